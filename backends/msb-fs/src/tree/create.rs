//! Making, moving and removing the entries of directories.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FileType, OFlags, RenameFlags, Stat};
use rustix::io::Errno;

use super::handle::FileHandle;
use super::lookup::open_known;
use super::node::{Access, Node};
use super::{Caller, Result, StatVirt, Tree, entry_name};
use crate::sys;
use crate::wire::abi::{CreateIn, EntryOut, MknodIn, OpenOut, oflag};

const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFLNK: u32 = 0o120_000;
const S_ISGID: u32 = 0o2000;
/// Longest target of a symbolic link, without the final zero byte.
const TARGET_MAX: usize = 4095;

/// What a new inode is to look like in the guest.
#[derive(Clone, Copy)]
struct Shape {
    owner: Caller,
    /// With type bits.
    mode: u32,
    rdev: u32,
}

impl Tree {
    /// Creates a regular file and opens it, or opens the one that is there.
    pub fn create(
        &self,
        parent: u64,
        name: &CStr,
        args: &CreateIn,
        caller: Caller,
    ) -> Result<(EntryOut, OpenOut)> {
        let name = entry_name(name)?;
        let parent = self.directory(parent)?;
        let mode = S_IFREG | (args.mode & 0o7777);
        match self.make_file(&parent, name, self.shape(&parent, mode, 0, caller)?) {
            Ok((file, stat)) => {
                let (entry, node, spare) = self.enter(&stat, file)?;
                let handle = FileHandle {
                    node,
                    own: spare,
                    append: args.flags & oflag::APPEND != 0 && !self.rules.writeback,
                };
                let opened = self.opened(handle, &stat);
                if opened.is_err() {
                    self.nodes.forget(entry.nodeid, 1);
                }
                Ok((entry, opened?))
            }
            // Somebody else made it meanwhile: its attributes are not ours to set.
            Err(Errno::EXIST) if args.flags & oflag::EXCL == 0 => {
                let (node, attr) = self.resolve(&parent, name)?;
                let opened = self.open(node.id, args.flags, args.open_flags);
                if opened.is_err() {
                    self.nodes.forget(node.id, 1);
                }
                Ok((self.entry(node.id, attr), opened?))
            }
            Err(error) => Err(error),
        }
    }

    /// Creates a regular file that has no name yet and opens it.
    pub fn tmpfile(
        &self,
        parent: u64,
        args: &CreateIn,
        caller: Caller,
    ) -> Result<(EntryOut, OpenOut)> {
        let parent = self.directory(parent)?;
        let shape = self.shape(&parent, S_IFREG | (args.mode & 0o7777), 0, caller)?;
        let flags = OFlags::RDWR | OFlags::TMPFILE;
        let file = sys::open_in(&parent.file, c".", flags, self.host_mode(shape.mode))?;
        self.dress(&file, shape)?;
        let stat = rustix::fs::fstat(&file)?;
        let (entry, node, own) = self.enter(&stat, file)?;
        let handle = FileHandle {
            node,
            own,
            append: args.flags & oflag::APPEND != 0 && !self.rules.writeback,
        };
        let opened = self.opened(handle, &stat);
        if opened.is_err() {
            self.nodes.forget(entry.nodeid, 1);
        }
        Ok((entry, opened?))
    }

    /// Creates a directory.
    pub fn mkdir(&self, parent: u64, name: &CStr, mode: u32, caller: Caller) -> Result<EntryOut> {
        let name = entry_name(name)?;
        let parent = self.directory(parent)?;
        let mut shape = self.shape(&parent, S_IFDIR | (mode & 0o7777), 0, caller)?;
        if self.inherits_group(&parent)?.is_some() {
            shape.mode |= S_ISGID;
        }
        let host = if self.overlay.is_off() {
            (mode & 0o7777) | 0o700
        } else {
            0o700
        };
        rustix::fs::mkdirat(&parent.file, name, rustix::fs::Mode::from_raw_mode(host))?;
        let undo = |error| {
            rustix::fs::unlinkat(&parent.file, name, AtFlags::REMOVEDIR).ok();
            error
        };
        let stat = sys::stat_in(&parent.file, name)?;
        let (file, stat, _) = open_known(&parent.file, name, &stat, false).map_err(undo)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(Errno::STALE);
        }
        self.dress(&file, shape).map_err(undo)?;
        let stat = rustix::fs::fstat(&file)?;
        let (node, _) = self.nodes.insert(&stat, file, Access::Read);
        self.entry_of(&node, &stat)
    }

    /// Creates a file of any type but directory. Special files are ordinary ones on the host.
    pub fn mknod(
        &self,
        parent: u64,
        name: &CStr,
        args: &MknodIn,
        caller: Caller,
    ) -> Result<EntryOut> {
        let name = entry_name(name)?;
        let parent = self.directory(parent)?;
        let kind = match args.mode & S_IFMT {
            0 => S_IFREG,
            kind => kind,
        };
        match kind {
            S_IFREG => {}
            // FIFO, socket, character and block device.
            0o010_000 | 0o140_000 | 0o020_000 | 0o060_000 if self.overlay.is_off() => {
                return Err(Errno::OPNOTSUPP);
            }
            0o010_000 | 0o140_000 | 0o020_000 | 0o060_000 => {}
            _ => return Err(Errno::INVAL),
        }
        let shape = self.shape(&parent, kind | (args.mode & 0o7777), args.rdev, caller)?;
        let (file, stat) = self.make_file(&parent, name, shape)?;
        Ok(self.enter(&stat, file)?.0)
    }

    /// Creates a symbolic link: a file that holds the target in strict mode, a real one otherwise.
    pub fn symlink(
        &self,
        parent: u64,
        name: &CStr,
        target: &CStr,
        caller: Caller,
    ) -> Result<EntryOut> {
        let name = entry_name(name)?;
        let parent = self.directory(parent)?;
        match target.to_bytes().len() {
            0 => return Err(Errno::NOENT),
            len if len > TARGET_MAX => return Err(Errno::NAMETOOLONG),
            _ => {}
        }
        if self.overlay.mode() != StatVirt::Strict {
            rustix::fs::symlinkat(target, &parent.file, name)?;
            let (node, attr) = self.resolve(&parent, name)?;
            return Ok(self.entry(node.id, attr));
        }
        let shape = self.shape(&parent, S_IFLNK | 0o777, 0, caller)?;
        let (file, _) = self.make_file(&parent, name, shape)?;
        let written = rustix::io::pwrite(&file, target.to_bytes(), 0);
        if written != Ok(target.to_bytes().len()) {
            rustix::fs::unlinkat(&parent.file, name, AtFlags::empty()).ok();
            return Err(written.err().unwrap_or(Errno::NOSPC));
        }
        let stat = rustix::fs::fstat(&file)?;
        Ok(self.enter(&stat, file)?.0)
    }

    /// The target of a symbolic link.
    pub fn readlink(&self, id: u64) -> Result<Vec<u8>> {
        let node = self.node(id)?;
        match node.kind {
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&node.file, c"", Vec::new())?;
                Ok(target.into_bytes())
            }
            FileType::RegularFile => {
                // Only what the guest made a link may be read as one.
                let found = self.overlay.read(node.fd(), node.kind)?;
                if found.is_none_or(|found| found.mode & S_IFMT != S_IFLNK) {
                    return Err(Errno::INVAL);
                }
                let mut target = vec![0; TARGET_MAX];
                let len = rustix::io::pread(&node.file, &mut target[..], 0)?;
                target.truncate(len);
                Ok(target)
            }
            _ => Err(Errno::INVAL),
        }
    }

    /// Gives the inode of a node one more name.
    pub fn link(&self, id: u64, parent: u64, name: &CStr) -> Result<EntryOut> {
        let name = entry_name(name)?;
        let (node, parent) = (self.node(id)?, self.directory(parent)?);
        if node.kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        let from = sys::fd_path(node.fd());
        rustix::fs::linkat(CWD, from, &parent.file, name, AtFlags::SYMLINK_FOLLOW)?;
        let (node, attr) = self.resolve(&parent, name)?;
        Ok(self.entry(node.id, attr))
    }

    /// Removes a name; `directory` says of what.
    pub fn unlink(&self, parent: u64, name: &CStr, directory: bool) -> Result<()> {
        let name = entry_name(name)?;
        let parent = self.directory(parent)?;
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        rustix::fs::unlinkat(&parent.file, name, flags)
    }

    /// Moves a name, with the flags of renameat2(2).
    pub fn rename(
        &self,
        (from, old): (u64, &CStr),
        (to, new): (u64, &CStr),
        flags: u32,
    ) -> Result<()> {
        let (old, new) = (entry_name(old)?, entry_name(new)?);
        let (from, to) = (self.directory(from)?, self.directory(to)?);
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE;
        // A whiteout would be a real device node on the host.
        let flags = RenameFlags::from_bits(flags).filter(|flags| known.contains(*flags));
        let flags = flags.ok_or(Errno::INVAL)?;
        rustix::fs::renameat_with(&from.file, old, &to.file, new, flags)
    }

    /// The group that new entries of `parent` get, when it hands its own down.
    fn inherits_group(&self, parent: &Node) -> Result<Option<u32>> {
        let stat = rustix::fs::fstat(&parent.file)?;
        let view = self.overlay.view(parent, &stat)?;
        Ok((view.mode & S_ISGID != 0).then_some(view.gid))
    }

    fn shape(&self, parent: &Node, mode: u32, rdev: u32, owner: Caller) -> Result<Shape> {
        let gid = if self.overlay.is_off() {
            None
        } else {
            self.inherits_group(parent)?
        };
        Ok(Shape {
            owner: Caller {
                uid: owner.uid,
                gid: gid.unwrap_or(owner.gid),
            },
            mode,
            rdev,
        })
    }

    fn host_mode(&self, mode: u32) -> u32 {
        if self.overlay.is_off() {
            (mode & 0o7777) | 0o600
        } else {
            0o600
        }
    }

    /// Creates a regular host file that did not exist, and gives it its attributes.
    fn make_file(&self, parent: &Node, name: &CStr, shape: Shape) -> Result<(OwnedFd, Stat)> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let file = sys::open_in(&parent.file, name, flags, self.host_mode(shape.mode))?;
        if let Err(error) = self.dress(&file, shape) {
            rustix::fs::unlinkat(&parent.file, name, AtFlags::empty()).ok();
            return Err(error);
        }
        let stat = rustix::fs::fstat(&file)?;
        Ok((file, stat))
    }

    /// Gives a new inode its attributes.
    fn dress(&self, file: &OwnedFd, shape: Shape) -> Result<()> {
        let stat = rustix::fs::fstat(file)?;
        let Shape { owner, mode, rdev } = shape;
        self.overlay
            .initialise(file.as_fd(), &stat, (owner, mode, rdev))
    }

    /// Makes a node of a new file that is open for reading and writing. The descriptor comes back
    /// when the inode is known already.
    fn enter(&self, stat: &Stat, file: OwnedFd) -> Result<(EntryOut, Arc<Node>, Option<OwnedFd>)> {
        let (node, spare) = self.nodes.insert(stat, file, Access::ReadWrite);
        let entry = self.entry_of(&node, stat)?;
        Ok((entry, node, spare))
    }

    fn entry_of(&self, node: &Node, stat: &Stat) -> Result<EntryOut> {
        match self.overlay.attr(node, stat) {
            Ok(attr) => Ok(self.entry(node.id, attr)),
            Err(error) => {
                self.nodes.forget(node.id, 1);
                Err(error)
            }
        }
    }
}
