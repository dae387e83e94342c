//! Files that lose their names before the guest has opened them: it knows them from a listing alone.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Result, ensure};
use tempfile::TempDir;

use super::client::*;
use super::folder;

/// Shared, and exclusive, where the guest does not open.
const PROFILES: [&[&str]; 2] = [&[], &["--exclusive"]];
/// FATTR_SIZE of fuse.h.
const SIZE: u32 = 8;
const CONTENT: &[u8] = b"what was there before";

/// A share with the files `first` and `second`, which are no longer young, and its server.
fn begin(flags: &[&str]) -> Result<(TempDir, Server)> {
    let folder = folder()?;
    for name in ["first", "second"] {
        fs::write(folder.path().join("share").join(name), CONTENT)?;
    }
    // Young files are opened when they are listed.
    std::thread::sleep(Duration::from_millis(60));
    let server = Server::start(folder.path(), flags)?;
    Ok((folder, server))
}

/// The node of a name, by a listing with attributes.
fn listed(server: &mut Server, name: &str) -> Result<u64> {
    let mut body = longs(&[0, 0]);
    body.extend_from_slice(&words(&[1 << 16, 0, 0, 0, 0, 0]));
    let list = server.well(READDIRPLUS, 1, &body)?;
    let mut rest = list.as_slice();
    while let Some((entry, tail)) = rest.split_at_checked(128 + 24) {
        let len = u32::from_le_bytes(entry[144..148].try_into()?) as usize;
        if tail[..len] == *name.as_bytes() {
            return Ok(u64::from_le_bytes(entry[..8].try_into()?));
        }
        rest = &tail[len.next_multiple_of(8)..];
    }
    anyhow::bail!("{name} is not listed")
}

/// Reads and writes a file that has no name any more.
fn use_nameless(server: &mut Server, node: u64, flags: &[&str]) -> Result<()> {
    let attr = server.attr(node)?;
    ensure!((attr.nlink, attr.size) == (0, 21), "{flags:?}: {attr:?}");
    let fh = if flags.is_empty() {
        server.open(node, 2)?
    } else {
        0
    };
    ensure!(read(server, node, fh)? == CONTENT, "{flags:?}: content");
    let written = server.write((node, fh), 5, b"WAS", 0)?;
    ensure!(written == (0, 3), "{flags:?}: {written:?}");
    ensure!(
        read(server, node, fh)? == b"what WAS there before",
        "{flags:?}: content after a write"
    );
    ensure!(server.setattr(node, SIZE, (4, 0, 0, 0))? == 0, "truncate");
    ensure!(read(server, node, fh)? == b"what", "{flags:?}: truncated");
    if fh != 0 {
        server.release(node, fh)?;
    }
    Ok(())
}

fn read(server: &mut Server, node: u64, fh: u64) -> Result<Vec<u8>> {
    let mut body = longs(&[fh, 0]);
    body.extend_from_slice(&words(&[4096, 0, 0, 0, 0, 0]));
    server.well(READ, node, &body)
}

#[test]
fn a_file_that_was_only_listed_is_of_use_after_its_removal() -> Result<()> {
    for flags in PROFILES {
        let (folder, mut server) = begin(flags)?;
        let node = listed(&mut server, "first")?;
        server.well(UNLINK, 1, &named(&[], &["first"]))?;
        ensure!(!folder.path().join("share/first").exists(), "is there");
        use_nameless(&mut server, node, flags)?;
        // Another of that name is another one.
        let (other, _) = server.create(1, "first", 0o644)?;
        ensure!(server.attr(other)?.size == 0 && other != node, "the same");
        ensure!(server.attr(node)?.size == 4, "{flags:?}: mixed up");
        // There and on the host until the guest forgets it, and not longer.
        let ino = server.attr(node)?.ino;
        ensure!(holds(&server, ino)?, "{flags:?}: let go of");
        server.tell(FORGET, node, &longs(&[1]))?;
        ensure!(!holds(&server, ino)?, "{flags:?}: held for ever");
    }
    Ok(())
}

/// Whether a descriptor of the server is of inode `ino` of the share, removed.
fn holds(server: &Server, ino: u64) -> Result<bool> {
    for entry in fs::read_dir(server.child.descriptors()?)? {
        // It may have been closed since.
        let Ok(found) = fs::metadata(entry?.path()) else {
            continue;
        };
        if found.ino() == ino && found.nlink() == 0 && found.is_file() {
            return Ok(true);
        }
    }
    Ok(false)
}

#[test]
fn a_file_that_was_only_listed_is_of_use_after_another_took_its_name() -> Result<()> {
    for flags in PROFILES {
        let (folder, mut server) = begin(flags)?;
        let first = listed(&mut server, "first")?;
        let second = listed(&mut server, "second")?;
        let mut body = longs(&[1]);
        body.extend_from_slice(b"second\0first\0");
        server.well(RENAME, 1, &body)?;
        use_nameless(&mut server, first, flags)?;
        ensure!(server.attr(second)?.nlink == 1, "{flags:?}: the new one");
        ensure!(server.find("first")? == second, "{flags:?}: another node");
        let host = fs::read(folder.path().join("share/first"))?;
        ensure!(host == CONTENT, "{flags:?}: written to the wrong file");
    }
    Ok(())
}

#[test]
fn a_file_that_was_only_listed_keeps_its_other_name() -> Result<()> {
    for flags in PROFILES {
        let (folder, mut server) = begin(flags)?;
        let share = folder.path().join("share");
        fs::hard_link(share.join("first"), share.join("third"))?;
        let node = listed(&mut server, "first")?;
        server.well(UNLINK, 1, &named(&[], &["first"]))?;
        let attr = server.attr(node)?;
        ensure!((attr.nlink, attr.size) == (1, 21), "{flags:?}: {attr:?}");
        ensure!(server.find("third")? == node, "{flags:?}: another node");
        let fh = if flags.is_empty() {
            server.open(node, 0)?
        } else {
            0
        };
        ensure!(read(&mut server, node, fh)? == CONTENT, "{flags:?}");
    }
    Ok(())
}
