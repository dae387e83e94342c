//! What dies in the middle: backends, of which the guest notices a pause, and the guest itself.

use std::io::{BufRead, BufReader};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{Msb, host, said, unfit};
use rustix::process::{Pid, Signal, kill_process};

/// Writes files durably, each with its sum, until told to stop; then reads all of them back from the
/// disk. A request that fails makes the file system read-only and the script fail.
const LOAD: &str = r#"
set -e
n=0
while [ ! -e /share/stop ]; do
    dd if=/dev/urandom of=/data/f$n bs=16k count=8 conv=fsync 2>/dev/null
    (cd /data && md5sum f$n) >>/tmp/sums
    n=$((n + 1))
    [ $n -lt 200 ] || n=0 && [ $n -gt 0 ] || : >/tmp/sums
    echo wrote
done
sync
echo 3 >/proc/sys/vm/drop_caches
cd /data && md5sum -c /tmp/sums >/dev/null
echo verified
"#;

/// The processes that serve the disk: the one that waits and the one that serves.
pub(crate) fn backend(msb: &Msb, image: &str) -> Result<Vec<i32>> {
    let all = msb.processes()?.into_iter();
    let ours = all.filter(|(_, line)| line.contains("msb-blk") && line.contains(image));
    Ok(ours.map(|(pid, _)| pid).collect())
}

#[test]
fn a_disk_whose_backend_is_killed_goes_on() -> Result<()> {
    if unfit(&["qemu"], "only QEMU connects to a backend again") {
        return Ok(());
    }
    let msb = Msb::new()?;
    let share = msb.dir("share")?;
    let content = msb.dir("content")?;
    let image = msb.path("load.qcow2");
    msb_testkit::msb::disk_image(&image, "qcow2", &content, 96)?;
    let flags = ["-v", "./share:/share", "--mount-disk", "./load.qcow2:/data"];
    let mut child = msb.start(&flags, LOAD)?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    let mut wrote = |count: usize| -> Result<()> {
        for _ in 0..count {
            let line = lines.next().context("the load has ended")??;
            ensure!(line == "wrote", "{line}");
        }
        Ok(())
    };
    wrote(5)?;
    for round in 0..3 {
        let before = backend(&msb, "load.qcow2")?;
        // The process that serves, then the one that waits for it.
        let victim = if round % 2 == 0 {
            before.last()
        } else {
            before.first()
        };
        let victim = Pid::from_raw(*victim.context("no backend")?).context("pid")?;
        kill_process(victim, Signal::KILL)?;
        // What was written before may still wait to be read, so the lines tell nothing of this.
        let mut after = Vec::new();
        for _ in 0..200 {
            after = backend(&msb, "load.qcow2")?;
            if after.len() == before.len() && after.iter().all(|pid| !before.contains(pid)) {
                break;
            }
            sleep(Duration::from_millis(50));
        }
        ensure!(
            after.len() == before.len() && after.iter().all(|pid| !before.contains(pid)),
            "{before:?} {after:?}"
        );
        wrote(20)?;
    }
    std::fs::write(share.join("stop"), "")?;
    let last = lines.map_while(Result::ok).last();
    let ended = said(&child.wait_with_output()?)?;
    ensure!(
        ended.code == 0 && last.as_deref() == Some("verified"),
        "{last:?} {ended:?}"
    );
    // What a death may leave are clusters that were in reserve.
    let text = image.display().to_string();
    host(
        "qemu-img",
        ["check", "-q", "-r", "leaks", "-f", "qcow2", &text],
    )?;
    Ok(())
}

#[test]
fn a_backend_that_dies_again_and_again_ends_the_run() -> Result<()> {
    let msb = Msb::new()?;
    let content = msb.dir("content")?;
    msb_testkit::msb::disk_image(&msb.path("load.raw"), "raw", &content, 16)?;
    let mut child = msb.start(&["--mount-disk", "./load.raw:/data"], "echo up; sleep 600")?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
    ensure!(line == "up\n", "{line}");
    for _ in 0..200 {
        if child.try_wait()?.is_some() {
            break;
        }
        if let Some(pid) = backend(&msb, "load.raw")?.last() {
            // It may have ended since.
            kill_process(Pid::from_raw(*pid).context("pid")?, Signal::KILL).ok();
        }
        sleep(Duration::from_millis(200));
    }
    let ended = said(&child.wait_with_output()?)?;
    ensure!(ended.code != 0 && ended.err.contains("/data"), "{ended:?}");
    Ok(())
}

#[test]
fn a_guest_that_dies_has_its_last_words_told() -> Result<()> {
    let kernels = ["qemu", "cloud-hypervisor"];
    if unfit(&kernels, "its kernel dies of nothing that can be written") {
        return Ok(());
    }
    let msb = Msb::new()?;
    let said = msb.run(&[], "echo c >/proc/sysrq-trigger; sleep 60")?;
    // cloud-hypervisor restarts the guest, and with it begins its console anew.
    let restarted = said.err.starts_with("error: the machine restarted");
    let told = said.err.starts_with("error: the VMM ended") && said.err.contains("Kernel panic");
    ensure!(said.code == 1 && (told || restarted), "{said:?}");
    Ok(())
}
