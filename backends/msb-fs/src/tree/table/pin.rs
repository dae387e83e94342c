//! What keeps an entry in the table: lookups of the guest, and cold nodes that lie below it.
//!
//! A cold node is reached by way of its directory, which the guest may forget before it: it may know
//! the node by another name elsewhere. Each cold entry therefore counts in the entry of its
//! directory, from before it becomes cold until after it ceases to be. Whoever gives a cold entry
//! its place holds the directory with its descriptor meanwhile, so that none lies below itself.

use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Body, Entry, Node, NodeTable, Place};
use crate::sys::Stat;
use crate::wire::abi::ROOT_ID;

impl Entry {
    /// The directory that this entry counts in, when it is cold.
    pub(super) fn above(&self) -> Option<u64> {
        match &self.body {
            Body::Cold(cold) => cold.facts.place.as_ref().map(|place| place.parent()),
            Body::Live(_) | Body::Gone => None,
        }
    }

    fn is_unused(&self) -> bool {
        self.lookups == 0 && self.below == 0
    }
}

impl NodeTable {
    /// Takes back `count` lookups. What the guest counts wrongly harms only itself: the number
    /// stops at zero, and the root stays.
    pub(crate) fn forget(&self, id: u64, count: u64) {
        let above = self.release(id, |entry| {
            entry.lookups = entry.lookups.saturating_sub(count);
        });
        self.unpin(above);
    }

    /// Forgets everything but the root.
    pub(crate) fn clear(&self) {
        for index in 0..self.slab.used() {
            if let Some(id) = self.slab.number_at(index) {
                self.forget(id, u64::MAX);
            }
        }
    }

    /// Counts one more cold node below the directory `id`; false when it is not known any more.
    pub(super) fn pin(&self, id: u64) -> bool {
        let count = |entry: &mut Entry| entry.below = entry.below.saturating_add(1);
        id == ROOT_ID || self.slab.get(id, count).is_some()
    }

    /// Counts one cold node less below a directory, and takes out what was only kept for that.
    /// Holds no lock of the caller's.
    pub(super) fn unpin(&self, mut id: Option<u64>) {
        while let Some(dir) = id {
            id = self.release(dir, |entry| entry.below = entry.below.saturating_sub(1));
        }
    }

    /// Calls `less` on an entry and takes it out when nothing keeps it then. Returns the directory
    /// that it counted in.
    fn release(&self, id: u64, less: impl FnOnce(&mut Entry)) -> Option<u64> {
        if id == ROOT_ID {
            return None;
        }
        let (unused, key) = self.slab.get(id, |entry| {
            less(entry);
            (entry.is_unused(), entry.key())
        })?;
        if !unused {
            return None;
        }
        let hash = key.map(|key| self.hash(key));
        // A lookup that comes in between finds the node under the same lock.
        let mut shard = hash.map(|hash| self.shard(hash));
        let slot = self.slab.lock(id)?;
        let unused = slot.value.as_ref().is_some_and(|entry| {
            // Between the two looks a cold node may have gone; never the other way about.
            entry.is_unused() && (entry.key() == key || entry.key().is_none())
        });
        if !unused {
            return None;
        }
        if let (Some(shard), Some(hash)) = (&mut shard, hash) {
            self.drop_item(shard, hash, id);
        }
        let gone = self.slab.take(id, slot)?;
        drop(shard);
        match &gone.body {
            Body::Live(_) => self.live.fetch_sub(1, Ordering::Relaxed),
            Body::Cold(_) => self.cold.fetch_sub(1, Ordering::Relaxed),
            Body::Gone => 0,
        };
        // Closing the last descriptor, as `gone` ends, may free a large file: not under a lock.
        gone.above()
    }

    /// Notes that the node `id`, which was cold at `old`, has been found in the directory `parent`.
    pub(super) fn move_cold(&self, id: u64, old: &Place, (parent, name): (u64, &CStr)) {
        if !self.pin(parent) {
            return;
        }
        let above = self.slab.get(id, |entry| match &mut entry.body {
            Body::Cold(cold) if cold.facts.place.as_ref() == Some(old) => {
                cold.facts.place = Some(Place::new(parent, name));
                old.parent()
            }
            // Somebody else was faster, and knows better.
            _ => parent,
        });
        self.unpin(Some(above.unwrap_or(parent)));
    }

    /// Takes the descriptor of `node`, which was just seen as `stat` at `place`. Not when anybody
    /// else uses it.
    pub(crate) fn spill(&self, node: &Arc<Node>, stat: &Stat, place: &Place) -> bool {
        if !self.pin(place.parent()) {
            return false;
        }
        let spilled = self.slab.get(node.id, |entry| {
            let Body::Live(held) = &entry.body else {
                return None;
            };
            // References come only from the slot, which is locked: two are the entry's and ours.
            if !Arc::ptr_eq(held, node) || Arc::strong_count(held) != 2 {
                return None;
            }
            let cold = node.cold(stat)?;
            if cold.facts.place.as_ref() != Some(place) {
                return None;
            }
            Some(std::mem::replace(&mut entry.body, Body::Cold(cold)))
        });
        let done = matches!(spilled, Some(Some(_)));
        if done {
            self.live.fetch_sub(1, Ordering::Relaxed);
            self.cold.fetch_add(1, Ordering::Relaxed);
        } else {
            self.unpin(Some(place.parent()));
        }
        done
    }
}
