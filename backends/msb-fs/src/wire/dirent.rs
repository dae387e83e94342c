//! Directory entries in the form of getdents64(2).

use std::ffi::CStr;

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostEntry<'a> {
    /// Inode number.
    pub ino: u64,
    /// Where the listing continues after it.
    pub next: u64,
    /// Type, as in the upper bits of a mode.
    pub kind: u8,
    /// Name.
    pub name: &'a CStr,
}

/// The first entry of `bytes` and its length; `None` when there is none.
///
/// ```text
/// 0     8      16       18     19
/// | ino | next | length | kind | name, ended by a zero byte, and padding
/// ```
pub fn next(bytes: &[u8]) -> Option<(HostEntry<'_>, usize)> {
    let word = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let len = u16::from_ne_bytes(bytes.get(16..18)?.try_into().ok()?);
    let len = usize::from(len);
    let entry = HostEntry {
        ino: word(0)?,
        next: word(8)?,
        kind: *bytes.get(18)?,
        name: CStr::from_bytes_until_nul(bytes.get(19..len)?).ok()?,
    };
    Some((entry, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_one_after_another() {
        let mut bytes = Vec::new();
        for (ino, name) in [(5_u64, c"a"), (6, c"longer")] {
            let len = (19 + name.count_bytes() + 1).next_multiple_of(8);
            let end = bytes.len() + len;
            bytes.extend_from_slice(&ino.to_ne_bytes());
            bytes.extend_from_slice(&(ino + 100).to_ne_bytes());
            bytes.extend_from_slice(&u16::try_from(len).unwrap().to_ne_bytes());
            bytes.push(8);
            bytes.extend_from_slice(name.to_bytes_with_nul());
            bytes.resize(end, 0);
        }
        let (first, len) = next(&bytes).unwrap();
        assert_eq!(
            (first.ino, first.next, first.kind, first.name),
            (5, 105, 8, c"a")
        );
        let (second, more) = next(&bytes[len..]).unwrap();
        assert_eq!((second.ino, second.name), (6, c"longer"));
        assert_eq!(next(&bytes[len + more..]), None);
        // Cut short, it is none.
        for cut in 0..len {
            assert_eq!(next(&bytes[..cut]), None);
        }
    }
}
