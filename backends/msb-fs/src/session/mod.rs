//! One FUSE session: takes requests apart, has the tree carry them out, and answers.

mod answer;
mod forgets;
mod pool;
mod task;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use msb_vhost::{Backlog, Request, Segments};
use rustix::io::Errno;
use zerocopy::{FromBytes, FromZeros};

use self::answer::Answer;
use self::forgets::Forgets;
use self::pool::Pool;
use self::task::Task;
use crate::tree::{Caching, Caller, Progress, Tree, Wanted};
use crate::wire::abi::{
    self, GETATTR_FH, GetxattrOut, InHeader, InitIn, InitOut, LseekOut, OutHeader,
    RELEASE_FLOCK_UNLOCK, ReadIn, StatfsOut, WriteIn, WriteOut, init, opcode,
};
use crate::wire::reply::HEADER_LEN;
use crate::wire::request::{self, Operation, WireError};

/// Largest body of a request that is not a WRITE: a SETXATTR with the longest value and name, and
/// room for extensions.
const BODY_MAX: usize = 1 << 17;
/// Bodies up to this length are read onto the stack: all those of two names and less.
const BODY_SMALL: usize = 640;
/// Largest READ and WRITE.
const DATA_MAX: u32 = 1 << 20;
const PAGE_SIZE: u32 = 4096;

/// The state that one guest's kernel and the server share.
pub struct Session {
    tree: Arc<Tree>,
    pool: Pool,
    forgets: Arc<Forgets>,
    /// The guest lists directories without opening them.
    lists_unopened: AtomicBool,
    /// Its SETXATTR is the long one.
    setxattr_ext: AtomicBool,
}

impl Session {
    /// A session over `tree`.
    pub fn new(tree: Tree) -> Self {
        Self {
            tree: Arc::new(tree),
            pool: Pool::default(),
            forgets: Arc::default(),
            lists_unopened: AtomicBool::new(false),
            setxattr_ext: AtomicBool::new(false),
        }
    }

    /// Takes what tells of FORGETs that the guest has sent and nobody has read yet.
    pub(crate) fn attach_backlog(&self, backlog: Backlog) {
        self.forgets.attach(backlog);
    }

    /// Forgets everything that the guest has set up.
    pub fn reset(&self) {
        self.lists_unopened.store(false, Ordering::Relaxed);
        self.setxattr_ext.store(false, Ordering::Relaxed);
        self.tree.go_unopened(false);
        self.tree.reset();
    }

    /// Carries out one request and completes it, now or later.
    pub fn handle(&self, mut request: Request) {
        let mut bytes = [0; size_of::<InHeader>()];
        let header = match request.readable.read_exact(&mut bytes) {
            Ok(()) => InHeader::read_from_bytes(&bytes).unwrap_or_default(),
            Err(_) => return request.complete(0),
        };
        // A request without room for it gets no reply: FORGET.
        let replies = request.writable.set_aside(HEADER_LEN).is_ok();
        let result = self.dispatch(&header, &mut request.readable, &mut request.writable);
        match result {
            Ok(Answer::Later(task)) => {
                let (tree, forgets) = (Arc::clone(&self.tree), Arc::clone(&self.forgets));
                self.pool.run(move || {
                    let result = forgets.insist(|| task.perform(&tree, &mut request.writable));
                    answer::send(&header, replies, request, result);
                });
            }
            Ok(Answer::Closed(fh)) => {
                let closed = self.tree.release(fh);
                answer::send(&header, replies, request, Ok(Answer::empty()));
                // Closing may take long, and tells the guest nothing.
                drop(closed);
            }
            Ok(Answer::Locked(id, lock)) => {
                let done = move |result: Result<(), Errno>| {
                    let result = result.map(|()| Answer::empty());
                    answer::send(&header, replies, request, result);
                };
                self.tree
                    .lock_when_free(id, &lock, header.unique, Box::new(done));
            }
            result => answer::send(&header, replies, request, result),
        }
    }

    fn dispatch(
        &self,
        header: &InHeader,
        readable: &mut Segments,
        writable: &mut Segments,
    ) -> Result<Answer, Errno> {
        let declared = header.len as usize;
        let len = declared
            .checked_sub(size_of::<InHeader>())
            .ok_or(Errno::INVAL)?;
        if len > readable.len() {
            return Err(Errno::INVAL);
        }
        readable.truncate(len);
        if header.opcode == opcode::WRITE {
            return self.write(header.nodeid, readable);
        }
        if len > BODY_MAX {
            return Err(Errno::TOOBIG);
        }
        let (mut small, mut large) = ([0; BODY_SMALL], Vec::new());
        let bytes = match small.get_mut(..len) {
            Some(bytes) => bytes,
            None => {
                large.resize(len, 0);
                large.as_mut_slice()
            }
        };
        readable.read_exact(bytes).map_err(|_| Errno::INVAL)?;
        let extensions = 8 * usize::from(header.total_extlen);
        let body = len.checked_sub(extensions).ok_or(Errno::INVAL)?;
        let (body, extensions) = bytes.split_at(body);
        let long = self.setxattr_ext.load(Ordering::Relaxed);
        let operation = request::parse(header.opcode, body, long).map_err(|error| match error {
            WireError::Short | WireError::Name => Errno::INVAL,
            // The guest takes that for a file system that has none, and asks no more.
            WireError::Opcode(opcode::IOCTL) => Errno::NOTTY,
            WireError::Opcode(_) => Errno::NOSYS,
        })?;
        // The one place where a read-only tree is kept from every change.
        if self.tree.rules().readonly && operation.mutates() {
            return Err(Errno::ROFS);
        }
        if let Operation::Read(args) = &operation {
            return self.read(header.nodeid, *args, writable);
        }
        let id = header.nodeid;
        let caller = Caller {
            uid: header.uid,
            gid: header.gid,
            other_gid: request::supplementary_group(extensions),
        };
        match operation {
            Operation::Lookup { .. }
            | Operation::Symlink { .. }
            | Operation::Mknod { .. }
            | Operation::Mkdir { .. }
            | Operation::Unlink { .. }
            | Operation::Rmdir { .. }
            | Operation::Rename { .. }
            | Operation::Link { .. }
            | Operation::Create { .. }
            | Operation::Tmpfile(_) => self.forgets.insist(|| self.names(id, caller, &operation)),
            Operation::Open(_)
            | Operation::Release(_)
            | Operation::Fsync { .. }
            | Operation::Opendir
            | Operation::Readdir { .. }
            | Operation::Releasedir { .. }
            | Operation::Fsyncdir { .. }
            | Operation::Fallocate(_)
            | Operation::Lseek(_)
            | Operation::CopyFileRange(_) => self.opened(id, caller, &operation, writable),
            Operation::Flush(_)
            | Operation::Getlk(_)
            | Operation::Setlk { .. }
            | Operation::Interrupt(_) => self.locks(id, &operation),
            _ => self
                .forgets
                .insist(|| self.attributes(id, caller, &operation)),
        }
    }

    /// Requests about locks, where they are the host's; the guest keeps its own otherwise.
    fn locks(&self, id: u64, operation: &Operation<'_>) -> Result<Answer, Errno> {
        let tree = &self.tree;
        if let Operation::Interrupt(args) = operation {
            // Everything else is carried out at once.
            tree.interrupt(args.unique);
            return Ok(Answer::None);
        }
        if !tree.rules().locks {
            return Err(Errno::NOSYS);
        }
        match operation {
            Operation::Flush(args) => tree.unlock(id, args.fh, args.lock_owner, false),
            Operation::Getlk(args) => return Ok(Answer::of(&tree.test_lock(id, args)?)),
            Operation::Setlk { args, wait: true } => return Ok(Answer::Locked(id, *args)),
            Operation::Setlk { args, wait: false } => tree.lock(id, args)?,
            _ => return Err(Errno::NOSYS),
        }
        Ok(Answer::empty())
    }

    /// Requests that name an entry of a directory.
    fn names(&self, id: u64, caller: Caller, operation: &Operation<'_>) -> Result<Answer, Errno> {
        let tree = &self.tree;
        Ok(match operation {
            Operation::Lookup { name } => match tree.lookup(id, name)? {
                Some(entry) => Answer::of(&entry),
                None => Answer::of(&tree.absent().ok_or(Errno::NOENT)?),
            },
            Operation::Symlink { name, target } => {
                Answer::of(&tree.symlink(id, name, target, caller)?)
            }
            Operation::Mknod { args, name } => Answer::of(&tree.mknod(id, name, args, caller)?),
            Operation::Mkdir { args, name } => Answer::of(&tree.mkdir(id, name, *args, caller)?),
            Operation::Link { node, name } => Answer::of(&tree.link(*node, id, name)?),
            Operation::Create { args, name } => {
                let (entry, opened) = tree.create(id, name, args, caller)?;
                Answer::pair(&entry, &opened)
            }
            Operation::Tmpfile(args) => {
                let (entry, opened) = tree.tmpfile(id, args, caller)?;
                Answer::pair(&entry, &opened)
            }
            Operation::Unlink { name } => {
                tree.unlink(id, name, false)?;
                Answer::empty()
            }
            Operation::Rmdir { name } => {
                tree.unlink(id, name, true)?;
                Answer::empty()
            }
            Operation::Rename {
                newdir,
                flags,
                old,
                new,
            } => {
                tree.rename((id, old), (*newdir, new), *flags)?;
                Answer::empty()
            }
            _ => return Err(Errno::NOSYS),
        })
    }

    /// Requests about open files and directories.
    fn opened(
        &self,
        id: u64,
        caller: Caller,
        operation: &Operation<'_>,
        writable: &mut Segments,
    ) -> Result<Answer, Errno> {
        let tree = &self.tree;
        match operation {
            Operation::Open(args) => {
                if tree.is_unopened() {
                    return Err(Errno::NOSYS);
                }
                Ok(Answer::of(&tree.open(id, args.flags, args.open_flags)?))
            }
            Operation::Opendir if self.lists_unopened.load(Ordering::Relaxed) => Err(Errno::NOSYS),
            Operation::Opendir => Ok(Answer::of(&tree.opendir(id)?)),
            Operation::Readdir { args, plus } => {
                let wanted = Wanted {
                    offset: args.offset,
                    plus: *plus,
                    size: args.size as usize,
                };
                Ok(Answer::Placed(tree.readdir(id, args.fh, wanted, writable)?))
            }
            Operation::Lseek(args) => {
                let offset = tree.lseek(id, args)?;
                Ok(Answer::of(&LseekOut { offset }))
            }
            Operation::CopyFileRange(args) => Ok(Answer::Later(Task::Copy(id, *args, caller))),
            Operation::Release(args) => {
                if args.release_flags & RELEASE_FLOCK_UNLOCK != 0 {
                    tree.unlock(id, args.fh, args.lock_owner, true);
                }
                Ok(Answer::Closed(args.fh))
            }
            Operation::Releasedir { fh } => Ok(Answer::Closed(*fh)),
            Operation::Fsync { fh, data_only } => {
                let (fh, data_only) = (*fh, *data_only);
                Ok(Answer::Later(Task::Fsync { id, fh, data_only }))
            }
            Operation::Fsyncdir { fh, data_only } => {
                let (fh, data_only) = (*fh, *data_only);
                Ok(Answer::Later(Task::Fsyncdir { id, fh, data_only }))
            }
            Operation::Fallocate(args) => Ok(Answer::Later(Task::Fallocate(id, *args, caller))),
            _ => Err(Errno::NOSYS),
        }
    }

    /// Requests about attributes, the file system as a whole, and the session itself.
    fn attributes(
        &self,
        id: u64,
        caller: Caller,
        operation: &Operation<'_>,
    ) -> Result<Answer, Errno> {
        let tree = &self.tree;
        match operation {
            Operation::Getattr(args) => {
                let fh = (args.flags & GETATTR_FH != 0).then_some(args.fh);
                return Ok(Answer::of(&tree.getattr(id, fh)?));
            }
            Operation::Statx(args) => {
                let fh = (args.getattr_flags & GETATTR_FH != 0).then_some(args.fh);
                return Ok(Answer::of(&tree.statx(id, fh)?));
            }
            Operation::Setattr(args) => return Ok(Answer::of(&tree.setattr(id, args)?)),
            Operation::Readlink => return Ok(Answer::Bytes(tree.readlink(id)?)),
            Operation::Statfs => {
                // What the guest has removed is free.
                self.forgets.catch_up();
                return self.statfs(id);
            }
            Operation::Getxattr { size, name } => {
                return sized(tree.getxattr(id, name)?, *size);
            }
            Operation::Listxattr { size } => return sized(tree.listxattr(id)?, *size),
            Operation::Setxattr {
                flags,
                name,
                value,
                kill_sgid,
            } => tree.setxattr(id, (name, value, *flags), *kill_sgid, caller)?,
            Operation::Removexattr { name } => tree.removexattr(id, name)?,
            Operation::Access { mask } => tree.access(id, *mask, caller)?,
            Operation::Syncfs => return Ok(Answer::Later(Task::Syncfs)),
            Operation::Init { args, flags2 } => return self.init(args, *flags2),
            Operation::Destroy => self.reset(),
            Operation::Forget { count } => {
                tree.forget(id, *count);
                self.forgets.note();
                return Ok(Answer::None);
            }
            Operation::BatchForget { list } => {
                for one in list {
                    tree.forget(one.nodeid, one.nlookup);
                }
                self.forgets.note();
                return Ok(Answer::None);
            }
            _ => return Err(Errno::NOSYS),
        }
        Ok(Answer::empty())
    }

    fn init(&self, args: &InitIn, flags2: u32) -> Result<Answer, Errno> {
        self.reset();
        let mut out = InitOut {
            major: abi::MAJOR,
            minor: abi::MINOR,
            ..InitOut::new_zeroed()
        };
        if args.major < abi::MAJOR {
            return Err(Errno::PROTO);
        }
        if args.major > abi::MAJOR {
            // The guest begins again with the version it is told.
            return Ok(Answer::of(&out));
        }
        let mut offered = u64::from(args.flags);
        if offered & init::INIT_EXT != 0 {
            offered |= u64::from(flags2) << 32;
        }
        let rules = self.tree.rules();
        let mut wanted = init::ASYNC_READ
            | init::BIG_WRITES
            | init::ATOMIC_O_TRUNC
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::HANDLE_KILLPRIV_V2
            | init::MAX_PAGES
            | init::CACHE_SYMLINKS
            | init::INIT_EXT
            | init::CREATE_SUPP_GROUP
            | init::ALLOW_IDMAP;
        if self.tree.may_go_unopened() {
            wanted |= init::NO_OPEN_SUPPORT;
            // Nobody would see the flag.
            wanted &= !init::ATOMIC_O_TRUNC;
        }
        if self.tree.may_list_unopened() {
            wanted |= init::NO_OPENDIR_SUPPORT;
        }
        if rules.writeback && !rules.readonly {
            wanted |= init::WRITEBACK_CACHE;
        }
        if rules.locks {
            wanted |= init::POSIX_LOCKS | init::FLOCK_LOCKS;
        }
        if rules.lists {
            wanted |= init::POSIX_ACL | init::DONT_MASK | init::SETXATTR_EXT;
        }
        if rules.submounts {
            wanted |= init::SUBMOUNTS;
        }
        if matches!(rules.caching, Caching::Never | Caching::Metadata) {
            wanted |= init::DIRECT_IO_ALLOW_MMAP;
        }
        let agreed = offered & wanted;
        self.tree.go_unopened(agreed & init::NO_OPEN_SUPPORT != 0);
        let lists_unopened = agreed & init::NO_OPENDIR_SUPPORT != 0;
        self.lists_unopened.store(lists_unopened, Ordering::Relaxed);
        let long = agreed & init::SETXATTR_EXT != 0;
        self.setxattr_ext.store(long, Ordering::Relaxed);
        out.max_readahead = args.max_readahead;
        out.flags = u32::try_from(agreed & u64::from(u32::MAX)).unwrap_or(0);
        out.flags2 = u32::try_from(agreed >> 32).unwrap_or(0);
        out.max_background = u16::MAX;
        out.congestion_threshold = u16::MAX / 4 * 3;
        out.max_write = DATA_MAX;
        out.time_gran = 1;
        out.max_pages = u16::try_from(DATA_MAX / PAGE_SIZE).unwrap_or(u16::MAX);
        Ok(Answer::of(&out))
    }

    fn statfs(&self, id: u64) -> Result<Answer, Errno> {
        let found = self.tree.statfs(id)?;
        let small = |value| u32::try_from(value).unwrap_or(u32::MAX);
        Ok(Answer::of(&StatfsOut {
            blocks: found.f_blocks,
            bfree: found.f_bfree,
            bavail: found.f_bavail,
            files: found.f_files,
            ffree: found.f_ffree,
            bsize: small(found.f_bsize),
            namelen: small(found.f_namemax),
            frsize: small(found.f_frsize),
            ..StatfsOut::new_zeroed()
        }))
    }

    fn read(&self, id: u64, args: ReadIn, into: &mut Segments) -> Result<Answer, Errno> {
        let size = (args.size as usize).min(into.len());
        match self
            .tree
            .read_cached(id, args.fh, (args.offset, size), into)?
        {
            Progress::Done(len) => Ok(Answer::Placed(len)),
            Progress::Waits(done) => Ok(Answer::Later(Task::Read { id, args, done })),
        }
    }

    fn write(&self, id: u64, body: &mut Segments) -> Result<Answer, Errno> {
        if self.tree.rules().readonly {
            return Err(Errno::ROFS);
        }
        let mut bytes = [0; size_of::<WriteIn>()];
        body.read_exact(&mut bytes).map_err(|_| Errno::INVAL)?;
        let args = WriteIn::read_from_bytes(&bytes).map_err(|_| Errno::INVAL)?;
        let (whole, forgotten) = (body.len(), self.forgets.done());
        let mut size = self.forgets.insist(|| match body.len() == whole {
            true => self.tree.write(id, &args, body),
            // It was written, and something else has failed.
            false => Err(Errno::NOSPC),
        })?;
        if size < args.size && self.forgets.gained(forgotten) {
            let rest = WriteIn {
                offset: args.offset.saturating_add(u64::from(size)),
                size: args.size - size,
                ..args
            };
            size += self.tree.write(id, &rest, body).unwrap_or(0);
        }
        Ok(Answer::of(&WriteOut { size, padding: 0 }))
    }
}

/// An attribute in the form of GETXATTR and LISTXATTR: its length alone when no room is offered.
fn sized(value: Vec<u8>, room: u32) -> Result<Answer, Errno> {
    let size = u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?;
    match room {
        0 => Ok(Answer::of(&GetxattrOut { size, padding: 0 })),
        room if room < size => Err(Errno::RANGE),
        _ => Ok(Answer::Bytes(value)),
    }
}

const _: () = assert!(size_of::<OutHeader>() == HEADER_LEN);
