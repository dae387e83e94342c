//! Attributes: getting, setting and checking them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use libc::S_IFMT;
use rustix::fs::{
    AtFlags, FileType, StatVfs, StatxFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
};
use rustix::io::Errno;
use zerocopy::FromZeros;

use super::overlay::without_special;
use super::table::{Cold, Found, Node, key};
use super::{Caller, FILE_ID, Result, StatVirt, Tree};
use crate::quota::{BLOCK, Room, Tally};
use crate::sys;
use crate::wire::abi::{Attr, AttrOut, ROOT_ID, SetattrIn, StatxOut, Time, set};

impl Tree {
    /// The attributes of a node, or of the file behind a handle.
    pub fn getattr(&self, id: u64, fh: Option<u64>) -> Result<AttrOut> {
        if self.is_single() && id == ROOT_ID {
            return Ok(self.attr_out(self.single_root()?));
        }
        let opened = fh.filter(|fh| *fh != 0);
        if let Some(Ok(handle)) = opened.map(|fh| self.handles.file(fh, id)) {
            return self.attr_of(&handle.node);
        }
        if self.is_single() {
            return self.attr_of(&*self.node(id)?);
        }
        match self.nodes.get(id).ok_or(Errno::STALE)? {
            Found::Live(node) => self.attr_of(&node),
            Found::Cold(cold) => Ok(self.attr_out(self.attr_by_name(id, &cold)?)),
        }
    }

    /// The attributes of a node without descriptor, by way of its name.
    fn attr_by_name(&self, id: u64, cold: &Cold) -> Result<Attr> {
        let place = cold.facts.place.as_ref().ok_or(Errno::STALE)?;
        if let Some(parent) = self.nodes.kept_live(place.parent())
            && let Ok(stat) = sys::stat_in(&parent.file, place.name())
            && cold.is(&stat)
        {
            return self.cold_attr(id, cold, &stat);
        }
        // Its directory is cold as well, or somebody has just moved it.
        self.attr_of_live(&*self.node(id)?)
    }

    pub(crate) fn attr_of_live(&self, node: &Node) -> Result<Attr> {
        self.overlay.attr(node, &sys::fstat(&node.file)?)
    }

    pub(crate) fn attr_of(&self, node: &Node) -> Result<AttrOut> {
        Ok(self.attr_out(self.attr_of_live(node)?))
    }

    /// The same with the time of birth, where the host's file system knows it.
    pub fn statx(&self, id: u64, fh: Option<u64>) -> Result<StatxOut> {
        let AttrOut {
            attr_valid,
            attr_valid_nsec,
            attr,
            ..
        } = self.getattr(id, fh)?;
        let mut out = StatxOut {
            attr_valid,
            attr_valid_nsec,
            mask: StatxFlags::BASIC_STATS.bits(),
            blksize: attr.blksize,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            mode: u16::try_from(attr.mode).unwrap_or(0),
            ino: attr.ino,
            size: attr.size,
            blocks: attr.blocks,
            atime: time(attr.atime, attr.atimensec),
            ctime: time(attr.ctime, attr.ctimensec),
            mtime: time(attr.mtime, attr.mtimensec),
            rdev_major: (attr.rdev >> 8) & 0xfff,
            rdev_minor: (attr.rdev & 0xff) | ((attr.rdev >> 12) & 0xf_ff00),
            ..StatxOut::new_zeroed()
        };
        if self.is_single() && id == ROOT_ID {
            return Ok(out);
        }
        let node = self.node(id)?;
        let born = rustix::fs::statx(&node.file, c"", AtFlags::EMPTY_PATH, StatxFlags::BTIME)?;
        if StatxFlags::from_bits_retain(born.stx_mask).contains(StatxFlags::BTIME) {
            out.mask |= StatxFlags::BTIME.bits();
            out.btime = Time {
                seconds: born.stx_btime.tv_sec,
                nanoseconds: born.stx_btime.tv_nsec,
                reserved: 0,
            };
        }
        Ok(out)
    }

    fn attr_out(&self, attr: Attr) -> AttrOut {
        let timeout = self.timeout();
        AttrOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            dummy: 0,
            attr,
        }
    }

    /// The attributes of the directory that holds a single file and does not exist on the host.
    fn single_root(&self) -> Result<Attr> {
        let root = self.nodes.kept_live(ROOT_ID).ok_or(Errno::STALE)?;
        let stat = sys::stat(&root.file)?;
        let owner = self.rules.ownership.owner;
        let (uid, gid) = owner.unwrap_or(self.rules.ownership.default_owner);
        let attr = super::overlay::merge(
            &stat,
            super::Override {
                uid,
                gid,
                mode: 0o040_555,
                rdev: 0,
            },
        );
        Ok(Attr {
            ino: ROOT_ID,
            size: 0,
            blocks: 0,
            nlink: 2,
            ..attr
        })
    }

    /// Changes attributes and returns all of them.
    pub fn setattr(&self, id: u64, args: &SetattrIn) -> Result<AttrOut> {
        let handle = if args.valid & set::FH != 0 && args.fh != 0 {
            self.handles.file(args.fh, id).ok()
        } else {
            None
        };
        let node = match &handle {
            Some(handle) => Arc::clone(&handle.node),
            None => self.node(id)?,
        };
        let given = args.valid & (set::UID | set::GID) != 0;
        let copied = given && self.is_copied_up(&node);
        if given || args.valid & set::MODE != 0 {
            self.set_owner_and_mode(&node, args, copied)?;
        }
        if args.valid & set::SIZE != 0 {
            let fd = handle.as_ref().map(|handle| handle.fd());
            let kept = || self.truncate(&node, fd, args.size);
            self.overlay.keeping_special(&node, kept)?;
        }
        let changed = args.valid & set::SIZE != 0 || given && !copied;
        // With nothing to set, Linux asks for no more than that: `file_modified` of a change whose
        // request has no flag for it.
        let asked = args.valid & !(set::FH | set::LOCKOWNER) == 0;
        if asked || args.valid & set::KILL_SUIDGID != 0 && changed && args.valid & set::MODE == 0 {
            self.overlay.drop_special(&node)?;
        }
        if args.valid & (set::ATIME | set::MTIME) != 0 {
            set_times(&node, args)?;
        }
        self.attr_of(&node)
    }

    /// Whether an overlay in the guest is copying the file up. It gives its copy the mode first and
    /// then the owner, which of a local file system takes nothing away, but is the same request as
    /// that of chown(2), which does.
    fn is_copied_up(&self, node: &Node) -> bool {
        let Some(place) = node.facts(|facts| facts.place.clone()) else {
            return false;
        };
        let Ok(parent) = self.directory(place.parent()) else {
            return false;
        };
        // Where it was last seen: it may have been moved since.
        let there =
            || sys::stat_in(&parent.file, place.name()).is_ok_and(|at| key(&at) == node.key);
        self.is_workshop(&parent) == Ok(true) && there()
    }

    /// Whether a directory is one in which an overlay makes its files: those alone have no
    /// permissions at all.
    pub(super) fn is_workshop(&self, node: &Node) -> Result<bool> {
        let view = self.overlay.view(node, &sys::stat(&node.file)?)?;
        Ok(view.mode & 0o7777 == 0)
    }

    fn set_owner_and_mode(&self, node: &Node, args: &SetattrIn, copied: bool) -> Result<()> {
        let _guard = self.overlay.lock();
        let stat = sys::stat(&node.file)?;
        let mut view = self.overlay.view(node, &stat)?;
        let before = view;
        if args.valid & set::UID != 0 {
            view.uid = args.uid;
        }
        if args.valid & set::GID != 0 {
            view.gid = args.gid;
        }
        if args.valid & (set::UID | set::GID) != 0 && !copied {
            view.mode = without_special(view.mode);
        }
        if args.valid & set::MODE != 0 {
            view.mode = (view.mode & S_IFMT) | (args.mode & 0o7777);
        }
        let moved = (view.uid, view.gid) != (before.uid, before.gid);
        match (self.overlay.mode(), node.kind) {
            (StatVirt::Off, _) => {
                let uid = (args.valid & set::UID != 0).then_some(args.uid);
                let gid = (args.valid & set::GID != 0).then_some(args.gid);
                if uid.is_some() || gid.is_some() {
                    match sys::chown(node.fd(), uid, gid) {
                        // To whom it belongs already, of which only the time is missing.
                        Err(Errno::PERM) if !moved => {}
                        result => result?,
                    }
                }
                if args.valid & set::MODE == 0 {
                    return Ok(());
                }
                // Root reads and writes whatever the mode, anybody else locks himself out.
                let floor = match node.kind {
                    FileType::Symlink => return Err(Errno::OPNOTSUPP),
                    _ if self.overlay.gives_away() => 0,
                    FileType::RegularFile => 0o600,
                    FileType::Directory => 0o700,
                    _ => 0,
                };
                sys::chmod(node.fd(), (args.mode & 0o7777) | floor)
            }
            (_, FileType::RegularFile | FileType::Directory) => {
                match self.overlay.write(node.fd(), &stat, view) {
                    // The host keeps what it can without extended attributes.
                    Err(Errno::OPNOTSUPP) if self.overlay.mode() == StatVirt::Relaxed => {
                        if moved {
                            return Err(Errno::PERM);
                        }
                        let floor = match node.kind {
                            FileType::Directory => 0o700,
                            _ => 0o600,
                        };
                        return sys::chmod(node.fd(), (view.mode & 0o777) | floor);
                    }
                    result => result?,
                }
                if view == before {
                    // Some hosts take the same value for no change, which has no time.
                    sys::chmod(node.fd(), stat.st_mode & 0o7777).ok();
                }
                if args.valid & set::MODE != 0 {
                    self.list_follows(node.fd(), view.mode)?;
                }
                Ok(())
            }
            // A real link cannot hold an override, and its owner decides nothing that matters:
            // refusing would only make every unpacking of an archive fail.
            (_, FileType::Symlink) if args.valid & set::MODE == 0 => Ok(()),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    /// Cuts or extends a regular file, through `fd` where that can be written.
    fn truncate(&self, node: &Node, fd: Option<BorrowedFd<'_>>, size: u64) -> Result<()> {
        match node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        let cut = |fd: BorrowedFd<'_>| {
            let cut = |_: &mut Tally| rustix::fs::ftruncate(fd, size);
            self.within(&[fd], Room::Fixed(0, 0), cut)
        };
        if let Some(fd) = fd {
            match cut(fd) {
                // Not opened for writing.
                Err(Errno::INVAL | Errno::BADF) => {}
                result => return result,
            }
        }
        if node.writable {
            return cut(node.fd());
        }
        let file = self.reopen(node, rustix::fs::OFlags::RDWR)?;
        cut(file.as_fd())
    }

    /// Whether `caller` may do what `mask` asks for (R 4, W 2, X 1).
    pub fn access(&self, id: u64, mask: u32, caller: Caller) -> Result<()> {
        if self.rules.readonly && mask & 2 != 0 {
            return Err(Errno::ROFS);
        }
        let attr = self.getattr(id, None)?.attr;
        let granted = if caller.uid == 0 {
            let runs = attr.mode & 0o111 != 0 || attr.mode & S_IFMT == 0o040_000;
            if runs { 7 } else { 6 }
        } else if caller.uid == attr.uid {
            attr.mode >> 6
        } else if caller.gid == attr.gid {
            attr.mode >> 3
        } else {
            attr.mode
        };
        if mask & 7 & !granted == 0 {
            Ok(())
        } else {
            Err(Errno::ACCESS)
        }
    }

    /// The state of the host file system that a node lies on.
    pub fn statfs(&self, id: u64) -> Result<StatVfs> {
        // The root of a single-file mount is no node, but its directory tells as much.
        let id = if self.is_single() { FILE_ID } else { id };
        let found = rustix::fs::fstatvfs(&self.node(id)?.file)?;
        let Some(account) = &self.account else {
            return Ok(found);
        };
        // The budget, and no more than the host has left.
        let (limit, used) = account.state();
        let host = found.f_bavail.saturating_mul(found.f_frsize.max(1));
        let left = limit.bytes.saturating_sub(used.bytes).min(host) / BLOCK;
        let inodes = limit.inodes.saturating_sub(used.inodes);
        Ok(StatVfs {
            f_bsize: BLOCK,
            f_frsize: BLOCK,
            f_blocks: limit.bytes / BLOCK,
            f_bfree: left,
            f_bavail: left,
            f_files: limit.inodes,
            f_ffree: inodes,
            f_favail: inodes,
            ..found
        })
    }
}

fn time(seconds: u64, nanoseconds: u32) -> Time {
    Time {
        seconds: seconds.cast_signed(),
        nanoseconds,
        reserved: 0,
    }
}

/// Sets access and modification time.
fn set_times(node: &Node, args: &SetattrIn) -> Result<()> {
    let time = |wanted, now, seconds: u64, nanoseconds: u32| Timespec {
        tv_sec: seconds.cast_signed(),
        tv_nsec: match args.valid {
            valid if valid & now != 0 => UTIME_NOW,
            valid if valid & wanted != 0 => i64::from(nanoseconds),
            _ => UTIME_OMIT,
        },
    };
    let times = Timestamps {
        last_access: time(set::ATIME, set::ATIME_NOW, args.atime, args.atimensec),
        last_modification: time(set::MTIME, set::MTIME_NOW, args.mtime, args.mtimensec),
    };
    if node.readable {
        rustix::fs::futimens(&node.file, &times)
    } else {
        rustix::fs::utimensat(&node.file, c"", &times, AtFlags::EMPTY_PATH)
    }
}
