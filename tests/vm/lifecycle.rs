//! What a sandbox's end leaves behind: nothing, however it ends; and what its commands return.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{Msb, said};
use rustix::process::{Pid, Signal, kill_process};

#[test]
fn the_exit_code_is_the_commands() -> Result<()> {
    let msb = Msb::new()?;
    // Other codes are looked at with `exec`, which boots no guest for each.
    for (command, code) in [
        (&["no-such-program"][..], 127),
        (&["sh", "-c", "kill -9 $$"], 137),
    ] {
        let said = msb.msb(["run", "demo", "--"].iter().chain(command))?;
        assert_eq!(said.code, code, "{command:?}: {said:?}");
    }
    Ok(())
}

#[test]
fn standard_streams_pass_through_whole() -> Result<()> {
    let msb = Msb::new()?;
    let mut child = msb
        .command([
            "run",
            "demo",
            "--",
            "sh",
            "-c",
            "md5sum; echo to-stderr >&2; dd if=/dev/zero bs=64k count=160 2>/dev/null",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().context("no standard input")?;
    let feeder = std::thread::spawn(move || input.write_all(&vec![b'x'; 3 << 20]));
    let said = said(&child.wait_with_output()?)?;
    feeder
        .join()
        .map_err(|_| anyhow::anyhow!("the feeder panicked"))??;
    // md5sum of 3 MiB of `x`, as GNU coreutils computes it.
    let (sum, zeroes) = said.out.split_once('\n').context("no output")?;
    assert_eq!(sum, format!("{}  -", md5_of_x()?));
    assert_eq!(zeroes.len(), 160 << 16);
    assert!(said.err.contains("to-stderr"), "{}", said.err);
    Ok(())
}

#[test]
fn nothing_is_left_behind_however_it_ends() -> Result<()> {
    let msb = Msb::new()?;
    msb.dir("share")?;
    let flags = [
        "-v",
        "./share:/x",
        "-v",
        "cache:/cache",
        "--mount-named",
        "data:/data:kind=disk,size=32M",
    ];
    for signal in [
        None,
        Some(Signal::INT),
        Some(Signal::TERM),
        Some(Signal::KILL),
    ] {
        let mut child = msb.start(&flags, "echo kept >/data/kept; sync; echo up; sleep 600")?;
        wait_for_line(&mut child, "up")?;
        assert!(msb.processes()?.len() >= 5, "{:?}", msb.processes()?);
        match signal {
            Some(signal) => kill_process(pid(&child)?, signal)?,
            // No signal to msb at all: the VMM dies under it.
            None => kill_vmm(&msb)?,
        }
        let ended = said(&child.wait_with_output()?)?;
        assert_ne!(ended.code, 0, "{signal:?}: {ended:?}");
        let left = settle(&msb)?;
        assert!(left.is_empty(), "{signal:?} left processes: {left:?}");
        // The next sandbox gets the same disk volume, so that no lock is left either.
        let next = msb.run(&flags, "cat /data/kept")?;
        assert_eq!(
            (next.code, next.out.as_str()),
            (0, "kept\n"),
            "{signal:?}: {next:?}"
        );
    }
    Ok(())
}

#[test]
fn a_backend_that_dies_ends_the_run_and_is_named() -> Result<()> {
    let msb = Msb::new()?;
    msb.dir("share")?;
    let mut child = msb.start(&["-v", "./share:/x"], "echo up; sleep 600")?;
    wait_for_line(&mut child, "up")?;
    let victim = msb
        .processes()?
        .into_iter()
        .rfind(|(_, command)| command.contains("msb-fs") && command.contains("/share"))
        .context("no msb-fs serves the share")?;
    kill_process(Pid::from_raw(victim.0).context("pid")?, Signal::KILL)?;
    let ended = said(&child.wait_with_output()?)?;
    assert!(ended.code != 0 && ended.err.contains("/x"), "{ended:?}");
    let left = settle(&msb)?;
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}

fn md5_of_x() -> Result<String> {
    let sum = msb_testkit::msb::host(
        "sh",
        [
            "-c",
            "head -c 3145728 /dev/zero | tr '\\0' x | md5sum | cut -d ' ' -f 1",
        ],
    )?;
    Ok(sum.trim().to_owned())
}

fn pid(child: &Child) -> Result<Pid> {
    Pid::from_raw(i32::try_from(child.id())?).context("pid")
}

fn kill_vmm(msb: &Msb) -> Result<()> {
    let vmms = ["qemu-system", "cloud-hypervisor --", " krun {"];
    let found = msb
        .processes()?
        .into_iter()
        .find(|(_, command)| vmms.iter().any(|vmm| command.contains(vmm)));
    let (pid, _) = found.context("no VMM runs")?;
    Ok(kill_process(
        Pid::from_raw(pid).context("pid")?,
        Signal::KILL,
    )?)
}

/// Waits for a line of the child's standard output.
fn wait_for_line(child: &mut Child, line: &str) -> Result<()> {
    let output = child.stdout.as_mut().context("no standard output")?;
    let mut seen = String::new();
    for next in BufReader::new(output).lines() {
        let next = next?;
        if next == line {
            return Ok(());
        }
        seen.push_str(&next);
    }
    let mut said = String::new();
    if let Some(errors) = child.stderr.as_mut() {
        std::io::Read::read_to_string(errors, &mut said)?;
    }
    anyhow::bail!("the command never said `{line}`, but `{seen}`: {said}")
}

/// Waits up to five seconds until no process of the sandbox is left; returns those that are.
fn settle(msb: &Msb) -> Result<Vec<(i32, String)>> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let left = msb.processes()?;
        if left.is_empty() || Instant::now() > deadline {
            return Ok(left);
        }
        sleep(Duration::from_millis(50));
    }
}

/// What a hostile user tries; each line says its number when it succeeds, and must not.
const ATTEMPTS: &str = r#"
    mount -o remount,suid /x && echo broke 1
    mount -o remount,dev,suid,exec /data && echo broke 2
    umount /x && echo broke 3
    umount -l /x && echo broke 4
    mount --bind /x /root && echo broke 5
    mount -t tmpfs none /root && echo broke 6
    unshare -m true && echo broke 7
    unshare -rm true && echo broke 8
    unshare -U true && echo broke 9
    echo 100 >/proc/sys/user/max_user_namespaces && echo broke 10
    unshare -rm true && echo broke 11
    for d in /dev/vd?; do dd if=$d of=/dev/null bs=512 count=1 && echo broke 12; done
    for d in /dev/vd?; do [ -b $d ] || { echo no disk >&2; continue; }; dd if=/dev/zero of=$d bs=512 count=0 conv=notrunc && echo broke 13; done
    mknod /root/disk b 254 0 && echo broke 14
    mknod /x/disk b 254 0 && dd if=/x/disk of=/dev/null count=1 && echo broke 15
    nsenter -t 1 -m true && echo broke 16
    ls /proc/1/root/ && echo broke 17
    cat /proc/1/environ && echo broke 18
    modprobe loop && echo broke 19
    chroot /proc/1/root true && echo broke 20
    dd if=/dev/mem of=/dev/null count=1 && echo broke 21
    cp /bin/busybox /x/su && chmod 4755 /x/su && su user -c '/x/su id -u' | grep -x 0 && echo broke 22
    su user -c 'mount -o remount,suid /x' && echo broke 23
    su user -c 'unshare -rm true' && echo broke 24
    reboot -f && echo broke 27
    swapon /dev/vda && echo broke 28
    true
"#;

#[test]
fn a_restricted_sandbox_cannot_undo_its_mounts() -> Result<()> {
    let msb = Msb::new()?;
    msb.dir("share")?;
    let flags = [
        "-v",
        "./share:/x",
        "--mount-named",
        "data:/data:kind=disk,size=8M",
        "--security",
        "restricted",
    ];
    let script = format!(
        "options() {{ awk -v p=$1 '$2 == p {{print $4}}' /proc/mounts; }}
         (options /x; options /data; grep -E 'NoNewPrivs' /proc/self/status) >/tmp/before
         cat /tmp/before; ({ATTEMPTS}) 2>/tmp/refused
         (options /x; options /data; grep -E 'NoNewPrivs' /proc/self/status) | diff /tmp/before - && echo unchanged; wc -l </tmp/refused"
    );
    let said = msb.run(&flags, &script)?;
    ensure!(
        said.out.contains("nosuid") && said.out.contains("nodev"),
        "{said:?}"
    );
    ensure!(said.out.contains("NoNewPrivs:\t1"), "{said:?}");
    assert!(!said.out.contains("broke"), "{said:?}");
    ensure!(
        said.out.contains("unchanged"),
        "the mounts have changed: {said:?}"
    );
    // The attempts were refused, and not skipped for want of a program.
    let refusals = said
        .out
        .lines()
        .last()
        .and_then(|line| line.trim().parse::<u32>().ok());
    ensure!(refusals > Some(23), "{said:?}");
    ensure!(!said.err.contains("not found"), "{said:?}");
    Ok(())
}
