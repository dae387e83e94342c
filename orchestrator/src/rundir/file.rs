//! Files and folders of ours: written whole, for the user alone.

use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, linkat};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::sweep::DRAFT;
use crate::{Error, MicrosandboxResult};

/// The first eight hexadecimal digits of a SHA-256.
pub(crate) fn short_hash(bytes: &[u8]) -> String {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(bytes);
    digest
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Makes a folder and its parents, for the user alone.
pub(crate) fn make_dir(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a file whole: its old content stays until the new one is on disk.
pub(crate) fn write_file(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().ok_or(std::io::ErrorKind::InvalidInput)?;
    let mut draft = tempfile::Builder::new().prefix(DRAFT).tempfile_in(folder)?;
    draft.write_all(content)?;
    draft.as_file().sync_all()?;
    draft.persist(path).map_err(|error| error.error)?;
    sync_dir(folder)
}

/// Writes a file whose content its name tells, under that name or not at all; one that is there
/// already is as good. The file has no name before it is whole, so that nothing can be left over.
pub(crate) fn write_once(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().ok_or(std::io::ErrorKind::InvalidInput)?;
    let mut draft = tempfile::tempfile_in(folder)?;
    draft.write_all(content)?;
    draft.sync_all()?;
    let own = format!("/proc/self/fd/{}", draft.as_raw_fd());
    match linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        // A file system without nameless files: it had a name once, which is gone.
        Err(Errno::NOENT) => write_file(path, content),
        Err(errno) => Err(errno.into()),
    }
}

pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> MicrosandboxResult<()> {
    let cannot = |error| Error::io(format!("cannot write `{}`", path.display()), error);
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| cannot(error.into()))?;
    text.push(b'\n');
    write_file(path, &text).map_err(cannot)
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> MicrosandboxResult<T> {
    let cannot = |error| Error::io(format!("cannot read `{}`", path.display()), error);
    let text = std::fs::read(path).map_err(cannot)?;
    serde_json::from_slice(&text).map_err(|error| cannot(error.into()))
}

pub(crate) fn sync_dir(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

/// Milliseconds since the epoch.
pub(crate) fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
