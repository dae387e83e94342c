//! Replies, bounded by the room that the guest gave for them.

use zerocopy::{FromBytes, IntoBytes};

use super::abi::{Dirent, EntryOut, OutHeader};

/// Length of the header of a reply.
pub const HEADER_LEN: usize = size_of::<OutHeader>();

/// Header of a reply with `len` bytes of payload. `error` is a positive errno or zero.
pub fn header(unique: u64, error: i32, len: usize) -> OutHeader {
    OutHeader {
        len: u32::try_from(HEADER_LEN.saturating_add(len)).unwrap_or(u32::MAX),
        error: error.saturating_neg(),
        unique,
    }
}

/// Directory entries in the form of READDIR or READDIRPLUS, at most `room` bytes of them.
#[derive(Debug)]
pub struct Listing<'a> {
    bytes: &'a mut Vec<u8>,
    room: usize,
}

impl<'a> Listing<'a> {
    /// An empty list that may grow to `room` bytes, put together in `bytes`.
    pub fn new(bytes: &'a mut Vec<u8>, room: usize) -> Self {
        bytes.clear();
        Self { bytes, room }
    }

    /// Whether an entry with a name of `name_len` bytes still fits.
    pub fn fits(&self, name_len: usize, plus: bool) -> bool {
        let head = if plus { size_of::<EntryOut>() } else { 0 };
        let len = head + (size_of::<Dirent>() + name_len).next_multiple_of(8);
        self.bytes.len() + len <= self.room
    }

    /// Appends an entry; `entry` is what READDIRPLUS says about the node. The caller has asked
    /// [`Listing::fits`].
    pub fn push(&mut self, entry: Option<&EntryOut>, ino: u64, next: u64, kind: u32, name: &[u8]) {
        if let Some(entry) = entry {
            self.bytes.extend_from_slice(entry.as_bytes());
        }
        let head = Dirent {
            ino,
            off: next,
            namelen: u32::try_from(name.len()).unwrap_or(0),
            kind,
        };
        self.bytes.extend_from_slice(head.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Removes all entries.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// The nodes that a list of READDIRPLUS names, once for each entry that counts as looked up.
    pub fn nodes(&self) -> impl Iterator<Item = u64> {
        let mut rest = self.bytes.as_slice();
        std::iter::from_fn(move || {
            let (entry, tail) = EntryOut::read_from_prefix(rest).ok()?;
            let (head, _) = Dirent::read_from_prefix(tail).ok()?;
            let len = (size_of::<Dirent>() + head.namelen as usize).next_multiple_of(8);
            rest = tail.get(len..).unwrap_or_default();
            Some(entry.nodeid)
        })
        .filter(|id| *id != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_stays_within_its_room() {
        let mut bytes = Vec::new();
        let mut list = Listing::new(&mut bytes, 70);
        assert!(list.fits(8, false) && !list.fits(47, false) && !list.fits(1, true));
        list.push(None, 5, 1, 8, b"x");
        assert!(list.fits(8, false) && !list.fits(9, false));
        list.push(None, 5, 2, 8, b"12345678");
        assert!(!list.fits(0, false));
        assert_eq!(bytes.len(), 64);
    }

    #[test]
    fn the_nodes_of_a_listing_are_found_again() {
        let mut bytes = Vec::new();
        let mut list = Listing::new(&mut bytes, 4096);
        for (id, name) in [
            (0, &b"."[..]),
            (7, b"some name"),
            (0, b"x"),
            (9, b"12345678"),
        ] {
            let entry = EntryOut {
                nodeid: id,
                ..EntryOut::default()
            };
            list.push(Some(&entry), 1, 1, 8, name);
        }
        assert_eq!(list.nodes().collect::<Vec<_>>(), [7, 9]);
    }

    #[test]
    fn the_error_of_a_header_is_negative() {
        let header = header(7, 2, 0);
        assert_eq!((header.len, header.error, header.unique), (16, -2, 7));
    }
}
