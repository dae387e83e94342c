//! One operation of a program, made up at random and carried out in either tree.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    self, Access, AtFlags, CWD, Dev, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags,
    SeekFrom, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::{self, Errno};

/// Open files of each side.
pub(super) const SLOTS: usize = 4;

/// Numbers that look random and follow from a seed.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `limit`.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    fn one_of<T: Copy>(&mut self, list: &[T]) -> T {
        list[usize::try_from(self.below(list.len() as u64)).unwrap_or(0)]
    }

    fn path(&mut self) -> String {
        self.one_of(NAMES).to_owned()
    }

    fn mode(&mut self, limits: Limits) -> u32 {
        let sticky = limits.owned_links && self.below(12) == 0;
        self.one_of(MODES) | if sticky { 0o1000 } else { 0 }
    }

    fn slot(&mut self) -> usize {
        usize::try_from(self.below(SLOTS as u64)).unwrap_or(0)
    }
}

/// What is not the same in all modes, or cannot be compared.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Devices can be made.
    pub(super) devices: bool,
    /// Everything holds attributes below `trusted.`.
    pub(super) trusted: bool,
    /// Symbolic links have owners, and directories the sticky bit that asks for them.
    pub(super) owned_links: bool,
    /// Space is reserved; holes are looked for otherwise, for where space is reserved and not
    /// written the answer depends on what happens to be in memory.
    pub(super) reserves: bool,
}

#[derive(Debug, Clone)]
pub(super) enum Operation {
    Mkdir(String, u32),
    Mknod(String, FileType, u32),
    Symlink(String, String),
    Link(String, String),
    Rename(String, String, RenameFlags),
    Unlink(String),
    Rmdir(String),
    Open(usize, String, OFlags, u32),
    Tmpfile(usize, String, u32),
    Name(usize, String),
    Close(usize),
    Read(usize, u64, usize),
    Write(usize, u64, usize, u8),
    Append(usize, usize, u8),
    Ftruncate(usize, u64),
    Truncate(String, u64),
    Fallocate(usize, FallocateFlags, u64, u64),
    Copy(usize, usize, u64, u64, usize),
    Seek(usize, SeekFrom),
    Chmod(String, u32),
    Fchmod(usize, u32),
    Chown(String, Option<u32>, Option<u32>),
    Utimens(String, Timestamps),
    SetXattr(String, &'static str, usize, XattrFlags),
    GetXattr(String, &'static str),
    ListXattr(String),
    RemoveXattr(String, &'static str),
    List(String),
    Readlink(String),
    Access(String, Access),
    Fsync(usize),
}

const NAMES: &[&str] = &[
    "a",
    "b",
    "c",
    "dir",
    "dir/a",
    "dir/b",
    "dir/sub",
    "dir/sub/a",
    "b/c",
];
const LENGTHS: &[usize] = &[0, 1, 100, 4095, 4096, 4097, 10_000, 40_000];
const PLACES: &[u64] = &[0, 1, 4096, 5000, 8192, 20_000, 65_536];
/// Setgid goes with the group's execute bit: without, a write by somebody outside of the group drops
/// it on the host, and the protocol says that it stays.
/// None is empty: a directory that permits nothing is where an overlay works, and is not like others.
const MODES: &[u32] = &[
    0o644, 0o600, 0o755, 0o777, 0o666, 0o4755, 0o2755, 0o6777, 0o4644, 0o001,
];
const USERS: &[u32] = &[0, 1000, 1001];

impl Operation {
    /// Makes one up.
    pub(super) fn random(random: &mut Random, limits: Limits) -> Self {
        match random.below(40) {
            choice @ 0..=9 => Self::of_names(random, limits, choice),
            choice @ 10..=29 => Self::of_files(random, limits, choice),
            choice => Self::of_attributes(random, limits, choice),
        }
    }

    /// One that makes, moves or removes a name.
    fn of_names(random: &mut Random, limits: Limits, choice: u64) -> Self {
        match choice {
            0 | 1 => Self::Mkdir(random.path(), random.mode(limits)),
            2 => {
                let kinds = [FileType::Fifo, FileType::Socket, FileType::RegularFile];
                let kind = match random.below(4) {
                    0 if limits.devices => FileType::CharacterDevice,
                    _ => random.one_of(&kinds),
                };
                Self::Mknod(random.path(), kind, random.mode(limits))
            }
            3 => {
                let target = random.one_of(&["a", "b", "dir", "sub/a", "no", "c"]);
                Self::Symlink(target.to_owned(), random.path())
            }
            4 => Self::Link(random.path(), random.path()),
            5..=7 => {
                let flags = random.one_of(&[
                    RenameFlags::empty(),
                    RenameFlags::empty(),
                    RenameFlags::NOREPLACE,
                    RenameFlags::EXCHANGE,
                ]);
                Self::Rename(random.path(), random.path(), flags)
            }
            8 => Self::Unlink(random.path()),
            _ => Self::Rmdir(random.path()),
        }
    }

    /// One that has to do with an open file.
    fn of_files(random: &mut Random, limits: Limits, choice: u64) -> Self {
        let slot = random.slot();
        let length = random.one_of(LENGTHS);
        let byte = u8::try_from(random.below(255)).unwrap_or(0) + 1;
        let place = random.one_of(PLACES);
        match choice {
            10..=15 => {
                let mut flags = random.one_of(&[OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR]);
                let more = [
                    (2, OFlags::CREATE),
                    (6, OFlags::EXCL),
                    (4, OFlags::TRUNC),
                    (5, OFlags::APPEND),
                    (8, OFlags::NOFOLLOW),
                    (16, OFlags::DIRECTORY),
                ];
                for (odds, flag) in more {
                    if random.below(odds) == 0 {
                        flags |= flag;
                    }
                }
                // Creating a directory by open(2) is refused by the system call itself.
                if flags.contains(OFlags::DIRECTORY) {
                    flags -= OFlags::CREATE;
                }
                if !flags.contains(OFlags::CREATE) {
                    flags -= OFlags::EXCL;
                }
                Self::Open(slot, random.path(), flags, random.mode(limits))
            }
            16 => Self::Tmpfile(slot, random.path(), random.mode(limits)),
            17 => Self::Name(slot, random.path()),
            18 => Self::Close(slot),
            19 | 20 => Self::Read(slot, place, length),
            21..=23 => Self::Write(slot, place, length, byte),
            24 => Self::Append(slot, length, byte),
            25 => Self::Ftruncate(slot, place),
            26 => Self::Truncate(random.path(), place),
            27 => {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let zero = FallocateFlags::ZERO_RANGE;
                let keep = FallocateFlags::KEEP_SIZE;
                let flags = if limits.reserves {
                    random.one_of(&[FallocateFlags::empty(), hole, zero, zero | keep, keep])
                } else {
                    hole
                };
                Self::Fallocate(slot, flags, place, length as u64)
            }
            28 => Self::Copy(slot, random.slot(), random.one_of(PLACES), place, length),
            29 if limits.reserves => Self::Fsync(slot),
            _ => Self::Seek(
                slot,
                if random.below(2) == 0 {
                    SeekFrom::Data(place)
                } else {
                    SeekFrom::Hole(place)
                },
            ),
        }
    }

    /// One that sees or changes what is said of a file.
    fn of_attributes(random: &mut Random, limits: Limits, choice: u64) -> Self {
        match choice {
            30 | 31 => Self::Chmod(random.path(), random.mode(limits)),
            32 => Self::Fchmod(random.slot(), random.mode(limits)),
            33 => {
                let uid = (random.below(2) == 0).then(|| random.one_of(USERS));
                let gid = (uid.is_none() || random.below(2) == 0).then(|| random.one_of(USERS));
                Self::Chown(random.path(), uid, gid)
            }
            34 => {
                let time = |random: &mut Random| Timespec {
                    tv_sec: 1_000_000 + i64::try_from(random.below(1000)).unwrap_or(0),
                    tv_nsec: match random.below(4) {
                        0 => UTIME_NOW,
                        1 => UTIME_OMIT,
                        _ => i64::try_from(random.below(1_000_000_000)).unwrap_or(0),
                    },
                };
                let times = Timestamps {
                    last_access: time(random),
                    last_modification: time(random),
                };
                Self::Utimens(random.path(), times)
            }
            35 => {
                let flags =
                    random.one_of(&[XattrFlags::empty(), XattrFlags::CREATE, XattrFlags::REPLACE]);
                let length = random.one_of(&[0, 1, 20, 300]);
                Self::SetXattr(random.path(), attribute(random, limits), length, flags)
            }
            36 => match random.below(3) {
                0 => Self::GetXattr(random.path(), attribute(random, limits)),
                1 => Self::ListXattr(random.path()),
                _ => Self::RemoveXattr(random.path(), attribute(random, limits)),
            },
            37 => Self::List(random.path()),
            38 => Self::Readlink(random.path()),
            _ => {
                let mask = [Access::READ_OK, Access::WRITE_OK, Access::EXEC_OK];
                Self::Access(random.path(), random.one_of(&mask))
            }
        }
    }
}

fn attribute(random: &mut Random, limits: Limits) -> &'static str {
    match random.below(3) {
        0 => "user.one",
        1 => "user.two",
        _ if limits.trusted => "trusted.three",
        _ => "user.three",
    }
}

/// One of the two trees, and what is open in it.
pub(super) struct Side {
    pub(super) root: PathBuf,
    files: [Option<OwnedFd>; SLOTS],
}

impl Side {
    pub(super) fn new(root: PathBuf) -> Self {
        Self {
            root,
            files: [const { None }; SLOTS],
        }
    }

    /// Closes everything.
    pub(super) fn close(&mut self) {
        self.files = [const { None }; SLOTS];
    }

    fn file(&self, slot: usize) -> io::Result<BorrowedFd<'_>> {
        self.files[slot]
            .as_ref()
            .map(AsFd::as_fd)
            .ok_or(Errno::BADF)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Carries the operation out; what comes of it says what the caller has learnt.
    pub(super) fn apply(&mut self, operation: &Operation) -> io::Result<String> {
        match operation {
            Operation::Mkdir(path, mode) => {
                done(fs::mkdir(self.at(path), Mode::from_raw_mode(*mode)))
            }
            Operation::Mknod(path, kind, mode) => {
                let device: Dev = fs::makedev(1, 3);
                done(fs::mknodat(
                    CWD,
                    self.at(path),
                    *kind,
                    Mode::from_raw_mode(*mode),
                    device,
                ))
            }
            Operation::Symlink(target, path) => done(fs::symlink(target.as_str(), self.at(path))),
            Operation::Link(from, to) => done(fs::link(self.at(from), self.at(to))),
            Operation::Rename(from, to, flags) => done(fs::renameat_with(
                CWD,
                self.at(from),
                CWD,
                self.at(to),
                *flags,
            )),
            Operation::Unlink(path) => done(fs::unlink(self.at(path))),
            Operation::Rmdir(path) => done(fs::rmdir(self.at(path))),
            _ => self.apply_to_file(operation),
        }
    }

    /// The operations on open files.
    fn apply_to_file(&mut self, operation: &Operation) -> io::Result<String> {
        match operation {
            Operation::Open(slot, path, flags, mode) => {
                // A pipe without a writer would wait.
                let flags = *flags | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
                let file = fs::open(self.at(path), flags, Mode::from_raw_mode(*mode))?;
                self.files[*slot] = Some(file);
                Ok(String::new())
            }
            Operation::Tmpfile(slot, path, mode) => {
                let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
                let file = fs::open(self.at(path), flags, Mode::from_raw_mode(*mode))?;
                self.files[*slot] = Some(file);
                Ok(String::new())
            }
            Operation::Name(slot, path) => {
                use std::os::fd::AsRawFd;
                let own = format!("/proc/self/fd/{}", self.file(*slot)?.as_raw_fd());
                done(fs::linkat(
                    CWD,
                    own,
                    CWD,
                    self.at(path),
                    AtFlags::SYMLINK_FOLLOW,
                ))
            }
            Operation::Close(slot) => {
                self.files[*slot] = None;
                Ok(String::new())
            }
            Operation::Read(slot, at, length) => {
                let mut bytes = vec![0; *length];
                let count = io::pread(self.file(*slot)?, &mut bytes, *at)?;
                Ok(format!("{count} {:x}", sum(&bytes[..count])))
            }
            Operation::Write(slot, at, length, byte) => {
                number(io::pwrite(self.file(*slot)?, &vec![*byte; *length], *at))
            }
            Operation::Append(slot, length, byte) => {
                number(io::write(self.file(*slot)?, &vec![*byte; *length]))
            }
            Operation::Ftruncate(slot, length) => done(fs::ftruncate(self.file(*slot)?, *length)),
            Operation::Truncate(path, length) => done(truncate(&self.at(path), *length)),
            Operation::Fallocate(slot, flags, at, length) => {
                done(fs::fallocate(self.file(*slot)?, *flags, *at, *length))
            }
            Operation::Copy(from, to, at_from, at_to, length) => {
                let (mut at_from, mut at_to) = (*at_from, *at_to);
                let (from, to) = (self.file(*from)?, self.file(*to)?);
                let (first, second) = (Some(&mut at_from), Some(&mut at_to));
                number(fs::copy_file_range(from, first, to, second, *length))
            }
            Operation::Seek(slot, to) => {
                let file = self.file(*slot)?;
                // In a directory these are places of the file system's own.
                if FileType::from_raw_mode(fs::fstat(file)?.st_mode) != FileType::RegularFile {
                    return Err(Errno::SPIPE);
                }
                fs::seek(file, *to).map(|place| place.to_string())
            }
            Operation::Fsync(slot) => done(fs::fsync(self.file(*slot)?)),
            _ => self.apply_to_attributes(operation),
        }
    }

    /// The operations on attributes, and those that only look.
    fn apply_to_attributes(&self, operation: &Operation) -> io::Result<String> {
        match operation {
            Operation::Chmod(path, mode) => {
                done(fs::chmod(self.at(path), Mode::from_raw_mode(*mode)))
            }
            Operation::Fchmod(slot, mode) => {
                done(fs::fchmod(self.file(*slot)?, Mode::from_raw_mode(*mode)))
            }
            Operation::Chown(path, uid, gid) => {
                let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                done(fs::chownat(CWD, self.at(path), uid, gid, flags))
            }
            Operation::Utimens(path, times) => {
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                done(fs::utimensat(CWD, self.at(path), times, flags))
            }
            Operation::SetXattr(path, name, length, flags) => done(fs::lsetxattr(
                self.at(path),
                *name,
                &vec![7; *length],
                *flags,
            )),
            Operation::GetXattr(path, name) => {
                number(fs::lgetxattr(self.at(path), *name, &mut [0_u8; 400]))
            }
            Operation::ListXattr(path) => attributes(&self.at(path)).map(|all| all.join(" ")),
            Operation::RemoveXattr(path, name) => done(fs::lremovexattr(self.at(path), *name)),
            Operation::List(path) => list(&self.at(path)).map(|all| all.join(" ")),
            Operation::Readlink(path) => {
                let target = fs::readlink(self.at(path), Vec::new())?;
                Ok(target.to_string_lossy().into_owned())
            }
            Operation::Access(path, mask) => {
                let flags = AtFlags::EACCESS;
                done(fs::accessat(CWD, self.at(path), *mask, flags))
            }
            _ => Err(Errno::NOSYS),
        }
    }
}

fn done(result: io::Result<()>) -> io::Result<String> {
    result.map(|()| String::new())
}

fn number(result: io::Result<usize>) -> io::Result<String> {
    result.map(|number| number.to_string())
}

/// truncate(2), which rustix has not: unlike open and ftruncate it says nothing of a handle.
fn truncate(path: &Path, length: u64) -> io::Result<()> {
    msb_testkit::sys::truncate(path, length)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// The attributes of a path, without those that the host's kernel has of its own.
pub(super) fn attributes(path: &Path) -> io::Result<Vec<String>> {
    let mut names = vec![0_u8; 4096];
    let count = fs::llistxattr(path, &mut names)?;
    let names = names[..count].split_inclusive(|byte| *byte == 0);
    let mut all: Vec<String> = names
        .filter_map(|name| CString::from_vec_with_nul(name.to_vec()).ok())
        .map(|name| name.to_string_lossy().into_owned())
        .filter(|name| name != "security.selinux")
        .collect();
    all.sort();
    Ok(all)
}

/// The names in a directory with their types.
pub(super) fn list(path: &Path) -> io::Result<Vec<String>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let file = fs::open(path, flags, Mode::empty())?;
    let mut all = fs::Dir::read_from(file)?
        .map(|entry| {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            Ok(format!("{name}:{:?}", entry.file_type()))
        })
        .collect::<io::Result<Vec<_>>>()?;
    all.sort();
    Ok(all)
}

/// A number that tells contents apart.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}
