//! Carries out file requests on a host directory, or on a single host file.

mod attr;
mod create;
mod data;
mod dir;
mod locks;
mod lookup;
mod overlay;
mod rename;
mod table;
mod xattr;

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

pub use self::data::Progress;
use self::dir::Buffers;
pub use self::dir::Wanted;
pub use self::locks::Done;
use self::locks::Locks;
use self::overlay::Overlay;
pub use self::overlay::{KEY, Override, Ownership, StatVirt};
use self::table::{Access, Found, HandleTable, Listings, Node, NodeTable};
use crate::quota::{Account, Room, Tally};
use crate::sys;
use crate::wire::abi::ROOT_ID;

/// The result of a file operation: its value, or the errno that the guest gets.
pub type Result<T> = std::result::Result<T, Errno>;

/// Node id of the file of a single-file mount.
const FILE_ID: u64 = ROOT_ID + 1;

/// Who asks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Caller {
    /// User id in the guest.
    pub uid: u32,
    /// Group id in the guest.
    pub gid: u32,
    /// Another group of the caller, to which the directory belongs in which it makes something.
    pub other_gid: Option<u32>,
}

impl Caller {
    /// Root, or who is known to be in the group `gid`.
    fn is_in(&self, gid: u32) -> bool {
        self.uid == 0 || self.gid == gid || self.other_gid == Some(gid)
    }
}

/// What is served.
#[derive(Debug, Clone)]
pub enum Source {
    /// A directory and everything below it.
    Directory(PathBuf),
    /// One file, as the only entry of a directory that does not exist on the host.
    File(PathBuf),
}

/// How much the guest may remember without asking again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// Nothing: names and attributes expire at once, data goes past the guest's page cache.
    Never,
    /// Names and attributes for long, no data.
    Metadata,
    /// Names and attributes for a second, data until the file is seen to have changed.
    Auto,
    /// Everything, for as long as the guest likes.
    Always,
}

/// How a tree is served.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Nothing may be changed. The session refuses such requests; the tree opens nothing for
    /// writing and leaves access times alone.
    pub readonly: bool,
    /// Who owns what.
    pub ownership: Ownership,
    /// What the guest may remember.
    pub caching: Caching,
    /// Nobody but this guest changes what is served.
    pub exclusive: bool,
    /// The guest collects writes in its page cache.
    pub writeback: bool,
    /// Mount points below the root are announced to the guest.
    pub submounts: bool,
    /// Access control lists are served, and default ones applied to new files.
    pub lists: bool,
    /// File locks of the guest are those of the host as well.
    pub locks: bool,
}

/// The source cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be opened.
    #[error("cannot open {path}")]
    Open {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A single-file mount names something else.
    #[error("{path} is not a regular file")]
    NotFile {
        /// What.
        path: PathBuf,
    },
    /// Overrides cannot be stored, which strict virtualisation needs.
    #[error(
        "{path} cannot store user extended attributes, which --stat-virt strict needs; \
         --stat-virt relaxed or off does without"
    )]
    Attributes {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The one file of a single-file mount. It is looked up by name whenever it is used, so that a
/// file that the host puts in its place shows in the guest.
pub(crate) struct Single {
    parent: OwnedFd,
    name: CString,
}

/// A served tree.
pub struct Tree {
    nodes: NodeTable,
    handles: HandleTable,
    listings: Listings,
    buffers: Buffers,
    overlay: Overlay,
    rules: Rules,
    /// The guest reads and writes without opening.
    unopened: AtomicBool,
    /// The host file system only reads as long as it takes.
    reads_wait: AtomicBool,
    /// Times of change are finer than a tick of the clock.
    fine_times: bool,
    single: Option<Single>,
    account: Option<Arc<Account>>,
    locks: Arc<Locks>,
}

impl Tree {
    /// Opens what is to be served and shows that it can be.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn new(source: &Source, rules: Rules) -> std::result::Result<Self, OpenError> {
        let overlay = Overlay::new(rules.ownership);
        let (path, single) = match source {
            Source::Directory(path) => (path.clone(), None),
            Source::File(path) => {
                let (parent, name) = split(path)?;
                (parent, Some((path, name)))
            }
        };
        let fail = |path: &Path, error: Errno| OpenError::Open {
            path: path.to_owned(),
            source: error.into(),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // The directory of a single file need not be listed, and may not be readable.
        let flags = if single.is_some() {
            flags | OFlags::PATH
        } else {
            flags
        };
        let file = rustix::fs::openat(CWD, &path, flags, Mode::empty())
            .map_err(|error| fail(&path, error))?;
        let stat = sys::stat(&file).map_err(|error| fail(&path, error))?;
        let probe = |path: &Path, result: Result<()>| {
            result.map_err(|error| OpenError::Attributes {
                path: path.to_owned(),
                source: error.into(),
            })
        };
        let access = if single.is_some() {
            Access::Path
        } else {
            Access::Read
        };
        let single = match single {
            None => {
                let result = overlay.probe(std::os::fd::AsFd::as_fd(&file), rules.readonly);
                probe(&path, result)?;
                None
            }
            Some((full, name)) => {
                let found = sys::stat_in(&file, &name).map_err(|error| fail(full, error))?;
                if found.kind() != FileType::RegularFile {
                    return Err(OpenError::NotFile { path: full.clone() });
                }
                let (opened, _, _) = lookup::open_known(&file, &name, &found, rules.readonly)
                    .map_err(|error| fail(full, error))?;
                let result = overlay.probe(std::os::fd::AsFd::as_fd(&opened), rules.readonly);
                probe(full, result)?;
                let parent = file.try_clone().map_err(|source| OpenError::Open {
                    path: path.clone(),
                    source,
                })?;
                Some(Single { parent, name })
            }
        };
        let fine_times = sys::has_fine_times(&file);
        Ok(Self {
            nodes: NodeTable::new(&stat, file, access, budget()),
            handles: HandleTable::default(),
            listings: Listings::default(),
            buffers: Buffers::default(),
            unopened: AtomicBool::new(false),
            reads_wait: AtomicBool::new(false),
            fine_times,
            overlay,
            rules,
            single,
            account: None,
            locks: Arc::default(),
        })
    }

    /// The directory that is served, or that of the single file.
    ///
    /// # Errors
    ///
    /// When no more descriptors can be had.
    pub fn place(&self) -> io::Result<OwnedFd> {
        match &self.single {
            Some(single) => single.parent.try_clone(),
            None => match self.nodes.kept_live(ROOT_ID) {
                Some(root) => root.file.try_clone(),
                None => Err(io::ErrorKind::NotFound.into()),
            },
        }
    }

    /// User and group of the share: as them, everything in it can be reached that its owner can.
    ///
    /// # Errors
    ///
    /// When the share cannot be looked at.
    pub fn owner(&self) -> io::Result<(u32, u32)> {
        const OTHERS_SEARCH: u32 = 0o001;
        let folder = sys::stat(self.place()?)?;
        let owner = match &self.single {
            // Whoever owns the file may not be able to enter its folder.
            Some(single) if folder.st_mode & OTHERS_SEARCH != 0 => {
                sys::stat_in(&single.parent, &single.name)?
            }
            _ => folder,
        };
        Ok((owner.st_uid, owner.st_gid))
    }

    /// Serves the same directory from inside the jail: `share` is the view of it there, and
    /// `descriptors` the folder of the process's own descriptors.
    ///
    /// # Errors
    ///
    /// When the new view cannot be used.
    pub fn settle(mut self, share: OwnedFd, descriptors: impl AsFd) -> io::Result<Self> {
        sys::work_beside_descriptors(descriptors)?;
        let stat = sys::stat(&share)?;
        let access = match &mut self.single {
            Some(single) => {
                single.parent = share.try_clone()?;
                Access::Path
            }
            None => Access::Read,
        };
        self.nodes = NodeTable::new(&stat, share, access, budget());
        Ok(self)
    }

    /// Keeps the space of the tree within the limit of `account`.
    ///
    /// # Errors
    ///
    /// When no more descriptors can be had.
    pub fn limited(mut self, account: Account) -> io::Result<Self> {
        let account = Arc::new(account.seen_through(self.place()?));
        self.nodes.account_with(Arc::clone(&account));
        self.account = Some(account);
        Ok(self)
    }

    /// Carries out `change`, which may alter the space that the files `touched` take, within the
    /// limit if there is one.
    fn within<T>(
        &self,
        touched: &[BorrowedFd<'_>],
        room: Room,
        change: impl FnOnce(&mut Tally) -> Result<T>,
    ) -> Result<T> {
        match &self.account {
            Some(account) => account.change(touched, room, change),
            None => change(&mut Tally::default()),
        }
    }

    /// How the tree is served.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Whether a single file is served.
    pub fn is_single(&self) -> bool {
        self.single.is_some()
    }

    /// How long the guest may trust names and attributes.
    pub fn timeout(&self) -> Duration {
        match self.rules.caching {
            _ if self.is_single() => Duration::ZERO,
            Caching::Never => Duration::ZERO,
            Caching::Auto => Duration::from_secs(1),
            Caching::Metadata | Caching::Always => Duration::from_secs(86_400),
        }
    }

    /// How long the guest may trust that a name does not exist. Whoever lets others change the
    /// files wants to see new ones.
    pub fn absence(&self) -> Duration {
        if self.rules.exclusive {
            self.timeout()
        } else {
            self.timeout().min(Duration::from_secs(1))
        }
    }

    /// Whether the guest may do without opening files: nothing tells then that the host has changed
    /// one, so only where nobody does.
    pub fn may_go_unopened(&self) -> bool {
        self.rules.exclusive && self.caches_data() && !self.rules.locks
    }

    /// Whether the guest may do without opening directories. It knows by their time of change
    /// whether its listings are up to date, which must be finer than a tick of the clock.
    pub fn may_list_unopened(&self) -> bool {
        self.caches_data() && (self.rules.exclusive || self.fine_times)
    }

    fn caches_data(&self) -> bool {
        !self.is_single() && matches!(self.rules.caching, Caching::Auto | Caching::Always)
    }

    /// Says whether the guest reads and writes without opening.
    pub fn go_unopened(&self, on: bool) {
        self.unopened.store(on, Ordering::Relaxed);
    }

    pub(crate) fn is_unopened(&self) -> bool {
        self.unopened.load(Ordering::Relaxed)
    }

    /// Takes back `count` lookups of a node.
    pub fn forget(&self, id: u64, count: u64) {
        self.nodes.forget(id, count);
    }

    /// Forgets all that the guest has looked up and opened.
    pub fn reset(&self) {
        self.locks.clear();
        self.handles.clear();
        self.listings.clear();
        self.nodes.clear();
    }

    /// The node `id`. The root of a single-file mount is none: the requests that it answers take
    /// another way, all others fail.
    fn node(&self, id: u64) -> Result<Arc<Node>> {
        match &self.single {
            None => match self.nodes.get(id).ok_or(Errno::STALE)? {
                Found::Live(node) => Ok(node),
                Found::Cold(cold) => self.revive(id, cold),
            },
            Some(single) if id == FILE_ID => self.single_node(single),
            Some(_) if id == ROOT_ID => Err(Errno::PERM),
            Some(_) => Err(Errno::STALE),
        }
    }

    fn directory(&self, id: u64) -> Result<Arc<Node>> {
        let node = self.node(id)?;
        if node.kind == FileType::Directory {
            Ok(node)
        } else {
            Err(Errno::NOTDIR)
        }
    }
}

/// How many nodes may hold a descriptor: most of what the process may open, for the rest is for
/// what the guest opens, and no more than serves any working set.
fn budget() -> usize {
    const MOST: u64 = 60_000;
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(MOST * 2);
    usize::try_from((limit / 2).min(MOST)).unwrap_or(0)
}

/// Splits the path of a single file into its directory and its name.
fn split(path: &Path) -> std::result::Result<(PathBuf, CString), OpenError> {
    let fail = |kind: io::ErrorKind| OpenError::Open {
        path: path.to_owned(),
        source: kind.into(),
    };
    // The user may name the file through symbolic links; the guest gets what they lead to.
    let path = path.canonicalize().map_err(|error| fail(error.kind()))?;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(OpenError::NotFile { path });
    };
    let name = CString::new(name.as_bytes()).map_err(|_| fail(io::ErrorKind::InvalidInput))?;
    Ok((parent.to_owned(), name))
}

/// Checks a name that the guest gives to an entry of a directory.
fn entry_name(name: &CStr) -> Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
        bytes if bytes.len() > 255 => Err(Errno::NAMETOOLONG),
        _ => Ok(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_single_components_are_names() {
        let check = |name: &str| entry_name(&CString::new(name).unwrap()).err();
        for bad in ["", ".", "..", "a/b", "/x", "../../etc", "/", "a/"] {
            assert_eq!(check(bad), Some(Errno::INVAL), "{bad:?}");
        }
        assert_eq!(check(&"x".repeat(256)), Some(Errno::NAMETOOLONG));
        for good in ["x", "...", ".a", " ", "\u{fc}\n", &"x".repeat(255)] {
            assert_eq!(check(good), None, "{good:?}");
        }
    }
}
