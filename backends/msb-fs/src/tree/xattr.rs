//! Extended attributes of the guest.
//!
//! Names below `security.` and `trusted.` mean something to the host's kernel, and need privilege
//! there. Except in the mode off they are kept below `user.msb.`, which the guest never sees.

use std::ffi::{CStr, CString};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::overlay::PREFIX;
use super::{Result, Tree};
use crate::sys;

/// Longest value, the kernel's XATTR_SIZE_MAX.
const VALUE_MAX: usize = 1 << 16;
/// Longest name.
const NAME_MAX: usize = 255;

impl Tree {
    /// The value of an attribute.
    pub fn getxattr(&self, id: u64, name: &CStr) -> Result<Vec<u8>> {
        let key = self.host_key(name)?;
        let node = self.node(id)?;
        let mut value = vec![0; VALUE_MAX];
        let len = match sys::getxattr(node.fd(), key.as_c_str(), &mut value) {
            // Programs of the host may have given capabilities to the file.
            Err(Errno::NODATA) if name == c"security.capability" => {
                sys::getxattr(node.fd(), name, &mut value)?
            }
            result => result?,
        };
        value.truncate(len);
        Ok(value)
    }

    /// The names of all attributes, each ended by a zero byte.
    pub fn listxattr(&self, id: u64) -> Result<Vec<u8>> {
        let node = self.node(id)?;
        let all = sys::listxattr(node.fd())?;
        let mut shown = Vec::with_capacity(all.len());
        for name in all.split_inclusive(|byte| *byte == 0) {
            let inner = name.strip_prefix(PREFIX);
            let name = match inner {
                Some(inner) if !self.overlay.is_off() && is_moved(inner) => inner,
                Some(_) => continue,
                None if name.starts_with(b"system.") => continue,
                None if is_moved(name) && !self.overlay.is_off() => continue,
                None => name,
            };
            shown.extend_from_slice(name);
        }
        Ok(shown)
    }

    /// Sets an attribute, with the flags of setxattr(2).
    pub fn setxattr(&self, id: u64, name: &CStr, value: &[u8], flags: u32) -> Result<()> {
        let key = self.host_key(name)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let node = self.node(id)?;
        sys::setxattr(node.fd(), key.as_c_str(), value, flags)
    }

    /// Removes an attribute.
    pub fn removexattr(&self, id: u64, name: &CStr) -> Result<()> {
        let key = self.host_key(name)?;
        let node = self.node(id)?;
        sys::removexattr(node.fd(), key.as_c_str())
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
        // An access control list would change the host's permissions behind the override.
        if bytes.starts_with(b"system.") {
            return Err(Errno::OPNOTSUPP);
        }
        if self.overlay.is_off() || !is_moved(bytes) {
            return Ok(name.to_owned());
        }
        let key = [PREFIX, bytes].concat();
        if key.len() > NAME_MAX {
            return Err(Errno::RANGE);
        }
        CString::new(key).map_err(|_| Errno::INVAL)
    }
}

fn is_moved(name: &[u8]) -> bool {
    name.starts_with(b"security.") || name.starts_with(b"trusted.")
}
