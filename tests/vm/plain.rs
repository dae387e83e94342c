//! Plain QEMU with a disk of ours and several queues: no part of `msb` but the backend.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{binary, busybox, host, kernel, unfit};

const QUEUES: usize = 2;

/// Each process writes a stripe of its own, on a processor and so on a queue of its own.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox insmod /virtio_blk.ko
echo "queues $(/bin/busybox ls /sys/block/vda/mq | /bin/busybox wc -l)"
echo "serial $(/bin/busybox cat /sys/block/vda/serial)"
for n in 0 1; do
    /bin/busybox taskset $((n + 1)) /bin/busybox sh -c "
        i=$n
        while [ \$i -lt 60 ]; do
            /bin/busybox yes stripe-\$i | /bin/busybox dd of=/dev/vda bs=64k seek=\$((i * 4)) count=3 iflag=fullblock 2>/dev/null
            i=\$((i + 2))
        done
        /bin/busybox sync" &
done
wait
/bin/busybox sync
echo 3 > /proc/sys/vm/drop_caches
echo "sum $(/bin/busybox sha256sum /dev/vda)"
echo "writes $(/bin/busybox awk '{print $5}' /sys/block/vda/stat) flushes $(/bin/busybox awk '{print $16}' /sys/block/vda/stat)"
echo done
/bin/busybox poweroff -f
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

fn initramfs(to: &Path) -> Result<()> {
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
    entry(&mut archive, "init", 0o100_755, INIT.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    fs::File::create(to)?.write_all(&archive)?;
    Ok(())
}

/// Runs the virtual machine until its guest switches it off.
fn boot(folder: &Path) -> Result<Output> {
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
        .args(["-chardev", &format!("socket,id=disk,path={}", at("socket"))])
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
        .output()
        .context("running QEMU")
}

#[test]
fn a_disk_with_several_queues() -> Result<()> {
    if unfit(&["qemu"], "this machine is QEMU's own, without msb") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name).display().to_string();
    initramfs(Path::new(&at("initrd")))?;
    host(
        "qemu-img",
        ["create", "-q", "-f", "qcow2", &at("disk.qcow2"), "20M"],
    )?;
    let mut backend = Command::new(binary("msb-blk"))
        .args([
            "--socket-path",
            &at("socket"),
            "--blk-file",
            &at("disk.qcow2"),
        ])
        .args(["--num-queues", &QUEUES.to_string(), "--serial", "plain"])
        .stdin(Stdio::null())
        .spawn()?;
    let vm = boot(folder.path())?;
    let console = String::from_utf8_lossy(&vm.stdout).into_owned();
    let status = backend.wait()?;
    let said = |word: &str| {
        let line = console
            .lines()
            .find_map(|line| line.trim().strip_prefix(word));
        line.map(|line| line.trim().to_owned()).with_context(|| {
            format!(
                "no {word:?} on the console:\n{console}{}",
                String::from_utf8_lossy(&vm.stderr)
            )
        })
    };
    ensure!(
        said("done").is_ok() && status.success(),
        "{status}\n{console}"
    );
    ensure!(said("queues ")? == QUEUES.to_string(), "{console}");
    ensure!(said("serial ")? == "plain", "{console}");
    host(
        "qemu-img",
        ["check", "-q", "-f", "qcow2", &at("disk.qcow2")],
    )?;
    host(
        "qemu-img",
        [
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            &at("disk.qcow2"),
            &at("raw"),
        ],
    )?;
    let sum = host("sha256sum", [&at("raw")])?;
    let judged = sum.split_whitespace().next().unwrap_or_default();
    ensure!(
        said("sum ")?.starts_with(judged),
        "qemu-img reads {judged}\n{console}"
    );
    let raw = fs::read(at("raw"))?;
    for stripe in 0..60_usize {
        let start = stripe * 4 * 65536;
        let text = format!("stripe-{stripe}\n");
        let stripe = &raw[start..start + 3 * 65536];
        ensure!(stripe.starts_with(text.as_bytes()), "{text}");
    }
    Ok(())
}
