//! msb-blk over its socket: what a driver writes is in the image, and what it must not is refused.

mod faults;
mod kills;
mod references;
mod requests;
mod standalone;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use msb_testkit::frontend::{DATA, EVENT_IDX, FrontEnd, Part};
use msb_testkit::msb::{binary, host};
use tempfile::TempDir;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const OK: u8 = 0;
const IOERR: u8 = 1;
const RO: u64 = 1 << 5;
const SIZE: u64 = 16 << 20;

/// Where a request's header, its data and its answer lie in guest memory.
const HEADER: u64 = DATA;
const BODY: u64 = DATA + 4096;
const BACK: u64 = DATA + (1 << 20);

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [
        kind.to_le_bytes().to_vec(),
        vec![0; 4],
        sector.to_le_bytes().to_vec(),
    ]
    .concat()
}

fn has_strace() -> bool {
    let found = Command::new("strace").arg("-V").output().is_ok();
    if !found {
        println!("skipped: strace is not installed");
    }
    found
}

/// A running backend; ended when dropped.
struct Backend(Child);

impl Drop for Backend {
    fn drop(&mut self) {
        // It may have ended with its front end already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Backend {
    /// Whether the process still runs.
    fn is_running(&mut self) -> Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }

    /// Ends it at once, whatever it is doing.
    fn kill(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }

    /// Waits for the end that follows that of the front end.
    fn finish(mut self) -> Result<()> {
        let status = self.0.wait()?;
        ensure!(status.success(), "msb-blk ended with {status}");
        Ok(())
    }
}

fn serve(folder: &Path, image: &str, flags: &[&str]) -> Result<(Backend, FrontEnd)> {
    let socket = folder.join(format!("{image}.sock"));
    // A killed process may not have closed its own yet, and would be connected to.
    std::fs::remove_file(&socket).ok();
    let child = Command::new(binary("msb-blk"))
        .arg("--socket-path")
        .arg(&socket)
        .arg("--blk-file")
        .arg(folder.join(image))
        .args([
            "--serial",
            "disk-1",
            "--num-queues",
            "2",
            "--sandbox",
            "strict",
        ])
        .args(flags)
        .stdin(Stdio::null())
        .spawn()
        .context("starting msb-blk")?;
    let backend = Backend(child);
    let mut front = FrontEnd::connect(&socket, 4 << 20)?;
    let offered = front.get(msb_testkit::frontend::code::GET_FEATURES)?;
    let features = EVENT_IDX | (offered & (RO | 1 << 9 | 1 << 12));
    front.start(2, 128, features)?;
    Ok((backend, front))
}

/// Carries one request out; returns its status and the bytes that were read.
fn request(
    front: &mut FrontEnd,
    queue: u16,
    kind: u32,
    sector: u64,
    data: &[u8],
    read: u32,
) -> Result<(u8, Vec<u8>)> {
    let header = [
        kind.to_le_bytes().to_vec(),
        vec![0; 4],
        sector.to_le_bytes().to_vec(),
    ]
    .concat();
    front.memory.write(DATA, &header);
    let (out, back, status) = (DATA + 4096, DATA + (1 << 20), DATA + 64);
    front.memory.write(out, data);
    front.memory.write(status, &[0xff]);
    let mut parts = vec![Part::Out(DATA, 16)];
    if !data.is_empty() {
        parts.push(Part::Out(out, u32::try_from(data.len())?));
    }
    if read > 0 {
        parts.push(Part::In(back, read));
    }
    parts.push(Part::In(status, 1));
    front.put(queue, &parts);
    front.kick(queue)?;
    front.wait(queue)?;
    let status = front.memory.read(status, 1);
    Ok((status[0], front.memory.read(back, usize::try_from(read)?)))
}

fn folder_with(image: &str, format: &str) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join(image).display().to_string();
    host(
        "qemu-img",
        ["create", "-q", "-f", format, &path, &SIZE.to_string()],
    )?;
    Ok(folder)
}

#[test]
fn what_a_driver_writes_is_in_the_image() -> Result<()> {
    for (image, format) in [("a.raw", "raw"), ("a.qcow2", "qcow2"), ("a.vmdk", "vmdk")] {
        let folder = folder_with(image, format)?;
        let (backend, mut front) = serve(folder.path(), image, &[])?;
        let capacity = u64::from_le_bytes(front.config(0, 8)?.as_slice().try_into()?);
        ensure!(
            capacity == SIZE / 512,
            "{image}: capacity of {capacity} sectors"
        );
        let (status, id) = request(&mut front, 0, GET_ID, 0, &[], 20)?;
        ensure!(
            status == OK && id.starts_with(b"disk-1\0"),
            "{image}: {id:?}"
        );
        let mut expected = vec![0; usize::try_from(SIZE)?];
        for round in 0..200_u64 {
            // Places and lengths that cross clusters, grains and each other.
            let sector = (round * 7919) % (SIZE / 512 - 64);
            let len = usize::try_from(512 * (1 + round % 40))?;
            let data: Vec<u8> = (0..len)
                .map(|at| ((at as u64 + round) % 251) as u8)
                .collect();
            let queue = (round % 2) as u16;
            let (status, _) = request(&mut front, queue, WRITE, sector, &data, 0)?;
            ensure!(status == OK, "{image}: write {round} gave {status}");
            let start = usize::try_from(sector * 512)?;
            expected[start..start + len].copy_from_slice(&data);
            let (status, back) =
                request(&mut front, queue, READ, sector, &[], u32::try_from(len)?)?;
            ensure!(
                status == OK && back == data,
                "{image}: read {round} differs"
            );
        }
        ensure!(
            request(&mut front, 0, FLUSH, 0, &[], 0)?.0 == OK,
            "{image}: flush"
        );
        drop(front);
        backend.finish()?;
        // qemu-img is the judge of what is on disk.
        let path = folder.path().join(image).display().to_string();
        let raw = folder.path().join("judged").display().to_string();
        host(
            "qemu-img",
            ["convert", "-f", format, "-O", "raw", &path, &raw],
        )?;
        ensure!(
            std::fs::read(&raw)? == expected,
            "{image}: the image differs"
        );
        if format == "qcow2" {
            host("qemu-img", ["check", "-q", "-f", "qcow2", &path])?;
        }
    }
    Ok(())
}

#[test]
fn requests_beyond_the_disk_fail_and_the_next_succeeds() -> Result<()> {
    let folder = folder_with("a.raw", "raw")?;
    let (_backend, mut front) = serve(folder.path(), "a.raw", &[])?;
    for sector in [SIZE / 512, SIZE / 512 - 1, u64::MAX, u64::MAX / 512] {
        let (status, _) = request(&mut front, 0, WRITE, sector, &[1; 1024], 0)?;
        ensure!(status == IOERR, "sector {sector} gave {status}");
    }
    let (status, _) = request(&mut front, 0, 99, 0, &[], 512)?;
    ensure!(status == 2, "an unknown request gave {status}");
    ensure!(
        request(&mut front, 0, READ, 0, &[], 512)?.0 == OK,
        "a good read"
    );
    Ok(())
}

#[test]
fn a_read_only_disk_refuses_writes_of_a_driver_that_ignores_the_feature() -> Result<()> {
    let folder = folder_with("a.qcow2", "qcow2")?;
    let before = std::fs::read(folder.path().join("a.qcow2"))?;
    let (backend, mut front) = serve(folder.path(), "a.qcow2", &["--read-only"])?;
    let features = front.get(msb_testkit::frontend::code::GET_FEATURES)?;
    ensure!(features & RO != 0, "the RO feature is missing");
    // WRITE, DISCARD and WRITE_ZEROES.
    for kind in [WRITE, 11, 13] {
        let (status, _) = request(&mut front, 0, kind, 0, &[0; 512], 0)?;
        ensure!(status != OK, "request {kind} succeeded");
    }
    ensure!(request(&mut front, 0, READ, 0, &[], 512)?.0 == OK, "a read");
    drop((front, backend));
    ensure!(
        std::fs::read(folder.path().join("a.qcow2"))? == before,
        "the image changed"
    );
    Ok(())
}

#[test]
fn one_writer_at_a_time() -> Result<()> {
    let folder = folder_with("a.raw", "raw")?;
    let (_first, _front) = serve(folder.path(), "a.raw", &[])?;
    let second = Command::new(binary("msb-blk"))
        .arg("--socket-path")
        .arg(folder.path().join("second.sock"))
        .arg("--blk-file")
        .arg(folder.path().join("a.raw"))
        .output()?;
    let said = String::from_utf8_lossy(&second.stderr);
    ensure!(
        second.status.code() == Some(4) && said.contains("in use"),
        "{said}"
    );
    Ok(())
}
