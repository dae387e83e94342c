//! Linking, moving and removing the entries of directories.

use std::ffi::CStr;
use std::os::fd::AsFd;

use libc::S_IFCHR;
use rustix::fs::{AtFlags, CWD, FileType, RenameFlags};
use rustix::io::Errno;

use super::create::Shape;
use super::lookup::{Fate, moved};
use super::table::Node;
use super::{Caller, Result, Tree, entry_name};
use crate::quota::{Room, Tally};
use crate::sys;
use crate::wire::abi::EntryOut;

impl Tree {
    /// Gives the inode of a node one more name.
    pub fn link(&self, id: u64, parent: u64, name: &CStr) -> Result<EntryOut> {
        let name = entry_name(name)?;
        let (node, parent) = (self.node(id)?, self.directory(parent)?);
        if node.kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        let from = sys::fd_path(node.fd());
        self.within(&[parent.fd(), node.fd()], Room::Fixed(1, 0), |_| {
            rustix::fs::linkat(CWD, from, &parent.file, name, AtFlags::SYMLINK_FOLLOW)
        })?;
        let (id, attr) = self.resolve(&parent, name)?;
        Ok(self.entry(id, attr))
    }

    /// Removes a name; `directory` says of what.
    pub fn unlink(&self, parent: u64, name: &CStr, directory: bool) -> Result<()> {
        let name = entry_name(name)?;
        let parent = self.directory(parent)?;
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        let held = self.hold(&parent, name, Fate::Removed);
        match self.victim(&parent, name)? {
            None => rustix::fs::unlinkat(&parent.file, name, flags)?,
            Some((account, victim)) => {
                let touched = [parent.fd(), victim.as_fd()];
                account.change(&touched, Room::Fixed(0, 0), |tally| {
                    rustix::fs::unlinkat(&parent.file, name, flags)?;
                    account.unlinked(&victim, directory, tally)
                })?;
            }
        }
        if let Some(node) = held {
            node.leave(parent.id, name);
        }
        Ok(())
    }

    /// Moves a name, with the flags of renameat2(2).
    pub fn rename(
        &self,
        (from, old): (u64, &CStr),
        (to, new): (u64, &CStr),
        flags: u32,
    ) -> Result<()> {
        let (old, new) = (entry_name(old)?, entry_name(new)?);
        let (from, to) = (self.directory(from)?, self.directory(to)?);
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !known.contains(flags) || flags.contains(RenameFlags::EXCHANGE | RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL);
        }
        let exchanged = flags.contains(RenameFlags::EXCHANGE);
        let replaced = match exchanged {
            true => Fate::Moved,
            false => Fate::Removed,
        };
        let held = (
            self.hold(&from, old, Fate::Moved),
            self.hold(&to, new, replaced),
        );
        match self.victim(&to, new) {
            // Nothing is replaced.
            Ok(None) | Err(Errno::NOENT) => {
                let longer = from.id != to.id || new.to_bytes().len() > old.to_bytes().len();
                let room = Room::Fixed(u64::from(longer), 0);
                self.within(&[from.fd(), to.fd()], room, |tally| {
                    self.rename_on_host((&from, old), (&to, new), flags, tally)
                })?;
            }
            Ok(Some((account, victim))) => {
                let touched = [from.fd(), to.fd(), victim.as_fd()];
                account.change(&touched, Room::Fixed(0, 0), |tally| {
                    self.rename_on_host((&from, old), (&to, new), flags, tally)?;
                    let empty = sys::stat(&victim)?.kind() == FileType::Directory;
                    account.unlinked(&victim, empty && !exchanged, tally)
                })?;
            }
            Err(error) => return Err(error),
        }
        moved(held, (from.id, old), (to.id, new), exchanged);
        Ok(())
    }

    fn rename_on_host(
        &self,
        (from, old): (&Node, &CStr),
        (to, new): (&Node, &CStr),
        flags: RenameFlags,
        tally: &mut Tally,
    ) -> Result<()> {
        if !flags.contains(RenameFlags::WHITEOUT) || self.overlay.is_off() {
            return rustix::fs::renameat_with(&from.file, old, &to.file, new, flags);
        }
        let plain = flags - RenameFlags::WHITEOUT;
        rustix::fs::renameat_with(&from.file, old, &to.file, new, plain)?;
        // The device 0:0 is in the guest's eyes only, as is every other.
        let whiteout = Shape {
            owner: Caller::default(),
            mode: S_IFCHR,
            rdev: 0,
            lists: None,
        };
        match self.make_on_host(from, old, &whiteout, b"") {
            Ok(made) => {
                tally.made_as(&made.stat);
                Ok(())
            }
            // Both names are links of one file: there was nothing to do.
            Err(Errno::EXIST) => Ok(()),
            Err(error) => {
                let back = RenameFlags::NOREPLACE;
                rustix::fs::renameat_with(&to.file, new, &from.file, old, back).ok();
                Err(error)
            }
        }
    }
}
