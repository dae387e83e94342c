//! What the guest knows by number: nodes, and the files and directories it has opened.
//!
//! A node is *live* when it has a descriptor, and *cold* when it is only known by its name in a
//! directory that is another node. Nodes begin cold when a listing shows them, and become cold when
//! more are live than descriptors may be open; whoever uses one makes it live again. Only a live
//! node that nobody uses becomes cold: its entry holds the one reference to it, under the lock of
//! its slot. A directory that the guest has forgotten stays for the cold nodes below it.
//!
//! Locks are taken in the order shard of the index, slot, facts of a node; never two slots at once.

mod handle;
mod node;
mod pin;
mod slab;
#[cfg(test)]
mod tests;

use std::hash::BuildHasher;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use hashbrown::{DefaultHashBuilder, HashTable};
use rustix::io::Errno;

pub(crate) use self::handle::{DirHandle, FileHandle, HandleTable, Listings, Stream};
pub(crate) use self::node::{Access, Cold, Facts, Key, Node, Place, is_grown, is_settled, key};
use self::slab::{Slab, lock};
use super::Result;
use crate::quota::Account;
use crate::sys::Stat;
use crate::wire::abi::ROOT_ID;

/// Parts of the index that are locked on their own.
const SHARDS: usize = 16;

/// What a number stands for.
enum Body {
    Live(Arc<Node>),
    Cold(Cold),
    /// A cold node whose inode is no more: its number now belongs to another one.
    Gone,
}

struct Entry {
    /// How often the guest has been told of it; it must not name what it has not been told of.
    lookups: u64,
    /// How many cold nodes have their place in this directory.
    below: u32,
    body: Body,
}

impl Entry {
    fn key(&self) -> Option<Key> {
        match &self.body {
            Body::Live(node) => Some(node.key),
            Body::Cold(cold) => Some(cold.key()),
            Body::Gone => None,
        }
    }
}

/// A node as it is found.
pub(crate) enum Found {
    Live(Arc<Node>),
    Cold(Cold),
}

/// Where in the slab an inode is; the hash is kept so that growing asks no slot.
#[derive(Clone, Copy)]
struct Item {
    hash: u32,
    index: u32,
}

impl Item {
    fn new(hash: u32, id: u64) -> Result<Self> {
        let index = slab::index(id).ok_or(Errno::STALE)?;
        Ok(Self { hash, index })
    }
}

/// The hash as the index wants it: it takes its own bits from both ends.
fn spread(hash: u32) -> u64 {
    u64::from(hash).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A million entries are no rare thing.
const _: () = assert!(slab::slot_size::<Entry>() <= 120 && size_of::<Item>() == 8);

/// All nodes.
pub(crate) struct NodeTable {
    slab: Slab<Entry>,
    index: [Mutex<HashTable<Item>>; SHARDS],
    hasher: DefaultHashBuilder,
    live: AtomicUsize,
    cold: AtomicUsize,
    hand: AtomicU32,
    /// How many nodes may be live.
    budget: usize,
    /// Who is told which inodes are open.
    account: Option<Arc<Account>>,
}

impl NodeTable {
    /// A table that holds nothing but the root, and keeps no more than about `budget` descriptors.
    pub(crate) fn new(stat: &Stat, file: OwnedFd, access: Access, budget: usize) -> Self {
        let table = Self {
            slab: Slab::new(),
            index: std::array::from_fn(|_| Mutex::default()),
            hasher: DefaultHashBuilder::default(),
            live: AtomicUsize::new(0),
            cold: AtomicUsize::new(0),
            hand: AtomicU32::new(0),
            budget,
            account: None,
        };
        // The first number that a slab gives is that of the root.
        table.insert(stat, file, access, None).ok();
        table
    }

    /// Tells `account` from now on which inodes are open.
    pub(crate) fn account_with(&mut self, account: Arc<Account>) {
        self.account = Some(account);
    }

    /// The node `id`, when the guest may name it.
    pub(crate) fn get(&self, id: u64) -> Option<Found> {
        let named = |entry: &mut Entry| (entry.lookups > 0).then(|| entry.found());
        self.slab.get(id, named)??
    }

    /// The node `id`, even one that is only kept for what lies below it.
    pub(crate) fn kept(&self, id: u64) -> Option<Found> {
        self.slab.get(id, Entry::found)?
    }

    /// The node `id`, when it is live; even one that is only kept.
    pub(crate) fn kept_live(&self, id: u64) -> Option<Arc<Node>> {
        match self.kept(id)? {
            Found::Live(node) => Some(node),
            Found::Cold(_) => None,
        }
    }

    /// The node of an inode that was found at `place`, if it is known; counts one lookup then.
    pub(crate) fn find(
        &self,
        stat: &Stat,
        parent: u64,
        name: &std::ffi::CStr,
    ) -> Option<(u64, Found)> {
        let key = key(stat);
        let hash = self.hash(key);
        let mut shard = self.shard(hash);
        let id = self.search(&shard, hash, key)?;
        let (found, above) = self.slab.get(id, |entry| {
            let above = entry.above();
            if !entry.check(stat) {
                return (None, above);
            }
            entry.lookups = entry.lookups.saturating_add(1);
            // A cold one that was in another directory must first count in this one.
            if above.is_none_or(|above| above == parent) {
                entry.move_to(parent, name);
            }
            (entry.found(), None)
        })?;
        if found.is_none() {
            self.drop_item(&mut shard, hash, id);
            self.cold.fetch_sub(1, Ordering::Relaxed);
        }
        drop(shard);
        self.unpin(above);
        let found = found?;
        if let Found::Cold(cold) = &found
            && let Some(old) = cold
                .facts
                .place
                .as_ref()
                .filter(|old| old.parent() != parent)
        {
            self.move_cold(id, old, (parent, name));
        }
        Some((id, found))
    }

    /// The number of the node of an inode, without counting a lookup.
    pub(crate) fn id_of(&self, stat: &Stat) -> Option<u64> {
        let key = key(stat);
        let hash = self.hash(key);
        let id = self.search(&self.shard(hash), hash, key)?;
        let same = self.slab.get(id, |entry| match &entry.body {
            Body::Live(_) => true,
            Body::Cold(cold) => cold.is(stat),
            Body::Gone => false,
        });
        (same == Some(true)).then_some(id)
    }

    /// Adds the inode behind `file`, or counts one more lookup of it when another request was
    /// faster; the descriptor comes back then.
    pub(crate) fn insert(
        &self,
        stat: &Stat,
        file: OwnedFd,
        access: Access,
        place: Option<Place>,
    ) -> Result<(Arc<Node>, Option<OwnedFd>)> {
        let key = key(stat);
        let hash = self.hash(key);
        let mut shard = self.shard(hash);
        let Some(id) = self.search(&shard, hash, key) else {
            return self.add_live(&mut shard, hash, (stat, file, access, place));
        };
        let mut above = None;
        let found = self.slab.get(id, |entry| {
            above = entry.above();
            if !entry.check(stat) {
                return Err(file);
            }
            entry.lookups = entry.lookups.saturating_add(1);
            let warm = self.warm(id, entry, stat, file, access);
            if let Some(place) = &place {
                entry.move_to(place.parent(), place.name());
            }
            Ok(warm)
        });
        let result = match found {
            Some(Ok(Some(found))) => Ok(found),
            Some(Err(file)) => {
                self.drop_item(&mut shard, hash, id);
                self.cold.fetch_sub(1, Ordering::Relaxed);
                self.add_live(&mut shard, hash, (stat, file, access, place))
            }
            _ => Err(Errno::STALE),
        };
        drop(shard);
        self.unpin(above);
        result
    }

    fn add_live(
        &self,
        shard: &mut HashTable<Item>,
        hash: u32,
        (stat, file, access, place): (&Stat, OwnedFd, Access, Option<Place>),
    ) -> Result<(Arc<Node>, Option<OwnedFd>)> {
        let mut made = None;
        let id = self.slab.insert(|id| {
            let node = Node::with(id, stat, file, access, Facts::new(place));
            let node = Arc::new(node.under(self.account.as_ref()));
            made = Some(Arc::clone(&node));
            Entry {
                lookups: 1,
                below: 0,
                body: Body::Live(node),
            }
        });
        let id = id.map_err(|_| Errno::NFILE)?;
        shard.insert_unique(spread(hash), Item::new(hash, id)?, |item| spread(item.hash));
        self.live.fetch_add(1, Ordering::Relaxed);
        Ok((made.ok_or(Errno::STALE)?, None))
    }

    /// Adds an inode that only its name is known of, and that [`NodeTable::find`] did not know.
    pub(crate) fn insert_cold(&self, stat: &Stat, cold: Cold) -> Result<u64> {
        let parent = cold.facts.place.as_ref().ok_or(Errno::STALE)?.parent();
        if !self.pin(parent) {
            return Err(Errno::STALE);
        }
        let mut spare = [Some(parent), None];
        let result = self.add_cold(stat, cold, &mut spare);
        for above in spare {
            self.unpin(above);
        }
        result
    }

    /// Adds a cold node that counts in its directory already, the first of `spare`. Leaves there
    /// the directories in which there is one less after all.
    fn add_cold(&self, stat: &Stat, cold: Cold, spare: &mut [Option<u64>; 2]) -> Result<u64> {
        let key = key(stat);
        let hash = self.hash(key);
        let mut shard = self.shard(hash);
        if let Some(id) = self.search(&shard, hash, key) {
            let mut before = None;
            let counted = self.slab.get(id, |entry| {
                before = entry.above();
                entry.lookups = entry.lookups.saturating_add(u64::from(entry.check(stat)));
                entry.key().is_some()
            });
            if counted == Some(true) {
                return Ok(id);
            }
            spare[1] = before;
            self.drop_item(&mut shard, hash, id);
            self.cold.fetch_sub(1, Ordering::Relaxed);
        }
        let id = self.slab.insert(|_| Entry {
            lookups: 1,
            below: 0,
            body: Body::Cold(cold),
        });
        let id = id.map_err(|_| Errno::NFILE)?;
        shard.insert_unique(spread(hash), Item::new(hash, id)?, |item| spread(item.hash));
        self.cold.fetch_add(1, Ordering::Relaxed);
        spare[0] = None;
        Ok(id)
    }

    /// Gives the cold node `id` a descriptor, unless another request was faster. `None` when `stat`
    /// is not its inode any more.
    pub(crate) fn revive(
        &self,
        id: u64,
        stat: &Stat,
        file: OwnedFd,
        access: Access,
    ) -> Option<Arc<Node>> {
        let mut slot = self.slab.lock(id)?;
        let entry = slot.value.as_mut()?;
        let same = match &entry.body {
            Body::Live(node) => node.key == key(stat),
            Body::Cold(cold) => cold.is(stat),
            Body::Gone => false,
        };
        if !same {
            return None;
        }
        let above = entry.above();
        let (node, spare) = self.warm(id, entry, stat, file, access)?;
        drop(slot);
        drop(spare);
        self.unpin(above);
        Some(node)
    }

    /// Makes an entry live.
    fn warm(
        &self,
        id: u64,
        entry: &mut Entry,
        stat: &Stat,
        file: OwnedFd,
        access: Access,
    ) -> Option<(Arc<Node>, Option<OwnedFd>)> {
        let facts = match &entry.body {
            Body::Live(node) => return Some((Arc::clone(node), Some(file))),
            Body::Cold(cold) => cold.facts.clone(),
            Body::Gone => return None,
        };
        let node = Node::with(id, stat, file, access, facts);
        let node = Arc::new(node.under(self.account.as_ref()));
        entry.body = Body::Live(Arc::clone(&node));
        self.cold.fetch_sub(1, Ordering::Relaxed);
        self.live.fetch_add(1, Ordering::Relaxed);
        Some((node, None))
    }

    /// Calls `with` on what is remembered of a node.
    pub(crate) fn facts(&self, id: u64, with: impl FnOnce(&mut Facts)) {
        self.slab.get(id, |entry| match &mut entry.body {
            Body::Live(node) => node.facts(with),
            Body::Cold(cold) => with(&mut cold.facts),
            Body::Gone => {}
        });
    }

    /// Whether an unlink or a rename must look after the node that it takes the name from: there
    /// are nodes that are known by name alone, or soon will be.
    pub(crate) fn names_matter(&self) -> bool {
        self.cold.load(Ordering::Relaxed) > 0 || self.live.load(Ordering::Relaxed) > self.budget / 2
    }

    /// Whether more descriptors are held than there should be.
    pub(crate) fn is_over(&self) -> bool {
        self.live.load(Ordering::Relaxed) > self.budget
    }

    /// How many nodes have a descriptor, and how many have none.
    #[cfg(test)]
    pub(crate) fn counts(&self) -> (usize, usize) {
        (
            self.live.load(Ordering::Relaxed),
            self.cold.load(Ordering::Relaxed),
        )
    }

    /// A node that has not been used since this last passed it, and whose name is known. Asks at
    /// most `steps` slots.
    pub(crate) fn candidate(&self, steps: u32) -> Option<Arc<Node>> {
        let used = self.slab.used().max(1);
        for _ in 0..steps {
            let index = self.hand.fetch_add(1, Ordering::Relaxed) % used;
            let Some(id) = self.slab.number_at(index).filter(|id| *id != ROOT_ID) else {
                continue;
            };
            let node = self.slab.get(id, |entry| match &entry.body {
                Body::Live(node) if Arc::strong_count(node) == 1 && !node.was_used() => {
                    let named = node.facts(|facts| facts.place.is_some());
                    named.then(|| Arc::clone(node))
                }
                _ => None,
            });
            if let Some(Some(node)) = node {
                return Some(node);
            }
        }
        None
    }

    fn hash(&self, key: Key) -> u32 {
        let [a, b, c, d, ..] = self.hasher.hash_one(key).to_be_bytes();
        u32::from_be_bytes([a, b, c, d])
    }

    fn shard(&self, hash: u32) -> MutexGuard<'_, HashTable<Item>> {
        // The lower bits choose the place in the table.
        let [highest, ..] = hash.to_be_bytes();
        lock(&self.index[usize::from(highest) % SHARDS])
    }

    fn search(&self, shard: &HashTable<Item>, hash: u32, key: Key) -> Option<u64> {
        let mut found = None;
        let same = |item: &Item| {
            let is = |id, entry: &mut Entry| (entry.key() == Some(key)).then_some(id);
            found = (item.hash == hash)
                .then(|| self.slab.at(item.index, is)?)
                .flatten();
            found.is_some()
        };
        shard.find(spread(hash), same)?;
        found
    }

    fn drop_item(&self, shard: &mut HashTable<Item>, hash: u32, id: u64) {
        let same = |item: &Item| slab::index(id) == Some(item.index);
        if let Ok(found) = shard.find_entry(spread(hash), same) {
            found.remove();
        }
    }
}

impl Entry {
    fn found(&mut self) -> Option<Found> {
        match &self.body {
            Body::Live(node) => {
                node.touch();
                Some(Found::Live(Arc::clone(node)))
            }
            Body::Cold(cold) => Some(Found::Cold(cold.clone())),
            Body::Gone => None,
        }
    }

    /// Whether this is the inode of `stat`, whose number is the same. A cold node that is not is
    /// gone from then on.
    fn check(&mut self, stat: &Stat) -> bool {
        match &self.body {
            Body::Live(_) => true,
            Body::Cold(cold) if cold.is(stat) => true,
            _ => {
                self.body = Body::Gone;
                false
            }
        }
    }

    fn move_to(&mut self, parent: u64, name: &std::ffi::CStr) {
        let update = |facts: &mut Facts| {
            if facts
                .place
                .as_ref()
                .is_none_or(|place| !place.is(parent, name))
            {
                facts.place = Some(Place::new(parent, name));
            }
        };
        match &mut self.body {
            Body::Live(node) => node.facts(update),
            Body::Cold(cold) => update(&mut cold.facts),
            Body::Gone => {}
        }
    }
}
