//! POSIX access control lists in the form of the kernel's extended attributes.
//!
//! ```text
//! u32 version = 2, then for each entry: u16 tag, u16 permissions, u32 user or group
//! ```

/// Attribute that holds the list of a file.
pub const ACCESS: &[u8] = b"system.posix_acl_access";
/// Attribute that holds what new entries of a directory inherit.
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    tag: u16,
    permissions: u16,
    id: u32,
}

/// A valid list: the owner, named users, the group, named groups, a mask if anybody is named, and
/// others, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acl(Vec<Entry>);

impl Acl {
    /// Reads a list; `None` when it is not a valid one.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first_chunk()?;
        if u32::from_le_bytes(*version) != VERSION || rest.len() % 8 != 0 {
            return None;
        }
        let entries: Vec<Entry> = rest
            .chunks_exact(8)
            .filter_map(|bytes| {
                let (tag, rest) = bytes.split_first_chunk()?;
                let (permissions, rest) = rest.split_first_chunk()?;
                Some(Entry {
                    tag: u16::from_le_bytes(*tag),
                    permissions: u16::from_le_bytes(*permissions),
                    id: u32::from_le_bytes(*rest.first_chunk()?),
                })
            })
            .collect();
        let list = Self(entries);
        list.is_valid().then_some(list)
    }

    fn is_valid(&self) -> bool {
        let mut last = 0;
        let mut seen = 0;
        for entry in &self.0 {
            let repeats = matches!(entry.tag, USER | GROUP);
            let single = matches!(entry.tag, USER_OBJ | GROUP_OBJ | MASK | OTHER);
            let in_order = entry.tag > last || (repeats && entry.tag == last);
            if !(repeats || single) || !in_order || entry.permissions > 7 {
                return false;
            }
            last = entry.tag;
            seen |= entry.tag;
        }
        let needed = USER_OBJ | GROUP_OBJ | OTHER;
        seen & needed == needed && (seen & (USER | GROUP) == 0 || seen & MASK != 0)
    }

    /// The list as the kernel reads it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            bytes.extend_from_slice(&entry.tag.to_le_bytes());
            bytes.extend_from_slice(&entry.permissions.to_le_bytes());
            bytes.extend_from_slice(&entry.id.to_le_bytes());
        }
        bytes
    }

    /// Whether it says no more than permission bits can.
    pub fn is_minimal(&self) -> bool {
        self.0.len() == 3
    }

    /// The permission bits that show the list: for the group, the most that anybody but the owner
    /// and others may do.
    pub fn permissions(&self) -> u32 {
        let of = |tag| self.0.iter().find(|entry| entry.tag == tag);
        let bits = |tag| of(tag).map_or(0, |entry| u32::from(entry.permissions));
        let group = if of(MASK).is_some() { MASK } else { GROUP_OBJ };
        bits(USER_OBJ) << 6 | bits(group) << 3 | bits(OTHER)
    }

    /// The list after chmod(2) has set the permission bits of `mode`.
    #[must_use]
    pub fn with_mode(mut self, mode: u32) -> Self {
        self.each_class(|_, bits| bits, mode);
        self
    }

    /// The list of a new file that inherits this one and is created with `mode`: nobody gets more
    /// than either allows.
    #[must_use]
    pub fn inherited(mut self, mode: u32) -> Self {
        self.each_class(|had, bits| had & bits, mode);
        self
    }

    /// Replaces the permissions of the three classes by what `combine` makes of them and of the
    /// bits of `mode`.
    fn each_class(&mut self, combine: impl Fn(u16, u16) -> u16, mode: u32) {
        let masked = self.0.iter().any(|entry| entry.tag == MASK);
        for entry in &mut self.0 {
            let shift = match entry.tag {
                USER_OBJ => 6,
                MASK => 3,
                GROUP_OBJ if !masked => 3,
                OTHER => 0,
                _ => continue,
            };
            let bits = u16::try_from((mode >> shift) & 7).unwrap_or(0);
            entry.permissions = combine(entry.permissions, bits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0];
        for (tag, permissions, id) in entries {
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&permissions.to_le_bytes());
            bytes.extend_from_slice(&id.to_le_bytes());
        }
        bytes
    }

    const NONE: u32 = u32::MAX;

    #[test]
    fn lists_survive_the_way_through_their_bytes() {
        let whole = bytes(&[
            (1, 7, NONE),
            (2, 6, 1000),
            (2, 4, 1001),
            (4, 5, NONE),
            (8, 1, 50),
            (16, 6, NONE),
            (32, 4, NONE),
        ]);
        let list = Acl::from_bytes(&whole).unwrap();
        assert_eq!(list.to_bytes(), whole);
        assert!(!list.is_minimal());
        assert_eq!(list.permissions(), 0o764);
    }

    #[test]
    fn what_the_kernel_would_refuse_is_refused() {
        let good = [(1, 7, NONE), (4, 5, NONE), (32, 4, NONE)];
        assert!(Acl::from_bytes(&bytes(&good)).unwrap().is_minimal());
        for bad in [
            bytes(&good[..2]),
            bytes(&[good[1], good[0], good[2]]),
            bytes(&[good[0], good[0], good[1], good[2]]),
            bytes(&[(1, 8, NONE), good[1], good[2]]),
            bytes(&[good[0], (2, 7, 5), good[1], good[2]]),
            bytes(&[good[0], good[1], good[2], (64, 0, 0)]),
            bytes(&good)[..27].to_vec(),
            [vec![3, 0, 0, 0], bytes(&good)[4..].to_vec()].concat(),
            vec![],
        ] {
            assert_eq!(Acl::from_bytes(&bad), None, "{bad:?}");
        }
    }

    #[test]
    fn modes_and_lists_follow_each_other() {
        let list = bytes(&[
            (1, 7, NONE),
            (2, 7, 9),
            (4, 5, NONE),
            (16, 7, NONE),
            (32, 5, NONE),
        ]);
        let list = Acl::from_bytes(&list).unwrap();
        assert_eq!(list.permissions(), 0o775);
        assert_eq!(list.clone().with_mode(0o640).permissions(), 0o640);
        assert_eq!(list.clone().inherited(0o666).permissions(), 0o664);
        let small = bytes(&[(1, 6, NONE), (4, 4, NONE), (32, 0, NONE)]);
        let small = Acl::from_bytes(&small).unwrap();
        assert_eq!(small.inherited(0o777).permissions(), 0o640);
    }
}
