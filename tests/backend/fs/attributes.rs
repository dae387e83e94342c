//! Owners, modes, special files and extended attributes, in each mode of virtualisation.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{binary, host};
use tempfile::TempDir;

use super::client::*;
use super::folder;

const KEY: &str = "user.msb.override_stat";
const MODE: u32 = 1;
const UID: u32 = 2;
const GID: u32 = 4;
const SIZE: u32 = 8;
const ATIME: u32 = 16;
const MTIME: u32 = 32;
const KILL_SUIDGID: u32 = 2048;

const EPERM: i32 = 1;
const EIO: i32 = 5;
const EACCES: i32 = 13;
const ENODATA: i32 = 61;
const ENOTTY: i32 = 25;
const EINVAL: i32 = 22;
const EOPNOTSUPP: i32 = 95;

/// Whether the tests may act as another user; says so when not.
fn is_root(what: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped, only root can {what}");
    }
    root
}

/// A share that belongs to an ordinary user, and a server that this user runs.
fn ordinary(
    flags: &[&str],
    prepare: impl FnOnce(&Path) -> Result<()>,
) -> Result<(TempDir, Server)> {
    let folder = folder()?;
    let share = folder.path().join("share");
    prepare(&share)?;
    host(
        "chown",
        [Path::new("-R"), Path::new("65534:65534"), folder.path()],
    )?;
    let socket = folder.path().join("fs.sock");
    let child = Command::new(binary("msb-fs"))
        .arg("--socket-path")
        .arg(&socket)
        .arg("--shared-dir")
        .arg(&share)
        .args(["--sandbox", "strict", "--log-level", "warn"])
        .args(flags)
        .uid(65534)
        .gid(65534)
        .stdin(Stdio::null())
        .spawn()
        .context("starting msb-fs")?;
    let server = Server::connect(child, &socket)?;
    Ok((folder, server))
}

fn stored(path: &Path) -> Result<Vec<u8>> {
    let mut value = [0; 64];
    let len = rustix::fs::getxattr(path, KEY, &mut value)?;
    Ok(value[..len].to_vec())
}

fn store(path: &Path, value: &[u8]) -> Result<()> {
    Ok(rustix::fs::setxattr(
        path,
        KEY,
        value,
        rustix::fs::XattrFlags::empty(),
    )?)
}

#[test]
fn off_serves_root_the_owners_and_modes_of_the_host() -> Result<()> {
    if !is_root("give files away") {
        return Ok(());
    }
    let folder = folder()?;
    let share = folder.path().join("share");
    fs::write(share.join("theirs"), "x")?;
    chown(share.join("theirs"), Some(1234), Some(4321))?;
    let mut server = Server::start(folder.path(), &["--stat-virt", "off"])?;
    let (theirs, attr) = server.find_in(1, "theirs")?;
    ensure!((attr.uid, attr.gid) == (1234, 4321), "{attr:?}");
    ensure!(
        server.setattr(theirs, UID | GID, (0, 0, 7, 8))? == 0,
        "chown"
    );
    ensure!(
        server.setattr(theirs, MODE, (0, 0o4400, 0, 0))? == 0,
        "chmod"
    );
    let found = fs::metadata(share.join("theirs"))?;
    ensure!(
        (found.uid(), found.gid(), found.mode()) == (7, 8, 0o104_400),
        "{found:?}"
    );

    server.caller = (1000, 1001);
    server.create(1, "mine", 0o6640)?;
    server.well(SYMLINK, 1, &named(&[], &["link", "mine"]))?;
    server.well(MKNOD, 1, &named(&[0o010_644, 0, 0, 0], &["pipe"]))?;
    server.well(MKNOD, 1, &named(&[0o140_600, 0, 0, 0], &["socket"]))?;
    server.well(MKNOD, 1, &named(&[0o020_000, 0, 0, 0], &["whiteout"]))?;
    for (name, mode) in [
        ("mine", 0o106_640),
        ("link", 0o120_777),
        ("pipe", 0o010_644),
        ("socket", 0o140_600),
        ("whiteout", 0o020_000),
    ] {
        let found = fs::symlink_metadata(share.join(name))?;
        let looks = (found.uid(), found.gid(), found.mode());
        ensure!(looks == (1000, 1001, mode), "{name}: {looks:?}");
    }
    // A device of the host is not made for a guest, whoever runs the server.
    let device = named(&[0o020_644, 0x103, 0, 0], &["null"]);
    ensure!(
        server.ask(MKNOD, 1, &device)?.0 == EPERM,
        "a device was made"
    );
    ensure!(!share.join("null").exists(), "a device was made");

    let group = server.mkdir(1, "group", 0o755)?;
    chown(share.join("group"), None, Some(555))?;
    fs::set_permissions(share.join("group"), Permissions::from_mode(0o2775))?;
    server.create(group, "file", 0o2755)?;
    server.mkdir(group, "below", 0o755)?;
    let file = fs::metadata(share.join("group/file"))?;
    ensure!(
        (file.gid(), file.mode() & 0o7777) == (555, 0o755),
        "{file:?}"
    );
    let below = fs::metadata(share.join("group/below"))?;
    ensure!(
        (below.gid(), below.mode() & 0o7777) == (555, 0o2755),
        "{below:?}"
    );
    Ok(())
}

#[test]
fn off_without_privilege_refuses_what_it_cannot_do() -> Result<()> {
    if !is_root("start a server of another user") {
        return Ok(());
    }
    let (_folder, mut server) = ordinary(&["--stat-virt", "off"], |share| {
        Ok(fs::write(share.join("file"), "x")?)
    })?;
    let (file, attr) = server.find_in(1, "file")?;
    ensure!((attr.uid, attr.gid) == (65534, 65534), "{attr:?}");
    ensure!(server.setattr(file, UID, (0, 0, 5, 0))? == EPERM, "chown");
    for mode in [0o010_644, 0o140_644, 0o020_644, 0o060_644] {
        let body = named(&[mode, 0x103, 0, 0], &["special"]);
        ensure!(
            server.ask(MKNOD, 1, &body)?.0 == EOPNOTSUPP,
            "mknod {mode:o}"
        );
    }
    server.well(MKNOD, 1, &named(&[0o644, 0, 0, 0], &["plain"]))?;
    // The owner keeps his own access, or the server could not go on.
    ensure!(server.setattr(file, MODE, (0, 0o044, 0, 0))? == 0, "chmod");
    ensure!(
        server.attr(file)?.mode == 0o100_644,
        "{:?}",
        server.attr(file)?
    );
    Ok(())
}

#[test]
fn what_the_host_forbids_its_owner_can_be_recorded_all_the_same() -> Result<()> {
    if !is_root("start a server of another user") {
        return Ok(());
    }
    let (folder, mut server) = ordinary(&[], |share| {
        for (name, mode) in [("object", 0o444), ("closed", 0o000)] {
            fs::write(share.join(name), "content")?;
            fs::set_permissions(share.join(name), Permissions::from_mode(mode))?;
        }
        Ok(())
    })?;
    for (name, mode) in [("object", 0o100_444), ("closed", 0o100_000)] {
        let (node, attr) = server.find_in(1, name)?;
        ensure!((attr.mode, attr.uid) == (mode, 0), "{name}: {attr:?}");
        // Asked for whenever a file is executed, and written to.
        let capability = server.getxattr(node, "security.capability")?;
        ensure!(capability == Err(ENODATA), "{name}: {capability:?}");
        ensure!(
            server.setattr(node, UID | MODE, (0, 0o640, 33, 0))? == 0,
            "{name}"
        );
        let attr = server.attr(node)?;
        ensure!((attr.mode, attr.uid) == (0o100_640, 33), "{name}: {attr:?}");
        stored(&folder.path().join("share").join(name))?;
        let fh = server.open(node, 0)?;
        let body = [longs(&[fh, 0]), words(&[100, 0]), vec![0; 16]].concat();
        ensure!(server.well(READ, node, &body)? == b"content", "{name}");
    }
    Ok(())
}

#[test]
fn a_broken_override_is_an_error_and_not_a_guess() -> Result<()> {
    let folder = folder()?;
    let share = folder.path().join("share");
    let good = words(&[1, 5, 6, 0o100_600, 0]);
    let mut version = good.clone();
    version[0] = 2;
    let mut directory = good.clone();
    directory[12..16].copy_from_slice(&0o040_700_u32.to_le_bytes());
    for (name, value) in [
        ("good", good.clone()),
        ("short", good[..19].to_vec()),
        ("empty", vec![]),
        ("long", [good.clone(), vec![0]].concat()),
        ("version", version),
        ("directory", directory),
    ] {
        fs::write(share.join(name), "x")?;
        store(&share.join(name), &value)?;
    }
    let mut server = Server::start(folder.path(), &[])?;
    ensure!(server.find_in(1, "good")?.1.uid == 5, "the good one");
    for name in ["short", "empty", "long", "version", "directory"] {
        let (error, _) = server.ask(LOOKUP, 1, &named(&[], &[name]))?;
        ensure!(error == EIO, "{name}: {error}");
    }
    // The listing names them all the same, so that they can be removed.
    for name in ["short", "long"] {
        server.well(UNLINK, 1, &named(&[], &[name]))?;
    }
    Ok(())
}

#[test]
fn creating_what_exists_changes_nothing_of_it() -> Result<()> {
    let folder = folder()?;
    let mut server = Server::start(folder.path(), &[])?;
    let (node, _) = server.create(1, "file", 0o600)?;
    ensure!(
        server.setattr(node, UID | GID | MODE, (0, 0o4711, 12, 13))? == 0,
        "setattr"
    );
    let path = folder.path().join("share/file");
    let before = stored(&path)?;
    server.caller = (77, 88);
    let (again, _) = server.create(1, "file", 0o666)?;
    ensure!(
        again == node && stored(&path)? == before,
        "the override changed"
    );
    let exclusive = named(&[0o302, 0o666, 0, 0], &["file"]);
    ensure!(server.ask(CREATE, 1, &exclusive)?.0 == 17, "not EEXIST");
    ensure!(stored(&path)? == before, "the override changed");
    Ok(())
}

#[test]
fn set_group_directories_hand_down_their_group() -> Result<()> {
    for mode in ["strict", "relaxed"] {
        let folder = folder()?;
        let mut server = Server::start(folder.path(), &["--stat-virt", mode])?;
        let group = server.mkdir(1, "group", 0o755)?;
        ensure!(
            server.setattr(group, GID | MODE, (0, 0o2775, 0, 300))? == 0,
            "setattr"
        );
        server.caller = (1000, 1000);
        let (file, _) = server.create(group, "file", 0o644)?;
        let attr = server.attr(file)?;
        ensure!(
            (attr.uid, attr.gid, attr.mode) == (1000, 300, 0o100_644),
            "{attr:?}"
        );
        let below = server.mkdir(group, "below", 0o755)?;
        let attr = server.attr(below)?;
        ensure!((attr.gid, attr.mode) == (300, 0o042_755), "{attr:?}");
        server.well(MKNOD, group, &named(&[0o010_600, 0, 0, 0], &["pipe"]))?;
        ensure!(server.find_in(group, "pipe")?.1.gid == 300, "mknod");
        // Somebody else's group is no way to its privileges.
        let (file, _) = server.create(group, "program", 0o2755)?;
        ensure!(
            server.attr(file)?.mode == 0o100_755,
            "{:o}",
            server.attr(file)?.mode
        );
        server.caller = (1000, 300);
        let (file, _) = server.create(group, "member", 0o2755)?;
        ensure!(
            server.attr(file)?.mode == 0o102_755,
            "{:o}",
            server.attr(file)?.mode
        );
    }
    Ok(())
}

#[test]
fn writing_takes_set_id_bits_and_capabilities_away() -> Result<()> {
    let folder = folder()?;
    let share = folder.path().join("share");
    // One file that only the host has marked, one that the guest has.
    fs::write(share.join("host"), "content")?;
    fs::set_permissions(share.join("host"), Permissions::from_mode(0o6755))?;
    let mut server = Server::start(folder.path(), &[])?;
    server.create(1, "guest", 0o6755)?;
    for (name, how) in ["host", "guest"]
        .into_iter()
        .flat_map(|name| ["write", "truncate", "open", "chown"].map(move |how| (name, how)))
    {
        let (node, _) = server.find_in(1, name)?;
        ensure!(server.setattr(node, MODE, (0, 0o6755, 0, 0))? == 0, "chmod");
        ensure!(
            server.setxattr(node, "security.capability", b"caps")? == 0,
            "setcap"
        );
        ensure!(
            server.attr(node)?.mode & 0o6000 == 0o6000,
            "{name}: not set"
        );
        match how {
            "write" => {
                let fh = server.open(node, 2)?;
                ensure!(server.write((node, fh), 0, b"new", 4)? == (0, 3), "write");
            }
            "truncate" => {
                ensure!(
                    server.setattr(node, SIZE | KILL_SUIDGID, (1, 0, 0, 0))? == 0,
                    "size"
                );
            }
            "open" => drop(server.well(OPEN, node, &words(&[0o1002, 1]))?),
            _ => {
                let valid = UID | GID | KILL_SUIDGID;
                ensure!(server.setattr(node, valid, (0, 0, 9, 9))? == 0, "chown");
            }
        }
        let mode = server.attr(node)?.mode;
        ensure!(mode & 0o6000 == 0, "{name} after {how}: {mode:o}");
        let capability = server.getxattr(node, "security.capability")?;
        ensure!(
            capability == Err(ENODATA),
            "{name} after {how}: {capability:?}"
        );
    }
    ensure!(
        fs::metadata(share.join("host"))?.mode() & 0o6000 == 0,
        "the host's bits"
    );
    Ok(())
}

#[test]
fn what_an_overlay_copies_up_keeps_its_privileges() -> Result<()> {
    for mode in ["strict", "relaxed"] {
        let folder = folder()?;
        let mut server = Server::start(folder.path(), &["--stat-virt", mode])?;
        let temporary = words(&[0o2, 0o100_644, 0, 0]);
        server.well(TMPFILE, 1, &temporary)?;
        // Nobody may enter the directory in which an overlay makes its copies.
        let work = server.mkdir(1, "work", 0)?;
        let (error, _) = server.ask(TMPFILE, work, &temporary)?;
        ensure!(error == EOPNOTSUPP, "{mode}: {error}");
        let (node, _) = server.create(work, "#1", 0)?;
        ensure!(
            server.setxattr(node, "security.capability", b"caps")? == 0,
            "setcap"
        );
        let special = |server: &mut Server| -> Result<_> {
            let mode = server.attr(node)?.mode & 0o7777;
            Ok((mode, server.getxattr(node, "security.capability")?.is_ok()))
        };
        ensure!(server.setattr(node, MODE, (0, 0o6755, 0, 0))? == 0, "chmod");
        let give = UID | GID | KILL_SUIDGID;
        ensure!(server.setattr(node, give, (0, 0, 9, 9))? == 0, "chown");
        ensure!(special(&mut server)? == (0o6755, true), "{mode}: lost");
        // Elsewhere it is like any other file, also when nobody has looked for it there.
        let mut body = longs(&[1]);
        body.extend_from_slice(b"#1\0program\0");
        server.well(RENAME, work, &body)?;
        ensure!(server.setattr(node, give, (0, 0, 9, 9))? == 0, "chown");
        ensure!(special(&mut server)? == (0o755, false), "{mode}: kept");
    }
    Ok(())
}

#[test]
fn our_attributes_are_out_of_the_guests_reach() -> Result<()> {
    let folder = folder()?;
    let share = folder.path().join("share");
    for flags in [
        &["--stat-virt", "strict"],
        &["--stat-virt", "relaxed"],
        &["--stat-virt", "off"],
    ] {
        let mut server = Server::start(folder.path(), flags)?;
        let (node, _) = server.create(1, "file", 0o640)?;
        store(&share.join("file"), &words(&[1, 0, 0, 0o100_640, 0]))?;
        let none = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(share.join("file"), "user.msb._probe", b"1", none)?;
        ensure!(
            server.setxattr(node, "user.mine", b"value")? == 0,
            "its own"
        );
        for name in [
            KEY,
            "user.msb._probe",
            "user.msb.",
            "user.msb.security.capability",
        ] {
            ensure!(server.setxattr(node, name, b"x")? == EACCES, "set {name}");
            ensure!(server.getxattr(node, name)? == Err(EACCES), "get {name}");
            let (error, _) = server.ask(REMOVEXATTR, node, &named(&[], &[name]))?;
            ensure!(error == EACCES, "remove {name}: {error}");
        }
        let list = server.listxattr(node)?;
        ensure!(list == "user.mine", "{flags:?}: {list}");
        ensure!(
            server.getxattr(node, "user.mine")? == Ok(b"value".to_vec()),
            "its own"
        );
        let mut small = words(&[2, 0]);
        small.extend_from_slice(b"user.mine\0");
        ensure!(server.ask(GETXATTR, node, &small)?.0 == 34, "not ERANGE");
        server.well(REMOVEXATTR, node, &named(&[], &["user.mine"]))?;
        server.well(UNLINK, 1, &named(&[], &["file"]))?;
    }
    Ok(())
}

#[test]
fn privileged_attributes_are_kept_for_the_guest_alone() -> Result<()> {
    if !is_root("start a server of another user") {
        return Ok(());
    }
    for mode in ["strict", "relaxed"] {
        let (folder, mut server) = ordinary(&["--stat-virt", mode], |_| Ok(()))?;
        let (file, _) = server.create(1, "file", 0o755)?;
        let dir = server.mkdir(1, "dir", 0o755)?;
        let capability = [
            1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        ensure!(
            server.setxattr(file, "security.capability", &capability)? == 0,
            "setcap"
        );
        ensure!(
            server.setxattr(dir, "trusted.overlay.opaque", b"y")? == 0,
            "opaque"
        );
        let found = server.getxattr(file, "security.capability")?;
        ensure!(found == Ok(capability.to_vec()), "{found:?}");
        ensure!(
            server.listxattr(file)? == "security.capability",
            "{}",
            server.listxattr(file)?
        );
        ensure!(
            server.listxattr(dir)? == "trusted.overlay.opaque",
            "{}",
            server.listxattr(dir)?
        );
        let mut value = [0; 64];
        let path = folder.path().join("share/file");
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&path, "security.host", b"its own", flags)?;
        let found = server.getxattr(file, "security.host")?;
        ensure!(found == Err(ENODATA), "the host's own is shown: {found:?}");
        rustix::fs::removexattr(&path, "security.host")?;
        let error = rustix::fs::getxattr(&path, "security.capability", &mut value);
        ensure!(
            error == Err(rustix::io::Errno::NODATA),
            "the host's file has capabilities"
        );
    }
    Ok(())
}

#[test]
fn links_and_special_files_answer_as_a_long_listing_asks() -> Result<()> {
    let folder = folder()?;
    let share = folder.path().join("share");
    fs::write(share.join("target"), "x")?;
    symlink("target", share.join("link"))?;
    host("mkfifo", [share.join("pipe")])?;
    let _socket = std::os::unix::net::UnixListener::bind(share.join("socket"))?;
    for mode in ["strict", "relaxed", "off"] {
        let mut server = Server::start(folder.path(), &["--stat-virt", mode])?;
        for name in ["link", "pipe", "socket"] {
            let (node, _) = server.find_in(1, name)?;
            for attribute in ["security.selinux", "security.capability", "user.x"] {
                let found = server.getxattr(node, attribute)?;
                ensure!(
                    found == Err(ENODATA),
                    "{mode}: {attribute} of {name}: {found:?}"
                );
            }
            let found = server.getxattr(node, "system.posix_acl_access")?;
            ensure!(
                found == Err(EOPNOTSUPP),
                "{mode}: list of {name}: {found:?}"
            );
            ensure!(server.listxattr(node)?.is_empty(), "{mode}: {name}");
            let error = server.setattr(node, ATIME | MTIME, (0, 0, 0, 0))?;
            ensure!(error == 0, "{mode}: times of {name}: {error}");
            ensure!(
                fs::symlink_metadata(share.join(name))?.mtime() == 2,
                "{mode}: {name}"
            );
            if name == "link" {
                let error = server.setattr(node, UID | GID, (0, 0, 3, 4))?;
                let root = rustix::process::geteuid().is_root();
                ensure!(error == 0 || !root, "{mode}: chown of {name}: {error}");
            }
            let (error, _) = server.ask(IOCTL, node, &[0; 32])?;
            ensure!(error == ENOTTY, "{mode}: ioctl of {name}: {error}");
        }
    }
    Ok(())
}

#[test]
fn a_whiteout_is_a_device_in_the_guest_alone() -> Result<()> {
    let folder = folder()?;
    let share = folder.path().join("share");
    for mode in ["strict", "relaxed"] {
        let mut server = Server::start(folder.path(), &["--stat-virt", mode])?;
        server.create(1, "file", 0o644)?;
        let body = |flags: u32| named(&[1, 0, flags, 0], &["file", "moved"]);
        ensure!(
            server.ask(RENAME2, 1, &body(6))?.0 == EINVAL,
            "exchange with whiteout"
        );
        server.well(RENAME2, 1, &body(4))?;
        let (_, attr) = server.find_in(1, "file")?;
        ensure!((attr.mode, attr.rdev) == (0o020_000, 0), "{attr:?}");
        ensure!(server.find_in(1, "moved")?.1.mode == 0o100_644, "moved");
        let found = fs::symlink_metadata(share.join("file"))?;
        ensure!(
            found.is_file() && !found.file_type().is_char_device(),
            "{found:?}"
        );
        ensure!(server.ask(RENAME2, 1, &body(1))?.0 == 17, "noreplace");
        server.well(RENAME2, 1, &body(2))?;
        ensure!(server.find_in(1, "file")?.1.mode == 0o100_644, "exchanged");
        for name in ["file", "moved"] {
            server.well(UNLINK, 1, &named(&[], &[name]))?;
        }
    }
    Ok(())
}

/// A list of access control: owner, a named user, group, mask, others.
fn list(user: u16, named: u16, group: u16, mask: u16, other: u16) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0];
    for (tag, bits, id) in [
        (1_u16, user, u32::MAX),
        (2, named, 1234),
        (4, group, u32::MAX),
        (16, mask, u32::MAX),
        (32, other, u32::MAX),
    ] {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&bits.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

#[test]
fn access_lists_and_modes_follow_each_other() -> Result<()> {
    const ACCESS: &str = "system.posix_acl_access";
    const DEFAULT: &str = "system.posix_acl_default";
    let folder = folder()?;
    for mode in ["strict", "relaxed", "off"] {
        let mut server = Server::start(folder.path(), &["--stat-virt", mode, "--posix-acl"])?;
        let agreed = server.init()?;
        let flags = u32::from_le_bytes(agreed[12..16].try_into()?);
        ensure!(
            flags & (1 << 20) != 0 && flags & (1 << 6) != 0,
            "{mode}: {flags:x}"
        );
        let (file, _) = server.create(1, "file", 0o644)?;
        ensure!(
            server.setxattr(file, ACCESS, &list(6, 7, 4, 6, 0))? == 0,
            "{mode}: set"
        );
        ensure!(
            server.attr(file)?.mode == 0o100_660,
            "{mode}: {:o}",
            server.attr(file)?.mode
        );
        ensure!(
            server.setattr(file, MODE, (0, 0o604, 0, 0))? == 0,
            "{mode}: chmod"
        );
        let found = server.getxattr(file, ACCESS)?;
        ensure!(found == Ok(list(6, 7, 4, 0, 4)), "{mode}: {found:?}");
        let simple = [
            &list(7, 0, 5, 0, 5)[..12],
            &list(7, 0, 5, 0, 5)[20..28],
            &list(7, 0, 5, 0, 5)[36..],
        ]
        .concat();
        ensure!(
            server.setxattr(file, ACCESS, &simple)? == 0,
            "{mode}: simple"
        );
        ensure!(
            server.getxattr(file, ACCESS)? == Err(ENODATA),
            "{mode}: a list is left"
        );
        ensure!(
            server.attr(file)?.mode == 0o100_755,
            "{mode}: {:o}",
            server.attr(file)?.mode
        );
        ensure!(
            server.setxattr(file, ACCESS, b"\x02\0\0\0\x01")? == EINVAL,
            "{mode}: nonsense"
        );

        let dir = server.mkdir(1, "dir", 0o755)?;
        ensure!(
            server.setxattr(dir, DEFAULT, &list(7, 7, 5, 7, 5))? == 0,
            "{mode}: default"
        );
        // The umask counts for nothing where there is a default list, and does elsewhere.
        let made = server.well(CREATE, dir, &named(&[0o102, 0o666, 0o077, 0], &["heir"]))?;
        let heir = u64::from_le_bytes(made[..8].try_into()?);
        ensure!(
            server.attr(heir)?.mode == 0o100_664,
            "{mode}: {:o}",
            server.attr(heir)?.mode
        );
        let found = server.getxattr(heir, ACCESS)?;
        ensure!(found == Ok(list(6, 7, 5, 6, 4)), "{mode}: {found:?}");
        let below = server.mkdir(dir, "below", 0o777)?;
        let found = server.getxattr(below, DEFAULT)?;
        ensure!(found == Ok(list(7, 7, 5, 7, 5)), "{mode}: {found:?}");
        let made = server.well(CREATE, 1, &named(&[0o102, 0o666, 0o027, 0], &["plain"]))?;
        let plain = u64::from_le_bytes(made[..8].try_into()?);
        ensure!(
            server.attr(plain)?.mode == 0o100_640,
            "{mode}: {:o}",
            server.attr(plain)?.mode
        );
        ensure!(server.listxattr(heir)? == ACCESS, "{mode}: listing");
        drop(server);
        fs::remove_dir_all(folder.path().join("share"))?;
        fs::create_dir(folder.path().join("share"))?;
    }
    Ok(())
}

#[test]
fn the_time_of_birth_is_the_hosts() -> Result<()> {
    let folder = folder()?;
    let path = folder.path().join("share/file");
    fs::write(&path, "12345")?;
    let Ok(born) = fs::metadata(&path)?.created() else {
        eprintln!("skipped, the host's file system knows no time of birth");
        return Ok(());
    };
    let mut server = Server::start(folder.path(), &[])?;
    let file = server.find("file")?;
    let out = server.well(STATX, file, &longs(&[0, 0, 0xfff]))?;
    ensure!(out.len() == 32 + 256, "{} bytes", out.len());
    let stat = &out[32..];
    let seconds = u64::from_le_bytes(stat[80..88].try_into()?);
    let born = born.duration_since(std::time::UNIX_EPOCH)?;
    ensure!(seconds == born.as_secs(), "{seconds} is not {born:?}");
    ensure!(u64::from_le_bytes(stat[40..48].try_into()?) == 5, "size");
    ensure!(stat[28..30] == 0o100_644_u32.to_le_bytes()[..2], "mode");
    Ok(())
}

#[test]
fn what_is_forgotten_too_often_harms_nobody() -> Result<()> {
    let folder = folder()?;
    let mut server = Server::start(folder.path(), &[])?;
    let (node, fh) = server.create(1, "file", 0o644)?;
    server.tell(FORGET, node, &longs(&[u64::MAX]))?;
    server.tell(FORGET, 1, &longs(&[u64::MAX]))?;
    server.tell(FORGET, 999, &longs(&[1]))?;
    server.release(node, fh)?;
    let (again, attr) = server.find_in(1, "file")?;
    ensure!(again != 0 && attr.mode == 0o100_644, "{attr:?}");
    Ok(())
}

#[test]
fn a_host_without_attributes_is_refused_or_made_the_best_of() -> Result<()> {
    if !is_root("mount a file system without extended attributes") {
        return Ok(());
    }
    let folder = folder()?;
    let share = folder.path().join("share");
    host(
        "mount",
        [
            Path::new("-t"),
            Path::new("ramfs"),
            Path::new("none"),
            &share,
        ],
    )?;
    let unmount = scopeguard(&share);
    let refused = Command::new(binary("msb-fs"))
        .arg("--socket-path")
        .arg(folder.path().join("refused.sock"))
        .arg("--shared-dir")
        .arg(&share)
        .output()?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        refused.status.code() == Some(1) && text.contains("relaxed"),
        "{text}"
    );
    let mut server = Server::start(folder.path(), &["--stat-virt", "relaxed"])?;
    server.caller = (1000, 1000);
    let (file, _) = server.create(1, "file", 0o644)?;
    server.mkdir(1, "dir", 0o755)?;
    server.well(SYMLINK, 1, &named(&[], &["link", "file"]))?;
    ensure!(
        server.attr(file)?.mode == 0o100_644,
        "{:?}",
        server.attr(file)?
    );
    ensure!(server.setattr(file, MODE, (0, 0o700, 0, 0))? == 0, "chmod");
    ensure!(
        server.attr(file)?.mode == 0o100_700,
        "{:?}",
        server.attr(file)?
    );
    ensure!(server.setattr(file, UID, (0, 0, 5, 0))? == EPERM, "chown");
    drop(server);
    drop(unmount);
    Ok(())
}

/// Unmounts `path` in the end, whatever happens.
fn scopeguard(path: &Path) -> impl Drop {
    struct Mounted(std::path::PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            host("umount", [Path::new("-l"), &self.0]).ok();
        }
    }
    Mounted(path.to_owned())
}
