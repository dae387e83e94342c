//! Making the entries of directories.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use libc::{
    S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK, S_ISGID, S_ISUID,
};
use rustix::fs::{AtFlags, FileType, OFlags};
use rustix::io::Errno;

use super::table::{Access, FileHandle, Node, Place};
use super::xattr::inherit_lists;
use super::{Caller, Override, Result, StatVirt, Tree, entry_name};
use crate::quota::{Account, BLOCK, Room};
use crate::sys::{self, Stat};
use crate::wire::abi::{CreateIn, EntryOut, MkdirIn, MknodIn, OpenOut, oflag};
use crate::wire::acl::Acl;

/// Longest target of a symbolic link, without the final zero byte.
const TARGET_MAX: usize = 4095;

/// What a new inode is to look like in the guest.
pub(super) struct Shape {
    pub(super) owner: Caller,
    /// With type bits.
    pub(super) mode: u32,
    pub(super) rdev: u32,
    /// The list that its directory hands down, as it is there and as it is for this inode.
    pub(super) lists: Option<(Acl, Acl)>,
}

/// A new file or directory.
pub(super) struct Made {
    file: OwnedFd,
    pub(super) stat: Stat,
    /// The override that it was given.
    stored: Option<Override>,
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
        let shape = self.shape(&parent, (mode, args.umask), 0, caller)?;
        match self.make_file(&parent, name, &shape, b"") {
            Ok(made) => {
                let stat = made.stat;
                let place = Some(Place::new(parent.id, name));
                let (entry, node, spare) = self.enter(made, Access::ReadWrite, place)?;
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
                let (id, attr) = self.resolve(&parent, name)?;
                let opened = self.open(id, args.flags, args.open_flags);
                if opened.is_err() {
                    self.nodes.forget(id, 1);
                }
                Ok((self.entry(id, attr), opened?))
            }
            Err(error) => Err(error),
        }
    }

    /// Creates a regular file that has no name yet and opens it. Not for an overlay of the guest,
    /// which makes do without: once it had linked such a file, its kernel would ask for it by the
    /// name it never had, and take it for stale.
    pub fn tmpfile(
        &self,
        parent: u64,
        args: &CreateIn,
        caller: Caller,
    ) -> Result<(EntryOut, OpenOut)> {
        let parent = self.directory(parent)?;
        if self.is_workshop(&parent)? {
            return Err(Errno::OPNOTSUPP);
        }
        let mode = S_IFREG | (args.mode & 0o7777);
        let shape = self.shape(&parent, (mode, args.umask), 0, caller)?;
        let flags = OFlags::RDWR | OFlags::TMPFILE;
        let mode = self.host_mode(shape.mode);
        // Its space is charged when the node is made, for it has no name.
        let one = Room::Fixed(1, 1);
        let made = self.within(&[], one, |_| {
            let file = self.with_room(|| sys::open_in(&parent.file, c".", flags, mode))?;
            let stored = self.dress(file.as_fd(), &shape)?;
            let stat = sys::stat(&file)?;
            Ok(Made { file, stat, stored })
        })?;
        let stat = made.stat;
        let (entry, node, own) = self.enter(made, Access::ReadWrite, None)?;
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
    pub fn mkdir(
        &self,
        parent: u64,
        name: &CStr,
        args: MkdirIn,
        caller: Caller,
    ) -> Result<EntryOut> {
        let name = entry_name(name)?;
        let parent = self.directory(parent)?;
        let mode = S_IFDIR | (args.mode & 0o7777);
        let shape = self.shape(&parent, (mode, args.umask), 0, caller)?;
        let host = self.host_mode(shape.mode);
        let (file, stored) = self.within(&[parent.fd()], Room::Fixed(BLOCK, 1), |tally| {
            rustix::fs::mkdirat(&parent.file, name, rustix::fs::Mode::from_raw_mode(host))?;
            let undo = |error| {
                rustix::fs::unlinkat(&parent.file, name, AtFlags::REMOVEDIR).ok();
                error
            };
            let stat = sys::stat_in(&parent.file, name)?;
            let (file, stat, _) = self.open_known(&parent.file, name, &stat).map_err(undo)?;
            if stat.kind() != FileType::Directory {
                return Err(Errno::STALE);
            }
            let stored = self.dress(file.as_fd(), &shape).map_err(undo)?;
            tally.made(&file)?;
            Ok((file, stored))
        })?;
        let stat = sys::stat(&file)?;
        let place = Some(Place::new(parent.id, name));
        let made = Made { file, stat, stored };
        Ok(self.enter(made, Access::Read, place)?.0)
    }

    /// Creates a file of any type but directory. Where ownership is kept apart from the host's,
    /// special files are ordinary ones there.
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
        let mode = kind | (args.mode & 0o7777);
        match kind {
            S_IFREG => {}
            S_IFIFO | S_IFSOCK | S_IFCHR | S_IFBLK if !self.overlay.is_off() => {}
            S_IFIFO | S_IFSOCK | S_IFCHR | S_IFBLK if !self.overlay.gives_away() => {
                return Err(Errno::OPNOTSUPP);
            }
            S_IFIFO | S_IFSOCK => {
                let shape = self.shape(&parent, (mode, args.umask), 0, caller)?;
                return self.make_special(&parent, name, &shape);
            }
            // The whiteout of an overlay file system stands for no device.
            S_IFCHR if args.rdev == 0 => {
                let shape = self.shape(&parent, (mode, args.umask), 0, caller)?;
                return self.make_special(&parent, name, &shape);
            }
            // Devices of the host are none of the guest's, whoever runs the server.
            S_IFCHR | S_IFBLK => return Err(Errno::PERM),
            _ => return Err(Errno::INVAL),
        }
        let shape = self.shape(&parent, (mode, args.umask), args.rdev, caller)?;
        let made = self.make_file(&parent, name, &shape, b"")?;
        let place = Some(Place::new(parent.id, name));
        Ok(self.enter(made, Access::ReadWrite, place)?.0)
    }

    /// Creates a pipe, a socket or a whiteout on the host.
    fn make_special(&self, parent: &Node, name: &CStr, shape: &Shape) -> Result<EntryOut> {
        let kind = FileType::from_raw_mode(shape.mode);
        let mode = rustix::fs::Mode::from_raw_mode(shape.mode & 0o7777);
        self.within(&[parent.fd()], Room::Fixed(1, 1), |tally| {
            rustix::fs::mknodat(&parent.file, name, kind, mode, 0)?;
            let place = sys::open_in(&parent.file, name, OFlags::PATH, 0);
            let dressed = place.and_then(|place| {
                self.dress(place.as_fd(), shape)?;
                tally.made(&place)
            });
            dressed.inspect_err(|_| {
                rustix::fs::unlinkat(&parent.file, name, AtFlags::empty()).ok();
            })
        })?;
        let (id, attr) = self.resolve(parent, name)?;
        Ok(self.entry(id, attr))
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
        let mut shape = self.shape(&parent, (S_IFLNK | 0o777, 0), 0, caller)?;
        shape.lists = None;
        if self.overlay.mode() != StatVirt::Strict {
            self.within(&[parent.fd()], Room::Fixed(BLOCK, 1), |tally| {
                rustix::fs::symlinkat(target, &parent.file, name)?;
                if self.overlay.gives_away() {
                    sys::chown_in(&parent.file, name, shape.owner.uid, shape.owner.gid)?;
                }
                tally.made_as(&sys::stat_in(&parent.file, name)?);
                Ok(())
            })?;
            let (id, attr) = self.resolve(&parent, name)?;
            return Ok(self.entry(id, attr));
        }
        let made = self.make_file(&parent, name, &shape, target.to_bytes())?;
        let place = Some(Place::new(parent.id, name));
        Ok(self.enter(made, Access::ReadWrite, place)?.0)
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

    /// The group that new entries of `parent` get, when it hands its own down.
    fn inherits_group(&self, parent: &Node) -> Result<Option<u32>> {
        let stat = sys::stat(&parent.file)?;
        let view = self.overlay.view(parent, &stat)?;
        Ok((view.mode & S_ISGID != 0).then_some(view.gid))
    }

    /// What a new entry of `parent` is to look like that `owner` makes with `mode`, under `umask`.
    fn shape(
        &self,
        parent: &Node,
        (mut mode, umask): (u32, u32),
        rdev: u32,
        owner: Caller,
    ) -> Result<Shape> {
        let handed_down = self.inherits_group(parent)?;
        let gid = handed_down.unwrap_or(owner.gid);
        // Nobody becomes a member of a group by making a program that runs as one.
        let foreign = handed_down.is_some() && !owner.is_in(gid);
        if foreign && mode & S_IFMT != S_IFDIR && mode & (S_ISGID | 0o010) == S_ISGID | 0o010 {
            mode &= !S_ISGID;
        }
        let mut lists = None;
        if self.rules.lists {
            match self.default_list(parent)? {
                // The host's kernel applies its own lists to what is made there.
                Some(_) if self.overlay.is_off() => {}
                Some(default) => {
                    let list = default.clone().inherited(mode);
                    mode = (mode & !0o777) | list.permissions();
                    lists = Some((default, list));
                }
                None => mode &= !(umask & 0o777),
            }
        }
        if handed_down.is_some() && mode & S_IFMT == S_IFDIR {
            mode |= S_ISGID;
        }
        Ok(Shape {
            owner: Caller { gid, ..owner },
            mode,
            rdev,
            lists,
        })
    }

    /// The mode with which a file is made on the host.
    fn host_mode(&self, mode: u32) -> u32 {
        let floor = match mode & S_IFMT {
            S_IFDIR => 0o700,
            _ => 0o600,
        };
        if self.overlay.gives_away() {
            mode & 0o7777
        } else if self.overlay.is_off() {
            (mode & 0o7777) | floor
        } else {
            floor
        }
    }

    /// Creates a regular host file that did not exist, with this content, and gives it its
    /// attributes.
    fn make_file(&self, parent: &Node, name: &CStr, shape: &Shape, content: &[u8]) -> Result<Made> {
        let bytes = if content.is_empty() { 1 } else { BLOCK };
        self.within(&[parent.fd()], Room::Fixed(bytes, 1), |tally| {
            let made = self.make_on_host(parent, name, shape, content)?;
            tally.made_as(&made.stat);
            Ok(made)
        })
    }

    pub(super) fn make_on_host(
        &self,
        parent: &Node,
        name: &CStr,
        shape: &Shape,
        content: &[u8],
    ) -> Result<Made> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let mode = self.host_mode(shape.mode);
        let file = self.with_room(|| sys::open_in(&parent.file, name, flags, mode))?;
        let stored = self.dress(file.as_fd(), shape).inspect_err(|_| {
            rustix::fs::unlinkat(&parent.file, name, AtFlags::empty()).ok();
        })?;
        if !content.is_empty() {
            let written = rustix::io::pwrite(&file, content, 0);
            if written != Ok(content.len()) {
                rustix::fs::unlinkat(&parent.file, name, AtFlags::empty()).ok();
                return Err(written.err().unwrap_or(Errno::NOSPC));
            }
        }
        let stat = sys::stat(&file)?;
        Ok(Made { file, stat, stored })
    }

    /// What bears a name that is about to be taken away from it, when space is accounted for.
    pub(super) fn victim(&self, parent: &Node, name: &CStr) -> Result<Option<(&Account, OwnedFd)>> {
        let Some(account) = &self.account else {
            return Ok(None);
        };
        let file = self.with_room(|| sys::open_in(&parent.file, name, OFlags::PATH, 0))?;
        Ok(Some((account, file)))
    }

    /// Gives a new inode its attributes; returns the override that was stored.
    fn dress(&self, file: BorrowedFd<'_>, shape: &Shape) -> Result<Option<Override>> {
        let Shape { owner, mode, .. } = *shape;
        if self.overlay.gives_away() {
            let special = mode & (S_ISUID | S_ISGID);
            let before = match special {
                0 => None,
                _ => Some(sys::stat(file)?.st_mode),
            };
            sys::chown(file, Some(owner.uid), Some(owner.gid))?;
            // A change of owner has cleared these.
            if let Some(before) = before {
                sys::chmod(file, (before & 0o1777) | special)?;
            }
            return Ok(None);
        }
        let stored = match self.overlay.initialise(file, (owner, mode, shape.rdev)) {
            // Better a file with the host's attributes than none.
            Err(Errno::OPNOTSUPP) if self.overlay.mode() == StatVirt::Relaxed => {
                self.dress_plainly(file, mode)?;
                return Ok(None);
            }
            result => result?,
        };
        if let Some((default, list)) = &shape.lists {
            let default = (mode & S_IFMT == S_IFDIR).then_some(default);
            inherit_lists(file, default, list)?;
        }
        Ok(stored)
    }

    /// Gives a new inode the attributes that a file system without extended ones can hold.
    fn dress_plainly(&self, file: BorrowedFd<'_>, mode: u32) -> Result<()> {
        match mode & S_IFMT {
            S_IFREG => sys::chmod(file, (mode & 0o777) | 0o600),
            S_IFDIR => sys::chmod(file, (mode & 0o777) | 0o700),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    /// Makes a node of a new file. The descriptor comes back when the inode is known already.
    fn enter(
        &self,
        made: Made,
        access: Access,
        place: Option<Place>,
    ) -> Result<(EntryOut, Arc<Node>, Option<OwnedFd>)> {
        let Made { file, stat, stored } = made;
        let (node, spare) = self.nodes.insert(&stat, file, access, place)?;
        self.relieve();
        // Whoever has found it before this may have changed its attributes as well.
        let entry = match stored.filter(|_| spare.is_none()) {
            Some(stored) => self.entry(node.id, self.overlay.merged(&stat, Some(stored))),
            None => self.entry_of(&node, &stat)?,
        };
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
