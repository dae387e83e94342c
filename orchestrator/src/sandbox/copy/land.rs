//! Unpacks what a sandbox sends, which may be anything, at one place of the host and nowhere else.
//!
//! The place itself is the user's choice and may lead through symbolic links. Below it every path is
//! resolved by the kernel without following any (`openat2`), in the step that uses it.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use msb_protocol::COPY_TOP;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Timespec, Timestamps};
use rustix::io::Errno;

use crate::image::{TarEntry, TarKind, TarReader};
use crate::{Error, ErrorKind, MicrosandboxResult};

/// A folder that is being filled.
struct Folder {
    place: PathBuf,
    fd: OwnedFd,
    /// Folders made in it, and the modes they get at the end.
    modes: Vec<(Vec<u8>, u32)>,
}

/// Unpacks at `to`, or in it under `name` when it is a folder.
pub(super) fn land(to: &Path, name: Option<&str>, stream: impl Read) -> MicrosandboxResult<()> {
    let mut reader = TarReader::new(stream);
    let strange = || {
        let message = "the sandbox sent something that is no copy of a file or directory";
        Error::new(ErrorKind::Io, message)
    };
    let broken = |error| strange().with_source(error);
    let top = reader.next_entry().map_err(broken)?.ok_or_else(strange)?;
    if path_of(&top) != COPY_TOP.as_bytes() {
        return Err(strange());
    }
    let is_folder = matches!(top.kind, TarKind::Directory);
    let place = place(to, name, is_folder)?;
    let cannot = |error| {
        let message = format!("cannot write `{}`", place.display());
        Error::io(message, error).with_value(place.display().to_string())
    };
    match top.kind {
        TarKind::File => {
            file(&place, &top, &mut reader).map_err(cannot)?;
            return match reader.next_entry().map_err(broken)? {
                None => Ok(()),
                Some(_) => Err(strange()),
            };
        }
        TarKind::Directory => {}
        _ => return Err(strange()),
    }
    let mut folder = Folder::open(&place, top.mode).map_err(cannot)?;
    while let Some(entry) = reader.next_entry().map_err(broken)? {
        let path = path_of(&entry);
        let below = path
            .strip_prefix(COPY_TOP.as_bytes())
            .and_then(|path| path.strip_prefix(b"/"))
            .filter(|path| is_plain(path))
            .ok_or_else(strange)?
            .to_owned();
        folder.add(&below, &entry, &mut reader).map_err(|error| {
            let shown = format!("{}/{}", folder.place.display(), below.escape_ascii());
            Error::io(format!("cannot write `{shown}`"), error).with_value(shown)
        })?;
    }
    folder.finish().map_err(cannot)
}

/// The path of an entry, without the slash that ends the names of directories.
fn path_of(entry: &TarEntry) -> &[u8] {
    let path = entry.path.as_slice();
    path.strip_suffix(b"/").unwrap_or(path)
}

fn is_plain(path: &[u8]) -> bool {
    path.split(|byte| *byte == b'/')
        .all(|part| !matches!(part, b"" | b"." | b".."))
}

/// Where what is copied goes, as cp(1) has it.
fn place(to: &Path, name: Option<&str>, is_folder: bool) -> MicrosandboxResult<PathBuf> {
    let refuse = |what: &str| {
        let message = format!("`{}` {what}", to.display());
        Error::new(ErrorKind::InvalidConfig, message).with_value(to.display().to_string())
    };
    match (fs::metadata(to), name) {
        (Ok(found), Some(name)) if found.is_dir() => Ok(to.join(name)),
        (Ok(found), None) if found.is_dir() => Ok(to.to_owned()),
        (Ok(_), _) if is_folder => Err(refuse("is a file, but a directory is copied")),
        (Err(_), _) if !is_folder && to.as_os_str().as_bytes().ends_with(b"/") => {
            Err(refuse("is no directory"))
        }
        _ => Ok(to.to_owned()),
    }
}

/// The one file that is copied, whose place is the user's choice.
fn file(place: &Path, entry: &TarEntry, content: &mut impl Read) -> io::Result<()> {
    let existed = place.exists();
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .open(place)?;
    io::copy(content, &mut file)?;
    if !existed {
        file.set_permissions(Permissions::from_mode(entry.mode & 0o777))?;
    }
    touch(&file, entry)
}

fn touch(file: &File, entry: &TarEntry) -> io::Result<()> {
    let (seconds, nanoseconds) = entry.mtime;
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: i64::from(nanoseconds.min(999_999_999)),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(rustix::fs::futimens(file, &times)?)
}

impl Folder {
    fn open(place: &Path, mode: u32) -> io::Result<Self> {
        let made = match fs::create_dir(place) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(error),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            place: place.to_owned(),
            fd: rustix::fs::open(place, flags, Mode::empty())?,
            modes: Vec::from_iter(made.then_some((b".".to_vec(), mode & 0o777))),
        })
    }

    fn add(&mut self, path: &[u8], entry: &TarEntry, content: &mut impl Read) -> io::Result<()> {
        let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&b"."[..], path),
        };
        let parent = self.resolve(parent)?;
        match &entry.kind {
            TarKind::Directory => {
                match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
                    Ok(()) => self.modes.push((path.to_owned(), entry.mode & 0o777)),
                    // Only a directory will do, as what comes next finds out.
                    Err(Errno::EXIST) => drop(self.resolve(path)?),
                    Err(errno) => return Err(errno.into()),
                }
                Ok(())
            }
            TarKind::File => {
                replace(&parent, name)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mode = Mode::from_raw_mode(entry.mode & 0o777);
                let file = rustix::fs::openat(&parent, name, flags | OFlags::NOFOLLOW, mode)?;
                let mut file = File::from(file);
                io::copy(content, &mut file)?;
                touch(&file, entry)
            }
            TarKind::Symlink(target) => {
                replace(&parent, name)?;
                Ok(rustix::fs::symlinkat(target.as_slice(), &parent, name)?)
            }
            // The agent sends no others.
            _ => Err(io::Error::other("it is a special file")),
        }
    }

    fn resolve(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        Ok(rustix::fs::openat2(
            &self.fd,
            path,
            flags,
            Mode::empty(),
            resolve,
        )?)
    }

    /// Gives folders their modes, from the bottom up: one may be closed to its owner.
    fn finish(&self) -> io::Result<()> {
        for (path, mode) in self.modes.iter().rev() {
            let folder = self.resolve(path)?;
            rustix::fs::fchmod(folder.as_fd(), Mode::from_raw_mode(*mode))?;
        }
        Ok(())
    }
}

/// Removes what has a name already, unless it is a directory.
fn replace(parent: &OwnedFd, name: &[u8]) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tar::{Builder, EntryType, Header};

    use super::*;

    struct Scratch {
        dir: tempfile::TempDir,
    }

    impl Scratch {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("outside")).unwrap();
            fs::write(dir.path().join("outside/canary"), "canary").unwrap();
            Self { dir }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn intact(&self) {
            assert_eq!(fs::read_dir(self.path("outside")).unwrap().count(), 1);
            assert_eq!(fs::read(self.path("outside/canary")).unwrap(), b"canary");
        }
    }

    /// An archive of entries: type, path, link target or content. Paths are taken as they are.
    fn archive(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
        let mut archive = Builder::new(Vec::new());
        for (kind, path, text) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o6755);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            let content = if kind.is_file() { text.as_bytes() } else { b"" };
            if !kind.is_file() {
                header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
            }
            header.set_size(content.len() as u64);
            header.set_cksum();
            archive.append(&header, content).unwrap();
        }
        archive.into_inner().unwrap()
    }

    const DIR: EntryType = EntryType::Directory;
    const FILE: EntryType = EntryType::Regular;
    const LINK: EntryType = EntryType::Symlink;

    #[test]
    fn a_tree_lands_where_cp_puts_it_without_set_id_bits() {
        let scratch = Scratch::new();
        let tree = archive(&[
            (DIR, "top/", ""),
            (DIR, "top/a", ""),
            (FILE, "top/a/f", "x"),
            (LINK, "top/l", "a/f"),
        ]);
        let to = scratch.path("to");
        land(&to, Some("from"), tree.as_slice()).unwrap();
        land(&to, Some("from"), tree.as_slice()).unwrap();
        land(&to, None, tree.as_slice()).unwrap();
        for top in ["to", "to/from"] {
            let file = scratch.path(top).join("l");
            assert_eq!(fs::read(&file).unwrap(), b"x");
            assert_eq!(
                fs::metadata(&file).unwrap().permissions().mode() & 0o7777,
                0o755
            );
        }
        let file = archive(&[(FILE, "top", "x")]);
        land(&to, Some("f"), file.as_slice()).unwrap();
        land(&scratch.path("g"), Some("f"), file.as_slice()).unwrap();
        assert_eq!(
            fs::read(scratch.path("to/f")).unwrap(),
            fs::read(scratch.path("g")).unwrap()
        );
        assert!(land(&scratch.path("none/"), Some("f"), file.as_slice()).is_err());
        assert!(land(&scratch.path("g"), Some("f"), tree.as_slice()).is_err());
    }

    #[test]
    fn nothing_is_written_anywhere_else() {
        let scratch = Scratch::new();
        let outside = scratch.path("outside").display().to_string();
        let hostile: &[&[(EntryType, &str, &str)]] = &[
            &[(FILE, "../outside/x", "x")],
            &[(DIR, "top", ""), (FILE, "top/../outside/x", "x")],
            &[(DIR, "top", ""), (FILE, "top/../../outside/x", "x")],
            &[(DIR, "top", ""), (FILE, "/etc/x", "x")],
            &[(DIR, "top", ""), (FILE, "topx", "x")],
            &[(DIR, "top", ""), (FILE, "top//x", "x")],
            &[
                (DIR, "top", ""),
                (LINK, "top/l", "../outside"),
                (FILE, "top/l/x", "x"),
            ],
            &[
                (DIR, "top", ""),
                (LINK, "top/l", &outside),
                (FILE, "top/l/x", "x"),
            ],
            &[
                (DIR, "top", ""),
                (LINK, "top/l", &outside),
                (DIR, "top/l", ""),
            ],
            &[
                (DIR, "top", ""),
                (LINK, "top/l", &outside),
                (LINK, "top/l/x", "y"),
            ],
            &[
                (DIR, "top", ""),
                (EntryType::Link, "top/l", "../outside/canary"),
            ],
            &[(DIR, "top", ""), (EntryType::Fifo, "top/l", "")],
            &[(DIR, "top", ""), (EntryType::Char, "top/l", "")],
            &[(LINK, "top", &outside), (FILE, "top/x", "x")],
            &[(FILE, "top", "x"), (FILE, "top/x", "x")],
            &[],
        ];
        for (number, entries) in hostile.iter().enumerate() {
            let to = scratch.path(&format!("to{number}"));
            let landed = land(&to, Some("x"), archive(entries).as_slice());
            assert!(landed.is_err(), "{entries:?}");
            scratch.intact();
        }
        assert!(land(&scratch.path("to"), None, [0xff_u8; 4096].as_slice()).is_err());
    }

    #[test]
    fn a_link_that_is_there_already_is_replaced_and_not_followed() {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path("to")).unwrap();
        symlink(scratch.path("outside/canary"), scratch.path("to/f")).unwrap();
        symlink(scratch.path("outside"), scratch.path("to/d")).unwrap();
        let file = archive(&[(DIR, "top", ""), (FILE, "top/f", "x")]);
        land(&scratch.path("to"), None, file.as_slice()).unwrap();
        let below = archive(&[(DIR, "top", ""), (DIR, "top/d", ""), (FILE, "top/d/x", "x")]);
        assert!(land(&scratch.path("to"), None, below.as_slice()).is_err());
        scratch.intact();
    }
}
