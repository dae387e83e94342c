//! Volumes that come and go while a sandbox runs.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use msb_testkit::msb::{Msb, Said, unfit};
use rustix::process::{Pid, Signal, kill_process};

/// VMMs that give a running machine a device.
const PLUGS: &[&str] = &["qemu", "cloud-hypervisor"];

fn begin(msb: &Msb) -> Result<()> {
    msb.write("share/file", "from the host\n")?;
    msb.dir("first")?;
    let said = msb.msb(["create", "demo", "--name", "box", "-v", "./first:/first"])?;
    ensure!(said.code == 0, "{said:?}");
    Ok(())
}

/// Runs `msb mount LINE`.
fn mount(msb: &Msb, line: &str) -> Result<Said> {
    msb.msb(["mount"].into_iter().chain(line.split(' ')))
}

fn good(said: Said) -> Result<Said> {
    ensure!(said.code == 0, "{said:?}");
    Ok(said)
}

/// Number of the processes that serve something of the sandbox.
fn backends(msb: &Msb) -> Result<usize> {
    let all = msb.processes()?.into_iter();
    let ours =
        all.filter(|(_, line)| line.contains("--exit-with-parent") && !line.contains(" tied "));
    Ok(ours.count())
}

#[test]
fn volumes_are_mounted_and_unmounted_while_the_sandbox_runs() -> Result<()> {
    if unfit(PLUGS, "it gives a running machine no device") {
        return Ok(());
    }
    let msb = Msb::new()?;
    begin(&msb)?;
    let before = backends(&msb)?;
    added(&msb)?;
    refusals(&msb)?;
    kept(&msb)?;
    removed(&msb, before)?;
    good(msb.msb(["rm", "-f", "box"])?)?;
    Ok(())
}

fn added(msb: &Msb) -> Result<()> {
    good(mount(
        msb,
        "add box --mount-dir ./share:/srv/new/share:noexec --mount-file ./share/file:/etc/added:ro --mount-named data:/data:kind=disk,size=16M --mount-owned /mine --tmpfs /scratch:8M",
    )?)?;
    let wrote = good(msb.exec(
        "box",
        "set -e; cat /srv/new/share/file /etc/added; echo guest >/srv/new/share/back; echo kept >/data/kept; echo own >/mine/kept
         ! echo x >/etc/added; grep -E ' (/srv/new/share|/etc/added|/data|/scratch) ' /proc/mounts | sort -k2 | cut -d' ' -f2,3,4",
    )?)?;
    ensure!(
        wrote
            .out
            .starts_with("from the host\nfrom the host\n/data ext4 rw"),
        "{wrote:?}"
    );
    ensure!(
        wrote.out.contains("/srv/new/share virtiofs rw,noexec"),
        "{wrote:?}"
    );
    ensure!(
        wrote.out.contains("/scratch tmpfs rw") && wrote.out.contains("size=8192k"),
        "{wrote:?}"
    );
    ensure!(
        msb.read("share/back")? == "guest\n",
        "the host does not see it"
    );
    Ok(())
}

/// What `inspect` shows, nobody else can attach, and a restart mounts again.
fn kept(msb: &Msb) -> Result<()> {
    let shown = good(msb.msb(["inspect", "box"])?)?;
    let paths = good(mount(msb, "ls -q box")?)?.out;
    ensure!(
        paths == "/first\n/data\n/mine\n/etc/added\n/srv/new/share\n/scratch\n",
        "{paths}"
    );
    for path in paths.lines() {
        ensure!(
            shown.out.contains(&format!("{path} → ")),
            "{path}: {shown:?}"
        );
    }
    let locked = msb.msb(["run", "demo", "--mount-named", "data:/data", "--", "true"])?;
    ensure!(locked.code != 0, "a disk was attached twice: {locked:?}");

    good(msb.msb(["restart", "box"])?)?;
    let kept = good(msb.exec(
        "box",
        "cat /data/kept /mine/kept /srv/new/share/back /etc/added; ls -d /scratch",
    )?)?;
    ensure!(
        kept.out == "kept\nown\nguest\nfrom the host\n/scratch\n",
        "{kept:?}"
    );

    Ok(())
}

fn removed(msb: &Msb, before: usize) -> Result<()> {
    // What was there from the start goes as well.
    good(mount(
        msb,
        "rm box /data /etc/added /mine /srv/new/share /scratch /first",
    )?)?;
    let left = good(msb.exec(
        "box",
        "ls -A /data /srv/new/share /scratch /first; ls /sys/block",
    )?)?;
    ensure!(
        !left.out.contains("kept") && !left.out.contains("vdb"),
        "{left:?}"
    );
    ensure!(
        good(mount(msb, "ls -q box")?)?.out.is_empty(),
        "still listed"
    );
    ensure!(backends(msb)? < before, "backends are left");
    // Its lock is free again.
    good(msb.run(&["--mount-named", "data:/data"], "cat /data/kept")?)?;
    // And its place. What is the sandbox's own stays with it, as what it is.
    good(mount(
        msb,
        "add box --mount-named data:/data --mount-owned /mine -q",
    )?)?;
    let again = good(msb.exec("box", "cat /data/kept /mine/kept")?)?;
    ensure!(again.out == "kept\nown\n", "{again:?}");
    good(mount(msb, "rm box /mine")?)?;
    let other = mount(msb, "add box --mount-owned /mine:kind=disk,size=4M")?;
    ensure!(
        other.code == 1 && other.err.contains("of the other kind for `/mine`"),
        "{other:?}"
    );
    Ok(())
}

/// Wrong requests change nothing.
fn refusals(msb: &Msb) -> Result<()> {
    msb.write("blank.raw", vec![0; 1 << 20])?;
    let before = good(mount(msb, "ls box")?)?.out;
    let count = backends(msb)?;
    good(msb.exec(
        "box",
        "ln -s /proc/sys /link; mkdir -p /own; mount -t tmpfs none /own",
    )?)?;
    for (line, cause) in [
        ("add box --tmpfs /data", "same guest path `/data`"),
        ("add box --tmpfs /proc/x", "/proc"),
        ("add box --tmpfs /link", "place of the system"),
        ("add box -v ./first:/own", "mounted there already"),
        ("add box --mount-dir ./none:/x", "No such file"),
        ("add box --mount-dir ./share:/etc/passwd", "not a directory"),
        (
            "add box --mount-named new:/etc/passwd:kind=disk,size=4M",
            "not a directory",
        ),
        ("add box --mount-disk ./blank.raw:/x", "no file system"),
        ("add box", "no volume is given"),
        ("add none --tmpfs /x", "none"),
        ("rm box /nowhere", "is mounted at `/nowhere`"),
        ("rm box /tmp", "is mounted at `/tmp`"),
    ] {
        let said = mount(msb, line)?;
        ensure!(
            said.code == 1 && said.err.contains(cause),
            "{line}: {said:?}"
        );
    }
    ensure!(
        good(mount(msb, "ls box")?)?.out == before,
        "a refusal changed the list"
    );
    ensure!(backends(msb)? == count, "a refused mount has a backend");
    let volumes = msb.msb(["volume", "ls", "-q"])?.out;
    ensure!(
        volumes == "data\n",
        "a refused mount made a volume: {volumes}"
    );

    // In use: it stays, unless told otherwise.
    good(msb.exec("box", "cd /scratch && (sleep 600 >/dev/null 2>&1 &)")?)?;
    let busy = mount(msb, "rm box /scratch")?;
    ensure!(
        busy.code == 1 && busy.err.contains("in use") && busy.err.contains("--force"),
        "{busy:?}"
    );
    good(mount(msb, "rm box /scratch --force")?)?;
    good(mount(msb, "add box --tmpfs /scratch:8M")?)?;
    Ok(())
}

/// Only what needs no device is mounted, and the rest is refused before it leaves a trace.
#[test]
fn a_machine_that_takes_no_devices_takes_a_tmpfs() -> Result<()> {
    if unfit(&["libkrun"], "its running machine takes devices") {
        return Ok(());
    }
    let msb = Msb::new()?;
    begin(&msb)?;
    let before = backends(&msb)?;
    for device in [
        "--mount-dir ./share:/x",
        "--mount-named new:/x:kind=disk,size=16M",
    ] {
        let refused = mount(&msb, &format!("add box {device}"))?;
        ensure!(
            refused.code == 1 && refused.err.contains("libkrun"),
            "{refused:?}"
        );
    }
    ensure!(backends(&msb)? == before, "a refused mount has a backend");
    ensure!(msb.msb(["volume", "ls", "-q"])?.out.is_empty(), "a volume");
    good(mount(&msb, "add box --tmpfs /scratch:8M")?)?;
    good(msb.exec("box", "grep ' /scratch tmpfs .*size=8192k' /proc/mounts")?)?;
    good(mount(&msb, "rm box /scratch")?)?;
    good(msb.exec("box", "! grep ' /scratch ' /proc/mounts")?)?;
    good(msb.msb(["rm", "-f", "box"])?)?;
    Ok(())
}

#[test]
fn whatever_is_killed_while_a_volume_is_mounted_is_mended() -> Result<()> {
    if unfit(PLUGS, "it gives a running machine no device") {
        return Ok(());
    }
    let msb = Msb::new()?;
    begin(&msb)?;
    // The command that asks: what it asked for is done or not, and nothing in between.
    let mut asks = msb
        .command("mount add box --mount-named one:/one:kind=disk,size=16M".split(' '))
        .spawn()?;
    std::thread::sleep(Duration::from_millis(150));
    if let Some(pid) = i32::try_from(asks.id()).ok().and_then(Pid::from_raw) {
        kill_process(pid, Signal::KILL)?;
    }
    asks.wait()?;
    // The next one waits for it.
    good(mount(&msb, "add box --tmpfs /after")?)?;
    let listed = good(mount(&msb, "ls box")?)?.out;
    let seen = good(msb.exec("box", "grep -c ' /one ' /proc/mounts || true")?)?.out;
    ensure!(
        listed.contains("/one") == (seen == "1\n"),
        "{listed} {seen}"
    );

    // The supervisor: the volume that was made for the mount goes with it.
    let mut asks = msb
        .command("mount add box --mount-named two:/two:kind=disk,size=16M".split(' '))
        .spawn()?;
    let made = msb.path("home/volumes/two");
    let patience = Instant::now() + Duration::from_secs(60);
    while !made.exists() {
        ensure!(Instant::now() < patience, "no volume was made");
        std::thread::sleep(Duration::from_millis(1));
    }
    for (pid, line) in msb.processes()? {
        if line.contains(" supervise ")
            && let Some(pid) = Pid::from_raw(pid)
        {
            kill_process(pid, Signal::KILL)?;
        }
    }
    ensure!(!asks.wait()?.success(), "it was told that the mount stands");
    let volumes = msb.msb(["volume", "ls", "-q"])?.out;
    ensure!(!volumes.contains("two"), "{volumes}");
    let started = good(msb.msb(["start", "box"])?)?;
    ensure!(started.code == 0, "{started:?}");
    let listed = good(mount(&msb, "ls box")?)?.out;
    ensure!(
        !listed.contains("/two") && listed.contains("/after"),
        "{listed}"
    );
    good(msb.msb(["rm", "-f", "box"])?)?;
    Ok(())
}
