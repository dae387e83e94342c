//! stat-virt: owners, modes and special files kept in an extended attribute of the host inode.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libc::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFMT, S_IFREG, S_ISGID, S_ISUID, S_IXGRP};
use rustix::fs::{FileType, OFlags, XattrFlags};
use rustix::io::Errno;

use super::table::Node;
use super::{Caller, Result};
use crate::sys::{self, Stat};
use crate::wire::abi::Attr;

/// Name of the attribute that holds an [`Override`].
pub const KEY: &str = "user.msb.override_stat";
const KEY_C: &CStr = c"user.msb.override_stat";
/// Every attribute below this name is ours, and hidden from the guest.
pub(crate) const PREFIX: &[u8] = b"user.msb.";
/// What shows at start that overrides can be stored.
const PROBE: &str = "user.msb._probe";
/// Owner of what does not belong to the server's user.
const NOBODY: (u32, u32) = (65534, 65534);

/// How far the guest's view of ownership and modes is kept apart from the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatVirt {
    /// All of it is; the host must store extended attributes.
    Strict,
    /// As strict, but symbolic links are real and hosts without extended attributes are tolerated.
    Relaxed,
    /// None of it: the guest sees and sets what the host has.
    Off,
}

/// Who owns what in the guest's eyes.
#[derive(Debug, Clone, Copy)]
pub struct Ownership {
    /// The mode of virtualisation.
    pub mode: StatVirt,
    /// Permission bits are copied to the host inode as well.
    pub mirror: bool,
    /// Owner shown for files of the server's own user.
    pub default_owner: (u32, u32),
    /// Owner shown for all files that have no override.
    pub owner: Option<(u32, u32)>,
}

/// The stored part of a file's attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Override {
    /// Owner in the guest.
    pub uid: u32,
    /// Group in the guest.
    pub gid: u32,
    /// Type and permission bits in the guest.
    pub mode: u32,
    /// Device number of a device node, as the guest kernel encodes it.
    pub rdev: u32,
}

impl Override {
    /// The 20 bytes of version 1: version, three zero bytes, then four little-endian words.
    pub fn to_bytes(self) -> [u8; 20] {
        let mut bytes = [0; 20];
        bytes[0] = 1;
        let words = [self.uid, self.gid, self.mode, self.rdev];
        for (place, word) in bytes[4..].chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Reads the bytes back; `None` when they are not version 1.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (1, 20) = (*bytes.first()?, bytes.len()) else {
            return None;
        };
        let word = |at: usize| {
            let bytes = bytes.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        Some(Self {
            uid: word(4)?,
            gid: word(8)?,
            mode: word(12)?,
            rdev: word(16)?,
        })
    }
}

/// Translates between the host's attributes and the guest's.
pub(crate) struct Overlay {
    rules: Ownership,
    server: u32,
    changes: Mutex<()>,
    /// The kernel reads attributes by name only from an open file.
    by_descriptor: AtomicBool,
}

impl Overlay {
    pub(crate) fn new(rules: Ownership) -> Self {
        Self {
            rules,
            server: rustix::process::geteuid().as_raw(),
            changes: Mutex::new(()),
            by_descriptor: AtomicBool::new(false),
        }
    }

    pub(crate) fn mode(&self) -> StatVirt {
        self.rules.mode
    }

    pub(crate) fn is_off(&self) -> bool {
        self.rules.mode == StatVirt::Off
    }

    /// Whether files get their owners on the host: root serves its host's files as they are.
    pub(crate) fn gives_away(&self) -> bool {
        self.is_off() && self.server == 0
    }

    pub(crate) fn owns(&self, stat: &Stat) -> bool {
        stat.st_uid == self.server
    }

    /// Keeps two requests from changing the attributes of one file at the same time.
    pub(crate) fn lock(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows that overrides can be kept at the root of the mount.
    pub(crate) fn probe(&self, root: BorrowedFd<'_>, readonly: bool) -> Result<()> {
        if self.rules.mode != StatVirt::Strict {
            return Ok(());
        }
        if readonly {
            return match sys::getxattr(root, PROBE, &mut [0; 8]) {
                Ok(_) | Err(Errno::NODATA | Errno::RANGE) => Ok(()),
                Err(error) => Err(error),
            };
        }
        sys::setxattr(root, PROBE, b"1", XattrFlags::empty())?;
        sys::removexattr(root, PROBE)
    }

    /// Whether inodes of type `kind` may have an override.
    pub(crate) fn is_stored(&self, kind: FileType) -> bool {
        !self.is_off() && matches!(kind, FileType::RegularFile | FileType::Directory)
    }

    /// The override of a host inode of type `kind`, if there is one.
    pub(crate) fn read(&self, fd: BorrowedFd<'_>, kind: FileType) -> Result<Option<Override>> {
        if !self.is_stored(kind) {
            return Ok(None);
        }
        let mut bytes = [0; 20];
        let result = sys::getxattr(fd, KEY, &mut bytes);
        self.decode(result, &bytes, kind)
    }

    /// The override of `name` in `dir`, without opening it where the kernel knows how. What bears
    /// the name by then may be something else than the caller has seen before.
    pub(crate) fn read_in(
        &self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        kind: FileType,
    ) -> Result<Option<Override>> {
        if !self.is_stored(kind) {
            return Ok(None);
        }
        let mut bytes = [0; 20];
        if !self.by_descriptor.load(Ordering::Relaxed) {
            match sys::getxattr_in(dir, name, KEY_C, &mut bytes) {
                Err(Errno::NOSYS) => self.by_descriptor.store(true, Ordering::Relaxed),
                result => return self.decode(result, &bytes, kind),
            }
        }
        // A pipe that has taken the place of a file is not opened for reading: it has no override.
        let file = sys::open_in(dir, name, OFlags::PATH, 0)?;
        if sys::stat(&file)?.kind() != kind {
            return Err(Errno::AGAIN);
        }
        let result = sys::getxattr(std::os::fd::AsFd::as_fd(&file), KEY, &mut bytes);
        self.decode(result, &bytes, kind)
    }

    fn decode(
        &self,
        result: Result<usize>,
        bytes: &[u8],
        kind: FileType,
    ) -> Result<Option<Override>> {
        let len = match result {
            Ok(len) => len,
            // A file that the server may not read shows as its host attributes say.
            Err(Errno::NODATA | Errno::ACCESS | Errno::PERM) => return Ok(None),
            Err(Errno::OPNOTSUPP) if self.rules.mode == StatVirt::Relaxed => return Ok(None),
            Err(Errno::NOENT) => return Err(Errno::NOENT),
            Err(_) => return Err(Errno::IO),
        };
        let found = bytes.get(..len).and_then(Override::from_bytes);
        let found = found.ok_or(Errno::IO)?;
        // Directories are directories in both worlds, or the tree would not be one.
        let directory = found.mode & S_IFMT == S_IFDIR;
        if directory == (kind == FileType::Directory) && found.mode & S_IFMT != 0 {
            Ok(Some(found))
        } else {
            Err(Errno::IO)
        }
    }

    /// What the guest sees of an inode without override.
    fn identity(&self, stat: &Stat) -> Override {
        let (uid, gid) = match self.rules {
            Ownership {
                mode: StatVirt::Off,
                ..
            } => (stat.st_uid, stat.st_gid),
            Ownership {
                owner: Some(owner), ..
            } => owner,
            Ownership { default_owner, .. } if self.owns(stat) => default_owner,
            _ => NOBODY,
        };
        Override {
            uid,
            gid,
            mode: stat.st_mode,
            rdev: encode_device(stat.st_rdev),
        }
    }

    /// The virtual part of the attributes of a node.
    pub(crate) fn view(&self, node: &Node, stat: &Stat) -> Result<Override> {
        if !self.is_stored(node.kind) {
            return Ok(self.identity(stat));
        }
        if let Some(known) = node.facts(|facts| facts.view(stat)) {
            return Ok(known.unwrap_or_else(|| self.identity(stat)));
        }
        let found = self.read(node.fd(), node.kind)?;
        node.facts(|facts| facts.remember(stat, found));
        Ok(found.unwrap_or_else(|| self.identity(stat)))
    }

    /// The attributes of a node as the guest sees them.
    pub(crate) fn attr(&self, node: &Node, stat: &Stat) -> Result<Attr> {
        node.notice(stat);
        Ok(merge(stat, self.view(node, stat)?))
    }

    /// The attributes of an inode that has no override.
    pub(crate) fn plain_attr(&self, stat: &Stat) -> Attr {
        merge(stat, self.identity(stat))
    }

    /// The attributes of an inode with this override, if any.
    pub(crate) fn merged(&self, stat: &Stat, found: Option<Override>) -> Attr {
        merge(stat, found.unwrap_or_else(|| self.identity(stat)))
    }

    /// Stores `new` for the inode behind `fd`, whose host attributes are `stat`.
    pub(crate) fn write(&self, fd: BorrowedFd<'_>, stat: &Stat, new: Override) -> Result<()> {
        if self.rules.mirror {
            self.mirror(fd, new.mode)?;
        }
        let bytes = new.to_bytes();
        match sys::setxattr(fd, KEY, &bytes, XattrFlags::empty()) {
            // The kernel asks for write permission on the inode, even of the owner.
            Err(Errno::ACCESS | Errno::PERM) if self.owns(stat) => {}
            result => return result,
        }
        let now = sys::stat(fd)?.st_mode & 0o7777;
        sys::chmod(fd, now | 0o600)?;
        let result = sys::setxattr(fd, KEY, &bytes, XattrFlags::empty());
        // An override that cannot be read would be lost: the owner's read permission stays.
        sys::chmod(fd, now | 0o400)?;
        result
    }

    /// Gives the host inode the permission bits of `mode`, never the special ones.
    fn mirror(&self, fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
        let floor = match mode & S_IFMT {
            S_IFREG => 0o600,
            S_IFDIR => 0o700,
            _ => return Ok(()),
        };
        sys::chmod(fd, (mode & 0o777) | floor)
    }

    /// Gives a new file its attributes, and says what was stored of them. `mode` has the type bits.
    pub(crate) fn initialise(
        &self,
        fd: BorrowedFd<'_>,
        (owner, mode, rdev): (Caller, u32, u32),
    ) -> Result<Option<Override>> {
        if self.is_off() {
            return Ok(None);
        }
        let new = Override {
            uid: owner.uid,
            gid: owner.gid,
            mode,
            rdev,
        };
        if self.rules.mirror {
            self.mirror(fd, mode)?;
        }
        match sys::setxattr(fd, KEY, &new.to_bytes(), XattrFlags::empty()) {
            // A list of the host may have taken the owner's permission to write.
            Err(Errno::ACCESS | Errno::PERM) => self.write(fd, &sys::stat(fd)?, new)?,
            result => result?,
        }
        Ok(Some(new))
    }

    /// Carries out a `change` of content that leaves setuid and setgid as they are: its caller in
    /// the guest has the privilege for that, which the server, in a user namespace, has not. Only
    /// where the guest's bits are the host's; elsewhere the host had better take away its own.
    pub(crate) fn keeping_special<T>(
        &self,
        node: &Node,
        change: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if !self.is_off() || !node.was_special() {
            return change();
        }
        let _guard = self.lock();
        let before = sys::stat(node.fd())?.st_mode;
        let result = change()?;
        if sys::stat(node.fd())?.st_mode != before {
            sys::chmod(node.fd(), before & 0o7777)?;
        }
        Ok(result)
    }

    /// Clears setuid and setgid, as a write or a change of owner by somebody without privilege
    /// does.
    pub(crate) fn drop_special(&self, node: &Node) -> Result<()> {
        let _guard = self.lock();
        let stat = sys::stat(node.fd())?;
        for name in ["security.capability", "user.msb.security.capability"] {
            match sys::removexattr(node.fd(), name) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS) => {}
                Err(error) => return Err(error),
            }
        }
        let found = self.read(node.fd(), node.kind)?;
        if let Some(mut found) = found {
            let cleared = without_special(found.mode);
            if cleared != found.mode {
                found.mode = cleared;
                self.write(node.fd(), &stat, found)?;
            }
        }
        let host = without_special(stat.st_mode);
        if host != stat.st_mode {
            sys::chmod(node.fd(), host & 0o7777)?;
        }
        Ok(())
    }
}

/// `mode` after its file has got new content or a new owner.
pub(crate) fn without_special(mode: u32) -> u32 {
    if mode & S_IFMT == S_IFDIR {
        return mode;
    }
    // Setgid without the group's execute bit once meant mandatory locking, not privilege.
    if mode & S_IXGRP != 0 {
        mode & !(S_ISUID | S_ISGID)
    } else {
        mode & !S_ISUID
    }
}

/// The host's attributes with the virtual ones put over them.
pub(crate) fn merge(stat: &Stat, view: Override) -> Attr {
    let device = matches!(view.mode & S_IFMT, S_IFCHR | S_IFBLK);
    Attr {
        ino: stat.st_ino,
        size: stat.st_size,
        blocks: stat.st_blocks,
        atime: stat.st_atime.cast_unsigned(),
        mtime: stat.st_mtime.cast_unsigned(),
        ctime: stat.st_ctime.cast_unsigned(),
        atimensec: stat.st_atime_nsec,
        mtimensec: stat.st_mtime_nsec,
        ctimensec: stat.st_ctime_nsec,
        mode: view.mode,
        nlink: stat.st_nlink,
        uid: view.uid,
        gid: view.gid,
        rdev: if device { view.rdev } else { 0 },
        blksize: stat.st_blksize,
        flags: 0,
    }
}

/// A device number in the 32-bit form of the Linux kernel's new_encode_dev.
fn encode_device(device: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn override_bytes_are_those_of_the_format() {
        let value = Override {
            uid: 1000,
            gid: 0x0102_0304,
            mode: 0o100_644,
            rdev: 0,
        };
        let bytes = value.to_bytes();
        assert_eq!(
            bytes,
            [
                1, 0, 0, 0, 0xe8, 3, 0, 0, 4, 3, 2, 1, 0xa4, 0x81, 0, 0, 0, 0, 0, 0
            ]
        );
        assert_eq!(Override::from_bytes(&bytes), Some(value));
        let mut padded = bytes;
        padded[2] = 9;
        assert_eq!(Override::from_bytes(&padded), Some(value));
        padded[0] = 2;
        assert_eq!(Override::from_bytes(&padded), None);
        assert_eq!(Override::from_bytes(&bytes[..19]), None);
        assert_eq!(Override::from_bytes(&[]), None);
    }

    #[test]
    fn privilege_bits_go_and_mandatory_locking_stays() {
        assert_eq!(without_special(0o106_755), 0o100_755);
        assert_eq!(without_special(0o106_745), 0o102_745);
        assert_eq!(without_special(0o042_755), 0o042_755);
    }
}
