//! Packs a file or directory of the host for the agent to unpack.

use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use msb_protocol::COPY_TOP;
use tar::{Builder, EntryType, Header};

use crate::{Error, MicrosandboxResult};

/// Bytes that are collected before they are sent.
const BUFFER: usize = 256 << 10;

/// The name that a path has in a directory; none when only its content is meant.
pub(super) fn name_of(path: &str) -> Option<String> {
    let trimmed = path.trim_end_matches('/');
    let name = trimmed.rsplit('/').next().unwrap_or_default();
    (!matches!(name, "" | "." | "..")).then(|| name.to_owned())
}

/// Fails as [`pack`] would at once.
pub(super) fn check(path: &Path) -> MicrosandboxResult<()> {
    let found = fs::metadata(path).map_err(|error| cannot(path, error))?;
    if found.is_dir() || found.is_file() {
        return Ok(());
    }
    Err(cannot(path, io::Error::other("it is a special file")))
}

/// Packs what lies at `path`; says what it leaves out.
pub(super) fn pack(path: &Path, output: impl Write) -> MicrosandboxResult<Vec<String>> {
    let mut left_out = Vec::new();
    // The path itself may be a link, what lies below it is copied as it is.
    let source = fs::canonicalize(path).map_err(|error| cannot(path, error))?;
    let mut archive = Builder::new(BufWriter::with_capacity(BUFFER, output));
    let mut waiting = vec![(source, PathBuf::from(COPY_TOP))];
    while let Some((source, name)) = waiting.pop() {
        let at = |error| cannot(&source, error);
        let found = fs::symlink_metadata(&source).map_err(at)?;
        let mut header = header(&found);
        if found.is_dir() {
            header.set_entry_type(EntryType::Directory);
            archive
                .append_data(&mut header, &name, io::empty())
                .map_err(at)?;
            for entry in fs::read_dir(&source).map_err(at)? {
                let entry = entry.map_err(at)?.file_name();
                waiting.push((source.join(&entry), name.join(&entry)));
            }
        } else if found.is_file() {
            header.set_size(found.len());
            // A file that shrinks meanwhile is filled up: its size has been told already.
            let content = File::open(&source).map_err(at)?;
            let content = content.chain(io::repeat(0)).take(found.len());
            archive
                .append_data(&mut header, &name, content)
                .map_err(at)?;
        } else if found.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            let target = fs::read_link(&source).map_err(at)?;
            archive
                .append_link(&mut header, &name, target)
                .map_err(at)?;
        } else {
            left_out.push(format!(
                "{}: not copied, for it is a special file",
                source.display()
            ));
        }
    }
    let flushed = archive.into_inner().and_then(|mut output| output.flush());
    flushed.map_err(|error| cannot(path, error))?;
    Ok(left_out)
}

fn header(found: &Metadata) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(found.permissions().mode() & 0o777);
    // Whoever copies owns the copy; readers refuse fields that are left empty.
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    let mtime = found.modified().ok();
    let mtime = mtime.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    header.set_mtime(mtime.unwrap_or_default().as_secs());
    header
}

fn cannot(path: &Path, error: io::Error) -> Error {
    let shown = path.display().to_string();
    Error::io(format!("cannot copy `{shown}`"), error).with_value(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_content_of_a_dot_is_meant() {
        for (path, name) in [
            ("/a/b", Some("b")),
            ("./b/", Some("b")),
            ("b", Some("b")),
            ("/a/.", None),
            ("/a/./", None),
            ("/", None),
            ("..", None),
        ] {
            assert_eq!(name_of(path).as_deref(), name, "{path}");
        }
    }
}
