//! Extended attributes of the guest.
//!
//! Names below `security.` and `trusted.` mean something to the host's kernel, and need privilege
//! there; an access control list would change its permissions. Except in the mode off they are kept
//! below `user.msb.`, which the guest never sees.

use std::ffi::{CStr, CString};
use std::os::fd::BorrowedFd;

use libc::S_ISGID;
use rustix::fs::{FileType, XattrFlags};
use rustix::io::Errno;
use rustix::path::Arg;

use super::overlay::PREFIX;
use super::table::Node;
use super::{Caller, Result, Tree};
use crate::quota::Room;
use crate::sys;
use crate::wire::acl::{self, Acl};

/// Longest value, the kernel's XATTR_SIZE_MAX.
const VALUE_MAX: usize = 1 << 16;
/// Names and values of one file together, where space is limited: an inode is charged as much, and
/// not all hosts count them among its blocks.
const ATTRIBUTES_MAX: usize = 4096;
/// Longest name.
const NAME_MAX: usize = 255;

impl Tree {
    /// The value of an attribute.
    pub fn getxattr(&self, id: u64, name: &CStr) -> Result<Vec<u8>> {
        let key = self.host_key(name)?;
        let node = self.node(id)?;
        let is_moved = key.as_c_str() != name;
        match read(node.fd(), &key) {
            Err(Errno::NODATA) => {}
            // Where the host shows nobody what is ours, as with overrides, there is nothing of ours:
            // the kernel asks for capabilities before it executes a file, and fails by any other
            // answer.
            Err(Errno::ACCESS | Errno::PERM) if is_moved => {}
            result => return result,
        }
        // Programs of the host may have given capabilities to the file.
        if name == c"security.capability" {
            return read(node.fd(), name);
        }
        Err(Errno::NODATA)
    }

    /// The names of all attributes, each ended by a zero byte.
    pub fn listxattr(&self, id: u64) -> Result<Vec<u8>> {
        let node = self.node(id)?;
        let all = sys::listxattr(node.fd())?;
        let mut shown = Vec::with_capacity(all.len());
        for name in all.split_inclusive(|byte| *byte == 0) {
            let inner = name.strip_prefix(PREFIX);
            let name = match inner {
                Some(inner) if !self.overlay.is_off() && self.is_moved(inner) => inner,
                Some(_) => continue,
                None if self.overlay.is_off() && self.is_list(name) => name,
                None if name.starts_with(b"system.") => continue,
                None if self.is_moved(name) && !self.overlay.is_off() => continue,
                None => name,
            };
            shown.extend_from_slice(name);
        }
        Ok(shown)
    }

    /// Sets an attribute, with the flags of setxattr(2). `kill_sgid` is what the guest says of a
    /// list: that its caller is neither root nor in the file's group, if it says anything.
    pub fn setxattr(
        &self,
        id: u64,
        (name, value, flags): (&CStr, &[u8], u32),
        kill_sgid: Option<bool>,
        caller: Caller,
    ) -> Result<()> {
        let (key, bytes) = (self.host_key(name)?, name.to_bytes());
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let node = self.node(id)?;
        if !self.overlay.is_off() && self.is_list(bytes) {
            return self.set_list(&node, (&key, value), kill_sgid, caller);
        }
        let result = if self.account.is_some() {
            self.within(&[node.fd()], Room::Fixed(1, 0), |_| {
                let others = attributes(node.fd(), &key)?;
                if others + key.as_bytes().len() + value.len() > ATTRIBUTES_MAX {
                    return Err(Errno::NOSPC);
                }
                sys::setxattr(node.fd(), key.as_c_str(), value, flags)
            })
        } else {
            sys::setxattr(node.fd(), key.as_c_str(), value, flags)
        };
        self.cannot_hold(&node, name, result)?;
        // The host's kernel has asked whether the server is in the group.
        if kill_sgid == Some(true) && bytes == acl::ACCESS {
            let mode = sys::stat(node.fd())?.st_mode & 0o7777;
            return sys::chmod(node.fd(), mode & !S_ISGID);
        }
        Ok(())
    }

    /// Removes an attribute.
    pub fn removexattr(&self, id: u64, name: &CStr) -> Result<()> {
        let key = self.host_key(name)?;
        let node = self.node(id)?;
        let result = sys::removexattr(node.fd(), key.as_c_str());
        match self.cannot_hold(&node, name, result) {
            Err(Errno::OPNOTSUPP) if node.kind == FileType::Symlink => Err(Errno::NODATA),
            result => result,
        }
    }

    /// Links and special files of the host hold no attribute of an ordinary user. Programs that
    /// ask for one below `security.` or `trusted.` expect EPERM for want of privilege alone.
    fn cannot_hold(&self, node: &Node, name: &CStr, result: Result<()>) -> Result<()> {
        let plain = matches!(node.kind, FileType::RegularFile | FileType::Directory);
        match result {
            Err(Errno::PERM)
                if !plain && !self.overlay.is_off() && self.is_moved(name.to_bytes()) =>
            {
                Err(Errno::OPNOTSUPP)
            }
            result => result,
        }
    }

    /// Sets an access control list that is kept apart from the host's.
    fn set_list(
        &self,
        node: &Node,
        (key, value): (&CStr, &[u8]),
        kill_sgid: Option<bool>,
        caller: Caller,
    ) -> Result<()> {
        let list = Acl::from_bytes(value).ok_or(Errno::INVAL)?;
        if key.to_bytes().ends_with(acl::DEFAULT) {
            return match node.kind {
                FileType::Directory => sys::setxattr(node.fd(), key, value, XattrFlags::empty()),
                _ => Err(Errno::ACCESS),
            };
        }
        let _guard = self.overlay.lock();
        let stat = sys::stat(node.fd())?;
        let mut view = self.overlay.view(node, &stat)?;
        view.mode = (view.mode & !0o777) | list.permissions();
        let outside = || !caller.is_in(view.gid) && node.kind != FileType::Directory;
        if kill_sgid.unwrap_or_else(outside) {
            view.mode &= !S_ISGID;
        }
        if list.is_minimal() {
            match sys::removexattr(node.fd(), key) {
                Ok(()) | Err(Errno::NODATA) => {}
                Err(error) => return Err(error),
            }
        } else {
            sys::setxattr(node.fd(), key, value, XattrFlags::empty())?;
        }
        self.overlay.write(node.fd(), &stat, view)
    }

    /// What new entries of the directory `parent` inherit.
    pub(super) fn default_list(&self, parent: &Node) -> Result<Option<Acl>> {
        let name = if self.overlay.is_off() {
            acl::DEFAULT.to_vec()
        } else {
            [PREFIX, acl::DEFAULT].concat()
        };
        match read(parent.fd(), name.as_slice()) {
            Ok(bytes) => Ok(Acl::from_bytes(&bytes)),
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::ACCESS | Errno::PERM) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Brings the access control list of a file into line with its new permission bits.
    pub(super) fn list_follows(&self, file: BorrowedFd<'_>, mode: u32) -> Result<()> {
        if !self.rules.lists {
            return Ok(());
        }
        let key = [PREFIX, acl::ACCESS].concat();
        match read(file, key.as_slice()).map(|bytes| Acl::from_bytes(&bytes)) {
            Ok(Some(list)) => {
                let bytes = list.with_mode(mode).to_bytes();
                sys::setxattr(file, key.as_slice(), &bytes, XattrFlags::empty())
            }
            Ok(None) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn is_list(&self, name: &[u8]) -> bool {
        let name = name.strip_suffix(b"\0").unwrap_or(name);
        self.rules.lists && (name == acl::ACCESS || name == acl::DEFAULT)
    }

    /// Whether the host keeps the attribute under another name.
    fn is_moved(&self, name: &[u8]) -> bool {
        name.starts_with(b"security.") || name.starts_with(b"trusted.") || self.is_list(name)
    }

    /// The name under which the host keeps the guest's attribute `name`.
    fn host_key(&self, name: &CStr) -> Result<CString> {
        let bytes = name.to_bytes();
        if bytes.is_empty() || bytes.len() > NAME_MAX {
            return Err(Errno::RANGE);
        }
        if bytes.starts_with(PREFIX) {
            return Err(Errno::ACCESS);
        }
        // Unasked, a list would change the host's permissions behind the override.
        if bytes.starts_with(b"system.") && !self.is_list(bytes) {
            return Err(Errno::OPNOTSUPP);
        }
        if self.overlay.is_off() || !self.is_moved(bytes) {
            return Ok(name.to_owned());
        }
        let key = [PREFIX, bytes].concat();
        if key.len() > NAME_MAX {
            return Err(Errno::RANGE);
        }
        CString::new(key).map_err(|_| Errno::INVAL)
    }
}

/// Length of all attributes of a file but `key`.
fn attributes(file: BorrowedFd<'_>, key: &CStr) -> Result<usize> {
    let list = sys::listxattr(file)?;
    let names = list.split_inclusive(|byte| *byte == 0);
    let mut total = 0;
    for name in names.filter_map(|name| CStr::from_bytes_with_nul(name).ok()) {
        if name != key {
            total += name.to_bytes().len() + sys::getxattr(file, name, &mut [])?;
        }
    }
    Ok(total)
}

/// The value of an attribute of the host.
fn read(file: BorrowedFd<'_>, name: impl Arg + Copy) -> Result<Vec<u8>> {
    let mut few = [0; 256];
    match sys::getxattr(file, name, &mut few) {
        Ok(len) => Ok(few.get(..len).unwrap_or(&few).to_vec()),
        Err(Errno::RANGE) => {
            let mut value = vec![0; VALUE_MAX];
            let len = sys::getxattr(file, name, &mut value)?;
            value.truncate(len);
            Ok(value)
        }
        Err(error) => Err(error),
    }
}

/// Stores what a new inode has inherited: a directory hands the default list on, and every inode
/// has the other.
pub(super) fn inherit_lists(file: BorrowedFd<'_>, default: Option<&Acl>, list: &Acl) -> Result<()> {
    let store = |name: &[u8], list: &Acl| {
        let key = [PREFIX, name].concat();
        sys::setxattr(file, key.as_slice(), &list.to_bytes(), XattrFlags::empty())
    };
    if let Some(default) = default {
        store(acl::DEFAULT, default)?;
    }
    if list.is_minimal() {
        return Ok(());
    }
    store(acl::ACCESS, list)
}
