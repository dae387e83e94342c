//! fio in a guest: its own verification of disks whose backends are killed meanwhile.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{disk_image, host, said, unfit};
use rustix::process::{Pid, Signal, kill_process};

use super::Guest;
use crate::crash::backend;

/// Writes both disks at random past the guest's cache and reads each block back soon after; gives
/// the space back; and looks for what the guest's kernel had to say of it.
const SCRIPT: &str = r#"
cat >/tmp/job <<'END'
[global]
ioengine=psync
direct=1
bsrange=4k-64k
size=24m
time_based=1
runtime=14
rw=randwrite
fsync=16
verify=crc32c
verify_fatal=1
verify_backlog=64
randseed=2026
group_reporting=1
[raw]
filename=/raw/one
[raw again]
filename=/raw/two
[qcow2]
filename=/qcow2/one
[qcow2 again]
filename=/qcow2/two
END
echo begins
fio --output=/tmp/log /tmp/job || { cat /tmp/log; exit 1; }
grep "WRITE:" /tmp/log
rm /raw/one /raw/two /qcow2/one /qcow2/two
sync
for disk in /raw /qcow2; do fstrim $disk; done
dmesg | grep -i "i/o error\|ext4.*error" && exit 1
echo verified
"#;

#[test]
fn fio_verifies_disks_whose_backends_are_killed() -> Result<()> {
    if unfit(&["qemu"], "only QEMU connects to a backend again") {
        return Ok(());
    }
    let guest = Guest::new(false)?;
    let content = guest.dir("content")?;
    let mut flags = Vec::new();
    for format in ["raw", "qcow2"] {
        disk_image(
            &guest.msb.path(&format!("load.{format}")),
            format,
            &content,
            160,
        )?;
        flags.extend([
            "--mount-disk".to_owned(),
            format!("./load.{format}:/{format}"),
        ]);
    }
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let mut child = guest.start(&flags, SCRIPT)?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    for line in lines.by_ref() {
        if line? == "begins" {
            break;
        }
    }
    let mut killed = 0;
    for round in 0..6 {
        sleep(Duration::from_millis(1500));
        let image = ["load.raw", "load.qcow2"][round % 2];
        // When the guest has ended early, what it says below tells why.
        let Some(server) = backend(&guest.msb, image)?.last().copied() else {
            break;
        };
        kill_process(Pid::from_raw(server).context("pid")?, Signal::KILL)?;
        killed += 1;
    }
    let rest = lines.map_while(Result::ok).collect::<Vec<_>>();
    let ended = said(&child.wait_with_output()?)?;
    ensure!(
        killed == 6 && ended.code == 0 && rest.last().is_some_and(|line| line == "verified"),
        "{killed} deaths, {ended:?}\n{}",
        rest.join("\n")
    );
    println!("{}", rest.join("\n"));
    for format in ["raw", "qcow2"] {
        let image = guest.msb.path(&format!("load.{format}"));
        let path = image.display().to_string();
        if format == "qcow2" {
            host(
                "qemu-img",
                ["check", "-q", "-r", "leaks", "-f", format, &path],
            )?;
        } else {
            host("e2fsck", ["-fn", &path])?;
        }
        // What fio wrote were 48 MiB on each; the journal and the tables stay.
        let taken = fs::metadata(&image)?.blocks() / 2;
        ensure!(taken < 24 << 10, "{format} keeps {taken} KiB");
        println!("{format}: {taken} KiB are left");
    }
    Ok(())
}
