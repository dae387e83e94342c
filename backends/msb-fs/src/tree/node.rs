//! The nodes that the guest knows, each with a descriptor that keeps its inode alive.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FileType, Stat};

use crate::wire::abi::ROOT_ID;

/// Identity of an inode on the host. It cannot be reused while a descriptor is held.
pub(crate) type Key = (u64, u64);

/// The key of what `stat` describes.
pub(crate) fn key(stat: &Stat) -> Key {
    (stat.st_dev, stat.st_ino)
}

/// One node.
pub(crate) struct Node {
    /// Number by which the guest names it; never used twice.
    pub(crate) id: u64,
    pub(crate) key: Key,
    pub(crate) file: OwnedFd,
    /// Type on the host.
    pub(crate) kind: FileType,
    /// Whether `file` can be read, and is not only a place (O_PATH).
    pub(crate) readable: bool,
    /// Whether `file` can be written as well.
    pub(crate) writable: bool,
    lookups: AtomicU64,
    seen: Mutex<Option<Version>>,
}

/// What tells two contents of one file apart.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    ctime: (i64, i64),
    size: i64,
}

/// What a freshly opened descriptor allows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Path,
    Read,
    ReadWrite,
}

impl Node {
    pub(crate) fn new(id: u64, stat: &Stat, file: OwnedFd, access: Access) -> Self {
        Self {
            id,
            key: key(stat),
            file,
            kind: FileType::from_raw_mode(stat.st_mode),
            readable: access != Access::Path,
            writable: access == Access::ReadWrite,
            lookups: AtomicU64::new(1),
            seen: Mutex::new(None),
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether the content is what it was when this was last asked.
    pub(crate) fn unchanged(&self, stat: &Stat) -> bool {
        let ctime = (
            stat.st_ctime,
            i64::try_from(stat.st_ctime_nsec).unwrap_or(0),
        );
        let now = Version {
            ctime,
            size: stat.st_size,
        };
        // Clocks of older kernels stand still for a tick: a change that falls into the tick of
        // this moment would leave the same time behind, so a young version proves nothing later.
        let settled = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .ok()
            .and_then(|age| i64::try_from(age.as_millis()).ok())
            .and_then(|ms| ms.checked_sub(ctime.0.checked_mul(1000)?))
            .is_some_and(|ms| ms - ctime.1 / 1_000_000 > 20);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let same = *seen == Some(now);
        *seen = settled.then_some(now);
        same
    }
}

#[derive(Default)]
struct Maps {
    by_id: HashMap<u64, Arc<Node>>,
    by_key: HashMap<Key, Arc<Node>>,
}

/// All nodes.
pub(crate) struct NodeTable {
    maps: RwLock<Maps>,
    next: AtomicU64,
}

impl NodeTable {
    /// A table that holds nothing but the root.
    pub(crate) fn new(root: Node) -> Self {
        let root = Arc::new(root);
        let mut maps = Maps::default();
        maps.by_key.insert(root.key, Arc::clone(&root));
        maps.by_id.insert(root.id, root);
        Self {
            maps: RwLock::new(maps),
            next: AtomicU64::new(ROOT_ID + 2),
        }
    }

    pub(crate) fn get(&self, id: u64) -> Option<Arc<Node>> {
        let maps = self.maps.read().unwrap_or_else(PoisonError::into_inner);
        maps.by_id.get(&id).cloned()
    }

    /// The node of an inode that is known already, counted as looked up once more.
    pub(crate) fn find(&self, key: Key) -> Option<Arc<Node>> {
        let maps = self.maps.read().unwrap_or_else(PoisonError::into_inner);
        let node = maps.by_key.get(&key)?;
        node.lookups.fetch_add(1, Ordering::Relaxed);
        Some(Arc::clone(node))
    }

    /// Adds the inode behind `file`, or counts one more lookup of it when another request was
    /// faster; the descriptor comes back then.
    pub(crate) fn insert(
        &self,
        stat: &Stat,
        file: OwnedFd,
        access: Access,
    ) -> (Arc<Node>, Option<OwnedFd>) {
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = maps.by_key.get(&key(stat)) {
            node.lookups.fetch_add(1, Ordering::Relaxed);
            return (Arc::clone(node), Some(file));
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let node = Arc::new(Node::new(id, stat, file, access));
        maps.by_id.insert(id, Arc::clone(&node));
        maps.by_key.insert(node.key, Arc::clone(&node));
        (node, None)
    }

    /// Takes back `count` lookups. What the guest counts wrongly harms only itself: the number
    /// stops at zero, and the root stays.
    pub(crate) fn forget(&self, id: u64, count: u64) {
        if id == ROOT_ID {
            return;
        }
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        let Some(node) = maps.by_id.get(&id) else {
            return;
        };
        let left = node.lookups.load(Ordering::Relaxed).saturating_sub(count);
        node.lookups.store(left, Ordering::Relaxed);
        if left > 0 {
            return;
        }
        let gone = maps.by_id.remove(&id);
        if let Some(node) = &gone {
            maps.by_key.remove(&node.key);
        }
        // Closing the last descriptor may free a large file: not under the lock.
        drop(maps);
        drop(gone);
    }

    /// Forgets everything but the root.
    pub(crate) fn clear(&self) {
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        maps.by_id.retain(|id, _| *id == ROOT_ID);
        maps.by_key.retain(|_, node| node.id == ROOT_ID);
    }
}
