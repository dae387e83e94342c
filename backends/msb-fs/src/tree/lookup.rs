//! From names to nodes, and from nodes to descriptors.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::table::{Access, Cold, Found, Node, Place, is_grown, key};
use super::{FILE_ID, Result, Single, Tree, entry_name};
use crate::sys::{self, Stat};
use crate::wire::abi::{ATTR_SUBMOUNT, Attr, EntryOut, ROOT_ID};

/// How often a name is looked up again when the host changes it at the same moment.
const TRIES: usize = 16;
/// How many directories without descriptor may lie above one another.
const DEPTH: usize = 4096;
/// How many descriptors are given back at once.
const RELIEF: usize = 32;

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
            let stat = sys::stat(&node.file)?;
            return Ok(Some(self.entry(FILE_ID, self.overlay.attr(&node, &stat)?)));
        }
        let parent = self.directory(parent)?;
        match self.resolve(&parent, name) {
            Ok((id, attr)) => Ok(Some(self.entry(id, attr))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Finds or makes the node of `name` and counts one lookup of it.
    pub(crate) fn resolve(&self, parent: &Node, name: &CStr) -> Result<(u64, Attr)> {
        for _ in 0..TRIES {
            let stat = sys::stat_in(&parent.file, name)?;
            let result = match self.nodes.find(&stat, parent.id, name) {
                Some((id, Found::Live(node))) => (id, self.overlay.attr(&node, &stat)),
                Some((id, Found::Cold(cold))) => (id, self.cold_attr(id, &cold, &stat)),
                None => match self.admit(parent, name, &stat) {
                    Ok(admitted) => admitted,
                    Err(Errno::AGAIN) => continue,
                    Err(error) => return Err(error),
                },
            };
            let (id, attr) = result;
            let mut attr = attr.inspect_err(|_| self.nodes.forget(id, 1))?;
            self.mark_submount(parent, &stat, &mut attr);
            return Ok((id, attr));
        }
        Err(Errno::STALE)
    }

    /// Says so when a directory is the root of another file system.
    pub(crate) fn mark_submount(&self, parent: &Node, stat: &Stat, attr: &mut Attr) {
        let other = stat.kind() == FileType::Directory && stat.st_dev != parent.key.0;
        if self.rules.submounts && other {
            attr.flags |= ATTR_SUBMOUNT;
        }
    }

    /// Makes a node of an inode that is not known yet.
    pub(crate) fn admit(
        &self,
        parent: &Node,
        name: &CStr,
        stat: &Stat,
    ) -> Result<(u64, Result<Attr>)> {
        let opens = matches!(stat.kind(), FileType::RegularFile | FileType::Directory);
        if !opens && is_grown(stat) {
            // There is nothing to read but its name, until somebody reads a link.
            let cold = Cold::new(stat, Place::new(parent.id, name));
            let id = self.nodes.insert_cold(stat, cold)?;
            return Ok((id, Ok(self.overlay.plain_attr(stat))));
        }
        let (file, stat, access) = self.open_known(&parent.file, name, stat)?;
        let place = Some(Place::new(parent.id, name));
        let (node, _) = self.nodes.insert(&stat, file, access, place)?;
        self.relieve();
        Ok((node.id, self.overlay.attr(&node, &stat)))
    }

    /// The attributes of a node without descriptor that was just seen to be `stat`.
    pub(crate) fn cold_attr(&self, id: u64, cold: &Cold, stat: &Stat) -> Result<Attr> {
        if !self.overlay.is_stored(cold.kind) {
            return Ok(self.overlay.plain_attr(stat));
        }
        if let Some(view) = cold.facts.view(stat) {
            return Ok(self.overlay.merged(stat, view));
        }
        self.attr_of_live(&*self.node(id)?)
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
        let timeout = self.absence();
        (!timeout.is_zero()).then(|| EntryOut {
            entry_valid: timeout.as_secs(),
            entry_valid_nsec: timeout.subsec_nanos(),
            ..EntryOut::default()
        })
    }

    /// The file that bears the name of a single-file mount at this moment.
    pub(crate) fn single_node(&self, single: &Single) -> Result<Arc<Node>> {
        for _ in 0..TRIES {
            let stat = sys::stat_in(&single.parent, &single.name)?;
            if stat.kind() != FileType::RegularFile {
                return Err(Errno::NOENT);
            }
            match self.open_known(&single.parent, &single.name, &stat) {
                Ok((file, stat, access)) => {
                    return Ok(Arc::new(Node::new(FILE_ID, &stat, file, access)));
                }
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Errno::STALE)
    }

    /// Gives a cold node a descriptor again, and the directories above it before that. ESTALE when
    /// the name no longer leads to it.
    pub(crate) fn revive(&self, id: u64, cold: Cold) -> Result<Arc<Node>> {
        let node = match self.climb(id, cold.clone()) {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.give_back(RELIEF);
                self.climb(id, cold)?
            }
            result => result?,
        };
        self.relieve();
        Ok(node)
    }

    /// Somebody else may give the node its descriptor meanwhile, and then its directory may go.
    fn climb(&self, id: u64, mut cold: Cold) -> Result<Arc<Node>> {
        for _ in 0..TRIES {
            let tried = cold.facts.place.clone();
            match self.climb_once(id, cold) {
                Err(Errno::STALE) => {}
                result => return result,
            }
            cold = match self.nodes.kept(id).ok_or(Errno::STALE)? {
                Found::Live(node) => return Ok(node),
                Found::Cold(moved) if moved.facts.place != tried => moved,
                Found::Cold(_) => return Err(Errno::STALE),
            };
        }
        Err(Errno::STALE)
    }

    fn climb_once(&self, id: u64, cold: Cold) -> Result<Arc<Node>> {
        let mut chain = vec![(id, cold)];
        let mut dir = loop {
            let above = chain.last().and_then(|(_, cold)| cold.facts.place.as_ref());
            let above = above.ok_or(Errno::STALE)?.parent();
            match self.nodes.kept(above).ok_or(Errno::STALE)? {
                Found::Live(node) => break node,
                Found::Cold(_) if chain.len() >= DEPTH => return Err(Errno::STALE),
                Found::Cold(cold) => chain.push((above, cold)),
            }
        };
        while let Some((id, cold)) = chain.pop() {
            let place = cold.facts.place.as_ref().ok_or(Errno::STALE)?;
            let gone = |error| match error {
                Errno::NOENT | Errno::NOTDIR | Errno::AGAIN => Errno::STALE,
                error => error,
            };
            let (at, name, readonly) = (&dir.file, place.name(), self.rules.readonly);
            let opened = if cold.kind == FileType::Directory {
                // Opening what turns out to be anything else does nothing to it.
                open_as(at, name, cold.kind, readonly)
            } else {
                let stat = sys::stat_in(at, name).map_err(gone)?;
                if !cold.is(&stat) {
                    return Err(Errno::STALE);
                }
                open_known(at, name, &stat, readonly)
            };
            let (file, stat, access) = opened.map_err(gone)?;
            if !cold.is(&stat) {
                return Err(Errno::STALE);
            }
            dir = self
                .nodes
                .revive(id, &stat, file, access)
                .ok_or(Errno::STALE)?;
        }
        Ok(dir)
    }

    /// Opens what `stat` was seen to be; makes room when no more descriptors can be had.
    pub(crate) fn open_known(
        &self,
        dir: &OwnedFd,
        name: &CStr,
        stat: &Stat,
    ) -> Result<(OwnedFd, Stat, Access)> {
        self.with_room(|| open_known(dir, name, stat, self.rules.readonly))
    }

    /// Tries again with fewer descriptors of nodes when there are none left.
    pub(crate) fn with_room<T>(&self, attempt: impl Fn() -> Result<T>) -> Result<T> {
        match attempt() {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.give_back(RELIEF);
                attempt()
            }
            result => result,
        }
    }

    /// Gives descriptors back when too many nodes have one.
    pub(crate) fn relieve(&self) {
        if self.nodes.is_over() {
            self.give_back(RELIEF);
        }
    }

    /// Takes the descriptors of up to `count` nodes that nobody uses and whose names still lead to
    /// them.
    pub(crate) fn give_back(&self, count: usize) {
        for _ in 0..count {
            let Some(node) = self.nodes.candidate(256) else {
                return;
            };
            let Some(place) = node.facts(|facts| facts.place.clone()) else {
                continue;
            };
            let parent = match self.nodes.kept(place.parent()) {
                Some(Found::Live(parent)) => parent,
                Some(Found::Cold(cold)) => match self.climb(place.parent(), cold) {
                    Ok(parent) => parent,
                    Err(_) => continue,
                },
                None => continue,
            };
            match sys::stat_in(&parent.file, place.name()) {
                Ok(stat) if key(&stat) == node.key && stat.kind() == node.kind => {
                    self.nodes.spill(&node, &stat, &place);
                }
                // Its name is not known any more, until it is looked up again.
                _ => node.facts(|facts| {
                    if facts.place.as_ref() == Some(&place) {
                        facts.place = None;
                    }
                }),
            }
        }
    }

    /// The node that bears a name which is about to be taken away from it, with a descriptor: what
    /// is only known by that name would be lost.
    pub(crate) fn hold(&self, parent: &Node, name: &CStr, fate: Fate) -> Option<Arc<Node>> {
        if !self.nodes.names_matter() {
            return None;
        }
        let stat = sys::stat_in(&parent.file, name).ok()?;
        let id = self.nodes.id_of(&stat)?;
        if let Found::Live(node) = self.nodes.kept(id)? {
            return Some(node);
        }
        let (file, stat, access) = if fate == Fate::Removed && is_last_name(&stat) {
            // It is most likely forgotten right afterwards.
            let file = self.with_room(|| sys::open_in(&parent.file, name, OFlags::PATH, 0));
            let file = file.ok()?;
            let stat = sys::stat(&file).ok()?;
            (file, stat, Access::Path)
        } else {
            self.open_known(&parent.file, name, &stat).ok()?
        };
        let node = self.nodes.revive(id, &stat, file, access);
        self.relieve();
        node
    }
}

/// What becomes of a name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Moved,
    Removed,
}

fn is_last_name(stat: &Stat) -> bool {
    stat.kind() == FileType::RegularFile && stat.st_nlink == 1
}

/// Notes where nodes are after a rename of what bore the first name to the second.
pub(super) fn moved(
    held: (Option<Arc<Node>>, Option<Arc<Node>>),
    (from, old): (u64, &CStr),
    (to, new): (u64, &CStr),
    exchanged: bool,
) {
    if let Some(replaced) = held.1 {
        replaced.leave(to, new);
        if exchanged {
            replaced.facts(|facts| facts.place = Some(Place::new(from, old)));
        }
    }
    if let Some(moved) = held.0 {
        moved.facts(|facts| facts.place = Some(Place::new(to, new)));
    }
}

/// Opens `name`, which was seen to be what `stat` says. EAGAIN when it is something else by now.
pub(super) fn open_known(
    dir: &OwnedFd,
    name: &CStr,
    stat: &Stat,
    readonly: bool,
) -> Result<(OwnedFd, Stat, Access)> {
    let opened = open_as(dir, name, stat.kind(), readonly)?;
    if key(&opened.1) == key(stat) && opened.1.kind() == stat.kind() {
        Ok(opened)
    } else {
        Err(Errno::AGAIN)
    }
}

/// Opens `name`, which was seen to be of type `kind`: regular files and directories for reading
/// where the server may, everything else as a mere place, so that no device or pipe is opened.
/// EAGAIN when it is seen to be something else by now.
fn open_as(
    dir: &OwnedFd,
    name: &CStr,
    kind: FileType,
    readonly: bool,
) -> Result<(OwnedFd, Stat, Access)> {
    let raced = |error| match error {
        Errno::LOOP | Errno::NXIO | Errno::NOTDIR => Errno::AGAIN,
        error => error,
    };
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
    let found = sys::stat(file.as_fd())?;
    Ok((file, found, access))
}
