//! Opens what holds an image: an archive file, compressed or not, or the folder of an OCI layout.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use ruzstd::decoding::StreamingDecoder;
use sha2::{Digest, Sha256};

use super::reader::{TarEntry, TarError, TarKind, TarReader};

/// An archive with more files than this is a root file system, whatever its files are called.
const NAMES_MAX: usize = 65_536;

/// Largest description of an image that is read into memory.
const JSON_MAX: u64 = 16 << 20;

const BUFFER: usize = 256 << 10;

/// What keeps an archive from being opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum ArchiveError {
    #[error("it cannot be read")]
    Read(#[from] io::Error),
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error("`{0}` is missing in the archive")]
    Missing(String),
    #[error("`{0}` of the archive is larger than a description should be")]
    TooLarge(String),
    #[error("`{0}` of the archive does not have the digest in its name")]
    Digest(String),
    #[error(
        "it is compressed with {0}, which is not read here: unpack it first, or use gzip or zstd"
    )]
    Compression(&'static str),
}

/// The files of an archive that holds an image.
pub(super) enum Files {
    /// Where they lie in an uncompressed tar.
    Tar {
        file: File,
        places: HashMap<String, Place>,
    },
    /// They lie in this folder.
    Folder(OwnedFd),
}

/// Where a file's bytes are, or the file that it is another name of.
#[derive(Debug, Clone)]
pub(super) enum Place {
    Bytes { start: u64, length: u64 },
    Alias(String),
}

impl Files {
    /// The files of an OCI layout in a folder.
    pub(super) fn of_folder(path: &Path) -> Result<Self, ArchiveError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from)?;
        Ok(Self::Folder(fd))
    }

    /// Lists the files of an archive, which may be compressed; `scratch` takes it unpacked then.
    pub(super) fn of_archive(mut file: File, scratch: &Path) -> Result<Option<Self>, ArchiveError> {
        let Some(places) = index(decompress(&file)?)? else {
            return Ok(None);
        };
        let image = ["manifest.json", "index.json"]
            .iter()
            .any(|name| places.contains_key(*name));
        if !image {
            return Ok(None);
        }
        if !matches!(sniff(&file)?, Compression::None) {
            let mut plain = tempfile::tempfile_in(scratch)?;
            io::copy(&mut decompress(&file)?, &mut plain)?;
            plain.flush()?;
            file = plain;
        }
        Ok(Some(Self::Tar { file, places }))
    }

    /// Opens one of the files and tells its size.
    pub(super) fn open(&self, path: &str) -> Result<(Box<dyn Read + '_>, u64), ArchiveError> {
        let missing = || ArchiveError::Missing(path.to_owned());
        match self {
            Self::Folder(folder) => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
                let fd = rustix::fs::openat2(folder, path, flags, Mode::empty(), resolve)
                    .map_err(|_| missing())?;
                let file = File::from(fd);
                let length = file.metadata()?.len();
                Ok((Box::new(file), length))
            }
            Self::Tar { file, places } => {
                let mut name = path;
                for _ in 0..8 {
                    match places.get(name).ok_or_else(missing)? {
                        Place::Alias(other) => name = other,
                        Place::Bytes { start, length } => {
                            let section = Section {
                                file,
                                at: *start,
                                left: *length,
                            };
                            return Ok((Box::new(section), *length));
                        }
                    }
                }
                Err(missing())
            }
        }
    }

    /// Reads a description; its digest must be that of its name, if its name is one.
    pub(super) fn read(&self, path: &str) -> Result<Vec<u8>, ArchiveError> {
        let (file, length) = self.open(path)?;
        if length > JSON_MAX {
            return Err(ArchiveError::TooLarge(path.to_owned()));
        }
        let mut text = Vec::new();
        file.take(JSON_MAX).read_to_end(&mut text)?;
        match path.strip_prefix("blobs/sha256/") {
            Some(digest) if hex(&Sha256::digest(&text)) != digest.to_ascii_lowercase() => {
                Err(ArchiveError::Digest(path.to_owned()))
            }
            _ => Ok(text),
        }
    }
}

/// Part of a file, read without moving its offset.
struct Section<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let count = self
            .file
            .read_at(buffer.get_mut(..length).unwrap_or_default(), self.at)?;
        self.at = self.at.saturating_add(count as u64);
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }
}

/// How a stream is compressed, by its first bytes.
enum Compression {
    None,
    Gzip,
    Zstd,
    Other(&'static str),
}

impl Compression {
    fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', ..] => Self::Other("xz"),
            [b'B', b'Z', b'h', ..] => Self::Other("bzip2"),
            _ => Self::None,
        }
    }
}

fn sniff(file: &File) -> io::Result<Compression> {
    let mut start = [0; 6];
    let count = file.read_at(&mut start, 0)?;
    Ok(Compression::of(start.get(..count).unwrap_or_default()))
}

/// The content of an archive file from its beginning.
pub(super) fn decompress(file: &File) -> Result<Box<dyn Read + '_>, ArchiveError> {
    let mut file = file;
    file.rewind()?;
    decompress_stream(file)
}

/// The content of a stream that may be compressed.
pub(super) fn decompress_stream<'a>(
    stream: impl Read + 'a,
) -> Result<Box<dyn Read + 'a>, ArchiveError> {
    let mut stream = BufReader::with_capacity(BUFFER, stream);
    let mut start = Vec::new();
    (&mut stream).take(6).read_to_end(&mut start)?;
    let kind = Compression::of(&start);
    let whole = io::Cursor::new(start).chain(stream);
    Ok(match kind {
        Compression::None => Box::new(whole),
        Compression::Gzip => Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(whole))),
        Compression::Zstd => {
            let decoder = StreamingDecoder::new(whole).map_err(io::Error::other)?;
            Box::new(BufReader::with_capacity(BUFFER, decoder))
        }
        Compression::Other(name) => return Err(ArchiveError::Compression(name)),
    })
}

/// Where the files of a tar lie, or nothing when there are too many for an image's archive.
fn index(stream: impl Read) -> Result<Option<HashMap<String, Place>>, ArchiveError> {
    let mut reader = TarReader::new(Counting { stream, count: 0 });
    let mut places = HashMap::new();
    while let Some(entry) = reader.next_entry()? {
        if places.len() > NAMES_MAX {
            return Ok(None);
        }
        if let Some((name, place)) = place(&entry, reader.stream().count) {
            places.insert(name, place);
        }
    }
    Ok(Some(places))
}

fn place(entry: &TarEntry, start: u64) -> Option<(String, Place)> {
    let name = clean(std::str::from_utf8(&entry.path).ok()?)?;
    let place = match &entry.kind {
        TarKind::File => Place::Bytes {
            start,
            length: entry.size,
        },
        TarKind::Link(target) => Place::Alias(clean(std::str::from_utf8(target).ok()?)?),
        TarKind::Symlink(target) => {
            let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
            Place::Alias(clean(&format!(
                "{folder}/{}",
                std::str::from_utf8(target).ok()?
            ))?)
        }
        _ => return None,
    };
    Some((name, place))
}

/// A path without `.` and with `..` carried out.
fn clean(path: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            _ => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// A stream that counts what was read from it.
struct Counting<R> {
    stream: R,
    count: u64,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        self.count = self.count.saturating_add(count as u64);
        Ok(count)
    }
}

/// A stream that computes the digest of what was read from it.
pub(super) struct Digesting<R> {
    stream: R,
    digest: Sha256,
}

impl<R: Read> Digesting<R> {
    pub(super) fn new(stream: R) -> Self {
        Self {
            stream,
            digest: Sha256::new(),
        }
    }

    /// The digest in hexadecimal.
    pub(super) fn finish(self) -> String {
        hex(&self.digest.finalize())
    }
}

impl<R: Read> Read for Digesting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        self.digest.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// A stream that tells how far it has been read.
pub(super) struct Telling<'a, R> {
    pub(super) stream: R,
    pub(super) done: &'a mut u64,
    pub(super) tell: &'a dyn Fn(u64),
}

impl<R: Read> Read for Telling<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        *self.done = self.done.saturating_add(count as u64);
        (self.tell)(*self.done);
        Ok(count)
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_within_an_archive_do_not_climb_out() {
        assert_eq!(clean("./a//b/../c").as_deref(), Some("a/c"));
        assert_eq!(clean("a/../../b"), None);
    }

    #[test]
    fn other_compressions_are_named() {
        let open = |bytes: &'static [u8]| decompress_stream(bytes).err().map(|e| e.to_string());
        assert!(open(b"\xfd7zXZ\0").is_some_and(|text| text.contains("xz")));
        assert!(open(b"BZh91AY").is_some_and(|text| text.contains("bzip2")));
        assert_eq!(open(b"plain"), None);
    }
}
