//! Gets the kernel proper out of a compressed image, because emulation is slow at doing that itself.
//!
//! A `bzImage` is a small program that unpacks an ELF file and jumps into it. QEMU can enter that
//! file directly when it has an entry point for it (PVH), which leaves out the firmware's loader and
//! the unpacking: a second of a boot of three under emulation.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::{Error, MicrosandboxResult, rundir};

/// More than any kernel has, so that a damaged image cannot fill the memory.
const LARGEST: u64 = 1 << 30;
/// Number of the ELF note that holds the entry point, owned by `Xen`.
const PVH_ENTRY: u32 = 18;
const NOTE_SEGMENT: u32 = 4;

/// The kernel that `image` holds, unpacked into the folder `cache` unless it lies there already;
/// `image` itself when it cannot be unpacked or entered that way.
///
/// # Errors
///
/// An error when the image cannot be read or its kernel cannot be written.
pub(crate) fn unpacked(image: &Path, cache: &Path) -> MicrosandboxResult<PathBuf> {
    let failed = |error| Error::io(format!("cannot read {}", image.display()), error);
    let metadata = fs::metadata(image).map_err(failed)?;
    let identity = format!(
        "{}\0{}\0{:?}",
        image.display(),
        metadata.len(),
        metadata.modified()
    );
    let digest = Sha256::digest(identity);
    let name: String = digest
        .iter()
        .take(12)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let path = cache.join(format!("vmlinux-{name}"));
    if path.is_file() {
        return Ok(path);
    }
    let Some(kernel) = unpack(&fs::read(image).map_err(failed)?) else {
        return Ok(image.to_owned());
    };
    let failed = |error| Error::io(format!("cannot write {}", path.display()), error);
    rundir::write_once(&path, &kernel).map_err(failed)?;
    Ok(path)
}

/// The ELF file inside a `bzImage`, if it has an entry point for PVH.
///
/// The header is that of Documentation/arch/x86/boot.rst: `HdrS` at 0x202, the number of sectors
/// before the protected-mode code at 0x1f1, offset and length of the payload at 0x248.
fn unpack(image: &[u8]) -> Option<Vec<u8>> {
    let header = Reader(image);
    if header.bytes(0x202, 4)? != b"HdrS" {
        return None;
    }
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + header.number(0x248)?;
    let payload = header.bytes(start, header.number(0x24c)?)?;
    let mut kernel = Vec::new();
    decompress(payload, &mut kernel)?;
    has_pvh_entry(&kernel)?.then_some(kernel)
}

fn decompress(payload: &[u8], kernel: &mut Vec<u8>) -> Option<()> {
    let read = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(payload).ok()?;
            decoder.take(LARGEST).read_to_end(kernel)
        }
        [0x1f, 0x8b, ..] => flate2::read::GzDecoder::new(payload)
            .take(LARGEST)
            .read_to_end(kernel),
        _ => return None,
    };
    read.ok().map(drop)
}

/// Whether a little-endian 64-bit ELF file has the note that QEMU looks for.
fn has_pvh_entry(kernel: &[u8]) -> Option<bool> {
    let file = Reader(kernel);
    if file.bytes(0, 6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = file.long(0x20)?;
    let (size, count) = (file.short(0x36)?, file.short(0x38)?);
    for index in 0..count {
        let segment = table.checked_add(index * size)?;
        if file.word(segment)? != NOTE_SEGMENT {
            continue;
        }
        let notes = file.bytes(file.long(segment + 0x08)?, file.long(segment + 0x20)?)?;
        if has_note(Reader(notes)).unwrap_or(false) {
            return Some(true);
        }
    }
    Some(false)
}

/// A note is the sizes of its name and content, its number, and both, padded to 4 bytes each.
fn has_note(notes: Reader<'_>) -> Option<bool> {
    let mut at = 0_usize;
    while at + 12 <= notes.0.len() {
        let (name, content) = (notes.number(at)?, notes.number(at + 4)?);
        if notes.word(at + 8)? == PVH_ENTRY && notes.bytes(at + 12, name)? == b"Xen\0" {
            return Some(true);
        }
        let length = name.checked_next_multiple_of(4)?.checked_add(content)?;
        at = at
            .checked_add(12)?
            .checked_add(length)?
            .checked_next_multiple_of(4)?;
    }
    Some(false)
}

/// Little-endian numbers at offsets that may lie outside.
#[derive(Clone, Copy)]
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(self, offset: usize, length: usize) -> Option<&'a [u8]> {
        self.0.get(offset..offset.checked_add(length)?)
    }

    fn short(self, offset: usize) -> Option<usize> {
        let bytes = self.bytes(offset, 2)?.try_into().ok()?;
        Some(usize::from(u16::from_le_bytes(bytes)))
    }

    fn word(self, offset: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes(offset, 4)?.try_into().ok()?))
    }

    fn number(self, offset: usize) -> Option<usize> {
        usize::try_from(self.word(offset)?).ok()
    }

    fn long(self, offset: usize) -> Option<usize> {
        let bytes = self.bytes(offset, 8)?.try_into().ok()?;
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_stay_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("vmlinuz");
        for content in [&b""[..], b"HdrS", &[0; 4096], &[0xff; 70_000]] {
            fs::write(&image, content).unwrap();
            assert_eq!(unpacked(&image, dir.path()).unwrap(), image);
        }
    }

    #[test]
    fn damaged_headers_are_refused() {
        let mut image = vec![0xff_u8; 2048];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(unpack(&image).is_none());
        let mut elf = vec![0xff_u8; 256];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        assert_ne!(has_pvh_entry(&elf), Some(true));
    }

    #[test]
    fn a_real_kernel_is_unpacked_once() {
        let Some(folder) = std::env::var_os("MSB_KERNEL").map(PathBuf::from) else {
            println!("skipped: MSB_KERNEL names no kernel");
            return;
        };
        let image = if folder.is_dir() {
            folder.join("vmlinuz")
        } else {
            folder
        };
        let dir = tempfile::tempdir().unwrap();
        let kernel = unpacked(&image, dir.path()).unwrap();
        if kernel == image {
            println!(
                "skipped: {} is of a kind that stays packed",
                image.display()
            );
            return;
        }
        let mut magic = [0; 4];
        fs::File::open(&kernel)
            .unwrap()
            .read_exact(&mut magic)
            .unwrap();
        assert_eq!(&magic, b"\x7fELF");
        assert_eq!(unpacked(&image, dir.path()).unwrap(), kernel);
    }
}
