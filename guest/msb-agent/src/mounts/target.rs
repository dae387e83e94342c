//! Resolves guest paths to mount points and makes those that do not exist.
//!
//! Every path is walked inside the sandbox's root: a symlink of the image may lead anywhere in
//! there, but neither `..` nor a link of `/proc` leads out.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2};
use rustix::io::Errno;

/// What a mount point has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A directory.
    Directory,
    /// Anything but a directory.
    File,
}

/// A mount point that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TargetError {
    /// It exists and is of the wrong kind.
    #[error("the mount point is {0}")]
    WrongKind(&'static str),
    /// It does not exist and cannot be made.
    #[error("cannot make the mount point ({path})")]
    Make {
        /// The part of it that could not be made.
        path: String,
        /// Why.
        #[source]
        source: Errno,
    },
    /// It cannot be reached.
    #[error("cannot reach the mount point")]
    Reach(#[source] Errno),
}

/// Opens `path` inside `root` as a mount point.
pub(crate) fn open(root: BorrowedFd<'_>, path: &str, kind: Kind) -> Result<OwnedFd, TargetError> {
    let found = match resolve(root, path) {
        Err(Errno::NOENT) => make(root, path, kind)?,
        found => found.map_err(TargetError::Reach)?,
    };
    let stat = fstat(&found).map_err(TargetError::Reach)?;
    let is_directory = FileType::from_raw_mode(stat.st_mode).is_dir();
    match kind {
        Kind::Directory if !is_directory => Err(TargetError::WrongKind("not a directory")),
        Kind::File if is_directory => Err(TargetError::WrongKind("a directory")),
        Kind::Directory | Kind::File => Ok(found),
    }
}

/// Opens `path` inside `root` as a path only.
pub(crate) fn resolve(root: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    openat2(
        root,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        inside,
    )
}

fn make(root: BorrowedFd<'_>, path: &str, kind: Kind) -> Result<OwnedFd, TargetError> {
    let names: Vec<_> = path.split('/').filter(|name| !name.is_empty()).collect();
    let mut made = String::new();
    let mut parent = resolve(root, "/").map_err(TargetError::Reach)?;
    for (index, name) in names.iter().enumerate() {
        let is_last = index + 1 == names.len();
        made.push('/');
        made.push_str(name);
        let failed = |source| TargetError::Make {
            path: made.clone(),
            source,
        };
        parent = match resolve(root, &made) {
            Err(Errno::NOENT) => {
                make_one(&parent, name, if is_last { kind } else { Kind::Directory })
                    .map_err(failed)?;
                resolve(root, &made).map_err(failed)?
            }
            found => found.map_err(failed)?,
        };
    }
    Ok(parent)
}

fn make_one(parent: &OwnedFd, name: &str, kind: Kind) -> Result<(), Errno> {
    match kind {
        Kind::Directory => mkdirat(parent, name, Mode::from_raw_mode(0o755)),
        Kind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            openat(parent, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    #[test]
    fn missing_mount_points_are_made_inside_the_root_only() {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("root");
        fs::create_dir_all(root.join("var")).unwrap();
        fs::create_dir_all(root.join("run")).unwrap();
        symlink("/run", root.join("var/run")).unwrap();
        symlink("../../../../..", root.join("up")).unwrap();
        symlink("/nowhere/at/all", root.join("dangling")).unwrap();
        symlink("/proc/self/cwd", root.join("magic")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        let fd = fs::File::open(&root).unwrap();
        let open = |path, kind| open(fd.as_fd(), path, kind);

        open("/a/b/c", Kind::Directory).unwrap();
        assert!(root.join("a/b/c").is_dir());
        open("/a/f/g", Kind::File).unwrap();
        assert!(root.join("a/f/g").is_file());
        open("/var/run/x", Kind::Directory).unwrap();
        assert!(root.join("run/x").is_dir());
        open("/up/y", Kind::Directory).unwrap();
        assert!(root.join("y").is_dir() && !outer.path().join("y").exists());
        let dangling = open("/dangling/z", Kind::Directory);
        assert!(matches!(
            dangling,
            Err(TargetError::Make {
                source: Errno::EXIST,
                ..
            })
        ));
        assert!(open("/magic/z", Kind::Directory).is_err());
        let under_file = open("/file/z", Kind::Directory);
        assert!(matches!(under_file, Err(TargetError::Reach(Errno::NOTDIR))));
        assert!(matches!(
            open("/file", Kind::Directory),
            Err(TargetError::WrongKind(_))
        ));
        assert!(matches!(
            open("/a", Kind::File),
            Err(TargetError::WrongKind(_))
        ));
    }
}
