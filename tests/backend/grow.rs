//! Disks that grow while they are in use: the host asks, the front end hears, the image agrees.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use msb_testkit::frontend::{DATA, EVENT_IDX, FrontEnd, Part, code};
use msb_testkit::msb::{binary, host};

const MIB: u64 = 1 << 20;
const READ: u32 = 0;
const WRITE: u32 = 1;

struct Backend(Child);

impl Drop for Backend {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn serve(folder: &Path, image: &str, flags: &[&str]) -> Result<Backend> {
    let child = Command::new(binary("msb-blk"))
        .current_dir(folder)
        .args(["--socket-path", "socket", "--control-path", "control"])
        .args(["--sandbox", "strict", "--blk-file", image])
        .args(flags)
        .stdin(Stdio::null())
        .spawn()
        .context("starting msb-blk")?;
    Ok(Backend(child))
}

fn command(folder: &Path, line: &str) -> Result<String> {
    let mut stream = UnixStream::connect(folder.join("control"))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(format!("{}\n", line.trim_end()).as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.trim_end().to_owned())
}

/// One request about a sector; its status and the data.
fn request(front: &mut FrontEnd, kind: u32, sector: u64, data: u8) -> Result<(u8, Vec<u8>)> {
    let header = [
        kind.to_le_bytes().to_vec(),
        vec![0; 4],
        sector.to_le_bytes().to_vec(),
        vec![0xff],
    ];
    front.memory.write(DATA, &header.concat());
    front.memory.write(DATA + 4096, &[data; 512]);
    let body = if kind == WRITE {
        Part::Out(DATA + 4096, 512)
    } else {
        Part::In(DATA + 4096, 512)
    };
    front.put(0, &[Part::Out(DATA, 16), body, Part::In(DATA + 16, 1)]);
    front.kick(0)?;
    front.wait(0)?;
    let status = front.memory.read(DATA + 16, 1)[0];
    Ok((status, front.memory.read(DATA + 4096, 512)))
}

fn capacity(front: &mut FrontEnd) -> Result<u64> {
    let sectors = front.config(0, 8)?;
    Ok(u64::from_le_bytes(sectors.as_slice().try_into()?) * 512)
}

#[test]
fn a_disk_in_use_grows_and_the_front_end_hears_of_it() -> Result<()> {
    for format in ["raw", "qcow2"] {
        let folder = tempfile::tempdir()?;
        let image = format!("disk.{format}");
        let path = folder.path().join(&image).display().to_string();
        host("qemu-img", ["create", "-q", "-f", format, &path, "16M"])?;
        let mut backend = serve(folder.path(), &image, &[])?;
        let mut front = FrontEnd::connect(&folder.path().join("socket"), 4 << 20)?;
        front.start(1, 64, EVENT_IDX)?;
        let (theirs, mut channel) = UnixStream::pair()?;
        channel.set_read_timeout(Some(Duration::from_secs(5)))?;
        front.acknowledged(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        ensure!(request(&mut front, WRITE, 0, 7)?.0 == 0, "a write");
        ensure!(
            request(&mut front, WRITE, 20 * 2048, 7)?.0 == 1,
            "beyond the end"
        );

        // Large enough for a second L2 table, and for a third L1 entry.
        for mib in [64, 700, 1500] {
            let answer = command(folder.path(), &format!("resize {}\n", mib * MIB))?;
            ensure!(answer == format!("ok {}", mib * MIB), "{format}: {answer}");
            let mut message = [0; 12];
            channel.read_exact(&mut message)?;
            // BACKEND_CONFIG_CHANGE_MSG, version 1, no body.
            ensure!(
                message == [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
                "{message:?}"
            );
            ensure!(capacity(&mut front)? == mib * MIB, "{format}: capacity");
            let last = mib * 2048 - 1;
            let (status, data) = request(&mut front, READ, last, 1)?;
            ensure!(status == 0 && data == [0; 512], "{format}: the new end");
            ensure!(
                request(&mut front, WRITE, last, 9)?.0 == 0,
                "{format}: write"
            );
        }
        for wrong in ["resize 512", "resize 1.5G", "grow", ""] {
            let answer = command(folder.path(), &format!("{wrong}\n"))?;
            ensure!(answer.starts_with("error "), "{wrong}: {answer}");
        }
        if format == "qcow2" {
            let answer = command(folder.path(), "resize 17592186044416\n")?;
            ensure!(answer.contains("no room for the tables"), "{answer}");
            ensure!(
                command(folder.path(), "resize")?.starts_with("error"),
                "qcow2"
            );
        } else {
            std::fs::File::options()
                .write(true)
                .open(&path)?
                .set_len(1600 * MIB)?;
            let answer = command(folder.path(), "resize")?;
            ensure!(answer == format!("ok {}", 1600 * MIB), "{answer}");
        }
        let expected = capacity(&mut front)?;
        ensure!(
            request(&mut front, READ, 0, 1)?.1 == [7; 512],
            "the old content"
        );
        drop(front);
        ensure!(backend.0.wait()?.success(), "msb-blk failed");
        let info = host("qemu-img", ["info", "--output=json", "-f", format, &path])?;
        ensure!(
            info.contains(&format!("\"virtual-size\": {expected}")),
            "{info}"
        );
        if format == "qcow2" {
            host("qemu-img", ["check", "-q", "-f", "qcow2", &path])?;
        }
    }
    Ok(())
}

#[test]
fn a_caller_who_says_nothing_holds_up_nobody_for_long() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.raw").display().to_string();
    host("qemu-img", ["create", "-q", "-f", "raw", &path, "16M"])?;
    let backend = serve(folder.path(), "disk.raw", &["--read-only"])?;
    let mut front = FrontEnd::connect(&folder.path().join("socket"), 4 << 20)?;
    front.start(1, 64, EVENT_IDX)?;
    let silent: Vec<UnixStream> = (0..3)
        .map(|_| UnixStream::connect(folder.path().join("control")))
        .collect::<std::io::Result<_>>()?;
    ensure!(capacity(&mut front)? == 16 * MIB, "capacity");
    drop(silent);
    // A disk that may not be written is not made longer either.
    let answer = command(folder.path(), &format!("resize {}\n", 32 * MIB))?;
    ensure!(answer.starts_with("error "), "{answer}");
    ensure!(std::fs::metadata(&path)?.len() == 16 * MIB, "it grew");
    drop(backend);
    Ok(())
}
