//! Writes a root file system as plain host files whose owners, modes and types are overrides.
//!
//! Everything is reached through directory descriptors, one component at a time, and nothing in the
//! tree is a real symbolic link, so that no path of an archive leads out of it. The guest's
//! symbolic links are followed as the guest would follow them, within the root.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

/// The attribute that holds owner, mode, type and device number (spec stat-virt 2.2).
const OVERRIDE: &str = "user.msb.override_stat";

/// What `msb-fs` puts before the name of an attribute that the host does not let it set.
const VIRTUAL_XATTR: &[u8] = b"user.msb.x.";

/// Deepest path, after symbolic links; keeps the walk back down within the descriptor limit.
const DEPTH_MAX: usize = 256;

/// Most symbolic links on the way to one file, as in Linux.
const LINKS_MAX: usize = 40;

/// Most bytes of a symbolic link's target, as in Linux.
const TARGET_MAX: usize = 4095;

/// What keeps an entry from being written.
#[derive(Debug, thiserror::Error)]
pub(super) enum TreeError {
    #[error("its path holds `..`")]
    Parent,
    #[error("its path is longer or deeper than a path can be")]
    TooLong,
    #[error("too many symbolic links on its way")]
    Loop,
    #[error("it lies below a file")]
    NotDirectory,
    #[error("it is a link to something that does not exist")]
    NoTarget,
    #[error("its link target is empty or too long")]
    BadTarget,
    #[error("it would replace the root directory")]
    Root,
    #[error("the file system keeps no extended attributes of users")]
    NoXattrs,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for TreeError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// Names of the directories on the way to a file, without symbolic links.
pub(super) type Components = Vec<Vec<u8>>;

/// A directory of the tree.
#[derive(Clone)]
pub(super) struct Folder {
    fd: Rc<OwnedFd>,
    at: Components,
}

/// Owner, mode and times of a file.
pub(super) struct Metadata<'a> {
    /// File type and permission bits, as in `st_mode`.
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
    pub(super) mtime: (i64, u32),
    pub(super) xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

/// A root file system that is being written.
pub(super) struct Tree {
    root: Folder,
    /// The folder of the last entry; the next one mostly lies in it as well.
    last: Option<(Components, Folder)>,
}

impl Folder {
    /// The path of a name in this folder.
    pub(super) fn path_of(&self, name: &[u8]) -> Vec<u8> {
        let mut path = self.at.join(&b'/');
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        path
    }

    fn child(&self, name: &[u8], fd: OwnedFd) -> Result<Self, TreeError> {
        if self.at.len() >= DEPTH_MAX {
            return Err(TreeError::TooLong);
        }
        let mut at = self.at.clone();
        at.push(name.to_vec());
        Ok(Self {
            fd: Rc::new(fd),
            at,
        })
    }

    fn open_child(&self, name: &[u8]) -> Result<Self, TreeError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty())?;
        self.child(name, fd)
    }
}

impl Tree {
    /// Makes the root of a new tree at `path`.
    pub(super) fn create(path: &Path) -> Result<Self, TreeError> {
        rustix::fs::mkdir(path, Mode::RWXU)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        let tree = Self {
            root: Folder {
                fd: Rc::new(fd),
                at: Vec::new(),
            },
            last: None,
        };
        tree.record(tree.root.fd.as_fd(), &DIRECTORY)?;
        Ok(tree)
    }

    /// Splits a path of an archive; the result has neither `.` nor empty parts, and is empty for
    /// the root.
    pub(super) fn split(path: &[u8]) -> Result<Components, TreeError> {
        let mut parts = Components::new();
        for part in path.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(TreeError::Parent),
                _ if part.len() > 255 || part.contains(&0) => return Err(TreeError::TooLong),
                _ => parts.push(part.to_vec()),
            }
        }
        if parts.len() > DEPTH_MAX {
            Err(TreeError::TooLong)
        } else {
            Ok(parts)
        }
    }

    /// The folder at `path`; what is missing on the way is made when `make` says so.
    pub(super) fn folder(&mut self, path: &[Vec<u8>], make: bool) -> Result<Folder, TreeError> {
        if let Some((last, folder)) = &self.last
            && last == path
        {
            return Ok(folder.clone());
        }
        let mut folder = self.root.clone();
        let mut pending: VecDeque<Vec<u8>> = path.iter().cloned().collect();
        let mut links = 0;
        while let Some(part) = pending.pop_front() {
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    let mut at = folder.at;
                    at.pop();
                    folder = self.root.clone();
                    for name in &at {
                        folder = folder.open_child(name)?;
                    }
                    continue;
                }
                _ => {}
            }
            match folder.open_child(&part) {
                Ok(child) => folder = child,
                Err(TreeError::Io(error)) => {
                    match error.raw_os_error().map(Errno::from_raw_os_error) {
                        Some(Errno::NOENT) if make => folder = self.make_folder(&folder, &part)?.0,
                        Some(Errno::NOENT) => return Err(TreeError::NoTarget),
                        Some(Errno::NOTDIR) => {
                            links += 1;
                            let target = link_target(&folder, &part)?;
                            if links > LINKS_MAX {
                                return Err(TreeError::Loop);
                            }
                            if target.starts_with(b"/") {
                                folder = self.root.clone();
                            }
                            for part in target.split(|byte| *byte == b'/').rev() {
                                pending.push_front(part.to_vec());
                            }
                        }
                        _ => return Err(error.into()),
                    }
                }
                Err(error) => return Err(error),
            }
        }
        self.last = Some((path.to_vec(), folder.clone()));
        Ok(folder)
    }

    /// The root folder.
    pub(super) fn root(&self) -> Folder {
        self.root.clone()
    }

    /// Makes a folder, or finds the one that is there; whether it was made is the second part.
    pub(super) fn make_folder(
        &mut self,
        parent: &Folder,
        name: &[u8],
    ) -> Result<(Folder, bool), TreeError> {
        match rustix::fs::mkdirat(&parent.fd, name, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => match parent.open_child(name) {
                Ok(folder) => return Ok((folder, false)),
                Err(TreeError::Io(_)) => {
                    self.remove(parent, name)?;
                    rustix::fs::mkdirat(&parent.fd, name, Mode::RWXU)?;
                }
                Err(error) => return Err(error),
            },
            Err(errno) => return Err(errno.into()),
        }
        let folder = parent.open_child(name)?;
        self.record(folder.fd.as_fd(), &DIRECTORY)?;
        Ok((folder, true))
    }

    /// Writes what is known about a folder, except its times, which its files would change.
    pub(super) fn describe(&self, folder: &Folder, metadata: &Metadata) -> Result<(), TreeError> {
        self.record(folder.fd.as_fd(), metadata)
    }

    /// Sets the time of a folder by its path; it may have been replaced since.
    pub(super) fn touch(&mut self, path: &[Vec<u8>], mtime: (i64, u32)) -> Result<(), TreeError> {
        let folder = self.folder(path, false)?;
        Ok(rustix::fs::futimens(&folder.fd, &times(mtime))?)
    }

    /// Makes a file of any type but directory, in place of whatever has its name.
    pub(super) fn make_file(
        &mut self,
        parent: &Folder,
        name: &[u8],
        content: &mut dyn Read,
        metadata: &Metadata,
    ) -> Result<u64, TreeError> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let fd = match rustix::fs::openat(&parent.fd, name, flags, mode) {
            Err(Errno::EXIST) => {
                self.remove(parent, name)?;
                rustix::fs::openat(&parent.fd, name, flags, mode)?
            }
            other => other?,
        };
        let mut file = File::from(fd);
        let written = io::copy(content, &mut file)?;
        self.record(file.as_fd(), metadata)?;
        rustix::fs::futimens(&file, &times(metadata.mtime))?;
        Ok(written)
    }

    /// Makes a symbolic link: a regular file that holds the target.
    pub(super) fn make_symlink(
        &mut self,
        parent: &Folder,
        name: &[u8],
        target: &[u8],
        metadata: &Metadata,
    ) -> Result<(), TreeError> {
        if target.is_empty() || target.len() > TARGET_MAX || target.contains(&0) {
            return Err(TreeError::BadTarget);
        }
        self.make_file(parent, name, &mut &target[..], metadata)
            .map(drop)
    }

    /// Gives the file at `target` one more name.
    pub(super) fn make_link(
        &mut self,
        parent: &Folder,
        name: &[u8],
        target: &[Vec<u8>],
    ) -> Result<(), TreeError> {
        let (target_name, above) = target.split_last().ok_or(TreeError::Root)?;
        let from = self.folder(above, false)?;
        if from.path_of(target_name) == parent.path_of(name) {
            return Ok(());
        }
        let link = || {
            rustix::fs::linkat(
                &from.fd,
                target_name.as_slice(),
                &parent.fd,
                name,
                AtFlags::empty(),
            )
        };
        match link() {
            Err(Errno::EXIST) => {
                self.remove(parent, name)?;
                link()?;
            }
            Err(Errno::NOENT) => return Err(TreeError::NoTarget),
            other => other?,
        }
        Ok(())
    }

    /// Removes a file, or a directory with everything below it; nothing is no error.
    pub(super) fn remove(&mut self, parent: &Folder, name: &[u8]) -> Result<(), TreeError> {
        self.remove_except(parent, name, &|_| false).map(drop)
    }

    /// Removes everything in a folder except what `keep` says of its path.
    pub(super) fn clear(
        &mut self,
        folder: &Folder,
        keep: &dyn Fn(&[u8]) -> bool,
    ) -> Result<(), TreeError> {
        for name in names(folder)? {
            self.remove_except(folder, &name, keep)?;
        }
        Ok(())
    }

    /// Removes a name except what `keep` says of it and of what lies below it; says whether it is
    /// gone.
    pub(super) fn remove_except(
        &mut self,
        parent: &Folder,
        name: &[u8],
        keep: &dyn Fn(&[u8]) -> bool,
    ) -> Result<bool, TreeError> {
        self.last = None;
        let kept = keep(&parent.path_of(name));
        match parent.open_child(name) {
            Ok(folder) => {
                let mut empty = true;
                for inner in names(&folder)? {
                    empty &= self.remove_except(&folder, &inner, keep)?;
                }
                if empty && !kept {
                    rustix::fs::unlinkat(&parent.fd, name, AtFlags::REMOVEDIR)?;
                }
                Ok(empty && !kept)
            }
            Err(TreeError::Io(_)) if kept => Ok(false),
            Err(TreeError::Io(_)) => match rustix::fs::unlinkat(&parent.fd, name, AtFlags::empty())
            {
                Ok(()) | Err(Errno::NOENT) => Ok(true),
                Err(errno) => Err(errno.into()),
            },
            Err(error) => Err(error),
        }
    }

    /// Waits until the tree is on disk.
    pub(super) fn sync(&self) -> Result<(), TreeError> {
        Ok(rustix::fs::syncfs(&self.root.fd)?)
    }

    fn record(&self, fd: BorrowedFd, metadata: &Metadata) -> Result<(), TreeError> {
        let set = |name: &OsStr, value: &[u8]| {
            rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()).map_err(|errno| match errno
            {
                Errno::OPNOTSUPP => TreeError::NoXattrs,
                errno => errno.into(),
            })
        };
        for (name, value) in metadata.xattrs {
            if let Some(name) = stored_name(name) {
                set(OsStr::from_bytes(&name), value)?;
            }
        }
        set(OsStr::new(OVERRIDE), &override_bytes(metadata))
    }
}

/// What a directory that no archive describes gets.
const DIRECTORY: Metadata = Metadata {
    mode: 0o040_755,
    owner: (0, 0),
    device: (0, 0),
    mtime: (0, 0),
    xattrs: &[],
};

/// The 20 bytes of spec stat-virt 2.2.
fn override_bytes(metadata: &Metadata) -> [u8; 20] {
    let (major, minor) = metadata.device;
    // The kernel's own packing of a device number into 32 bits: as FUSE sends it.
    let device = (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xfff00) << 12);
    let mut bytes = [0; 20];
    let fields = [1, metadata.owner.0, metadata.owner.1, metadata.mode, device];
    for (place, field) in bytes.chunks_exact_mut(4).zip(fields) {
        place.copy_from_slice(&field.to_le_bytes());
    }
    bytes
}

/// Under which name an attribute of an archive is kept, if at all.
fn stored_name(name: &[u8]) -> Option<Vec<u8>> {
    // An archive must not plant what only the server writes.
    if name.starts_with(b"user.msb.") || name.contains(&0) || name.len() > 200 {
        return None;
    }
    if name.starts_with(b"user.") {
        return Some(name.to_vec());
    }
    if name == b"security.capability" || name.starts_with(b"trusted.") {
        return Some([VIRTUAL_XATTR, name].concat());
    }
    None
}

/// The target of a symbolic link of the guest.
fn link_target(folder: &Folder, name: &[u8]) -> Result<Vec<u8>, TreeError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(&folder.fd, name, flags, Mode::empty())?);
    let mut bytes = [0_u8; 20];
    let length = match rustix::fs::fgetxattr(&file, OVERRIDE, &mut bytes) {
        Ok(length) => length,
        Err(Errno::NODATA) => return Err(TreeError::NotDirectory),
        Err(errno) => return Err(errno.into()),
    };
    let mode = bytes
        .get(12..16)
        .and_then(|field| field.try_into().ok())
        .map(u32::from_le_bytes);
    match mode {
        Some(mode) if length == 20 && FileType::from_raw_mode(mode) == FileType::Symlink => {}
        _ => return Err(TreeError::NotDirectory),
    }
    let mut target = Vec::new();
    file.take(TARGET_MAX as u64).read_to_end(&mut target)?;
    Ok(target)
}

fn names(folder: &Folder) -> Result<Vec<Vec<u8>>, TreeError> {
    let mut names = Vec::new();
    for entry in Dir::read_from(&folder.fd)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

fn times((seconds, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanos.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_have_the_layout_of_the_spec() {
        let metadata = Metadata {
            mode: 0o020_620,
            owner: (1000, 5),
            device: (136, 0x1ff),
            mtime: (0, 0),
            xattrs: &[],
        };
        let bytes = override_bytes(&metadata);
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "01000000e80300000500000090210000ff881000");
    }

    #[test]
    fn archives_cannot_plant_overrides() {
        assert_eq!(stored_name(b"user.msb.override_stat"), None);
        assert_eq!(
            stored_name(b"user.mime").as_deref(),
            Some(&b"user.mime"[..])
        );
        assert_eq!(
            stored_name(b"security.capability").as_deref(),
            Some(&b"user.msb.x.security.capability"[..])
        );
        assert_eq!(stored_name(b"security.selinux"), None);
    }

    #[test]
    fn paths_lose_their_noise_and_cannot_climb() {
        let parts = |path: &[u8]| Tree::split(path).map(|parts| parts.join(&b'|'));
        assert_eq!(parts(b"./a//b/").unwrap(), b"a|b");
        assert_eq!(parts(b"/etc/passwd").unwrap(), b"etc|passwd");
        assert_eq!(parts(b"./").unwrap(), b"");
        assert!(matches!(parts(b"a/../b"), Err(TreeError::Parent)));
        assert!(matches!(parts(&[b'x'; 300]), Err(TreeError::TooLong)));
    }
}
