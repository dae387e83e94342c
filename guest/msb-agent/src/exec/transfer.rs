//! Packs and unpacks what is copied out of the sandbox and into it, as a confined child process.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use msb_protocol::{Builtin, COPY_TOP};
use tar::{Archive, Builder, Entry, EntryType, Header};

/// Bytes that are collected before they go through the pipe.
const BUFFER: usize = 256 << 10;

/// What keeps something from being copied.
#[derive(Debug, thiserror::Error)]
enum TransferError {
    #[error("{0}: {1}")]
    Path(PathBuf, #[source] io::Error),
    #[error("{0}: is not a directory")]
    NotADirectory(PathBuf),
    #[error("the archive cannot be read: {0}")]
    Archive(#[source] io::Error),
    #[error("the archive is not one of ours")]
    Strange,
}

type Result<T> = std::result::Result<T, TransferError>;

/// Does the work; the exit code. What goes wrong is told on standard error.
pub(super) fn carry_out(work: &Builtin) -> i32 {
    // A panic must not unwind into the agent's own loop, of which this process is a copy.
    let done = std::panic::catch_unwind(|| match work {
        Builtin::Pack { path } => pack(Path::new(path), io::stdout().lock()),
        Builtin::Unpack { path, name } => unpack(path, name.as_deref(), io::stdin().lock()),
    });
    match done {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            eprintln!("{error}");
            1
        }
        Err(_) => 1,
    }
}

fn pack(path: &Path, output: impl Write) -> Result<()> {
    let at = |error| TransferError::Path(path.to_owned(), error);
    // The path itself may be a link, what lies below it is copied as it is.
    let source = fs::canonicalize(path).map_err(at)?;
    let mut archive = Builder::new(BufWriter::with_capacity(BUFFER, output));
    let mut waiting = vec![(source, PathBuf::from(COPY_TOP))];
    while let Some((source, name)) = waiting.pop() {
        let at = |error| TransferError::Path(source.clone(), error);
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
            eprintln!("{}: not copied, for it is a special file", source.display());
        }
    }
    let flushed = archive.into_inner().and_then(|mut output| output.flush());
    flushed.map_err(TransferError::Archive)
}

fn header(found: &Metadata) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(found.permissions().mode() & 0o7777);
    // Whoever copies owns the copy; readers refuse fields that are left empty.
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    let mtime = found
        .modified()
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    header.set_mtime(mtime.unwrap_or_default().as_secs());
    header
}

fn unpack(path: &str, name: Option<&str>, input: impl Read) -> Result<()> {
    let mut archive = Archive::new(input);
    let mut top = None;
    let mut folders = Vec::new();
    for entry in archive.entries().map_err(TransferError::Archive)? {
        let mut entry = entry.map_err(TransferError::Archive)?;
        let is_folder = entry.header().entry_type().is_dir();
        let below = below_top(&entry)?;
        let place = match &top {
            None if below.as_os_str().is_empty() => {
                top.insert(place(path, name, is_folder)?).clone()
            }
            Some(top) => top.join(below),
            None => return Err(TransferError::Strange),
        };
        let mode = entry.header().mode().map_err(TransferError::Archive)? & 0o777;
        write(&mut entry, &place, mode)
            .map_err(|error| TransferError::Path(place.clone(), error))?;
        if is_folder {
            folders.push((place, mode));
        }
    }
    // From the bottom up, and last: a folder may be one that nothing can be put into.
    for (place, mode) in folders.into_iter().rev() {
        let done = fs::set_permissions(&place, Permissions::from_mode(mode));
        done.map_err(|error| TransferError::Path(place, error))?;
    }
    top.map(drop).ok_or(TransferError::Strange)
}

/// Where what is copied goes, as cp(1) has it.
fn place(path: &str, name: Option<&str>, is_folder: bool) -> Result<PathBuf> {
    let to = PathBuf::from(path);
    match (fs::metadata(&to), name) {
        (Ok(found), Some(name)) if found.is_dir() => Ok(to.join(name)),
        (Ok(found), None) if found.is_dir() => Ok(to),
        (Ok(_), _) if is_folder => Err(TransferError::NotADirectory(to)),
        (Err(_), _) if !is_folder && path.ends_with('/') => Err(TransferError::NotADirectory(to)),
        _ => Ok(to),
    }
}

fn below_top(entry: &Entry<'_, impl Read>) -> Result<PathBuf> {
    let path = entry.path().map_err(TransferError::Archive)?;
    let below = path
        .strip_prefix(COPY_TOP)
        .map_err(|_| TransferError::Strange)?;
    let plain = below
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    plain
        .then(|| below.to_owned())
        .ok_or(TransferError::Strange)
}

fn write(entry: &mut Entry<'_, impl Read>, place: &Path, mode: u32) -> io::Result<()> {
    match entry.header().entry_type() {
        EntryType::Directory => match fs::create_dir(place) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && place.is_dir() => {
                // It may be one that even its owner put nothing into.
                let mode = fs::metadata(place)?.permissions().mode();
                fs::set_permissions(place, Permissions::from_mode(mode | 0o700))
            }
            made => made,
        },
        EntryType::Symlink => {
            let target = entry.link_name()?.ok_or(io::ErrorKind::InvalidData)?;
            match fs::remove_file(place) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            symlink(target, place)
        }
        _ => {
            // Written in place, for it may be a mount point.
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(mode);
            let mut file = options.open(place)?;
            io::copy(entry, &mut file)?;
            file.set_permissions(Permissions::from_mode(mode))?;
            let mtime = Duration::from_secs(entry.header().mtime()?);
            file.set_modified(UNIX_EPOCH + mtime)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> String {
        fs::read_to_string(path).unwrap_or_else(|error| format!("{}: {error}", path.display()))
    }

    #[test]
    fn a_tree_arrives_as_it_left() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::write(from.join("a/b/file"), "content").unwrap();
        fs::set_permissions(from.join("a/b/file"), Permissions::from_mode(0o750)).unwrap();
        fs::set_permissions(from.join("a/b"), Permissions::from_mode(0o500)).unwrap();
        symlink("b/file", from.join("a/link")).unwrap();
        symlink("from", dir.path().join("alias")).unwrap();
        let mut archive = Vec::new();
        pack(&dir.path().join("alias"), &mut archive).unwrap();

        let to = dir.path().join("to").display().to_string();
        unpack(&to, Some("from"), archive.as_slice()).unwrap();
        // The second time it exists: what is copied goes into it, or its content does.
        unpack(&to, Some("inside"), archive.as_slice()).unwrap();
        unpack(&to, None, archive.as_slice()).unwrap();
        for top in ["to", "to/inside"] {
            let top = dir.path().join(top);
            assert_eq!(read(&top.join("a/link")), "content");
            assert!(top.join("a/link").is_symlink());
            let mode =
                |path: &str| fs::metadata(top.join(path)).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode("a/b/file"), mode("a/b")), (0o750, 0o500));
        }
    }

    #[test]
    fn a_file_goes_where_cp_puts_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::write(path("file"), "new").unwrap();
        fs::create_dir(path("folder")).unwrap();
        fs::write(path("old"), "something longer").unwrap();
        let mut archive = Vec::new();
        pack(Path::new(&path("file")), &mut archive).unwrap();
        for (to, place) in [("folder", "folder/file"), ("old", "old"), ("made", "made")] {
            unpack(&path(to), Some("file"), archive.as_slice()).unwrap();
            assert_eq!(read(Path::new(&path(place))), "new");
        }
        for to in ["none/", "none/deeper", "old/x"] {
            assert!(
                unpack(&path(to), Some("file"), archive.as_slice()).is_err(),
                "{to}"
            );
        }
        assert!(unpack(&path("folder"), Some("file"), &b"no archive"[..]).is_err());
    }
}
