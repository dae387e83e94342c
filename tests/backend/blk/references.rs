//! An image opens no other file: neither by what its guest writes nor by what it says itself.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{binary, host};

use super::{FLUSH, OK, READ, SIZE, WRITE, folder_with, has_strace, request, serve};

/// Runs msb-blk on an image until it is ready or refuses, under strace; its output and the paths
/// it has opened.
fn traced(folder: &Path, image: &Path, flags: &[&str]) -> Result<(Output, BTreeSet<String>)> {
    let log = folder.join("strace");
    // Whoever gets to serve sees at once that the front end has gone.
    let (theirs, ours) = UnixStream::pair()?;
    drop(ours);
    let output = Command::new("strace")
        .args(["-f", "-qq", "-e", "trace=open,openat,openat2", "-o"])
        .arg(&log)
        .arg(binary("msb-blk"))
        .args(["--fd", "0", "--sandbox", "none", "--blk-file"])
        .arg(image)
        .args(flags)
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .output()
        .context("running strace")?;
    let log = fs::read_to_string(log)?;
    let quoted = log.lines().filter_map(|line| line.split('"').nth(1));
    Ok((output, quoted.map(str::to_owned).collect()))
}

/// A guest that writes the header of another format over its raw disk gains nothing (as it did in
/// cloud-hypervisor, CVE-2026-27211).
#[test]
fn a_raw_disk_stays_raw_and_opens_nothing_else() -> Result<()> {
    if !has_strace() {
        return Ok(());
    }
    let folder = folder_with("disk.img", "raw")?;
    let image = folder.path().join("disk.img");
    let clean = traced(folder.path(), &image, &["--allow-references"])?.1;
    for (name, format) in [("trap.qcow2", "qcow2"), ("trap.vmdk", "vmdk")] {
        let path = folder.path().join(name).display().to_string();
        host("qemu-img", ["create", "-q", "-f", format, &path, "16M"])?;
        if format == "qcow2" {
            host(
                "qemu-img",
                [
                    "rebase",
                    "-u",
                    "-f",
                    format,
                    "-F",
                    "raw",
                    "-b",
                    "/etc/shadow",
                    &path,
                ],
            )?;
        }
        let mut head = fs::read(&path)?;
        head.resize(256 << 10, 0);
        let (backend, mut front) = serve(folder.path(), "disk.img", &[])?;
        for (nth, piece) in head.chunks(64 << 10).enumerate() {
            let sector = nth as u64 * 128;
            ensure!(
                request(&mut front, 0, WRITE, sector, piece, 0)?.0 == OK,
                "{name}"
            );
        }
        ensure!(request(&mut front, 0, FLUSH, 0, &[], 0)?.0 == OK, "{name}");
        drop(front);
        backend.finish()?;
        let (output, opened) = traced(folder.path(), &image, &["--allow-references"])?;
        ensure!(opened == clean, "{name}: {opened:?} instead of {clean:?}");
        ensure!(output.status.success(), "{name}: {output:?}");
        let (backend, mut front) = serve(folder.path(), "disk.img", &["--allow-references"])?;
        let (status, back) = request(&mut front, 0, READ, 0, &[], 64 << 10)?;
        ensure!(
            status == OK && back == head[..64 << 10],
            "{name}: not raw any more"
        );
        drop(front);
        backend.finish()?;
        ensure!(
            fs::metadata(&image)?.len() == SIZE,
            "{name}: the size has changed"
        );
    }
    Ok(())
}

/// Makes images that refer to what they must not, and what they refer to; returns their names.
#[expect(clippy::too_many_lines, reason = "a table of references")]
fn corpus(folder: &Path) -> Result<Vec<String>> {
    let at = |name: &str| folder.join(name);
    fs::write(at("secret.raw"), vec![1; 1 << 20])?;
    fs::create_dir(at("dir"))?;
    std::os::unix::fs::symlink("secret.raw", at("link"))?;
    std::os::unix::fs::symlink("/etc/shadow", at("far"))?;
    host("mkfifo", [at("fifo")])?;
    let names = [
        "/etc/shadow",
        "/dev/zero",
        "/proc/self/mem",
        "../secret.raw",
        "./secret.raw",
        "dir/../secret.raw",
        "file:secret.raw",
        "file:///etc/shadow",
        "json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}",
        "nbd://127.0.0.1/x",
        "nbd:unix:/run/x",
        "https://127.0.0.1/x",
        "fat:rw:/",
        "..",
        "link",
        "far",
        "fifo",
        "dir",
    ];
    let mut images = Vec::new();
    let mut add = |name: String| {
        images.push(name.clone());
        at(&name)
    };
    for (nth, name) in names.iter().enumerate() {
        let path = add(format!("backing{nth}.qcow2")).display().to_string();
        host("qemu-img", ["create", "-q", "-f", "qcow2", &path, "1M"])?;
        host(
            "qemu-img",
            [
                "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", name, &path,
            ],
        )?;
    }
    let data = at("data.qcow2").display().to_string();
    let option = format!("data_file={}", at("0123456789ab.bin").display());
    host(
        "qemu-img",
        ["create", "-q", "-f", "qcow2", "-o", &option, &data, "1M"],
    )?;
    let good = fs::read(at("data.qcow2"))?;
    let place = good
        .windows(8)
        .position(|w| w == [0x44, 0x41, 0x54, 0x41, 0, 0, 0, option.len() as u8 - 10]);
    let place = place.context("no data file extension")? as u64;
    for (nth, name) in ["/etc/shadow", "../x", "link", "far", "file:x", "fifo"]
        .iter()
        .enumerate()
    {
        let path = add(format!("data{nth}.qcow2"));
        fs::write(&path, &good)?;
        let file = fs::OpenOptions::new().write(true).open(&path)?;
        file.write_all_at(&(name.len() as u32).to_be_bytes(), place + 4)?;
        file.write_all_at(&vec![0; option.len() - 10], place + 8)?;
        file.write_all_at(name.as_bytes(), place + 8)?;
    }
    for (nth, line) in [
        "RW 8 FLAT \"/etc/shadow\" 0",
        "RW 8 FLAT \"../secret.raw\" 0",
        "RW 8 FLAT \"link\" 0",
        "RW 8 FLAT \"far\" 0",
        "RW 8 SPARSE \"fifo\"",
        "RW 8 VMFS \"dir\"",
        "parentCID=00000001\nparentFileNameHint=\"/etc/shadow\"\nRW 8 ZERO",
        "parentCID=00000001\nparentFileNameHint=\"far\"\nRW 8 ZERO",
    ]
    .iter()
    .enumerate()
    {
        fs::write(
            add(format!("extent{nth}.vmdk")),
            format!("# Disk DescriptorFile\n{line}\n"),
        )?;
    }
    Ok(images)
}

/// Thirty images that refer to what they must not: none is served, and nothing foreign is opened.
#[test]
fn references_to_foreign_files_are_refused() -> Result<()> {
    if !has_strace() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let images = corpus(folder.path())?;
    ensure!(images.len() >= 30, "only {} images", images.len());
    let shared = traced(folder.path(), &at("secret.raw"), &["--read-only"])?.1;
    for image in &images {
        for flags in [&["--read-only"][..], &["--read-only", "--allow-references"]] {
            let (output, mut opened) = traced(folder.path(), &at(image), flags)?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.code() == Some(3), "{image} {flags:?}: {said}");
            ensure!(said.contains("refers to"), "{image} {flags:?}: {said}");
            opened.retain(|path| !shared.contains(path) && !path.ends_with(image.as_str()));
            // With the flag a plain name is tried, and what is found there refused before it is read.
            opened.retain(|path| {
                flags.len() == 1 || !["link", "far", "fifo", "dir"].contains(&path.as_str())
            });
            ensure!(opened.is_empty(), "{image} {flags:?} opened {opened:?}");
        }
    }
    Ok(())
}
