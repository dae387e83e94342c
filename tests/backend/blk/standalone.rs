//! The conventions of vhost-user programs, for callers that are not `msb`.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use msb_testkit::frontend::FrontEnd;
use msb_testkit::msb::binary;
use rustix::process::{Pid, Signal, kill_process};

use super::faults::ended;
use super::{OK, READ, folder_with, request};

#[test]
fn capabilities_and_discovery_follow_the_convention() -> Result<()> {
    for flag in ["--print-capabilities", "-c"] {
        // All other flags are ignored.
        let output = Command::new(binary("msb-blk"))
            .args([flag, "--blk-file", "/nonexistent"])
            .output()?;
        ensure!(output.status.success(), "{flag}: {output:?}");
        let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(said["type"] == "block", "{said}");
        ensure!(
            said["features"] == serde_json::json!(["read-only", "blk-file"]),
            "{said}"
        );
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../backends/msb-blk/60-msb-blk.json");
    let found: serde_json::Value = serde_json::from_slice(&fs::read(file)?)?;
    ensure!(
        found["type"] == "block" && found["description"].is_string(),
        "{found}"
    );
    let program = found["binary"].as_str().unwrap_or_default();
    ensure!(PathBuf::from(program).is_absolute(), "{found}");
    Ok(())
}

/// `--fd` is a listening socket to some callers and a connected one to others.
#[test]
fn an_inherited_socket_may_listen_or_be_connected() -> Result<()> {
    let folder = folder_with("a.raw", "raw")?;
    let image = folder.path().join("a.raw");
    let start = |fd: std::os::fd::OwnedFd| -> Result<Child> {
        let mut command = Command::new(binary("msb-blk"));
        // The short flags of QEMU's own vhost-user-blk.
        command.args(["-f", "0", "-r", "-b"]).arg(&image);
        Ok(command.stdin(Stdio::from(fd)).spawn()?)
    };
    let (ours, theirs) = UnixStream::pair()?;
    let child = start(theirs.into())?;
    let mut front = FrontEnd::on(ours, 4 << 20)?;
    front.start(1, 128, 1 << 5)?;
    ensure!(
        request(&mut front, 0, READ, 0, &[], 512)?.0 == OK,
        "connected"
    );
    drop(front);
    ended(child)?;
    let path = folder.path().join("listening.sock");
    let child = start(UnixListener::bind(&path)?.into())?;
    let mut front = FrontEnd::connect(&path, 4 << 20)?;
    front.start(1, 128, 1 << 5)?;
    ensure!(
        request(&mut front, 0, READ, 0, &[], 512)?.0 == OK,
        "listening"
    );
    drop(front);
    ended(child)?;
    if start(fs::File::open(&image)?.into())?.wait()?.success() {
        bail!("a file was taken for a socket");
    }
    Ok(())
}

/// In its jail it is the first process of its pid namespace, for which the kernel throws signals
/// away that it is not prepared for.
#[test]
fn an_end_that_is_asked_for_while_it_starts_is_not_missed() -> Result<()> {
    let folder = folder_with("a.raw", "raw")?;
    for delay in (0..60).map(|step| Duration::from_micros(step * 250)) {
        let mut command = Command::new(binary("msb-blk"));
        command.arg("--blk-file").arg(folder.path().join("a.raw"));
        command.arg("--socket-path").arg(folder.path().join("sock"));
        let mut child = command.stdin(Stdio::null()).spawn()?;
        std::thread::sleep(delay);
        let pid = Pid::from_raw(i32::try_from(child.id())?).context("pid")?;
        kill_process(pid, Signal::TERM)?;
        let deadline = Instant::now() + Duration::from_secs(5);
        while child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                child.kill()?;
                child.wait()?;
                bail!("SIGTERM after {delay:?} did not end it");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// A parent that died has been replaced by a reaper, which any process may be.
#[test]
fn a_parent_that_is_another_one_by_now_is_noticed() -> Result<()> {
    let folder = folder_with("a.raw", "raw")?;
    let start = |parent: u32| {
        let mut command = Command::new(binary("msb-blk"));
        command.arg("--blk-file").arg(folder.path().join("a.raw"));
        command.arg("--socket-path").arg(folder.path().join("sock"));
        command.arg(format!("--exit-with-parent={parent}"));
        command
    };
    let orphan = start(std::process::id() + 1).output()?;
    let said = String::from_utf8_lossy(&orphan.stderr);
    ensure!(
        !orphan.status.success() && said.contains("the parent process has gone"),
        "{orphan:?}"
    );
    let child = start(std::process::id()).spawn()?;
    let mut front = FrontEnd::connect(&folder.path().join("sock"), 4 << 20)?;
    front.start(1, 128, 0)?;
    ensure!(
        request(&mut front, 0, READ, 0, &[], 512)?.0 == OK,
        "no answer"
    );
    drop(front);
    ended(child)
}
