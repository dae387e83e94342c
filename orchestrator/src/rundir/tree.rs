//! Removes and measures trees that somebody else may have filled, however deep and odd.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::{Errno, Result};

/// Removes what `name` in `parent` is, with everything below it.
///
/// No symbolic link is followed and no mount point is crossed. Directories are moved up to the top
/// before they are emptied, so that any depth takes two descriptors and no recursion.
pub(crate) fn remove(parent: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        // POSIX says EPERM, Linux says EISDIR.
        Err(Errno::ISDIR | Errno::PERM) => {}
        done => return done,
    }
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        done => return done,
    }
    let top = open(parent, name)?;
    let mut waiting = Vec::new();
    empty(top.as_fd(), None, &mut waiting)?;
    while let Some(next) = waiting.pop() {
        let dir = open(top.as_fd(), &next)?;
        empty(dir.as_fd(), Some(top.as_fd()), &mut waiting)?;
        rustix::fs::unlinkat(top.as_fd(), &next, AtFlags::REMOVEDIR)?;
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// Removes what is at `path`, as [`remove`] does.
pub(crate) fn remove_path(path: &Path) -> io::Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let folder = fs::File::open(folder)?;
    let name = CString::new(name.as_bytes())?;
    remove(folder.as_fd(), &name).map_err(io::Error::from)
}

/// Removes what is in `dir`. Directories that are not empty go to `top`, or stay when `dir` is it,
/// and are added to `waiting`.
fn empty(
    dir: BorrowedFd<'_>,
    top: Option<BorrowedFd<'_>>,
    waiting: &mut Vec<CString>,
) -> Result<()> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let unlinked = unlink(dir, name, AtFlags::empty());
        if !matches!(unlinked, Err(Errno::ISDIR | Errno::PERM)) {
            unlinked?;
            continue;
        }
        match unlink(dir, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            done => {
                done?;
                continue;
            }
        }
        match top {
            None => waiting.push(name.to_owned()),
            Some(top) => waiting.push(move_up(dir, name, top)?),
        }
    }
    Ok(())
}

/// Unlinks, and once more after opening up a directory that its owner made read-only.
fn unlink(dir: BorrowedFd<'_>, name: &CStr, flags: AtFlags) -> Result<()> {
    match rustix::fs::unlinkat(dir, name, flags) {
        Err(Errno::ACCESS) => {
            rustix::fs::fchmod(dir, Mode::RWXU)?;
            rustix::fs::unlinkat(dir, name, flags)
        }
        done => done,
    }
}

fn move_up(dir: BorrowedFd<'_>, name: &CStr, top: BorrowedFd<'_>) -> Result<CString> {
    for number in 0_u32.. {
        let moved = CString::new(format!(".removed-{number}")).map_err(|_| Errno::INVAL)?;
        match rustix::fs::renameat_with(dir, name, top, &moved, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(moved),
            Err(Errno::EXIST) => {}
            Err(other) => return Err(other),
        }
    }
    Err(Errno::EXIST)
}

fn open(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
    let attempt = |flags| {
        let flags = flags | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve)
    };
    match attempt(OFlags::RDONLY) {
        Err(Errno::ACCESS) => {
            let closed = attempt(OFlags::PATH)?;
            let path = format!("/proc/self/fd/{}", closed.as_raw_fd());
            rustix::fs::chmod(path, Mode::RWXU)?;
            attempt(OFlags::RDONLY)
        }
        done => done,
    }
}

/// How much a tree is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Size {
    /// Bytes that its files hold, holes included.
    pub(crate) logical: u64,
    /// Bytes that it takes on the disk.
    pub(crate) allocated: u64,
}

/// Measures a tree: holes take nothing, files with several names count once.
///
/// What changes or disappears meanwhile is counted as it was seen.
pub(crate) fn measure(root: &Path) -> Size {
    let mut seen = HashSet::new();
    let mut size = Size::default();
    let mut waiting = vec![root.to_owned()];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Ok(found) = entry.metadata() else {
                continue;
            };
            if found.is_dir() {
                waiting.push(entry.path());
            } else if found.nlink() > 1 && !seen.insert((found.dev(), found.ino())) {
                continue;
            } else if found.is_file() {
                size.logical += found.len();
            }
            size.allocated += found.blocks() * 512;
        }
    }
    size
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn remove_in(dir: &Path, name: &str) -> Result<()> {
        let parent = fs::File::open(dir).unwrap();
        remove(parent.as_fd(), &CString::new(name).unwrap())
    }

    #[test]
    fn a_tree_goes_and_what_its_links_point_at_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        fs::create_dir(tree.join(".removed-0")).unwrap();
        fs::write(tree.join(".removed-0/x"), "").unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "").unwrap();
        symlink(&outside, tree.join("a/link")).unwrap();
        symlink("nowhere", tree.join("a/b/dangling")).unwrap();
        fs::write(tree.join("a/b/c/file"), "").unwrap();
        fs::set_permissions(tree.join("a/b"), fs::Permissions::from_mode(0o500)).unwrap();
        remove_in(dir.path(), "tree").unwrap();
        assert!(!tree.exists());
        assert!(outside.join("kept").exists());
        assert_eq!(remove_in(dir.path(), "tree"), Err(Errno::NOENT));
    }

    #[test]
    fn depth_does_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        // Deeper than a path can be long, and than a process has descriptors.
        let mut at: OwnedFd = fs::File::open(dir.path()).unwrap().into();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "deep", Mode::RWXU).unwrap();
            at = open(at.as_fd(), c"deep").unwrap();
        }
        remove_in(dir.path(), "deep").unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn holes_take_nothing_and_links_are_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::File::create(dir.path().join("sparse"))
            .unwrap()
            .set_len(1 << 30)
            .unwrap();
        assert!(measure(dir.path()).allocated < 1 << 20);
        assert_eq!(measure(dir.path()).logical, 1 << 30);
        fs::write(dir.path().join("full"), vec![1; 1 << 20]).unwrap();
        let one = measure(dir.path());
        assert!(one.allocated >= 1 << 20);
        fs::hard_link(dir.path().join("full"), dir.path().join("again")).unwrap();
        assert_eq!(measure(dir.path()), one);
    }
}
