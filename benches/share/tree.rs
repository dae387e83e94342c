//! What is served: files of known size, with the metadata that a sandbox would have left on them.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::fs::XattrFlags;

/// Number of small files in `files`.
pub const SMALL_FILES: usize = 64;
/// Bytes of `data` and of `written`.
pub const DATA_BYTES: u64 = 256 << 20;
/// Directories of `many`, and files in each.
pub const DIRECTORIES: usize = 10;
/// See [`DIRECTORIES`].
pub const ENTRIES: usize = 1000;

/// Name of the attribute that holds the metadata.
pub const KEY: &str = "user.msb.override_stat";

/// The override that `strict` keeps on each file: version 1, owner 1000:1000, mode, no device.
pub fn metadata(mode: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[0] = 1;
    for (place, word) in bytes[4..].chunks_exact_mut(4).zip([1000, 1000, mode, 0]) {
        place.copy_from_slice(&u32::to_le_bytes(word));
    }
    bytes
}

/// Records owner and mode as msb-fs does, so that strict mode finds its metadata on every file.
fn mark(path: &Path, mode: u32) -> Result<()> {
    rustix::fs::setxattr(path, KEY, &metadata(mode), XattrFlags::empty())
        .with_context(|| format!("extended attributes on {}", path.display()))
}

/// Makes a directory of the tree.
///
/// # Errors
///
/// What the host reports.
pub fn directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path)?;
    mark(path, 0o040_755)
}

/// Makes a file of the tree.
///
/// # Errors
///
/// What the host reports.
pub fn file(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content)?;
    mark(path, 0o100_644)
}

/// Makes the share of the direct rows below `folder`.
///
/// # Errors
///
/// What the host reports.
pub fn share(folder: &Path) -> Result<PathBuf> {
    let share = names(folder, DIRECTORIES)?;
    for name in ["data", "written"] {
        filled(&share.join(name), DATA_BYTES)?;
        mark(&share.join(name), 0o100_644)?;
    }
    Ok(share)
}

/// The part of it that has many names and little data.
///
/// # Errors
///
/// What the host reports.
pub fn names(folder: &Path, directories: usize) -> Result<PathBuf> {
    let share = folder.join("share");
    directory(&share)?;
    directory(&share.join("files"))?;
    for number in 0..SMALL_FILES {
        file(&share.join(small(number)), &[b'x'; 1024])?;
    }
    many(&share.join("many"), directories, ENTRIES)?;
    Ok(share)
}

/// Makes the share of the rows that want their data in memory.
///
/// # Errors
///
/// What the host reports.
pub fn small_share(folder: &Path) -> Result<PathBuf> {
    let share = folder.join("share");
    directory(&share)?;
    filled(&share.join("written"), DATA_BYTES)?;
    mark(&share.join("written"), 0o100_644)?;
    Ok(share)
}

/// Path of a small file in the share.
pub fn small(number: usize) -> String {
    format!("files/f{number:03}")
}

/// Makes `directories` folders with `entries` empty files each.
///
/// # Errors
///
/// What the host reports.
pub fn many(folder: &Path, directories: usize, entries: usize) -> Result<()> {
    directory(folder)?;
    for number in 0..directories {
        let below = folder.join(format!("d{number:04}"));
        directory(&below)?;
        for entry in 0..entries {
            file(&below.join(format!("entry-{entry:05}.txt")), b"")?;
        }
    }
    Ok(())
}

/// Fills a file by writes of 1 MiB and puts it on the disk.
///
/// # Errors
///
/// What the host reports.
pub fn filled(path: &Path, bytes: u64) -> Result<()> {
    let mut file = File::create(path)?;
    let block: Vec<u8> = (0..1_u32 << 20).map(|at| (at % 251) as u8).collect();
    for _ in 0..bytes >> 20 {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(())
}

/// Microseconds that a bare read or write of `len` bytes at random places of a file takes: the
/// state of its page cache, which no server can change.
///
/// # Errors
///
/// What the host reports.
pub fn bare_cost(path: &Path, len: usize, write: bool) -> Result<f64> {
    let file = File::options().read(true).write(write).open(path)?;
    let places = file.metadata()?.len() / len as u64;
    let mut block = vec![0x5a; len];
    let mut random = 88_172_645_463_325_252_u64;
    let begin = Instant::now();
    let mut count = 0;
    while begin.elapsed().as_millis() < 60 {
        for _ in 0..16 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let at = random % places * len as u64;
            if write {
                file.write_all_at(&block, at)?;
            } else {
                file.read_exact_at(&mut block, at)?;
            }
            count += 1;
        }
    }
    Ok(begin.elapsed().as_secs_f64() * 1e6 / f64::from(count))
}
