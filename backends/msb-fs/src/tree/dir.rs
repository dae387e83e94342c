//! Listing directories.

use std::collections::VecDeque;
use std::ffi::CString;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::handle::{DirHandle, Stream};
use super::node::Node;
use super::{Caching, FILE_ID, Result, Tree};
use crate::sys::{self, RawEntry};
use crate::wire::abi::{EntryOut, OpenOut, ROOT_ID, fopen};
use crate::wire::reply::Listing;

impl Tree {
    /// Opens a directory for listing.
    pub fn opendir(&self, id: u64) -> Result<OpenOut> {
        let file = if self.is_single() && id == ROOT_ID {
            None
        } else {
            let node = self.directory(id)?;
            Some(self.reopen(&node, OFlags::RDONLY | OFlags::DIRECTORY)?)
        };
        let stream = Mutex::new(Stream {
            file,
            ahead: VecDeque::new(),
            position: 0,
            end: 0,
        });
        let open_flags = match self.rules.caching {
            Caching::Always if !self.is_single() => fopen::CACHE_DIR | fopen::KEEP_CACHE,
            _ => 0,
        };
        Ok(OpenOut {
            fh: self.handles.add_dir(DirHandle { id, stream })?,
            open_flags,
            backing_id: 0,
        })
    }

    /// Brings a directory to the host's disk.
    pub fn fsyncdir(&self, id: u64, fh: u64, data_only: bool) -> Result<()> {
        let handle = self.handles.dir(fh, id)?;
        let stream = handle.stream.lock().unwrap_or_else(PoisonError::into_inner);
        match &stream.file {
            Some(file) if data_only => rustix::fs::fdatasync(file),
            Some(file) => rustix::fs::fsync(file),
            None => Ok(()),
        }
    }

    /// Lists a directory from position `offset` on into `list`; with `plus`, every entry counts as
    /// looked up.
    pub fn readdir(
        &self,
        id: u64,
        fh: u64,
        offset: u64,
        plus: bool,
        list: &mut Listing,
    ) -> Result<()> {
        let handle = self.handles.dir(fh, id)?;
        let mut stream = handle.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if stream.file.is_none() {
            return self.list_single(offset, plus, list);
        }
        let dir = self.directory(id)?;
        // Position zero is a rewinddir(3): what was read ahead is out of date.
        if offset == 0 || offset != stream.position {
            stream.ahead.clear();
            stream.position = offset;
            stream.end = offset;
        }
        loop {
            if stream.ahead.is_empty() {
                let Some(file) = &stream.file else {
                    return Ok(());
                };
                let more = sys::read_dir(file, stream.end)?;
                let Some(last) = more.last() else {
                    return Ok(());
                };
                stream.end = last.next;
                stream.ahead = more.into();
            }
            while let Some(entry) = stream.ahead.front() {
                if !list.fits(entry.name.to_bytes().len(), plus) {
                    return if list.is_empty() {
                        Err(Errno::INVAL)
                    } else {
                        Ok(())
                    };
                }
                self.list_entry(&dir, entry, plus, list);
                stream.position = entry.next;
                stream.ahead.pop_front();
            }
        }
    }

    fn list_entry(&self, dir: &Node, entry: &RawEntry, plus: bool, list: &mut Listing) {
        let name = entry.name.to_bytes();
        let mut push = |found: EntryOut, ino, kind: u32| {
            list.push(plus.then_some(&found), ino, entry.next, kind >> 12, name);
        };
        let host = entry.kind.as_raw_mode();
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
            return match self.resolve(dir, &entry.name) {
                Ok((node, attr)) => push(self.entry(node.id, attr), attr.ino, attr.mode),
                // Listed all the same: whoever looks closer gets the error.
                Err(_) => push(EntryOut::default(), entry.ino, host),
            };
        }
        let virtual_kind = match entry.kind {
            FileType::RegularFile | FileType::Unknown if !self.overlay.is_off() => {
                self.peek(dir, &entry.name).unwrap_or(0)
            }
            _ => host,
        };
        push(EntryOut::default(), entry.ino, virtual_kind);
    }

    /// The type of an entry in the guest, without making a node of it.
    fn peek(&self, dir: &Node, name: &CString) -> Result<u32> {
        let stat = sys::stat_in(&dir.file, name)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Ok(stat.st_mode & 0o170_000);
        }
        let (file, stat, _) =
            super::lookup::open_known(&dir.file, name, &stat, self.rules.readonly)?;
        self.overlay.kind_of(std::os::fd::AsFd::as_fd(&file), &stat)
    }

    /// Lists the root of a single-file mount.
    fn list_single(&self, offset: u64, plus: bool, list: &mut Listing) -> Result<()> {
        let Some(single) = &self.single else {
            return Err(Errno::NOTDIR);
        };
        let names = [c".", c"..", single.name.as_c_str()];
        for (name, next) in names.into_iter().zip(1u64..) {
            if next <= offset {
                continue;
            }
            if !list.fits(name.to_bytes().len(), plus) {
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
                plus.then_some(&found),
                ino,
                next,
                kind >> 12,
                name.to_bytes(),
            );
        }
        Ok(())
    }
}
