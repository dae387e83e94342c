//! msb-fs over its socket: FUSE requests by hand, judged by the host's file system.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

mod attributes;
mod client;
mod dropin;
mod quota;
mod unnamed;

use client::*;

const ENOSYS: i32 = 38;
const EROFS: i32 = 30;

fn folder() -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    fs::create_dir(folder.path().join("share"))?;
    Ok(folder)
}

#[test]
fn the_configuration_names_the_share_and_its_queues() -> Result<()> {
    let folder = folder()?;
    let mut server = Server::start(folder.path(), &[])?;
    let config = server.config(40)?;
    ensure!(
        config.starts_with(b"share\0") && config[36..] == [1, 0, 0, 0],
        "{config:?}"
    );
    Ok(())
}

/// The kernel stops whoever opens a file in a process of several threads for tens of milliseconds,
/// each time that the table doubles.
#[test]
fn the_table_of_descriptors_need_not_grow_while_it_serves() -> Result<()> {
    for (flags, least) in [(&[][..], 16_384), (&["--rlimit-nofile=200"], 200)] {
        let folder = folder()?;
        let mut server = Server::start(folder.path(), flags)?;
        server.config(40)?;
        let room: u64 = server.child.status("FDSize")?.parse()?;
        ensure!(room >= least, "{flags:?}: room for {room}");
    }
    Ok(())
}

#[test]
fn bad_names_are_refused_by_every_operation_and_touch_nothing() -> Result<()> {
    let folder = folder()?;
    fs::write(folder.path().join("canary"), "untouched")?;
    fs::create_dir(folder.path().join("share-secret"))?;
    fs::write(folder.path().join("share/file"), "x")?;
    let mut server = Server::start(folder.path(), &[])?;
    let file = server.find("file")?;
    let long = "n".repeat(256);
    let bad = [
        "",
        ".",
        "..",
        "a/b",
        "/",
        "/etc/passwd",
        "../canary",
        "../share-secret",
        "./file",
        &long,
    ];
    for name in bad {
        let named = |lead: &[u32]| [words(lead), format!("{name}\0").into_bytes()].concat();
        let two = |lead: &[u32], swap: bool| {
            let names = if swap {
                format!("{name}\0good\0")
            } else {
                format!("good\0{name}\0")
            };
            [words(lead), names.into_bytes()].concat()
        };
        let requests = [
            ("LOOKUP", LOOKUP, named(&[])),
            ("MKDIR", MKDIR, named(&[0o755, 0])),
            ("MKNOD", MKNOD, named(&[0o100_644, 0, 0, 0])),
            ("CREATE", CREATE, named(&[0o101, 0o644, 0, 0])),
            ("UNLINK", UNLINK, named(&[])),
            ("RMDIR", RMDIR, named(&[])),
            (
                "SYMLINK",
                SYMLINK,
                [format!("{name}\0").into_bytes(), b"target\0".to_vec()].concat(),
            ),
            ("RENAME from", RENAME, two(&[1, 0], true)),
            ("RENAME to", RENAME, two(&[1, 0], false)),
            ("RENAME2 to", RENAME2, two(&[1, 0, 0, 0], false)),
            ("LINK", LINK, named(&[u32::try_from(file)?, 0])),
        ];
        for (what, opcode, body) in requests {
            // `.` and `..` may be looked up: a guest that exports its mount does.
            let (error, _) = server.ask(opcode, 1, &body)?;
            ensure!(
                error != 0 || (what == "LOOKUP" && name == "."),
                "{what} of {name:?} succeeded"
            );
        }
    }
    ensure!(
        fs::read_to_string(folder.path().join("canary"))? == "untouched",
        "the canary changed"
    );
    ensure!(
        fs::read_dir(folder.path().join("share"))?.count() == 1,
        "something was made in the share"
    );
    ensure!(
        fs::read_dir(folder.path().join("share-secret"))?.count() == 0,
        "something was made beside it"
    );
    Ok(())
}

#[test]
fn links_and_special_files_of_the_host_are_never_opened() -> Result<()> {
    let folder = folder()?;
    fs::write(folder.path().join("canary"), "secret")?;
    let share = folder.path().join("share");
    symlink("../canary", share.join("relative"))?;
    symlink(folder.path().join("canary"), share.join("absolute"))?;
    symlink("/proc/self/root", share.join("magic"))?;
    msb_testkit::msb::host("mkfifo", [share.join("fifo")])?;
    let mut server = Server::start(folder.path(), &[])?;
    for name in ["relative", "absolute", "magic", "fifo"] {
        let node = server.find(name)?;
        let (error, _) = server.ask(OPEN, node, &words(&[0, 0]))?;
        ensure!(error != 0, "{name} was opened");
        let (error, _) = server.ask(LOOKUP, node, b"etc\0")?;
        ensure!(error != 0, "{name} was walked through");
        // Its attributes are known without waiting for a writer of the pipe.
        let (error, _) = server.ask(GETATTR, node, &[0; 16])?;
        ensure!(error == 0, "{name}: GETATTR gave {error}");
    }
    Ok(())
}

#[test]
#[expect(clippy::too_many_lines, reason = "most of it is the table")]
fn a_read_only_share_refuses_every_change() -> Result<()> {
    let folder = folder()?;
    let path = folder.path().join("share/file");
    fs::write(&path, "as it was")?;
    let before = fs::metadata(&path)?;
    let mut server = Server::start(folder.path(), &["--readonly"])?;
    let file = server.find("file")?;
    let id = u32::try_from(file)?;
    let mut setattr = vec![0; 88];
    setattr[0] = 1;
    let changes = [
        ("SETATTR", SETATTR, file, setattr),
        ("OPEN for writing", OPEN, file, words(&[1, 0])),
        ("OPEN with truncation", OPEN, file, words(&[0o1000, 0])),
        (
            "CREATE",
            CREATE,
            1,
            [words(&[0o101, 0o644, 0, 0]), b"new\0".to_vec()].concat(),
        ),
        (
            "MKNOD",
            MKNOD,
            1,
            [words(&[0o100_644, 0, 0, 0]), b"new\0".to_vec()].concat(),
        ),
        (
            "MKDIR",
            MKDIR,
            1,
            [words(&[0o755, 0]), b"new\0".to_vec()].concat(),
        ),
        ("SYMLINK", SYMLINK, 1, b"new\0target\0".to_vec()),
        (
            "LINK",
            LINK,
            1,
            [words(&[id, 0]), b"new\0".to_vec()].concat(),
        ),
        ("UNLINK", UNLINK, 1, b"file\0".to_vec()),
        ("RMDIR", RMDIR, 1, b"file\0".to_vec()),
        (
            "RENAME",
            RENAME,
            1,
            [words(&[1, 0]), b"file\0new\0".to_vec()].concat(),
        ),
        (
            "RENAME2",
            RENAME2,
            1,
            [words(&[1, 0, 0, 0]), b"file\0new\0".to_vec()].concat(),
        ),
        (
            "SETXATTR",
            SETXATTR,
            file,
            [words(&[1, 0]), b"user.a\0b".to_vec()].concat(),
        ),
        ("REMOVEXATTR", REMOVEXATTR, file, b"user.a\0".to_vec()),
        ("FALLOCATE", FALLOCATE, file, vec![0; 32]),
    ];
    for (what, opcode, node, body) in changes {
        let (error, _) = server.ask(opcode, node, &body)?;
        ensure!(error == EROFS, "{what} gave errno {error}");
    }
    let after = fs::metadata(&path)?;
    ensure!(
        fs::read_to_string(&path)? == "as it was"
            && fs::read_dir(folder.path().join("share"))?.count() == 1,
        "the share changed"
    );
    ensure!(
        (
            before.mtime(),
            before.ctime(),
            before.ctime_nsec(),
            before.mode()
        ) == (
            after.mtime(),
            after.ctime(),
            after.ctime_nsec(),
            after.mode()
        ),
        "the file's attributes changed"
    );
    Ok(())
}

#[test]
fn unknown_and_malformed_requests_are_answered_and_harm_nothing() -> Result<()> {
    let folder = folder()?;
    fs::write(folder.path().join("share/file"), "x")?;
    let mut server = Server::start(folder.path(), &[])?;
    for opcode in (53..=255).chain([4095, 0xffff_ffff]) {
        let (error, _) = server.ask(opcode, 1, &[0; 64])?;
        ensure!(error == ENOSYS, "opcode {opcode} gave {error}");
    }
    // Every known operation with bodies of every small length. FORGET, INTERRUPT, DESTROY and
    // BATCH_FORGET have no reply; INIT would begin anew; SYNCFS has no body, and waits for a disk
    // that others may keep busy.
    for opcode in (1..=52).filter(|opcode| ![2, 26, 36, 38, 42, 50].contains(opcode)) {
        for len in 0..100 {
            for node in [1, 2, 999, u64::MAX] {
                server
                    .ask(opcode, node, &vec![0xa5; len])
                    .with_context(|| format!("opcode {opcode} with {len} bytes"))?;
            }
        }
    }
    ensure!(server.find("file")? != 0, "the server is gone");
    Ok(())
}

#[test]
fn metadata_is_recorded_as_microsandbox_does() -> Result<()> {
    let folder = folder()?;
    let mut server = Server::start(folder.path(), &[])?;
    // A character device 1:3 with mode 0640, made by root of the guest.
    let (error, _) = server.ask(
        MKNOD,
        1,
        &[words(&[0o020_640, (1 << 8) | 3, 0, 0]), b"null\0".to_vec()].concat(),
    )?;
    ensure!(error == 0, "MKNOD gave {error}");
    let path = folder.path().join("share/null");
    let metadata = fs::symlink_metadata(&path)?;
    ensure!(
        metadata.is_file() && metadata.mode() & 0o7777 == 0o600,
        "mode {:o}",
        metadata.mode()
    );
    let mut value = [0; 64];
    let len = rustix::fs::getxattr(&path, "user.msb.override_stat", &mut value)?;
    let expected = [words(&[1, 0, 0, 0o020_640, 0x103])].concat();
    ensure!(value[..len] == expected, "{:?}", &value[..len]);
    Ok(())
}
