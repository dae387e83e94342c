//! In virtiofsd's place: its users' command lines, its socket, and how front ends begin.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use msb_testkit::frontend::{EVENT_IDX, FrontEnd, PROTOCOL_FEATURES, code};
use msb_testkit::msb::binary;
use rustix::fs::{FlockOperation, flock};

use super::client::*;
use super::folder;

const MEMORY: usize = 8 << 20;
const FEATURES: u64 = EVENT_IDX | PROTOCOL_FEATURES | (1 << 32);

/// Starts the program under the name virtiofsd. `SOCKET` and `SHARE` stand for paths; with `--fd`
/// it gets a listening socket as standard input.
fn start(folder: &Path, line: &str) -> Result<Child> {
    let program = folder.join("virtiofsd");
    if !program.exists() {
        symlink(binary("msb-fs"), &program)?;
    }
    let path = |name: &str| folder.join(name).to_str().expect("a plain path").to_owned();
    let line = line.replace("SOCKET", &path("fs.sock"));
    let line = line.replace("SHARE", &path("share"));
    let input = if line.contains("--fd") {
        let listener = UnixListener::bind(folder.join("fs.sock"))?;
        Stdio::from(OwnedFd::from(listener))
    } else {
        Stdio::null()
    };
    Command::new(program)
        .args(line.split_whitespace())
        .stdin(input)
        .stderr(Stdio::piped())
        .spawn()
        .context("starting virtiofsd")
}

/// Waits for the end of a process; returns its exit status.
fn ended(child: &mut Child) -> Result<Option<i32>> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code());
        }
        ensure!(Instant::now() < end, "it does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn every_known_command_line_starts_and_serves() -> Result<()> {
    let libvirt = "--fd=0 --shared-dir SHARE";
    let lines = [
        // libvirt, with nothing and with everything its XML may ask for.
        libvirt.to_owned(),
        format!(
            "{libvirt} --cache always --sandbox namespace --xattr --thread-pool-size=16 \
             --rlimit-nofile=1024 --log-level debug --uid-map=:0:1000:1: --uid-map=:1:100000:9: \
             --gid-map=:0:1000:1: --gid-map=:1:100000:9:"
        ),
        format!("{libvirt} --cache never --sandbox chroot --readonly"),
        "--fd=0 -o source=SHARE,cache=always,sandbox=namespace,xattr,flock,posix_lock -d".into(),
        "--fd=0 -o source=SHARE,no_xattr,no_flock,no_posix_lock".into(),
        // Kata Containers in Go, and in Rust.
        "--syslog --cache=auto --shared-dir=SHARE --fd=0 --thread-pool-size=1 --announce-submounts"
            .into(),
        "--socket-path SOCKET --shared-dir SHARE --cache never --thread-pool-size=1 \
         -o announce_submounts --xattr"
            .into(),
        // By hand, with flags of each kind that virtiofsd has.
        "--socket-path=SOCKET --shared-dir=SHARE --tag share --sandbox none --seccomp none \
         --inode-file-handles=prefer --allow-direct-io --writeback --no-readdirplus --killpriv-v2 \
         --security-label --posix-acl --preserve-noatime --modcaps=+sys_admin"
            .into(),
        "--socket=SOCKET --shared-dir=SHARE --translate-uid map:1000:0:1 --xattrmap=:map::user.:: \
         --migration-mode=find-paths --migration-on-error=guest-error -f"
            .into(),
    ];
    for line in lines {
        let folder = folder()?;
        fs::write(folder.path().join("share/file"), "content")?;
        let socket = folder.path().join("fs.sock");
        let child = start(folder.path(), &line)?;
        let mut server = Server::connect(child, &socket).with_context(|| line.clone())?;
        let (_, attr) = server.find_in(1, "file").with_context(|| line.clone())?;
        let host = fs::metadata(folder.path().join("share/file"))?;
        ensure!(
            (attr.uid, attr.mode) == (host.uid(), host.mode()),
            "{line}: {attr:?}"
        );
        let mut child = server.hang_up();
        ensure!(ended(&mut child)? == Some(0), "{line}: it failed");
    }
    Ok(())
}

#[test]
fn it_says_when_it_waits_and_leaves_its_number() -> Result<()> {
    let folder = folder()?;
    let mut child = start(folder.path(), "--socket-path SOCKET --shared-dir SHARE")?;
    let output = BufReader::new(child.stderr.take().context("no stderr")?);
    // Kata's runtime reads until these words come.
    let found = output
        .lines()
        .map_while(Result::ok)
        .any(|line| line.contains("Waiting for vhost-user socket connection"));
    ensure!(found, "nothing was said");
    let socket = fs::metadata(folder.path().join("fs.sock"))?;
    ensure!(socket.mode() & 0o777 == 0o700, "{:o}", socket.mode());
    let path = folder.path().join("fs.sock.pid");
    ensure!(
        fs::read_to_string(&path)?.trim() == child.id().to_string(),
        "its number"
    );
    let again = start(folder.path(), "--socket-path SOCKET --shared-dir SHARE")?;
    let refused = again.wait_with_output()?;
    ensure!(
        refused.status.code() == Some(1),
        "a second server: {refused:?}"
    );
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&child),
        rustix::process::Signal::TERM,
    )?;
    ensure!(ended(&mut child)? == Some(0), "after SIGTERM");
    flock(File::open(&path)?, FlockOperation::NonBlockingLockExclusive)?;
    Ok(())
}

#[test]
fn a_group_may_connect_when_it_is_told() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped, only root can give a socket to a group");
        return Ok(());
    }
    let folder = folder()?;
    let line = "--socket-path SOCKET --shared-dir SHARE --socket-group 4711";
    let child = start(folder.path(), line)?;
    let socket = folder.path().join("fs.sock");
    let server = Server::connect(child, &socket)?;
    let found = fs::metadata(&socket)?;
    ensure!(
        (found.gid(), found.mode() & 0o777) == (4711, 0o660),
        "{found:?}"
    );
    drop(server);
    let mut refused = start(folder.path(), &line.replace("4711", "no-such-group"))?;
    ensure!(
        ended(&mut refused)? == Some(1),
        "a group that does not exist"
    );
    Ok(())
}

#[test]
fn capabilities_are_printed_whatever_else_is_asked() -> Result<()> {
    for rest in [&[][..], &["--fd=3"], &["--nonsense"]] {
        let output = Command::new(binary("msb-fs"))
            .arg("--print-capabilities")
            .args(rest)
            .output()?;
        ensure!(output.status.success(), "{output:?}");
        let found: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(found["type"] == "fs", "{found}");
        let features = found["features"].as_array().context("no features")?;
        ensure!(features.contains(&"separate-options".into()), "{found}");
    }
    Ok(())
}

/// A server on one end of a socket pair, as some management programs pass it on.
fn connected(folder: &Path) -> Result<(Child, FrontEnd)> {
    let (ours, theirs) = UnixStream::pair()?;
    let child = Command::new(binary("msb-fs"))
        .args(["--fd", "0", "--log-level", "warn", "--shared-dir"])
        .arg(folder.join("share"))
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()?;
    Ok((child, FrontEnd::on(ours, MEMORY)?))
}

fn activate(front: &mut FrontEnd) -> Result<()> {
    front.share_memory()?;
    front.set(code::SET_FEATURES, &FEATURES.to_ne_bytes())?;
    for queue in 0..2 {
        front.start_queue(queue, 128, 0)?;
    }
    Ok(())
}

#[test]
fn every_front_end_may_begin_in_its_own_order() -> Result<()> {
    for who in ["qemu", "cloud-hypervisor", "libkrun", "crosvm"] {
        let folder = folder()?;
        fs::write(folder.path().join("share/file"), "content")?;
        let (child, mut front) = connected(folder.path())?;
        match who {
            "libkrun" => {
                front.get(code::GET_FEATURES)?;
                front.negotiate()?;
                front.get(code::GET_QUEUE_NUM)?;
                front.ask(code::SET_OWNER, &[], &[])?;
            }
            "qemu" => {
                front.get(code::GET_FEATURES)?;
                front.negotiate()?;
                front.get(code::GET_QUEUE_NUM)?;
                front.get(code::GET_MAX_MEM_SLOTS)?;
                front.ask(code::SET_OWNER, &[], &[])?;
            }
            _ => {
                front.ask(code::SET_OWNER, &[], &[])?;
                front.get(code::GET_FEATURES)?;
                front.negotiate()?;
                front.get(code::GET_QUEUE_NUM)?;
            }
        }
        ensure!(
            front.config(0, 40)?[36..] == [1, 0, 0, 0],
            "{who}: configuration"
        );
        activate(&mut front)?;
        for queue in 0..2 {
            front.enable(queue, true)?;
        }
        let mut server = Server::over(child, front);
        server.init().with_context(|| who.to_owned())?;
        server.find("file").with_context(|| who.to_owned())?;
        // The guest's driver goes and comes again.
        let front = server.front();
        for queue in 0..2 {
            front.enable(queue, false)?;
        }
        if who == "libkrun" {
            front.ask(code::SET_OWNER, &[], &[])?;
        } else {
            for queue in 0..2 {
                front.stop_queue(queue)?;
            }
        }
        activate(front)?;
        for queue in 0..2 {
            front.enable(queue, true)?;
        }
        server.init().with_context(|| format!("{who}, again"))?;
        server
            .find("file")
            .with_context(|| format!("{who}, again"))?;
    }
    Ok(())
}
