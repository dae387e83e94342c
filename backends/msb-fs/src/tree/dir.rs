//! Listing directories.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use msb_vhost::Segments;
use rustix::fs::{FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use super::table::{Cold, DirHandle, Found, Node, Place, Stream, is_grown, is_settled};
use super::{Caching, FILE_ID, Result, Tree};
use crate::sys;
use crate::wire::abi::{EntryOut, OpenOut, ROOT_ID, fopen};
use crate::wire::dirent::{self, HostEntry};
use crate::wire::reply::Listing;

/// What is read from the host at once, kept for the requests that follow.
const READ_AHEAD: usize = 1 << 16;
/// Buffers that are kept for the next listings.
const SPARE: usize = 4;
/// What the longest entry takes there.
const LONGEST: usize = 280;

/// Buffers for entries that no listing uses.
#[derive(Default)]
pub(crate) struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    fn take(&self) -> Vec<u8> {
        let spare = lock(&self.0).pop();
        spare.unwrap_or_else(|| vec![0; READ_AHEAD])
    }

    fn put(&self, buffer: Vec<u8>) {
        let mut spare = lock(&self.0);
        if spare.len() < SPARE {
            spare.push(buffer);
        }
    }
}

/// What a listing is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Position where it goes on.
    pub offset: u64,
    /// With the attributes of each entry, which counts as looked up.
    pub plus: bool,
    /// Room for the reply.
    pub size: usize,
}

/// The override of an entry may be read by name: nobody puts another inode there meanwhile, or it
/// is looked at again afterwards.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    Calm,
    Moving,
}

impl Tree {
    /// Opens a directory for listing.
    pub fn opendir(&self, id: u64) -> Result<OpenOut> {
        let node = if self.is_single() && id == ROOT_ID {
            None
        } else {
            Some(self.directory(id)?)
        };
        let open_flags = match (self.rules.caching, &node) {
            (Caching::Always, Some(_)) => fopen::CACHE_DIR | fopen::KEEP_CACHE,
            (Caching::Auto, Some(node)) if node.unchanged(&sys::fstat(&node.file)?) => {
                fopen::CACHE_DIR | fopen::KEEP_CACHE
            }
            (Caching::Auto, Some(_)) => fopen::CACHE_DIR,
            _ => 0,
        };
        let mut stream = Stream::default();
        if let Some(node) = &node {
            stream.file = Some(self.open_stream(node)?);
        }
        let handle = DirHandle {
            id,
            node,
            stream: Mutex::new(stream),
        };
        Ok(OpenOut {
            fh: self.handles.add_dir(handle)?,
            open_flags,
            backing_id: 0,
        })
    }

    /// Another descriptor of a directory, with a position of its own.
    fn open_stream(&self, node: &Node) -> Result<std::os::fd::OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK;
        match self.with_room(|| sys::open_in(&node.file, c".", flags, 0)) {
            // The server may not search it, or reaches it in another way.
            Err(Errno::ACCESS | Errno::BADF) => self.reopen(node, flags),
            result => result,
        }
    }

    /// Brings a directory to the host's disk.
    pub fn fsyncdir(&self, id: u64, fh: u64, data_only: bool) -> Result<()> {
        let node = if fh == 0 {
            Some(self.directory(id)?)
        } else {
            self.handles.dir(fh, id)?.node.clone()
        };
        match &node {
            Some(node) if data_only => rustix::fs::fdatasync(&node.file),
            Some(node) => rustix::fs::fsync(&node.file),
            None => Ok(()),
        }
    }

    /// Lists a directory into the front of `into`; returns how many bytes that took.
    pub fn readdir(&self, id: u64, fh: u64, wanted: Wanted, into: &mut Segments) -> Result<usize> {
        let handle = self.listing(id, fh, wanted.offset)?;
        let mut stream = lock(&handle.stream);
        let mut reply = std::mem::take(&mut stream.reply);
        reply.clear();
        let mut list = Listing::new(&mut reply, wanted.size.min(into.len()));
        let result = match &handle.node {
            None => self.list_single(wanted, &mut list),
            Some(node) => self.list(node, &mut stream, wanted, &mut list),
        };
        let result = result.and_then(|()| into.write_all(&reply).map_err(|_| Errno::IO));
        let len = reply.len();
        stream.reply = reply;
        drop(stream);
        // A guest that does not open does not say either when it is done.
        if fh == 0 && (len == 0 || result.is_err()) {
            self.listings.remove(&handle);
        }
        result.map(|()| len)
    }

    /// The listing of an open directory. Handle zero is that of a guest that does not open: it
    /// goes on where an earlier request has ended, or begins.
    fn listing(&self, id: u64, fh: u64, offset: u64) -> Result<Arc<DirHandle>> {
        if fh != 0 {
            return self.handles.dir(fh, id);
        }
        if let Some(found) = self.listings.find(id, offset) {
            return Ok(found);
        }
        let node = self.directory(id)?;
        let file = self.open_stream(&node)?;
        let stream = Stream {
            file: Some(file),
            ..Stream::default()
        };
        let handle = Arc::new(DirHandle {
            id,
            node: Some(node),
            stream: Mutex::new(stream),
        });
        self.listings.add(Arc::clone(&handle));
        Ok(handle)
    }

    fn list(
        &self,
        dir: &Node,
        stream: &mut Stream,
        wanted: Wanted,
        list: &mut Listing<'_>,
    ) -> Result<()> {
        // Position zero is a rewinddir(3): what was read ahead is out of date.
        let fresh = stream.position == 0 && stream.filled == 0;
        if wanted.offset != stream.position || (wanted.offset == 0 && !fresh) {
            seek(stream, wanted.offset)?;
        }
        if !wanted.plus || self.overlay.is_off() {
            return self.list_entries(dir, stream, (wanted, Names::Calm), list);
        }
        let before = sys::stat(&dir.file)?;
        let names = if is_settled(&before) {
            Names::Calm
        } else {
            Names::Moving
        };
        let at = stream.at;
        self.list_entries(dir, stream, (wanted, names), list)?;
        if names == Names::Calm && sys::stat(&dir.file)?.changed() != before.changed() {
            // An entry was moved while it was looked at. Once more, carefully.
            for id in list.nodes() {
                self.nodes.forget(id, 1);
            }
            list.clear();
            if stream.position != wanted.offset {
                seek(stream, wanted.offset)?;
            } else {
                stream.at = at;
            }
            self.list_entries(dir, stream, (wanted, Names::Moving), list)?;
        }
        Ok(())
    }

    fn list_entries(
        &self,
        dir: &Node,
        stream: &mut Stream,
        (wanted, names): (Wanted, Names),
        list: &mut Listing<'_>,
    ) -> Result<()> {
        loop {
            let rest = stream.buffer.get(stream.at..stream.filled);
            let Some((entry, len)) = dirent::next(rest.unwrap_or_default()) else {
                let Some(file) = &stream.file else {
                    return Err(Errno::BADF);
                };
                // A host that has left room has no more. Whether that is still so, it is asked when
                // the guest asks again, as guests do until they are told of nothing.
                let room = stream.buffer.len().saturating_sub(stream.filled);
                if stream.filled > 0 && room >= LONGEST && !list.is_empty() {
                    return Ok(());
                }
                // The end is only the end when the kernel says so again: entries may be added.
                if stream.buffer.is_empty() {
                    stream.buffer = self.buffers.take();
                }
                stream.at = 0;
                stream.filled = sys::read_dir(file, &mut stream.buffer)?;
                if stream.filled == 0 {
                    self.buffers.put(std::mem::take(&mut stream.buffer));
                    return Ok(());
                }
                continue;
            };
            if !list.fits(entry.name.to_bytes().len(), wanted.plus) {
                return if list.is_empty() {
                    Err(Errno::INVAL)
                } else {
                    Ok(())
                };
            }
            self.list_entry(dir, &entry, (wanted.plus, names), list);
            stream.position = entry.next;
            stream.at += len;
        }
    }

    fn list_entry(
        &self,
        dir: &Node,
        entry: &HostEntry<'_>,
        (plus, names): (bool, Names),
        list: &mut Listing<'_>,
    ) {
        let name = entry.name.to_bytes();
        let mut push = |found: EntryOut, ino, kind: u32| {
            list.push(plus.then_some(&found), ino, entry.next, kind >> 12, name);
        };
        let host = u32::from(entry.kind) << 12;
        if name == b"." || name == b".." {
            // What lies above the root is none of the guest's business.
            let ino = if dir.id == ROOT_ID {
                dir.key.1
            } else {
                entry.ino
            };
            return push(EntryOut::default(), ino, host);
        }
        if plus {
            return match self.meet(dir, entry.name, names) {
                Ok(found) => push(found, found.attr.ino, found.attr.mode),
                // It has gone since the host was read.
                Err(Errno::NOENT) => {}
                // Listed all the same: whoever looks closer gets the error.
                Err(_) => push(EntryOut::default(), entry.ino, host),
            };
        }
        let kind = self.peek(dir, entry.name, host).unwrap_or(host);
        push(EntryOut::default(), entry.ino, kind);
    }

    /// Finds or makes the node of an entry, without opening it, and counts one lookup of it.
    fn meet(&self, dir: &Node, name: &CStr, names: Names) -> Result<EntryOut> {
        let stat = sys::stat_in(&dir.file, name)?;
        let (id, attr) = match self.nodes.find(&stat, dir.id, name) {
            Some((id, Found::Live(node))) => (id, self.overlay.attr(&node, &stat)),
            Some((id, Found::Cold(cold))) => {
                if self.overlay.is_stored(cold.kind) && cold.facts.view(&stat).is_none() {
                    let found = self.override_of(dir, name, &stat, names);
                    if let Ok(found) = found {
                        self.nodes.facts(id, |facts| facts.remember(&stat, found));
                    }
                    (id, found.map(|found| self.overlay.merged(&stat, found)))
                } else {
                    (id, self.cold_attr(id, &cold, &stat))
                }
            }
            None if !is_grown(&stat) => self.admit(dir, name, &stat)?,
            None => {
                let found = self.override_of(dir, name, &stat, names)?;
                let mut cold = Cold::new(&stat, Place::new(dir.id, name));
                cold.facts.remember(&stat, found);
                let id = self.nodes.insert_cold(&stat, cold)?;
                (id, Ok(self.overlay.merged(&stat, found)))
            }
        };
        let mut attr = attr.inspect_err(|_| self.nodes.forget(id, 1))?;
        self.mark_submount(dir, &stat, &mut attr);
        Ok(self.entry(id, attr))
    }

    /// The override of `name`, which was seen to be `stat`.
    fn override_of(
        &self,
        dir: &Node,
        name: &CStr,
        stat: &sys::Stat,
        names: Names,
    ) -> Result<Option<super::Override>> {
        let found = self.overlay.read_in(dir.fd(), name, stat.kind())?;
        if names == Names::Moving && self.overlay.is_stored(stat.kind()) {
            let again = sys::stat_in(&dir.file, name)?;
            let same = (again.st_dev, again.st_ino, again.changed())
                == (stat.st_dev, stat.st_ino, stat.changed());
            if !same {
                return Err(Errno::AGAIN);
            }
        }
        Ok(found)
    }

    /// The type of an entry in the guest, without making a node of it. `host` is what the
    /// directory says.
    fn peek(&self, dir: &Node, name: &CStr, host: u32) -> Result<u32> {
        let mut kind = FileType::from_raw_mode(host);
        if kind == FileType::Unknown {
            kind = sys::stat_in(&dir.file, name)?.kind();
        }
        if kind != FileType::RegularFile {
            return Ok(kind.as_raw_mode());
        }
        let found = self.overlay.read_in(dir.file.as_fd(), name, kind)?;
        Ok(found.map_or(kind.as_raw_mode(), |found| found.mode))
    }

    /// Lists the root of a single-file mount.
    fn list_single(&self, wanted: Wanted, list: &mut Listing<'_>) -> Result<()> {
        let Some(single) = &self.single else {
            return Err(Errno::NOTDIR);
        };
        let names = [c".", c"..", single.name.as_c_str()];
        for (name, next) in names.into_iter().zip(1u64..) {
            if next <= wanted.offset {
                continue;
            }
            if !list.fits(name.to_bytes().len(), wanted.plus) {
                break;
            }
            let (mut found, mut ino, mut kind) = (EntryOut::default(), ROOT_ID, 0o040_000);
            if next == 3 {
                match self.getattr(FILE_ID, None) {
                    Ok(out) => {
                        (ino, kind) = (out.attr.ino, out.attr.mode);
                        found = self.entry(FILE_ID, out.attr);
                    }
                    Err(Errno::NOENT) => continue,
                    Err(error) => return Err(error),
                }
            }
            list.push(
                wanted.plus.then_some(&found),
                ino,
                next,
                kind >> 12,
                name.to_bytes(),
            );
        }
        Ok(())
    }
}

/// Goes on at `offset`, which a listing has given, and forgets what was read ahead.
fn seek(stream: &mut Stream, offset: u64) -> Result<()> {
    if let Some(file) = &stream.file {
        rustix::fs::seek(file, SeekFrom::Start(offset))?;
    }
    (stream.at, stream.filled) = (0, 0);
    stream.position = offset;
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
