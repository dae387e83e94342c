//! Plain QEMU with a disk of ours and several queues: no part of `msb` but the backend.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{binary, busybox, host, kernel, unfit};
use tempfile::TempDir;

const QUEUES: usize = 2;

/// What every guest here begins with.
const PRELUDE: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
insmod /virtio_blk.ko
"#;

/// Each process writes a stripe of its own, on a processor and so on a queue of its own.
const STRIPES: &str = r#"
echo "queues $(ls /sys/block/vda/mq | wc -l)"
echo "serial $(cat /sys/block/vda/serial)"
for n in 0 1; do
    taskset $((n + 1)) sh -c "
        i=$n
        while [ \$i -lt 60 ]; do
            yes stripe-\$i | dd of=/dev/vda bs=64k seek=\$((i * 4)) count=3 iflag=fullblock 2>/dev/null
            i=\$((i + 2))
        done
        sync" &
done
wait
sync
echo 3 > /proc/sys/vm/drop_caches
echo "sum $(sha256sum /dev/vda)"
echo done
poweroff -f
"#;

/// Writes durably, says so each time, waits for the disk to grow, and writes at its new end.
const GROWTH: &str = r#"
small=$(cat /sys/block/vda/size)
for n in $(seq 0 39); do
    yes block-$n | dd of=/dev/vda bs=64k seek=$((n * 4)) count=3 iflag=fullblock conv=fsync 2>/dev/null || echo failed
    echo wrote
done
echo "waits $small"
while [ "$(cat /sys/block/vda/size)" = "$small" ]; do sleep 0.1; done
large=$(cat /sys/block/vda/size)
echo "grown $large"
yes end | dd of=/dev/vda bs=64k seek=$((large / 128 - 2)) count=2 iflag=fullblock conv=fsync 2>/dev/null || echo failed
echo 3 > /proc/sys/vm/drop_caches
echo "sum $(sha256sum /dev/vda)"
echo done
poweroff -f
"#;

/// One entry of an archive in the "newc" format of cpio.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, body: &[u8]) {
    let (len, name_len) = (body.len() as u32, name.len() as u32 + 1);
    let fields = [0, mode, 0, 0, 1, 0, len, 0, 0, 0, 0, name_len, 0];
    let fields = fields.map(|field: u32| format!("{field:08X}"));
    archive.extend(format!("070701{}{name}\0", fields.concat()).bytes());
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(body);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

fn initramfs(to: &Path, script: &str) -> Result<()> {
    let modules = kernel().join("modules");
    let found = host(
        "find",
        [
            modules.as_os_str(),
            "-name".as_ref(),
            "virtio_blk.ko*".as_ref(),
        ],
    )?;
    let module = found
        .lines()
        .next()
        .context("the guest kernel has no virtio_blk")?;
    let module = if module.ends_with(".xz") {
        let output = Command::new(busybox())
            .args(["unxz", "-c", module])
            .output()?;
        ensure!(output.status.success(), "unpacking {module}");
        output.stdout
    } else {
        fs::read(module)?
    };
    let mut archive = Vec::new();
    for folder in ["bin", "dev"] {
        entry(&mut archive, folder, 0o040_755, &[]);
    }
    entry(
        &mut archive,
        "bin/busybox",
        0o100_755,
        &fs::read(busybox())?,
    );
    entry(&mut archive, "virtio_blk.ko", 0o100_644, &module);
    let init = format!("{PRELUDE}{script}");
    entry(&mut archive, "init", 0o100_755, init.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    fs::File::create(to)?.write_all(&archive)?;
    Ok(())
}

/// Starts a virtual machine that runs until its guest switches it off.
fn boot(folder: &Path) -> Result<Child> {
    let at = |name: &str| folder.join(name).display().to_string();
    Command::new("timeout")
        .args([
            "240",
            "qemu-system-x86_64",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ])
        .args([
            "-machine",
            "q35,memory-backend=memory",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "256M",
        ])
        .args(["-accel", "tcg", "-no-reboot", "-serial", "stdio"])
        .args([
            "-object",
            "memory-backend-memfd,id=memory,size=256M,share=on",
        ])
        .args([
            "-chardev",
            &format!("socket,id=disk,path={},reconnect=1", at("socket")),
        ])
        .args([
            "-device",
            &format!("vhost-user-blk-pci,chardev=disk,num-queues={QUEUES}"),
        ])
        .arg("-kernel")
        .arg(kernel().join("vmlinuz"))
        .args([
            "-initrd",
            &at("initrd"),
            "-append",
            "console=ttyS0 quiet panic=-1",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("running QEMU")
}

/// Starts a backend of `disk.qcow2`.
fn backend(folder: &Path) -> Result<Child> {
    let at = |name: &str| folder.join(name).display().to_string();
    Command::new(binary("msb-blk"))
        .args([
            "--socket-path",
            &at("socket"),
            "--control-path",
            &at("control"),
        ])
        .args(["--blk-file", &at("disk.qcow2")])
        .args(["--num-queues", &QUEUES.to_string(), "--serial", "plain"])
        .stdin(Stdio::null())
        .spawn()
        .context("starting msb-blk")
}

/// A folder with an empty disk and what a guest begins with, to run a script.
fn prepare(script: &str) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.qcow2").display().to_string();
    initramfs(&folder.path().join("initrd"), script)?;
    host("qemu-img", ["create", "-q", "-f", "qcow2", &image, "20M"])?;
    Ok(folder)
}

/// The content of the image as qemu-img reads it, which finds nothing wrong; the guest has read the
/// same.
fn judged(folder: &Path, console: &str) -> Result<Vec<u8>> {
    let at = |name: &str| folder.join(name).display().to_string();
    let image = at("disk.qcow2");
    host(
        "qemu-img",
        ["check", "-q", "-r", "leaks", "-f", "qcow2", &image],
    )?;
    host(
        "qemu-img",
        ["convert", "-f", "qcow2", "-O", "raw", &image, &at("raw")],
    )?;
    let sum = host("sha256sum", [&at("raw")])?;
    let sum = sum.split_whitespace().next().context("no sum")?;
    ensure!(
        after(console, "sum ")?.starts_with(sum),
        "qemu-img reads {sum}\n{console}"
    );
    Ok(fs::read(at("raw"))?)
}

/// What the guest said after a word.
fn after<'a>(console: &'a str, word: &str) -> Result<&'a str> {
    let line = console
        .lines()
        .find_map(|line| line.trim().strip_prefix(word));
    line.map(str::trim)
        .with_context(|| format!("no {word:?} on the console:\n{console}"))
}

#[test]
fn a_disk_with_several_queues() -> Result<()> {
    if unfit(&["qemu"], "this machine is QEMU's own, without msb") {
        return Ok(());
    }
    let folder = prepare(STRIPES)?;
    let folder = folder.path();
    let mut backend = backend(folder)?;
    let vm = boot(folder)?.wait_with_output()?;
    let console = String::from_utf8_lossy(&vm.stdout);
    let status = backend.wait()?;
    after(&console, "done").with_context(|| String::from_utf8_lossy(&vm.stderr).into_owned())?;
    ensure!(status.success(), "{status}\n{console}");
    ensure!(
        after(&console, "queues ")? == QUEUES.to_string(),
        "{console}"
    );
    ensure!(after(&console, "serial ")? == "plain", "{console}");
    let raw = judged(folder, &console)?;
    for stripe in 0..60_usize {
        let start = stripe * 4 * 65536;
        let text = format!("stripe-{stripe}\n");
        let stripe = &raw[start..start + 3 * 65536];
        ensure!(stripe.starts_with(text.as_bytes()), "{text}");
    }
    Ok(())
}

#[test]
fn a_killed_backend_started_again_by_hand_and_a_disk_that_grows() -> Result<()> {
    if unfit(&["qemu"], "this machine is QEMU's own, without msb") {
        return Ok(());
    }
    let folder = prepare(GROWTH)?;
    let folder = folder.path();
    let mut server = backend(folder)?;
    let mut vm = boot(folder)?;
    let mut console = String::new();
    let mut written = 0;
    for line in BufReader::new(vm.stdout.take().context("no console")?).lines() {
        let line = line?;
        console.push_str(&format!("{line}\n"));
        if line.trim() == "wrote" {
            written += 1;
            if [5, 15, 25].contains(&written) {
                server.kill()?;
                server.wait()?;
                // The guest's requests wait meanwhile.
                sleep(Duration::from_millis(300));
                server = backend(folder)?;
            }
        } else if line.starts_with("waits") {
            let mut control = UnixStream::connect(folder.join("control"))?;
            control.write_all(b"resize 25165824\n")?;
            let mut answer = [0; 12];
            control.read_exact(&mut answer)?;
            ensure!(&answer == b"ok 25165824\n", "{answer:?}");
        }
    }
    let vm = vm.wait_with_output()?;
    let status = server.wait()?;
    after(&console, "done").with_context(|| String::from_utf8_lossy(&vm.stderr).into_owned())?;
    ensure!(
        status.success() && written == 40 && !console.contains("failed"),
        "{status}\n{console}"
    );
    ensure!(after(&console, "waits ")? == "40960", "{console}");
    ensure!(after(&console, "grown ")? == "49152", "{console}");
    let raw = judged(folder, &console)?;
    ensure!(
        raw.len() == 24 << 20 && raw.ends_with(b"end\n"),
        "{console}"
    );
    for block in 0..40_usize {
        let start = block * 4 * 65536;
        let text = format!("block-{block}\n");
        ensure!(raw[start..].starts_with(text.as_bytes()), "{text}");
    }
    Ok(())
}
