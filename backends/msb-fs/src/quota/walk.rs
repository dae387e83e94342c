//! The ground truth: what the files below a directory take.

use std::collections::HashSet;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Dir, FileType, OFlags};
use rustix::io::Errno;

use super::{Space, space_of};
use crate::sys;

/// Counts the space of everything below `root` and of its own entries, each inode once. What the
/// server may not look at is left out.
pub(super) fn count(root: impl AsFd) -> Result<Space, Errno> {
    let mut total = Space {
        bytes: space_of(&sys::stat(root.as_fd())?),
        inodes: 0,
    };
    let mut seen = HashSet::new();
    let open = |dir: &OwnedFd, name: &CString| {
        sys::open_in(dir, name, OFlags::RDONLY | OFlags::DIRECTORY, 0)
    };
    let first = sys::open_in(root, c".", OFlags::RDONLY | OFlags::DIRECTORY, 0)?;
    let mut stack = vec![(Dir::read_from(&first)?, first)];
    while let Some((list, dir)) = stack.last_mut() {
        let Some(entry) = list.read() else {
            stack.pop();
            continue;
        };
        let name = match entry {
            Ok(entry) => entry.file_name().to_owned(),
            // Removed meanwhile, most likely.
            Err(_) => {
                stack.pop();
                continue;
            }
        };
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let Ok(stat) = sys::stat_in(&*dir, &name) else {
            continue;
        };
        let directory = stat.kind() == FileType::Directory;
        if !directory && stat.st_nlink > 1 && !seen.insert((stat.st_dev, stat.st_ino)) {
            continue;
        }
        total.bytes = total.bytes.saturating_add(space_of(&stat));
        total.inodes += 1;
        if directory {
            match open(dir, &name) {
                Ok(below) => stack.push((Dir::read_from(&below)?, below)),
                Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM) => return Err(Errno::MFILE),
                Err(_) => {}
            }
        }
    }
    Ok(total)
}
