//! Who keeps setuid and setgid, and who loses them, as on a local file system.

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use msb_testkit::share::{ORDINARY, Setup, Share};
use msb_testkit::sys::{act_as, join, truncate};
use rustix::fs::{FallocateFlags, copy_file_range, fallocate};

use crate::bridge::skipped;

type Change = fn(&Path) -> Result<()>;

fn open(path: &Path) -> Result<fs::File> {
    Ok(OpenOptions::new().write(true).open(path)?)
}

/// Everything that changes the content of a file.
const CHANGES: &[(&str, Change)] = &[
    ("write", |path| Ok(open(path)?.write_all_at(b"x", 5)?)),
    ("truncate", |path| Ok(truncate(path, 100)?)),
    ("ftruncate", |path| Ok(open(path)?.set_len(100)?)),
    ("O_TRUNC", |path| {
        OpenOptions::new().write(true).truncate(true).open(path)?;
        Ok(())
    }),
    ("fallocate", |path| {
        fallocate(open(path)?, FallocateFlags::empty(), 0, 20_000)?;
        Ok(())
    }),
    ("punch", |path| {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(open(path)?, hole, 0, 4096)?;
        Ok(())
    }),
    ("copy", |path| {
        let source = fs::File::open(path.with_file_name("source"))?;
        copy_file_range(&source, None, open(path)?, None, 100)?;
        Ok(())
    }),
];

fn matrix(setup: Setup<'_>) -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = Share::new(setup)?;
    fs::write(share.guest("source"), vec![2; 300])?;
    fs::set_permissions(share.guest("source"), Permissions::from_mode(0o644))?;
    let path = share.guest("program");
    for (name, change) in CHANGES {
        for (user, expected) in [(0, 0o6777), (ORDINARY, 0o777)] {
            fs::write(&path, vec![1; 9000])?;
            fs::set_permissions(&path, Permissions::from_mode(0o6777))?;
            act_as(user)?;
            let result = change(&path);
            act_as(0)?;
            result.with_context(|| format!("{name} by {user}"))?;
            let mode = fs::metadata(&path)?.permissions().mode() & 0o7777;
            ensure!(
                mode == expected,
                "{:?}: {name} by {user} leaves {mode:o}",
                setup.flags
            );
            fs::remove_file(&path)?;
        }
    }
    // A new owner takes them away whoever gives it, of a file; a directory keeps setgid.
    fs::write(&path, "x")?;
    fs::set_permissions(&path, Permissions::from_mode(0o6777))?;
    chown(&path, Some(0), Some(0))?;
    let mode = fs::metadata(&path)?.permissions().mode() & 0o7777;
    ensure!(mode == 0o777, "chown leaves {mode:o}");
    fs::create_dir(share.guest("dir"))?;
    fs::set_permissions(share.guest("dir"), Permissions::from_mode(0o2777))?;
    chown(share.guest("dir"), Some(0), Some(0))?;
    let mode = fs::metadata(share.guest("dir"))?.permissions().mode() & 0o7777;
    ensure!(mode == 0o2777, "chown of a directory leaves {mode:o}");
    share.finish()
}

#[test]
fn strict() -> Result<()> {
    matrix(Setup::default())
}

#[test]
fn strict_without_opening() -> Result<()> {
    matrix(Setup {
        flags: &["--exclusive"],
        ..Setup::default()
    })
}

#[test]
fn relaxed_without_caching() -> Result<()> {
    matrix(Setup {
        flags: &["--stat-virt", "relaxed", "--cache", "none"],
        ..Setup::default()
    })
}

#[test]
fn off() -> Result<()> {
    matrix(Setup {
        flags: &["--stat-virt", "off"],
        ..Setup::default()
    })
}

/// A group that [`ORDINARY`] is in or not.
const TEAM: u32 = 300;

/// An access control list: `rwxr-xr-x`, and one more user who may read.
fn list() -> Vec<u8> {
    let entries = [(1, 7, -1), (2, 4, 7), (4, 5, -1), (16, 5, -1), (32, 5, -1)];
    let mut bytes = vec![2, 0, 0, 0];
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&u16::to_le_bytes(tag));
        bytes.extend_from_slice(&u16::to_le_bytes(permissions));
        bytes.extend_from_slice(&i32::to_le_bytes(id));
    }
    bytes
}

#[test]
fn setgid_is_for_members_of_the_group() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let none = rustix::fs::XattrFlags::empty();
    for mode in ["strict", "relaxed", "off"] {
        let share = Share::new(Setup {
            flags: &["--stat-virt", mode, "--posix-acl"],
            ..Setup::default()
        })?;
        let team = share.guest("team");
        fs::create_dir(&team)?;
        chown(&team, Some(0), Some(TEAM))?;
        fs::set_permissions(&team, Permissions::from_mode(0o2777))?;
        // Membership beside the first group counts, as does being root.
        for (user, groups, kept) in [
            (ORDINARY, &[][..], 0),
            (ORDINARY, &[TEAM], 0o2000),
            (ORDINARY, &[TEAM + 1, TEAM], 0o2000),
            (0, &[], 0o2000),
        ] {
            let case = format!("{mode}, {user} in {groups:?}");
            let (made, listed) = (team.join("made"), team.join("listed"));
            let dir = team.join("dir");
            // Somebody's files, which are his to give a list.
            for path in [&listed, &dir] {
                match path == &dir {
                    true => fs::create_dir(path)?,
                    false => fs::write(path, "x")?,
                }
                chown(path, Some(user), Some(TEAM))?;
                fs::set_permissions(path, Permissions::from_mode(0o2755))?;
            }
            join(groups)?;
            act_as(user)?;
            let result = || -> Result<()> {
                OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o2755)
                    .open(&made)?;
                for path in [&listed, &dir] {
                    rustix::fs::setxattr(path, "system.posix_acl_access", &list(), none)?;
                }
                Ok(())
            }();
            act_as(0)?;
            join(&[])?;
            result.context(case.clone())?;
            for path in [&made, &listed, &dir] {
                let found = fs::metadata(path)?;
                ensure!(found.gid() == TEAM, "{case}: {}", found.gid());
                let mode = found.mode() & 0o7777;
                ensure!(mode == 0o755 | kept, "{case}: {path:?} has {mode:o}");
            }
            fs::remove_file(&made)?;
            fs::remove_file(&listed)?;
            fs::remove_dir(&dir)?;
        }
        share.finish()?;
    }
    Ok(())
}

#[test]
fn strict_keeps_no_privilege_of_the_host() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    // A program of the host, changed by root of the guest, is no longer what the host trusted.
    let share = Share::new(Setup::default())?;
    fs::write(share.host("program"), "x")?;
    fs::set_permissions(share.host("program"), Permissions::from_mode(0o4755))?;
    let mode = fs::metadata(share.guest("program"))?.permissions().mode() & 0o7777;
    ensure!(mode == 0o4755, "the guest sees {mode:o}");
    open(&share.guest("program"))?.write_all_at(b"changed", 0)?;
    let mode = fs::metadata(share.host("program"))?.permissions().mode() & 0o7777;
    ensure!(mode == 0o755, "the host sees {mode:o}");
    share.finish()
}
