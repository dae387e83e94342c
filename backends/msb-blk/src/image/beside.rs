//! Opens other files an image names, if that is allowed at all.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

/// What an image may refer to.
#[derive(Debug)]
pub struct References {
    /// The folder the image lies in.
    pub folder: OwnedFd,
    /// Whether any plain name in that folder may be opened (`--allow-references`).
    pub allowed: bool,
}

/// Whether `name` is a single path component that no format takes for an address: the only kind of
/// reference that is ever followed.
pub fn is_plain_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name != b"."
        && name != b".."
        && name.len() <= 255
        && !name.iter().any(|&b| b == b'/' || b == 0 || b == b':')
}

/// Opens the regular file `name` in `folder`: no path, no symbolic link, nothing that blocks.
///
/// # Errors
///
/// `InvalidInput` for a name that is not plain or a file that is not regular, or what openat2(2)
/// reports.
pub(super) fn open_beside(folder: BorrowedFd<'_>, name: &[u8], write: bool) -> io::Result<OwnedFd> {
    if !is_plain_name(name) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "only a plain file name beside the image can be referred to",
        ));
    }
    let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
    let file = rustix::fs::openat2(
        folder,
        name,
        access | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(file.as_fd())?.st_mode);
    if kind != FileType::RegularFile {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    Ok(file)
}
