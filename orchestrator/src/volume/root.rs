//! File operations inside a volume that cannot be led out of it, also while a guest changes it.
//!
//! Every path is resolved by the kernel below one descriptor (`openat2`, `RESOLVE_BENEATH`), in the
//! same step that opens it. Nothing is checked first and used later. An absolute symbolic link that
//! names the host's place of the volume is rewritten to a path below the descriptor first.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, MicrosandboxResult};
use crate::rundir::tree;

/// How often a path is looked up again that the guest changed meanwhile.
const ATTEMPTS: usize = 64;

const FILE_MODE: Mode = Mode::from_raw_mode(0o644);
const DIR_MODE: Mode = Mode::from_raw_mode(0o755);

/// How many symbolic links are followed on the way, as by the kernel.
const LINKS: usize = 40;

/// The pinned root directory of a volume.
#[derive(Debug)]
pub(super) struct Root {
    fd: OwnedFd,
    /// Where the host sees it: what an absolute link inside may begin with.
    places: Vec<PathBuf>,
}

/// The last name of a path, and the directory that it lies in.
struct Entry {
    parent: OwnedFd,
    name: OsString,
}

impl Root {
    pub(super) fn open(folder: &Path) -> MicrosandboxResult<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::open(folder, flags, Mode::empty()) {
            Ok(fd) => {
                let now = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
                let places = std::iter::once(folder.to_owned()).chain(now.ok());
                Ok(Self {
                    places: places.collect(),
                    fd,
                })
            }
            Err(Errno::NOENT) => {
                let message = format!("there is no volume at `{}`", folder.display());
                Err(Error::new(ErrorKind::VolumeNotFound, message))
            }
            Err(errno) => Err(Error::io(
                format!("cannot open `{}`", folder.display()),
                errno,
            )),
        }
    }

    /// A regular file, for reading.
    pub(super) fn read(&self, path: &str) -> MicrosandboxResult<File> {
        let found = self
            .resolve(path, OFlags::PATH)
            .map_err(|errno| failed("open", path, errno))?;
        reopen(found.as_fd(), OFlags::RDONLY).map_err(|errno| failed("open", path, errno))
    }

    /// A regular file, for writing from its beginning; made, with its parents, when it is missing.
    pub(super) fn write(&self, path: &str) -> MicrosandboxResult<File> {
        let cannot = |errno| failed("write", path, errno);
        if let Some((parent, _)) = relative(path).trim_end_matches('/').rsplit_once('/') {
            self.mkdir(parent)?;
        }
        // Without O_NONBLOCK a FIFO would wait for a reader.
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = self.resolve_with(path, flags, FILE_MODE).map_err(cannot)?;
        regular(file.as_fd()).map_err(cannot)?;
        rustix::fs::ftruncate(&file, 0).map_err(cannot)?;
        Ok(File::from(file))
    }

    /// The names in a directory with what they are.
    pub(super) fn list(&self, path: &str) -> MicrosandboxResult<Vec<(OsString, Stat)>> {
        let cannot = |errno| failed("list", path, errno);
        let dir = self
            .resolve(path, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(cannot)?;
        let mut entries = Vec::new();
        for entry in Dir::read_from(&dir).map_err(cannot)? {
            let entry = entry.map_err(cannot)?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            // One that disappears meanwhile is not there.
            if let Ok(stat) = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                entries.push((OsString::from_vec(name.to_bytes().to_vec()), stat));
            }
        }
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(entries)
    }

    /// Makes a directory and its parents; one that is there is left as it is.
    pub(super) fn mkdir(&self, path: &str) -> MicrosandboxResult<()> {
        let cannot = |errno| failed("make", path, errno);
        let mut way = String::new();
        for part in relative(path)
            .split('/')
            .filter(|part| !matches!(*part, "" | "."))
        {
            let parent = if way.is_empty() {
                ".".to_owned()
            } else {
                way.clone()
            };
            way.push_str(part);
            match self.resolve(&way, OFlags::PATH | OFlags::DIRECTORY) {
                Ok(_) => {}
                Err(Errno::NOENT) => {
                    let parent = self
                        .resolve(&parent, OFlags::PATH | OFlags::DIRECTORY)
                        .map_err(cannot)?;
                    match rustix::fs::mkdirat(&parent, part, DIR_MODE) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(cannot(errno)),
                    }
                }
                Err(errno) => return Err(cannot(errno)),
            }
            way.push('/');
        }
        Ok(())
    }

    /// Removes a file, a symbolic link or an empty directory.
    pub(super) fn remove(&self, path: &str) -> MicrosandboxResult<()> {
        let cannot = |errno| failed("remove", path, errno);
        let Entry { parent, name } = self.entry("remove", path)?;
        match rustix::fs::unlinkat(&parent, &name, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => {
                rustix::fs::unlinkat(&parent, &name, AtFlags::REMOVEDIR).map_err(cannot)
            }
            done => done.map_err(cannot),
        }
    }

    /// Removes a directory with everything in it.
    pub(super) fn remove_dir(&self, path: &str) -> MicrosandboxResult<()> {
        let cannot = |errno| failed("remove", path, errno);
        let Entry { parent, name } = self.entry("remove", path)?;
        let stat = rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(cannot)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(cannot(Errno::NOTDIR));
        }
        let name = std::ffi::CString::new(name.as_bytes()).map_err(|_| cannot(Errno::INVAL))?;
        tree::remove(parent.as_fd(), &name).map_err(cannot)
    }

    /// Renames within the volume; what has the new name is replaced, as by `rename(2)`.
    pub(super) fn rename(&self, from: &str, to: &str) -> MicrosandboxResult<()> {
        let old = self.entry("rename", from)?;
        let new = self.entry("rename", to)?;
        rustix::fs::renameat(&old.parent, &old.name, &new.parent, &new.name)
            .map_err(|errno| failed("rename", from, errno))
    }

    /// What a path is, at the end of all symbolic links.
    pub(super) fn stat(&self, path: &str) -> MicrosandboxResult<Stat> {
        let cannot = |errno| failed("look at", path, errno);
        let found = self.resolve(path, OFlags::PATH).map_err(cannot)?;
        rustix::fs::fstat(&found).map_err(cannot)
    }

    /// Whether there is something at a path, at the end of all symbolic links.
    pub(super) fn exists(&self, path: &str) -> MicrosandboxResult<bool> {
        match self.resolve(path, OFlags::PATH) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
            Err(errno) => Err(failed("look at", path, errno)),
        }
    }

    fn entry(&self, verb: &str, path: &str) -> MicrosandboxResult<Entry> {
        let clean = relative(path).trim_end_matches('/');
        let (parent, name) = clean.rsplit_once('/').unwrap_or((".", clean));
        if matches!(name, "." | "..") {
            let message = format!("cannot {verb} `{path}`: the root of a volume stays where it is");
            return Err(Error::new(ErrorKind::InvalidConfig, message).with_value(path));
        }
        let parent = self
            .resolve(parent, OFlags::PATH | OFlags::DIRECTORY)
            .map_err(|errno| failed(verb, path, errno))?;
        Ok(Entry {
            parent,
            name: OsStr::new(name).to_owned(),
        })
    }

    fn resolve(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        self.resolve_with(path, flags, Mode::empty())
    }

    fn resolve_with(&self, path: &str, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        let mut path = relative(path).to_owned();
        for _ in 0..=LINKS {
            match self.beneath(&path, flags, mode) {
                // To the kernel every absolute link leads out.
                Err(Errno::XDEV) => path = self.relinked(&path).ok_or(Errno::XDEV)?,
                done => return done,
            }
        }
        Err(Errno::LOOP)
    }

    /// The path with its first symbolic link replaced by what that stands for, if it stands for
    /// something in this volume. Nothing is opened by what is found here: the kernel resolves the
    /// new path as it did the old one, whatever has changed meanwhile.
    fn relinked(&self, path: &str) -> Option<String> {
        let parts: Vec<&str> = path
            .split('/')
            .filter(|part| !matches!(*part, "" | "."))
            .collect();
        for (number, part) in parts.iter().enumerate() {
            let way = parts.get(..number)?.join("/");
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            let found = self.beneath(relative(&format!("{way}/{part}")), flags, Mode::empty());
            let found = found.ok()?;
            let stat = rustix::fs::fstat(&found).ok()?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
                continue;
            }
            let target = rustix::fs::readlinkat(&found, "", Vec::new()).ok()?;
            let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
            let inside = if target.is_absolute() {
                let mut inside = self.places.iter();
                inside
                    .find_map(|place| target.strip_prefix(place).ok())?
                    .to_owned()
            } else {
                Path::new(&way).join(target)
            };
            let rest = parts.get(number + 1..)?.join("/");
            let whole = format!("{}/{rest}", inside.to_str()?);
            return Some(relative(&whole).to_owned());
        }
        None
    }

    fn beneath(&self, path: &str, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC;
        for _ in 0..ATTEMPTS {
            match rustix::fs::openat2(&self.fd, path, flags, mode, resolve) {
                // The kernel could not rule out an escape, because of a rename meanwhile.
                Err(Errno::AGAIN) => {}
                done => return done,
            }
        }
        Err(Errno::AGAIN)
    }
}

/// The path from the root of the volume, which a leading `/` stands for.
fn relative(path: &str) -> &str {
    match path.trim_start_matches('/') {
        "" => ".",
        rest => rest,
    }
}

fn regular(file: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let stat = rustix::fs::fstat(file)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(Errno::ISDIR),
        _ => Err(Errno::INVAL),
    }
}

/// Opens what a path descriptor stands for, once it is known that opening has no other effect.
fn reopen(found: BorrowedFd<'_>, flags: OFlags) -> rustix::io::Result<File> {
    regular(found)?;
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
}

fn failed(verb: &str, path: &str, errno: Errno) -> Error {
    match errno {
        Errno::XDEV => Error::new(
            ErrorKind::PathEscape,
            format!("cannot {verb} `{path}`: it leads out of the volume"),
        ),
        Errno::INVAL => Error::new(
            ErrorKind::InvalidConfig,
            format!("cannot {verb} `{path}`: it is neither a regular file nor a directory"),
        ),
        errno => Error::io(
            format!("cannot {verb} `{path}` in the volume"),
            io::Error::from(errno),
        ),
    }
    .with_value(path)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    struct Scratch {
        dir: tempfile::TempDir,
        root: Root,
    }

    fn scratch() -> Scratch {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("vol")).unwrap();
        fs::create_dir(dir.path().join("vol-secret")).unwrap();
        fs::write(dir.path().join("vol-secret/canary"), "canary").unwrap();
        let root = Root::open(&dir.path().join("vol")).unwrap();
        Scratch { dir, root }
    }

    fn text(root: &Root, path: &str) -> MicrosandboxResult<String> {
        let mut text = String::new();
        root.read(path)?.read_to_string(&mut text).unwrap();
        Ok(text)
    }

    fn write(root: &Root, path: &str, text: &str) -> MicrosandboxResult<()> {
        root.write(path)?.write_all(text.as_bytes()).unwrap();
        Ok(())
    }

    #[test]
    fn files_are_written_with_their_parents_and_read_back() {
        let Scratch { dir, root } = &scratch();
        write(root, "a/b/file", "long text").unwrap();
        write(root, "/a/b/file", "text").unwrap();
        for path in ["a/b/file", "/a/b/file", "//a/./b/../b/file"] {
            assert_eq!(text(root, path).unwrap(), "text", "{path}");
        }
        assert_eq!(fs::read(dir.path().join("vol/a/b/file")).unwrap(), b"text");
        root.rename("a/b/file", "/a/moved").unwrap();
        assert!(!root.exists("a/b/file").unwrap());
        assert_eq!(root.stat("a/moved").unwrap().st_size, 4);
        let names: Vec<_> = root
            .list("a")
            .unwrap()
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, ["b", "moved"]);
        root.remove("a/moved").unwrap();
        root.remove("a/b").unwrap();
        root.mkdir("a/x/y/z").unwrap();
        root.mkdir("a/x/y/z").unwrap();
        root.remove_dir("a").unwrap();
        assert!(root.list("/").unwrap().is_empty());
    }

    #[test]
    fn nothing_leads_out_of_the_volume() {
        let Scratch { dir, root } = &scratch();
        let outside = dir.path().join("vol-secret");
        let inside = dir.path().join("vol");
        symlink(&outside, inside.join("absolute")).unwrap();
        symlink("../vol-secret", inside.join("upwards")).unwrap();
        symlink("/proc/self/root", inside.join("magic")).unwrap();
        symlink("absolute", inside.join("chain")).unwrap();
        for path in [
            "../vol-secret/canary",
            "/../vol-secret/canary",
            "a/../../vol-secret/canary",
            "absolute/canary",
            "upwards/canary",
            "magic/etc/passwd",
            "chain/canary",
        ] {
            fs::create_dir_all(inside.join("a")).unwrap();
            let kinds = [
                text(root, path).unwrap_err().kind(),
                write(root, path, "x").unwrap_err().kind(),
                root.stat(path).unwrap_err().kind(),
                root.exists(path).unwrap_err().kind(),
                root.mkdir(&format!("{path}/new")).unwrap_err().kind(),
                root.remove(path).unwrap_err().kind(),
                root.remove_dir(path).unwrap_err().kind(),
                root.rename(path, "here").unwrap_err().kind(),
                root.rename("a", path).unwrap_err().kind(),
            ];
            assert_eq!(kinds, [ErrorKind::PathEscape; 9], "{path}");
        }
        assert_eq!(fs::read(outside.join("canary")).unwrap(), b"canary");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        // The links themselves can be removed.
        root.remove("absolute").unwrap();
    }

    #[test]
    fn links_inside_are_followed() {
        let Scratch { dir, root } = &scratch();
        write(root, "real/file", "text").unwrap();
        symlink("../real", dir.path().join("vol/real/back")).unwrap();
        symlink("real", dir.path().join("vol/link")).unwrap();
        assert_eq!(text(root, "link/back/file").unwrap(), "text");
        // Also by the path that the host has for the volume.
        let inside = dir.path().join("vol");
        symlink(inside.join("real"), inside.join("absolute")).unwrap();
        symlink("absolute", inside.join("to-absolute")).unwrap();
        symlink(&inside, inside.join("whole")).unwrap();
        for path in [
            "absolute/file",
            "to-absolute/back/file",
            "whole/whole/link/file",
        ] {
            assert_eq!(text(root, path).unwrap(), "text", "{path}");
        }
        write(root, "whole/absolute/new", "new").unwrap();
        assert_eq!(fs::read(inside.join("real/new")).unwrap(), b"new");
        symlink(inside.join("../vol-secret"), inside.join("back-out")).unwrap();
        assert_eq!(
            text(root, "back-out/canary").unwrap_err().kind(),
            ErrorKind::PathEscape
        );
        symlink(inside.join("round"), inside.join("round")).unwrap();
        assert_eq!(text(root, "round").unwrap_err().kind(), ErrorKind::Io);
        symlink("loop", dir.path().join("vol/loop")).unwrap();
        assert_eq!(text(root, "loop").unwrap_err().kind(), ErrorKind::Io);
    }

    #[test]
    fn the_root_stays_where_it_is() {
        let Scratch { root, .. } = &scratch();
        root.mkdir("a").unwrap();
        for path in ["", "/", ".", "..", "a/..", "a/.", "./"] {
            for done in [
                root.remove(path),
                root.remove_dir(path),
                root.rename(path, "b"),
            ] {
                assert_eq!(done.unwrap_err().kind(), ErrorKind::InvalidConfig, "{path}");
            }
        }
    }

    #[test]
    fn special_files_are_not_waited_for() {
        let Scratch { dir, root } = &scratch();
        let fifo = dir.path().join("vol/fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert_eq!(
            text(root, "fifo").unwrap_err().kind(),
            ErrorKind::InvalidConfig
        );
        assert!(write(root, "fifo", "x").is_err());
    }

    #[test]
    fn a_guest_that_swaps_a_directory_for_a_link_gains_nothing() {
        swapped_for(|_| "../vol-secret".into());
        // Links that are rewritten, of which one leads back.
        swapped_for(|inside| inside.join("../vol-secret"));
        swapped_for(|inside| inside.join("other"));
    }

    fn swapped_for(target: fn(&Path) -> PathBuf) {
        let Scratch { dir, root } = &scratch();
        let inside = dir.path().join("vol");
        for folder in ["real", "other"] {
            fs::create_dir(inside.join(folder)).unwrap();
            fs::write(inside.join(folder).join("canary"), "mine").unwrap();
        }
        symlink(target(&inside), inside.join("link")).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (here, there) = (inside.join("real"), inside.join("link"));
                let at = rustix::fs::CWD;
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                while !stop.load(Ordering::Relaxed) {
                    rustix::fs::renameat_with(at, &here, at, &there, flags).unwrap();
                }
            });
            for _ in 0..2_000 {
                if let Ok(text) = text(root, "real/canary") {
                    assert_eq!(text, "mine");
                }
                let _ = write(root, "real/new", "x");
                let _ = root.remove("real/new");
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(
            fs::read_dir(dir.path().join("vol-secret")).unwrap().count(),
            1
        );
    }
}
