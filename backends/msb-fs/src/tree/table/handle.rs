//! Files and directories that the guest has opened.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::node::Node;
use super::slab::{Slab, lock};
use crate::tree::Result;

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
#[derive(Default)]
pub(crate) struct Stream {
    /// Opened with the first listing.
    pub(crate) file: Option<OwnedFd>,
    /// Entries that were read from the host, as the kernel lays them out.
    pub(crate) buffer: Vec<u8>,
    /// Where in `buffer` the next entry begins.
    pub(crate) at: usize,
    /// How much of `buffer` is filled.
    pub(crate) filled: usize,
    /// Position of the next entry in the directory.
    pub(crate) position: u64,
    /// Where the reply is put together.
    pub(crate) reply: Vec<u8>,
}

/// An open directory.
pub(crate) struct DirHandle {
    pub(crate) id: u64,
    /// `None` for the root of a single-file mount.
    pub(crate) node: Option<Arc<Node>>,
    pub(crate) stream: Mutex<Stream>,
}

/// Listings of directories that the guest has not opened, the one that was used last at the end.
#[derive(Default)]
pub(crate) struct Listings(Mutex<Vec<Arc<DirHandle>>>);

/// How many listings are kept; who has more at a time begins anew in the middle.
const LISTINGS: usize = 32;

impl Listings {
    /// The listing of node `id` that stands at `position`, or one of it that nobody uses.
    pub(crate) fn find(&self, id: u64, position: u64) -> Option<Arc<DirHandle>> {
        let mut list = lock(&self.0);
        let stands = |handle: &Arc<DirHandle>| {
            let stream = handle.stream.try_lock();
            stream.is_ok_and(|stream| stream.position == position)
        };
        let mine = || list.iter().enumerate().filter(|(_, one)| one.id == id);
        let exact = mine().find(|(_, one)| stands(one));
        let idle = || mine().find(|(_, one)| Arc::strong_count(one) == 1);
        let at = exact.or_else(idle)?.0;
        let found = list.remove(at);
        list.push(Arc::clone(&found));
        Some(found)
    }

    pub(crate) fn add(&self, handle: Arc<DirHandle>) {
        let mut list = lock(&self.0);
        let oldest = (list.len() >= LISTINGS).then(|| list.remove(0));
        list.push(handle);
        drop(list);
        drop(oldest);
    }

    /// Ends a listing.
    pub(crate) fn remove(&self, handle: &Arc<DirHandle>) {
        let mut list = lock(&self.0);
        let at = list.iter().position(|one| Arc::ptr_eq(one, handle));
        let gone = at.map(|at| list.remove(at));
        drop(list);
        drop(gone);
    }

    pub(crate) fn clear(&self) {
        lock(&self.0).clear();
    }
}

#[derive(Clone)]
enum Handle {
    File(Arc<FileHandle>),
    Dir(Arc<DirHandle>),
}

/// All open handles. Their numbers are never zero, which stands for no handle.
pub(crate) struct HandleTable(Slab<Handle>);

impl Default for HandleTable {
    fn default() -> Self {
        Self(Slab::new())
    }
}

impl HandleTable {
    pub(crate) fn add_file(&self, handle: FileHandle) -> Result<u64> {
        self.add(Handle::File(Arc::new(handle)))
    }

    pub(crate) fn add_dir(&self, handle: DirHandle) -> Result<u64> {
        self.add(Handle::Dir(Arc::new(handle)))
    }

    fn add(&self, handle: Handle) -> Result<u64> {
        self.0.insert(|_| handle).map_err(|_| Errno::NFILE)
    }

    /// The open file `fh`, which must be one of node `id`.
    pub(crate) fn file(&self, fh: u64, id: u64) -> Result<Arc<FileHandle>> {
        match self.0.get(fh, |handle| handle.clone()) {
            Some(Handle::File(file)) if file.node.id == id => Ok(file),
            _ => Err(Errno::BADF),
        }
    }

    /// The open directory `fh`, which must be node `id`.
    pub(crate) fn dir(&self, fh: u64, id: u64) -> Result<Arc<DirHandle>> {
        match self.0.get(fh, |handle| handle.clone()) {
            Some(Handle::Dir(dir)) if dir.id == id => Ok(dir),
            _ => Err(Errno::BADF),
        }
    }

    /// Takes a handle away; what comes back closes it when it is dropped.
    pub(crate) fn remove(&self, fh: u64) -> Option<impl Send> {
        self.0.remove(fh)
    }

    pub(crate) fn clear(&self) {
        for index in 0..self.0.used() {
            if let Some(fh) = self.0.number_at(index) {
                self.0.remove(fh);
            }
        }
    }
}
