//! Reads a tar stream entry by entry, with its extensions, in bounded memory.
//!
//! Header fields are read by the crate `tar`; the extensions (PAX records, GNU long names) are put
//! together here, because that crate keeps an extension of any size in memory and cannot read PAX
//! values that hold a line feed, as the binary ones of `SCHILY.xattr.security.capability` do.

use std::io::{self, Read};

use tar::{EntryType, Header};

const BLOCK: usize = 512;

/// An extension larger than this is refused; a path has at most 4096 bytes, an attribute 64 KiB.
const EXTENSION_MAX: u64 = 1 << 20;

/// One entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TarEntry {
    /// Its path, as it is in the archive.
    pub(crate) path: Vec<u8>,
    /// What it is.
    pub(crate) kind: TarKind,
    /// Permission bits, with set-id and sticky bits.
    pub(crate) mode: u32,
    /// Owner and group.
    pub(crate) owner: (u32, u32),
    /// Seconds and nanoseconds of its last change.
    pub(crate) mtime: (i64, u32),
    /// Extended attributes.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of content that follow.
    pub(crate) size: u64,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TarKind {
    File,
    Directory,
    Symlink(Vec<u8>),
    /// Another name of the entry at this path.
    Link(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// What makes an archive unreadable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    #[error("the archive cannot be read")]
    Read(#[source] io::Error),
    #[error("the archive ends in the middle of an entry")]
    Truncated,
    #[error("this is no tar archive, or it is damaged: wrong header checksum")]
    Checksum,
    #[error("field `{0}` of a tar header makes no sense")]
    Field(&'static str),
    #[error("an extended header of {0} bytes is too large")]
    TooLarge(u64),
    #[error("`{0}` is a sparse file, which image archives should not hold: pack it without -S")]
    Sparse(String),
    #[error("`{0}` has the unknown entry type `{1}`")]
    Kind(String, char),
}

/// A tar stream.
pub(crate) struct TarReader<R> {
    stream: R,
    /// Bytes of the current entry's content that have not been read, and of its padding.
    content: u64,
    padding: u64,
}

/// What extended headers said about the next entry.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: bool,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(stream: R) -> Self {
        Self {
            stream,
            content: 0,
            padding: 0,
        }
    }

    /// The next entry; what is left of the last one's content is skipped.
    pub(crate) fn next_entry(&mut self) -> Result<Option<TarEntry>, TarError> {
        let mut extensions = Extensions::default();
        loop {
            self.skip_rest()?;
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let size = header.entry_size().map_err(|_| TarError::Field("size"))?;
            match header.entry_type() {
                EntryType::XHeader => extensions.read_pax(&self.extension(size)?)?,
                EntryType::GNULongName => extensions.path = Some(text(self.extension(size)?)),
                EntryType::GNULongLink => extensions.link = Some(text(self.extension(size)?)),
                // A global header holds comments, such as the commit of `git archive`.
                EntryType::XGlobalHeader => drop(self.extension(size)?),
                _ => return self.entry(&header, size, extensions).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header,
        size: u64,
        extensions: Extensions,
    ) -> Result<TarEntry, TarError> {
        let path = extensions
            .path
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let shown = || String::from_utf8_lossy(&path).into_owned();
        let entry_type = header.entry_type();
        if extensions.sparse || entry_type == EntryType::GNUSparse {
            return Err(TarError::Sparse(shown()));
        }
        let link = || {
            let of_header = || header.link_name_bytes().map(|name| name.into_owned());
            extensions
                .link
                .clone()
                .or_else(of_header)
                .unwrap_or_default()
        };
        let kind = match entry_type {
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => {
                TarKind::Directory
            }
            EntryType::Regular | EntryType::Continuous => TarKind::File,
            EntryType::Directory => TarKind::Directory,
            EntryType::Symlink => TarKind::Symlink(link()),
            EntryType::Link => TarKind::Link(link()),
            EntryType::Char => device(header).map(|(major, minor)| TarKind::Char(major, minor))?,
            EntryType::Block => {
                device(header).map(|(major, minor)| TarKind::Block(major, minor))?
            }
            EntryType::Fifo => TarKind::Fifo,
            other => return Err(TarError::Kind(shown(), char::from(other.as_byte()))),
        };
        let number = |value: io::Result<u64>, name| {
            value
                .ok()
                .and_then(|v| u32::try_from(v).ok())
                .ok_or(TarError::Field(name))
        };
        let size = extensions.size.unwrap_or(size);
        // POSIX lets a hard link carry content; GNU tar writes none and so does everybody since.
        self.content = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        let seconds = || {
            header
                .mtime()
                .ok()
                .and_then(|s| i64::try_from(s).ok())
                .unwrap_or(0)
        };
        Ok(TarEntry {
            kind,
            mode: header.mode().map_err(|_| TarError::Field("mode"))? & 0o7777,
            owner: (
                extensions
                    .uid
                    .map_or_else(|| number(header.uid(), "uid"), Ok)?,
                extensions
                    .gid
                    .map_or_else(|| number(header.gid(), "gid"), Ok)?,
            ),
            mtime: extensions.mtime.unwrap_or_else(|| (seconds(), 0)),
            xattrs: extensions.xattrs,
            size,
            path,
        })
    }

    /// The next header block, or nothing at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            let rest = block.get_mut(filled..).unwrap_or_default();
            match self.stream.read(rest) {
                // Archives without the two final blocks of zeros exist.
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(TarError::Truncated),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TarError::Read(error)),
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block);
        // The checksum counts its own eight bytes as spaces.
        let sum: u32 = block
            .iter()
            .enumerate()
            .map(|(at, byte)| {
                if (148..156).contains(&at) {
                    32
                } else {
                    u32::from(*byte)
                }
            })
            .sum();
        match header.cksum() {
            Ok(recorded) if recorded == sum => Ok(Some(header.clone())),
            _ => Err(TarError::Checksum),
        }
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > EXTENSION_MAX {
            return Err(TarError::TooLarge(size));
        }
        self.content = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes).map_err(TarError::Read)?;
        Ok(bytes)
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        let rest = self.content.saturating_add(self.padding);
        self.content = 0;
        self.padding = 0;
        let skipped = io::copy(&mut (&mut self.stream).take(rest), &mut io::sink());
        match skipped {
            Ok(count) if count == rest => Ok(()),
            Ok(_) => Err(TarError::Truncated),
            Err(error) => Err(TarError::Read(error)),
        }
    }

    /// The stream itself, at the beginning of the current entry's content.
    pub(crate) fn stream(&self) -> &R {
        &self.stream
    }

    /// Reads the stream to its end, so that what counts its bytes has seen all of them.
    pub(crate) fn drain(mut self) -> Result<R, TarError> {
        self.skip_rest()?;
        io::copy(&mut self.stream, &mut io::sink()).map_err(TarError::Read)?;
        Ok(self.stream)
    }
}

/// The content of the current entry.
impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = (&mut self.stream).take(self.content).read(buffer)?;
        if count == 0 && self.content > 0 && !buffer.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                TarError::Truncated,
            ));
        }
        self.content = self.content.saturating_sub(count as u64);
        Ok(count)
    }
}

impl Extensions {
    /// Takes the records of a PAX header: `LENGTH KEY=VALUE\n`, the length counting all of it.
    fn read_pax(&mut self, mut records: &[u8]) -> Result<(), TarError> {
        const BAD: TarError = TarError::Field("pax header");
        while !records.is_empty() {
            let space = records.iter().position(|byte| *byte == b' ').ok_or(BAD)?;
            let (length, _) = records.split_at_checked(space).ok_or(BAD)?;
            let length: usize = parse(length).ok_or(BAD)?;
            let (record, rest) = records.split_at_checked(length).ok_or(BAD)?;
            records = rest;
            let record = record
                .get(space + 1..)
                .and_then(|r| r.strip_suffix(b"\n"))
                .ok_or(BAD)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(BAD)?;
            let (key, value) = record.split_at_checked(equals).ok_or(BAD)?;
            self.take(key, value.get(1..).ok_or(BAD)?)?;
        }
        Ok(())
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(parse(value).ok_or(TarError::Field("size"))?),
            b"uid" => self.uid = Some(parse(value).ok_or(TarError::Field("uid"))?),
            b"gid" => self.gid = Some(parse(value).ok_or(TarError::Field("gid"))?),
            b"mtime" => self.mtime = Some(time(value).ok_or(TarError::Field("mtime"))?),
            _ if key.starts_with(b"GNU.sparse.") => self.sparse = true,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

fn device(header: &Header) -> Result<(u32, u32), TarError> {
    let number = |value: io::Result<Option<u32>>| value.ok().flatten();
    match (number(header.device_major()), number(header.device_minor())) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => Err(TarError::Field("device number")),
    }
}

/// A GNU long name: the bytes before the zero that ends it.
fn text(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

fn parse<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Reads `seconds[.fraction]`; before 1970 the fraction still counts forwards.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let value = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = value.split_once('.').unwrap_or((value, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanos: u32 = nanos.parse().ok()?;
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_values_may_hold_line_feeds() {
        let mut extensions = Extensions::default();
        extensions
            .read_pax(b"26 SCHILY.xattr.user.a=\n\0=\n9 path=x\n")
            .unwrap_err();
        let mut extensions = Extensions::default();
        extensions
            .read_pax(b"28 SCHILY.xattr.user.a=\n\0=\n\n10 path=x\n")
            .unwrap();
        assert_eq!(
            extensions.xattrs,
            [(b"user.a".to_vec(), b"\n\0=\n".to_vec())]
        );
        assert_eq!(extensions.path.as_deref(), Some(&b"x"[..]));
    }

    #[test]
    fn times_keep_their_fraction() {
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"-2.25"), Some((-3, 750_000_000)));
        assert_eq!(time(b"7"), Some((7, 0)));
        assert_eq!(time(b"7.x"), None);
    }

    #[test]
    fn rubbish_is_refused() {
        let read = |bytes: &[u8]| TarReader::new(bytes).next_entry();
        assert!(matches!(read(b""), Ok(None)));
        assert!(matches!(read(&[0; 1024]), Ok(None)));
        assert!(matches!(read(b"short"), Err(TarError::Truncated)));
        assert!(matches!(read(&[7; 512]), Err(TarError::Checksum)));
    }
}
