//! Files and directories that the guest has opened.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::io::Errno;

use super::Result;
use super::node::Node;
use crate::sys::RawEntry;

/// How many handles a guest may hold.
const MOST: usize = 1 << 20;

/// An open file.
pub(crate) struct FileHandle {
    pub(crate) node: Arc<Node>,
    /// A descriptor of its own, where that of the node does not do.
    pub(crate) own: Option<OwnedFd>,
    /// Writes go to the end of the file.
    pub(crate) append: bool,
}

impl FileHandle {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.own
            .as_ref()
            .map_or_else(|| self.node.fd(), AsFd::as_fd)
    }
}

/// The listing of an open directory.
pub(crate) struct Stream {
    /// `None` for the root of a single-file mount.
    pub(crate) file: Option<OwnedFd>,
    /// Entries that were read from the host and not yet asked for.
    pub(crate) ahead: VecDeque<RawEntry>,
    /// Where `ahead` begins.
    pub(crate) position: u64,
    /// Where the host goes on after `ahead`.
    pub(crate) end: u64,
}

/// An open directory.
pub(crate) struct DirHandle {
    pub(crate) id: u64,
    pub(crate) stream: Mutex<Stream>,
}

#[derive(Clone)]
enum Handle {
    File(Arc<FileHandle>),
    Dir(Arc<DirHandle>),
}

/// All open handles.
#[derive(Default)]
pub(crate) struct HandleTable {
    map: RwLock<HashMap<u64, Handle>>,
    last: AtomicU64,
}

impl HandleTable {
    pub(crate) fn add_file(&self, handle: FileHandle) -> Result<u64> {
        self.add(Handle::File(Arc::new(handle)))
    }

    pub(crate) fn add_dir(&self, handle: DirHandle) -> Result<u64> {
        self.add(Handle::Dir(Arc::new(handle)))
    }

    fn add(&self, handle: Handle) -> Result<u64> {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        if map.len() >= MOST {
            return Err(Errno::NFILE);
        }
        // Zero stands for no handle, when the guest opens without asking.
        let fh = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        map.insert(fh, handle);
        Ok(fh)
    }

    /// The open file `fh`, which must be one of node `id`.
    pub(crate) fn file(&self, fh: u64, id: u64) -> Result<Arc<FileHandle>> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        match map.get(&fh) {
            Some(Handle::File(file)) if file.node.id == id => Ok(Arc::clone(file)),
            _ => Err(Errno::BADF),
        }
    }

    /// The open directory `fh`, which must be node `id`.
    pub(crate) fn dir(&self, fh: u64, id: u64) -> Result<Arc<DirHandle>> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        match map.get(&fh) {
            Some(Handle::Dir(dir)) if dir.id == id => Ok(Arc::clone(dir)),
            _ => Err(Errno::BADF),
        }
    }

    pub(crate) fn remove(&self, fh: u64) {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        let gone = map.remove(&fh);
        drop(map);
        drop(gone);
    }

    pub(crate) fn clear(&self) {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        map.clear();
    }
}
