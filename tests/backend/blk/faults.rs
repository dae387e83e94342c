//! A host that refuses costs requests, never the image, and the process lives.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use msb_testkit::frontend::FrontEnd;
use msb_testkit::msb::{binary, host};

use super::{FLUSH, IOERR, OK, READ, WRITE, folder_with, has_strace, request};

/// Starts msb-blk below strace, which makes system calls fail.
fn serve_failing(folder: &Path, image: &str, inject: &str) -> Result<(Child, FrontEnd)> {
    let socket = folder.join("failing.sock");
    fs::remove_file(&socket).ok();
    let child = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", inject])
        .arg(binary("msb-blk"))
        .args(["--sandbox", "none", "--socket-path"])
        .arg(&socket)
        .arg("--blk-file")
        .arg(folder.join(image))
        .stdin(Stdio::null())
        .spawn()
        .context("starting strace")?;
    let mut front = FrontEnd::connect(&socket, 4 << 20)?;
    front.start(1, 128, 1 << 9)?;
    Ok((child, front))
}

pub(super) fn ended(mut child: Child) -> Result<()> {
    let status = child.wait()?;
    ensure!(status.success(), "msb-blk ended with {status}");
    Ok(())
}

/// The host forgets what it could not write back, so no flush may succeed any more.
#[test]
fn after_a_failed_flush_none_succeeds() -> Result<()> {
    if !has_strace() {
        return Ok(());
    }
    for (image, format) in [("a.raw", "raw"), ("a.qcow2", "qcow2")] {
        let folder = folder_with(image, format)?;
        let (child, mut front) =
            serve_failing(folder.path(), image, "inject=fdatasync:error=EIO:when=1")?;
        request(&mut front, 0, WRITE, 0, &[7; 4096], 0)?;
        for nth in 0..3 {
            let (status, _) = request(&mut front, 0, FLUSH, 0, &[], 0)?;
            ensure!(status == IOERR, "{image}: flush {nth} gave {status}");
        }
        let (status, _) = request(&mut front, 0, READ, 0, &[], 4096)?;
        ensure!(status == OK, "{image}: a read gave {status}");
        drop(front);
        ended(child)?;
        if format == "qcow2" {
            judge(&folder.path().join(image), None)?;
        }
    }
    Ok(())
}

type Expected<'a> = &'a dyn Fn(&[u8]) -> Result<()>;

/// Fails unless qemu-img finds no error and, if it is known, this content.
fn judge(path: &Path, expected: Option<Expected<'_>>) -> Result<()> {
    let check = Command::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(path)
        .output()?;
    ensure!(
        matches!(check.status.code(), Some(0 | 3)),
        "{}",
        String::from_utf8_lossy(&check.stdout)
    );
    if let Some(expected) = expected {
        let raw = path.with_extension("judged");
        let (from, to) = (path.display().to_string(), raw.display().to_string());
        host(
            "qemu-img",
            ["convert", "-f", "qcow2", "-O", "raw", &from, &to],
        )?;
        expected(&fs::read(&raw)?)?;
    }
    Ok(())
}

/// The host refuses the N-th change of the real file, for several N; `MSB_FAULT_STEP=1` for all.
#[test]
fn a_refusing_host_costs_requests_and_nothing_else() -> Result<()> {
    if !has_strace() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("a.qcow2");
    let path = image.display().to_string();
    let asked = std::env::var("MSB_FAULT_STEP").ok();
    let step = asked.and_then(|n| n.parse().ok()).unwrap_or(7);
    let calls = "pwrite64,pwritev,pwritev2,fallocate,ftruncate,fdatasync";
    for nth in (1..60).step_by(step) {
        let error = ["ENOSPC", "EIO", "EDQUOT"][nth / step % 3];
        host(
            "qemu-img",
            [
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                "cluster_size=4k",
                &path,
                "4M",
            ],
        )?;
        let inject = format!("inject={calls}:error={error}:when={nth}");
        let (child, mut front) = serve_failing(folder.path(), "a.qcow2", &inject)?;
        // Sectors with all the bytes they may hold; what was flushed has one.
        let mut allowed = vec![vec![0_u8]; 8192];
        for round in 0..24_u64 {
            let byte = 1 + round as u8;
            let (sector, count) = (round * 331 % 8000, 1 + round % 30);
            let data = vec![byte; count as usize * 512];
            let (status, _) = request(&mut front, 0, WRITE, sector, &data, 0)?;
            let touched = &mut allowed[sector as usize..(sector + count) as usize];
            for sector in touched {
                if status == OK {
                    sector.clear();
                }
                sector.push(byte);
            }
            if round % 6 == 5 {
                request(&mut front, 0, FLUSH, 0, &[], 0)?;
            }
        }
        ensure!(
            request(&mut front, 0, READ, 0, &[], 4096)?.0 == OK,
            "{inject}: a read"
        );
        drop(front);
        ended(child)?;
        judge(
            &image,
            Some(&|read: &[u8]| {
                for (number, sector) in read.chunks(512).enumerate() {
                    let same = sector.iter().all(|byte| *byte == sector[0]);
                    let fits = same && allowed[number].contains(&sector[0]);
                    ensure!(fits, "{inject}: sector {number} holds {}", sector[0]);
                }
                Ok(())
            }),
        )
        .context(inject.clone())?;
    }
    Ok(())
}
