//! Opening files, and their content.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use msb_vhost::Segments;
use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use super::table::{FileHandle, Node};
use super::{Caching, Caller, Result, Tree};
use crate::quota::{Account, BLOCK, Room, Tally};
use crate::sys::{self, Stat};
use crate::wire::abi::{
    CopyFileRangeIn, FallocateIn, LseekIn, OPEN_KILL_SUIDGID, OpenOut, WRITE_CACHE,
    WRITE_KILL_SUIDGID, WriteIn, fopen, oflag,
};

/// pwritev2(2): this write goes to the end of the file.
const RWF_APPEND: i32 = 0x10;

/// preadv2(2): fail rather than wait for the disk.
const RWF_NOWAIT: i32 = 8;

/// How far a read has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So many bytes, and there are no more.
    Done(usize),
    /// So many bytes; the rest must be waited for.
    Waits(usize),
}

/// What a request reads from or writes to.
enum OpenFile {
    /// What the guest has opened.
    Handle(Arc<FileHandle>),
    /// The node itself; for writing or not.
    Node(Arc<Node>, bool),
    /// Opened for this request alone.
    Once(Arc<Node>, OwnedFd),
}

impl OpenFile {
    fn node(&self) -> &Node {
        match self {
            Self::Handle(handle) => &handle.node,
            Self::Node(node, _) | Self::Once(node, _) => node,
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Handle(handle) => handle.fd(),
            Self::Node(node, true) => node.writer().unwrap_or_else(|| node.fd()),
            Self::Node(node, false) => node.fd(),
            Self::Once(_, own) => own.as_fd(),
        }
    }

    fn appends(&self) -> bool {
        matches!(self, Self::Handle(handle) if handle.append)
    }
}

impl Tree {
    /// Opens a regular file.
    pub fn open(&self, id: u64, flags: u32, open_flags: u32) -> Result<OpenOut> {
        let node = self.node(id)?;
        match node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        let truncate = flags & oflag::TRUNC != 0;
        let writes = flags & oflag::ACCMODE != 0;
        let own = if truncate || writes {
            let access = match flags & oflag::ACCMODE {
                oflag::WRONLY if !self.rules.writeback => OFlags::WRONLY,
                _ => OFlags::RDWR,
            };
            // The descriptor of a file that was created here serves for writing as well.
            if node.writable {
                None
            } else {
                Some(self.reopen(&node, access)?)
            }
        } else if node.readable {
            None
        } else {
            Some(self.reopen(&node, OFlags::RDONLY)?)
        };
        let handle = FileHandle {
            node,
            own,
            append: flags & oflag::APPEND != 0 && !self.rules.writeback,
        };
        if truncate {
            let kill = open_flags & OPEN_KILL_SUIDGID != 0;
            self.content(&handle.node, kill, || {
                let cut = |_: &mut Tally| rustix::fs::ftruncate(handle.fd(), 0);
                self.within(&[handle.fd()], Room::Fixed(0, 0), cut)
            })?;
        }
        let stat = sys::fstat(handle.fd())?;
        self.opened(handle, &stat)
    }

    /// Registers an open file and says what the guest may cache of it.
    pub(crate) fn opened(&self, handle: FileHandle, stat: &Stat) -> Result<OpenOut> {
        if self.is_unopened() {
            // A file that was created is used like all others, and never released.
            return Ok(OpenOut {
                fh: 0,
                open_flags: fopen::KEEP_CACHE,
                backing_id: 0,
            });
        }
        let unchanged = handle.node.unchanged(stat);
        let open_flags = match self.rules.caching {
            Caching::Never | Caching::Metadata => fopen::DIRECT_IO,
            Caching::Always => fopen::KEEP_CACHE,
            Caching::Auto if unchanged => fopen::KEEP_CACHE,
            Caching::Auto => 0,
        };
        Ok(OpenOut {
            fh: self.handles.add_file(handle)?,
            open_flags,
            backing_id: 0,
        })
    }

    /// Opens the host file of a node once more. In the modes that keep the guest's permissions
    /// apart, those of the host do not stand in the way of the files' owner.
    pub(crate) fn reopen(&self, node: &Node, flags: OFlags) -> Result<OwnedFd> {
        if !matches!(node.kind, FileType::RegularFile | FileType::Directory) {
            return Err(Errno::NXIO);
        }
        let result = self.with_room(|| sys::reopen(node.fd(), flags));
        if !matches!(result, Err(Errno::ACCESS)) || self.overlay.is_off() || self.rules.readonly {
            return result;
        }
        let _guard = self.overlay.lock();
        let stat = sys::stat(&node.file)?;
        if !self.overlay.owns(&stat) {
            return result;
        }
        let mode = stat.st_mode & 0o7777;
        sys::chmod(node.fd(), mode | 0o600)?;
        let result = sys::reopen(node.fd(), flags);
        sys::chmod(node.fd(), mode)?;
        result
    }

    /// The open file `fh` of node `id`. Handle zero is the node itself, for guests that do not
    /// open.
    fn handle(&self, id: u64, fh: u64, writes: bool) -> Result<OpenFile> {
        if fh != 0 {
            return Ok(OpenFile::Handle(self.handles.file(fh, id)?));
        }
        let node = self.node(id)?;
        if node.kind != FileType::RegularFile {
            return Err(Errno::BADF);
        }
        if !writes && !node.readable {
            let own = self.reopen(&node, OFlags::RDONLY)?;
            return Ok(OpenFile::Once(node, own));
        }
        if writes && node.writer().is_none() {
            let own = self.reopen(&node, OFlags::RDWR)?;
            node.set_writer(own);
        }
        Ok(OpenFile::Node(node, writes))
    }

    /// Reads up to `size` bytes into the front of `into`; fewer at the end of the file.
    pub fn read(
        &self,
        id: u64,
        fh: u64,
        (offset, size): (u64, usize),
        into: &mut Segments,
    ) -> Result<usize> {
        let file = self.handle(id, fh, false)?;
        // A regular file gives less only at its end.
        let read = into.pread(file.fd(), size, offset, 0);
        read.map_err(|error| errno(&error))
    }

    /// The same, as far as the host has the data in memory.
    pub fn read_cached(
        &self,
        id: u64,
        fh: u64,
        (offset, size): (u64, usize),
        into: &mut Segments,
    ) -> Result<Progress> {
        let file = self.handle(id, fh, false)?;
        let waits = self.reads_wait.load(Ordering::Relaxed);
        let flags = if waits { 0 } else { RWF_NOWAIT };
        let count = match into.pread(file.fd(), size, offset, flags) {
            Ok(count) => count,
            Err(error) => match errno(&error) {
                Errno::AGAIN if !waits => return Ok(Progress::Waits(0)),
                Errno::OPNOTSUPP if !waits => {
                    self.reads_wait.store(true, Ordering::Relaxed);
                    return Ok(Progress::Waits(0));
                }
                error => return Err(error),
            },
        };
        if count == size || waits {
            return Ok(Progress::Done(count));
        }
        // Either the end of the file, or of what is in memory.
        let end = u64::try_from(count)
            .ok()
            .and_then(|count| offset.checked_add(count));
        let whole =
            end.is_some_and(|end| sys::stat(file.fd()).is_ok_and(|stat| stat.st_size <= end));
        Ok(if whole {
            Progress::Done(count)
        } else {
            Progress::Waits(count)
        })
    }

    /// Writes the front of `from`; fewer bytes than asked for when the host has no room for more.
    pub fn write(&self, id: u64, args: &WriteIn, from: &mut Segments) -> Result<u32> {
        let handle = self.handle(id, args.fh, true)?;
        let size = args.size as usize;
        if from.len() < size {
            return Err(Errno::INVAL);
        }
        // What the guest writes back from its page cache has its place already.
        let append = handle.appends() && args.write_flags & WRITE_CACHE == 0;
        let place = (args.offset, size);
        let kill = args.write_flags & WRITE_KILL_SUIDGID != 0;
        let done = self.content(handle.node(), kill, || match &self.account {
            None => put(from, handle.fd(), place, append),
            Some(account) => {
                write_limited(account, from, handle.fd(), place, append, args.write_flags)
            }
        })?;
        u32::try_from(done).map_err(|_| Errno::INVAL)
    }

    /// Takes a handle back. It is closed when the value is dropped, which may take a while.
    pub fn release(&self, fh: u64) -> impl Send {
        self.handles.remove(fh)
    }

    /// Brings a file to the host's disk.
    pub fn fsync(&self, id: u64, fh: u64, data_only: bool) -> Result<()> {
        let handle = self.handle(id, fh, false)?;
        if data_only {
            rustix::fs::fdatasync(handle.fd())
        } else {
            rustix::fs::fsync(handle.fd())
        }
    }

    /// Brings the host file system to its disk.
    pub fn syncfs(&self) -> Result<()> {
        let node = match &self.single {
            Some(single) => self.single_node(single)?,
            None => self.node(crate::wire::abi::ROOT_ID)?,
        };
        rustix::fs::syncfs(&node.file)
    }

    /// Reserves or frees space of a file.
    pub fn fallocate(&self, id: u64, args: &FallocateIn, caller: Caller) -> Result<()> {
        let handle = self.handle(id, args.fh, true)?;
        let mode = FallocateFlags::from_bits(args.mode).ok_or(Errno::OPNOTSUPP)?;
        let end = args.offset.checked_add(args.length).ok_or(Errno::FBIG)?;
        let frees = FallocateFlags::PUNCH_HOLE
            | FallocateFlags::COLLAPSE_RANGE
            | FallocateFlags::INSERT_RANGE;
        let room = if mode.intersects(frees) {
            Room::Fixed(0, 0)
        } else {
            Room::Between(args.offset, end)
        };
        self.content(handle.node(), kills(caller), || {
            self.within(&[handle.fd()], room, |_| {
                rustix::fs::fallocate(handle.fd(), mode, args.offset, args.length)
            })
        })
    }

    /// Carries out a `change` of a file's content, which takes setuid and setgid away or leaves
    /// them.
    pub(super) fn content<T>(
        &self,
        node: &Node,
        kill: bool,
        change: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if !kill {
            return self.overlay.keeping_special(node, change);
        }
        let result = change()?;
        self.overlay.drop_special(node)?;
        Ok(result)
    }

    /// Finds the next data or hole of a file.
    pub fn lseek(&self, id: u64, args: &LseekIn) -> Result<u64> {
        let handle = self.handle(id, args.fh, false)?;
        let to = match args.whence {
            3 => SeekFrom::Data(args.offset),
            4 => SeekFrom::Hole(args.offset),
            _ => return Err(Errno::INVAL),
        };
        rustix::fs::seek(handle.fd(), to)
    }

    /// Copies from one open file to another on the host.
    pub fn copy(&self, id: u64, args: &CopyFileRangeIn, caller: Caller) -> Result<u32> {
        if args.flags != 0 {
            return Err(Errno::INVAL);
        }
        let from = self.handle(id, args.fh_in, false)?;
        let to = self.handle(args.nodeid_out, args.fh_out, true)?;
        let (mut at_from, mut at_to) = (args.off_in, args.off_out);
        // The reply has 32 bits; the guest asks again for the rest.
        let len = usize::try_from(args.len.min(1 << 30)).map_err(|_| Errno::INVAL)?;
        let mut copy = |len: usize| {
            let (from, at_from) = (from.fd(), Some(&mut at_from));
            rustix::fs::copy_file_range(from, at_from, to.fd(), Some(&mut at_to), len)
        };
        let limited = self.account.is_some();
        let all = || {
            if !limited {
                return copy(len);
            }
            // There is no more to copy than the source has.
            let source = sys::stat(from.fd())?.st_size.saturating_sub(args.off_in);
            let len = len.min(usize::try_from(source).unwrap_or(usize::MAX));
            let end = args.off_out.checked_add(len as u64).ok_or(Errno::FBIG)?;
            let room = Room::Between(args.off_out, end);
            self.within(&[to.fd()], room, |_| copy(len))
        };
        let done = self.content(to.node(), kills(caller), all)?;
        u32::try_from(done).map_err(|_| Errno::IO)
    }
}

/// Whether a change of content by FALLOCATE or COPY_FILE_RANGE, which say nothing of privilege
/// unlike WRITE, takes setuid and setgid away. Root keeps them. A guest that does not say who asks
/// (since it knows ALLOW_IDMAP) has sent an empty SETATTR before where they must go.
fn kills(caller: Caller) -> bool {
    const UNTOLD: u32 = u32::MAX;
    caller.uid != 0 && caller.uid != UNTOLD
}

/// Writes the front of `from` to `fd`, at a position or at the end of the file; fewer bytes when the
/// host has no room for more.
fn put(
    from: &mut Segments,
    fd: BorrowedFd<'_>,
    (offset, size): (u64, usize),
    append: bool,
) -> Result<usize> {
    let flags = if append { RWF_APPEND } else { 0 };
    let mut done = 0;
    while done < size {
        let at = u64::try_from(done)
            .ok()
            .and_then(|done| offset.checked_add(done));
        let at = at.ok_or(Errno::FBIG)?;
        match from.pwrite(fd, size - done, at, flags) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(_) if done > 0 => break,
            Err(error) => return Err(errno(&error)),
        }
    }
    Ok(done)
}

/// The same within a limit of space: what fits when not all does.
fn write_limited(
    account: &Account,
    from: &mut Segments,
    fd: BorrowedFd<'_>,
    (offset, mut size): (u64, usize),
    append: bool,
    flags: u32,
) -> Result<usize> {
    loop {
        let start = if append {
            sys::stat(fd)?.st_size
        } else {
            offset
        };
        let end = start.checked_add(size as u64).ok_or(Errno::FBIG)?;
        let result = account.change(&[fd], Room::Between(start, end), |_| {
            put(from, fd, (offset, size), append)
        });
        if result != Err(Errno::NOSPC) || flags & WRITE_CACHE != 0 {
            return result;
        }
        // Up to the end of the block that is there already, and what blocks are left.
        let tail = start.next_multiple_of(BLOCK) - start;
        let fits = tail.saturating_add(account.left() / BLOCK * BLOCK);
        match usize::try_from(fits) {
            Ok(fits) if fits > 0 && fits < size => size = fits,
            _ => return result,
        }
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::INVAL)
}
