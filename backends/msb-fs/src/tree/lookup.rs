//! From names to nodes.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, Stat};
use rustix::io::Errno;

use super::node::{Access, Node, key};
use super::{FILE_ID, Result, Single, Tree, entry_name};
use crate::sys;
use crate::wire::abi::{ATTR_SUBMOUNT, Attr, EntryOut, ROOT_ID};

/// How often a name is looked up again when the host changes it at the same moment.
const TRIES: usize = 16;

impl Tree {
    /// Finds `name` in the directory `parent`; `None` when there is nothing of that name.
    pub fn lookup(&self, parent: u64, name: &CStr) -> Result<Option<EntryOut>> {
        let name = entry_name(name)?;
        if let Some(single) = &self.single {
            if parent != ROOT_ID {
                return Err(Errno::NOTDIR);
            }
            if name != single.name.as_c_str() {
                return Ok(None);
            }
            let node = self.node(FILE_ID)?;
            let stat = rustix::fs::fstat(&node.file)?;
            return Ok(Some(self.entry(FILE_ID, self.overlay.attr(&node, &stat)?)));
        }
        let parent = self.directory(parent)?;
        match self.resolve(&parent, name) {
            Ok((node, attr)) => Ok(Some(self.entry(node.id, attr))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Finds or makes the node of `name` and counts one lookup of it.
    pub(crate) fn resolve(&self, parent: &Node, name: &CStr) -> Result<(Arc<Node>, Attr)> {
        for _ in 0..TRIES {
            let stat = sys::stat_in(&parent.file, name)?;
            let (node, stat) = if let Some(node) = self.nodes.find(key(&stat)) {
                (node, stat)
            } else {
                match open_known(&parent.file, name, &stat, self.rules.readonly) {
                    Ok((file, stat, access)) => (self.nodes.insert(&stat, file, access).0, stat),
                    Err(Errno::AGAIN) => continue,
                    Err(error) => return Err(error),
                }
            };
            let mut attr = match self.overlay.attr(&node, &stat) {
                Ok(attr) => attr,
                Err(error) => {
                    self.nodes.forget(node.id, 1);
                    return Err(error);
                }
            };
            if self.rules.submounts
                && node.kind == FileType::Directory
                && node.key.0 != parent.key.0
            {
                attr.flags |= ATTR_SUBMOUNT;
            }
            return Ok((node, attr));
        }
        Err(Errno::STALE)
    }

    /// The reply that names a node.
    pub(crate) fn entry(&self, id: u64, attr: Attr) -> EntryOut {
        let timeout = self.timeout();
        EntryOut {
            nodeid: id,
            generation: 0,
            entry_valid: timeout.as_secs(),
            attr_valid: timeout.as_secs(),
            entry_valid_nsec: timeout.subsec_nanos(),
            attr_valid_nsec: timeout.subsec_nanos(),
            attr,
        }
    }

    /// The reply that says that a name does not exist, and how long that holds.
    pub fn absent(&self) -> Option<EntryOut> {
        if self.timeout().is_zero() {
            return None;
        }
        Some(self.entry(0, Attr::default()))
    }

    /// The file that bears the name of a single-file mount at this moment.
    pub(crate) fn single_node(&self, single: &Single) -> Result<Arc<Node>> {
        for _ in 0..TRIES {
            let stat = sys::stat_in(&single.parent, &single.name)?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Err(Errno::NOENT);
            }
            match open_known(&single.parent, &single.name, &stat, self.rules.readonly) {
                Ok((file, stat, access)) => {
                    return Ok(Arc::new(Node::new(FILE_ID, &stat, file, access)));
                }
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Errno::STALE)
    }
}

/// Opens `name`, which was seen to be what `stat` says: regular files and directories for reading
/// where the server may, everything else as a mere place, so that no device or pipe is opened.
/// EAGAIN when it is something else by now.
pub(crate) fn open_known(
    dir: &OwnedFd,
    name: &CStr,
    stat: &Stat,
    readonly: bool,
) -> Result<(OwnedFd, Stat, Access)> {
    let raced = |error| match error {
        Errno::LOOP | Errno::NXIO | Errno::NOTDIR => Errno::AGAIN,
        error => error,
    };
    let kind = FileType::from_raw_mode(stat.st_mode);
    let mut access = Access::Read;
    let file = match kind {
        FileType::RegularFile | FileType::Directory => {
            let mut flags = OFlags::RDONLY | OFlags::NONBLOCK;
            if kind == FileType::Directory {
                flags |= OFlags::DIRECTORY;
            }
            let mut result = Err(Errno::PERM);
            if readonly {
                result = sys::open_in(dir, name, flags | OFlags::NOATIME, 0);
            }
            // Only the owner of a file may leave its access time alone.
            if result.as_ref().err() == Some(&Errno::PERM) {
                result = sys::open_in(dir, name, flags, 0);
            }
            if matches!(result, Err(Errno::ACCESS | Errno::PERM)) {
                access = Access::Path;
                result = sys::open_in(dir, name, OFlags::PATH, 0);
            }
            result.map_err(raced)?
        }
        _ => {
            access = Access::Path;
            sys::open_in(dir, name, OFlags::PATH, 0).map_err(raced)?
        }
    };
    let found = rustix::fs::fstat(file.as_fd())?;
    if key(&found) == key(stat) && FileType::from_raw_mode(found.st_mode) == kind {
        Ok((file, found, access))
    } else {
        Err(Errno::AGAIN)
    }
}
