//! One node: an inode of the host that the guest knows, with or without a descriptor.

use std::ffi::CStr;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use rustix::fs::FileType;
use smallvec::SmallVec;

use super::slab::lock;
use crate::quota::{Account, Presence};
use crate::sys::{Stat, file_time as now};
use crate::tree::overlay::Override;

/// Identity of an inode on the host: device and number. While a descriptor is held the number
/// cannot be given to another inode.
pub(crate) type Key = (u64, u64);

/// The key of what `stat` describes.
pub(crate) fn key(stat: &Stat) -> Key {
    (stat.st_dev, stat.st_ino)
}

/// What a freshly opened descriptor allows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Path,
    Read,
    ReadWrite,
}

/// Where an inode was last seen: a name in the directory that is another node.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// Zero is no node, which tells a place from none in no more room.
    parent: NonZeroU64,
    /// With the final zero byte.
    name: SmallVec<[u8; 16]>,
}

impl Place {
    pub(crate) fn new(parent: u64, name: &CStr) -> Self {
        Self {
            parent: NonZeroU64::new(parent).unwrap_or(NonZeroU64::MAX),
            name: SmallVec::from_slice(name.to_bytes_with_nul()),
        }
    }

    pub(crate) fn parent(&self) -> u64 {
        self.parent.get()
    }

    pub(crate) fn name(&self) -> &CStr {
        CStr::from_bytes_with_nul(&self.name).unwrap_or_default()
    }

    pub(crate) fn is(&self, parent: u64, name: &CStr) -> bool {
        self.parent() == parent && self.name.as_slice() == name.to_bytes_with_nul()
    }
}

/// A time that nothing has: it lies too far back to be told from a young one.
const NEVER: i64 = i64::MIN;

/// An override without a type, which none has: that there is none.
const NO_OVERRIDE: Override = Override {
    uid: 0,
    gid: 0,
    mode: 0,
    rdev: 0,
};

/// What is remembered of an inode beside its identity. There may be a million: it holds no room
/// for what is not known.
#[derive(Clone)]
pub(crate) struct Facts {
    pub(crate) place: Option<Place>,
    /// The override, or [`NO_OVERRIDE`], as of the change time beside it.
    view: Override,
    /// [`NEVER`] when the override is not known.
    view_at: i64,
    /// Change time of the content that the guest may still have in its cache, or [`NEVER`].
    seen: i64,
}

impl Facts {
    pub(crate) fn new(place: Option<Place>) -> Self {
        Self {
            place,
            view: NO_OVERRIDE,
            view_at: NEVER,
            seen: NEVER,
        }
    }

    /// The override of an inode whose attributes are now `stat`, when it is known to be the same
    /// as when it was read: whatever changes it also changes the change time.
    pub(crate) fn view(&self, stat: &Stat) -> Option<Option<Override>> {
        let known = self.view_at != NEVER && stat.changed() == Some(self.view_at);
        known.then(|| (self.view != NO_OVERRIDE).then_some(self.view))
    }

    /// Remembers what was read after `stat`.
    pub(crate) fn remember(&mut self, stat: &Stat, found: Option<Override>) {
        self.view = found.unwrap_or(NO_OVERRIDE);
        self.view_at = settled(stat, now()).unwrap_or(NEVER);
    }

    /// Whether the content is what it was when this was last asked.
    pub(crate) fn unchanged(&mut self, stat: &Stat) -> bool {
        let changed = stat.changed();
        let same = self.seen != NEVER && changed == Some(self.seen);
        if !same {
            self.seen = settled(stat, now()).unwrap_or(NEVER);
        }
        same
    }
}

/// Longer than a tick of the clock of file systems, in nanoseconds.
const TICK: i64 = 20_000_000;

/// The change time of `stat` if any later change must give another one. The clock of file systems
/// stands still for a tick, or for two seconds on those that store no fractions: a change in the
/// same tick would leave the same time behind, so a young time proves nothing.
fn settled(stat: &Stat, now: i64) -> Option<i64> {
    const COARSE: i64 = 2_000_000_000;
    let changed = stat.changed()?;
    let least = if stat.st_ctime_nsec == 0 {
        COARSE
    } else {
        TICK
    };
    (now.checked_sub(changed)? > least).then_some(changed)
}

/// Whether any later change gives another change time than that of `stat`.
pub(crate) fn is_settled(stat: &Stat) -> bool {
    settled(stat, now()).is_some()
}

/// Whether an inode is so old that another one with its number would have another time of birth.
pub(crate) fn is_grown(stat: &Stat) -> bool {
    let age = stat
        .born_or_changed()
        .and_then(|born| now().checked_sub(born));
    age.is_some_and(|age| age > TICK)
}

/// A node without a descriptor; it is reached by its name.
#[derive(Clone)]
pub(crate) struct Cold {
    ino: u64,
    /// All of a device number that Linux has: twelve bits and twenty.
    dev: u32,
    pub(crate) kind: FileType,
    /// Time of birth, or where the file system keeps none the change time: the number of a removed
    /// inode may be given to another one. [`NEVER`] when there is neither.
    born: i64,
    pub(crate) facts: Facts,
}

impl Cold {
    pub(crate) fn new(stat: &Stat, place: Place) -> Self {
        Self::with(key(stat), stat, Facts::new(Some(place)))
    }

    fn with((dev, ino): Key, stat: &Stat, facts: Facts) -> Self {
        Self {
            ino,
            // Were there larger ones, such a node would be found to be another one, and so be gone.
            dev: u32::try_from(dev).unwrap_or(u32::MAX),
            kind: stat.kind(),
            born: stat.born_or_changed().unwrap_or(NEVER),
            facts,
        }
    }

    pub(crate) fn key(&self) -> Key {
        (u64::from(self.dev), self.ino)
    }

    /// Whether `stat` describes the same inode.
    pub(crate) fn is(&self, stat: &Stat) -> bool {
        self.key() == key(stat)
            && self.kind == stat.kind()
            && self.born != NEVER
            && Some(self.born) == stat.born_or_changed()
    }
}

/// A node with a descriptor that keeps its inode alive.
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
    /// A descriptor for writing, where `file` is none and the guest writes without opening.
    writer: OnceLock<OwnedFd>,
    used: AtomicBool,
    /// The host's file was last seen with setuid or setgid.
    special: AtomicBool,
    facts: Mutex<Facts>,
    /// Says to the other servers of a quota that the inode is open.
    presence: Option<Presence>,
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(presence) = self.presence.take() {
            presence.leave(&self.file);
        }
    }
}

impl Node {
    pub(crate) fn new(id: u64, stat: &Stat, file: OwnedFd, access: Access) -> Self {
        Self::with(id, stat, file, access, Facts::new(None))
    }

    pub(super) fn with(id: u64, stat: &Stat, file: OwnedFd, access: Access, facts: Facts) -> Self {
        Self {
            id,
            key: key(stat),
            file,
            kind: stat.kind(),
            readable: access != Access::Path,
            writable: access == Access::ReadWrite,
            writer: OnceLock::new(),
            used: AtomicBool::new(true),
            special: AtomicBool::new(is_special(stat)),
            facts: Mutex::new(facts),
            presence: None,
        }
    }

    /// The node as one whose space is accounted for.
    pub(super) fn under(mut self, account: Option<&Arc<Account>>) -> Self {
        self.presence = account.and_then(|account| account.enter(&self.file));
        self
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A descriptor that can be written, if there is one.
    pub(crate) fn writer(&self) -> Option<BorrowedFd<'_>> {
        match self.writable {
            true => Some(self.fd()),
            false => self.writer.get().map(AsFd::as_fd),
        }
    }

    /// Keeps a descriptor for writing, unless there is one already.
    pub(crate) fn set_writer(&self, file: OwnedFd) {
        self.writer.set(file).ok();
    }

    /// Calls `with` on what is remembered.
    pub(crate) fn facts<R>(&self, with: impl FnOnce(&mut Facts) -> R) -> R {
        with(&mut lock(&self.facts))
    }

    /// Whether the content is what it was when this was last asked.
    pub(crate) fn unchanged(&self, stat: &Stat) -> bool {
        self.facts(|facts| facts.unchanged(stat))
    }

    /// Notices which of setuid and setgid the host's file has.
    pub(crate) fn notice(&self, stat: &Stat) {
        let special = is_special(stat);
        if self.special.load(Ordering::Relaxed) != special {
            self.special.store(special, Ordering::Relaxed);
        }
    }

    /// Whether the host's file was last seen with setuid or setgid.
    pub(crate) fn was_special(&self) -> bool {
        self.special.load(Ordering::Relaxed)
    }

    /// Forgets where it is, if it was last seen there.
    pub(crate) fn leave(&self, parent: u64, name: &CStr) {
        self.facts(|facts| {
            if facts
                .place
                .as_ref()
                .is_some_and(|place| place.is(parent, name))
            {
                facts.place = None;
            }
        });
    }

    pub(super) fn touch(&self) {
        // Written only when it changes, for the line is shared between queues.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn was_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// The node without its descriptor, when it was found by its name just now.
    pub(super) fn cold(&self, stat: &Stat) -> Option<Cold> {
        let facts = self.facts(|facts| facts.clone());
        facts.place.as_ref().filter(|_| is_grown(stat))?;
        stat.born_or_changed()?;
        Some(Cold::with(self.key, stat, facts))
    }
}

/// Whether a program runs with the rights of its file's owner or group.
fn is_special(stat: &Stat) -> bool {
    stat.kind() == FileType::RegularFile && stat.st_mode & 0o6000 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    fn at(seconds: i64, nanoseconds: u32) -> Stat {
        Stat {
            st_ctime: seconds,
            st_ctime_nsec: nanoseconds,
            ..Stat::default()
        }
    }

    #[test]
    fn a_young_change_time_proves_nothing() {
        let stat = at(1000, 500_000_000);
        let time = 1000 * SECOND + 500_000_000;
        assert_eq!(settled(&stat, time), None);
        assert_eq!(settled(&stat, time + 19_000_000), None);
        assert_eq!(settled(&stat, time + 21_000_000), Some(time));
        // A clock that was set back proves nothing either.
        assert_eq!(settled(&stat, time - SECOND), None);
        assert_eq!(settled(&stat, i64::MIN), None);
    }

    #[test]
    fn no_change_is_stamped_with_a_time_that_has_passed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for _ in 0..500 {
            let before = now();
            std::fs::write(&path, "x").unwrap();
            let stat = crate::sys::stat(std::fs::File::open(&path).unwrap()).unwrap();
            assert!(stat.changed() >= Some(before), "{stat:?} {before}");
        }
    }

    #[test]
    fn a_time_without_fractions_is_young_for_longer() {
        let stat = at(1000, 0);
        assert_eq!(settled(&stat, 1001 * SECOND), None);
        assert_eq!(settled(&stat, 1003 * SECOND), Some(1000 * SECOND));
    }

    #[test]
    fn an_override_is_valid_while_the_change_time_is_equal() {
        let value = Override {
            uid: 1,
            gid: 2,
            mode: 0o100_644,
            rdev: 0,
        };
        let mut facts = Facts::new(None);
        assert_eq!(facts.view(&at(1000, 1)), None);
        facts.remember(&at(1000, 1), Some(value));
        assert_eq!(facts.view(&at(1000, 1)), Some(Some(value)));
        assert_eq!(facts.view(&at(1000, 2)), None);
        assert_eq!(facts.view(&at(999, 1)), None);
        facts.remember(&at(2000, 1), None);
        assert_eq!(facts.view(&at(2000, 1)), Some(None));
        // What was read in this very tick may be out of date when it is asked for again.
        let young = now();
        let young = at(young / SECOND, u32::try_from(young % SECOND).unwrap());
        facts.remember(&young, Some(value));
        assert_eq!(facts.view(&young), None);
        // Nor does a time beyond what can be compared.
        facts.remember(&at(i64::MAX, 1), Some(value));
        assert_eq!(facts.view(&at(i64::MAX, 1)), None);
    }

    #[test]
    fn content_is_unchanged_only_when_it_was_seen_settled() {
        let mut facts = Facts::new(None);
        assert!(!facts.unchanged(&at(1000, 1)));
        assert!(facts.unchanged(&at(1000, 1)));
        assert!(facts.unchanged(&at(1000, 1)));
        assert!(!facts.unchanged(&at(1001, 1)));
        assert!(!facts.unchanged(&at(1000, 1)));
        assert!(!facts.unchanged(&at(i64::MAX, 1)) && !facts.unchanged(&at(i64::MAX, 1)));
    }

    #[test]
    fn a_cold_node_is_known_by_its_birth() {
        let stat = Stat {
            st_ino: 5,
            st_mode: 0o100_600,
            born: Some(7),
            ..at(1000, 1)
        };
        let cold = Cold::new(&stat, Place::new(1, c"x"));
        assert!(cold.is(&stat));
        let changed = Stat {
            st_ctime: 2000,
            ..stat
        };
        assert!(cold.is(&changed));
        let reused = Stat {
            born: Some(8),
            ..stat
        };
        assert!(!cold.is(&reused));
        let other = Stat {
            st_mode: 0o040_700,
            ..stat
        };
        assert!(!cold.is(&other));
        // Without a time of birth any change makes it another one.
        let plain = Stat { born: None, ..stat };
        let cold = Cold::new(&plain, Place::new(1, c"x"));
        assert!(cold.is(&plain));
        let changed = Stat {
            born: None,
            ..changed
        };
        assert!(!cold.is(&changed));
    }
}
