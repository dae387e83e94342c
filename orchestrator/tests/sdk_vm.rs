//! The Rust examples of the documents, pasted as they stand there, run against real sandboxes.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use microsandbox::{
    DiskImageFormat, ErrorKind, ExecEvent, ExecOptions, MicrosandboxResult, Resource, Sandbox,
    SecurityProfile, SizeExt, StatVirtualization, Volume, VolumeKind,
};
use msb_testkit::documents::{EVERYTHING, documents, everything, relaxed_link};
use msb_testkit::msb::{Msb, bin_dir, kernel, unfit};

/// Runs `example` in a process of its own, in the folder of `msb` and with its home: both come
/// from the process, which cannot change them while it has threads.
fn pasted(
    name: &str,
    example: impl AsyncFnOnce() -> Result<()>,
    after: impl FnOnce(&Msb) -> Result<()>,
) -> Result<()> {
    if std::env::var_os("MSB_TEST_INSIDE").is_some() {
        let events = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        return events.block_on(example());
    }
    let msb = documents()?;
    let limit = std::env::var("MSB_COMMAND_LIMIT");
    // A guest that does not boot is told of before the whole example is given up.
    let boot = std::env::var("MSB_BOOT_LIMIT");
    let output = Command::new("timeout")
        .args(["--kill-after=20", limit.as_deref().unwrap_or("150")])
        .arg(std::env::current_exe()?)
        .args(["--exact", name, "--nocapture"])
        .current_dir(msb.path(""))
        .env("MSB_TEST_INSIDE", "1")
        .env("MSB_HOME", msb.home())
        .env("MSB_KERNEL", kernel())
        .env("MSB_BIN_DIR", bin_dir())
        .env("MSB_BOOT_LIMIT", boot.as_deref().unwrap_or("100"))
        .output()?;
    let said = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    ensure!(output.status.success(), "{}{}", said.0, said.1);
    ensure!(
        said.0.contains("1 passed"),
        "the example did not run: {}",
        said.0
    );
    after(&msb)
}

/// The error that there must be.
fn refusal<T>(result: MicrosandboxResult<T>) -> Result<microsandbox::Error> {
    result.err().context("it was not refused")
}

/// Says how far an example has come: it is all that is known of one that does not end.
fn step(what: &str) {
    println!("  {what}");
}

/// Runs a line in a sandbox, which must succeed.
async fn shell(sb: &Sandbox, line: &str) -> Result<String> {
    step(line);
    let output = sb.shell(line).await?;
    ensure!(
        output.success(),
        "{line}: {}{}",
        output.stdout(),
        output.stderr()
    );
    Ok(output.stdout())
}

#[test]
fn bind_mounts() -> Result<()> {
    let example = async || {
        let sb = Sandbox::builder("dev")
            .image("python")
            .volume("/app/src", |v| v.bind("./src").readonly().noexec())
            .volume("/app/data", |v| v.bind("./data"))
            .create()
            .await?;
        let seen = shell(
            &sb,
            "cat /app/src/main.py; sh /app/src/tool; /app/src/tool; echo $?; echo guest >/app/data/out",
        )
        .await?;
        ensure!(seen == "print('from the host')\nran\n126\n", "{seen}");
        ensure!(
            !sb.shell("touch /app/src/new").await?.success(),
            "ro can be written"
        );
        sb.stop().await?;
        Sandbox::remove("dev").await?;
        Ok(())
    };
    pasted("bind_mounts", example, |msb| {
        assert_eq!(msb.read("data/out")?, "guest\n");
        Ok(())
    })
}

#[test]
fn named_volumes() -> Result<()> {
    let example = async || {
        let cache = Volume::builder("pip-cache").create().await?;
        let docker_data = Volume::builder("docker-data")
            .disk()
            .size(20.gib())
            .create()
            .await?;
        ensure!(
            docker_data.capacity_bytes() == Some(20 << 30),
            "{docker_data:?}"
        );

        let sb = Sandbox::builder("worker")
            .image("python")
            .volume("/root/.cache/pip", |v| v.named(cache.name()))
            .create()
            .await?;
        shell(&sb, "echo wheel >/root/.cache/pip/wheel").await?;
        // Reached from the host, while the sandbox runs and without one.
        ensure!(
            cache.fs().read_to_string("wheel").await? == "wheel\n",
            "not what the guest wrote"
        );
        let refused = refusal(Volume::remove("pip-cache").await)?;
        ensure!(
            refused.kind() == ErrorKind::InUse && refused.to_string().contains("worker"),
            "{refused}"
        );
        sb.stop().await?;
        Sandbox::remove("worker").await?;
        cache.fs().write("from-host", "host\n").await?;

        named_with().await?;

        Volume::builder("old-cache").create().await?;
        let volumes = Volume::list().await?;
        Volume::remove("old-cache").await?;
        ensure!(volumes.len() == 3, "{volumes:?}");
        let left = Volume::list().await?;
        ensure!(
            left.iter().all(|volume| volume.name() != "old-cache"),
            "{left:?}"
        );
        let handle = Volume::get("docker-data").await?;
        ensure!(
            (handle.kind(), handle.disk_format(), handle.disk_fstype())
                == (VolumeKind::Disk, Some("raw"), Some("ext4")),
            "{handle:?}"
        );
        handle.remove().await?;
        Ok(())
    };
    pasted("named_volumes", example, |msb| {
        let left: Vec<_> = fs::read_dir(msb.home().join("volumes"))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| !name.starts_with('.'))
            .collect();
        assert_eq!(left, ["pip-cache"]);
        Ok(())
    })
}

/// The example of the reference, and what its modes refuse.
async fn named_with() -> Result<()> {
    let sb = Sandbox::builder("worker")
        .image("python")
        .volume("/cache", |v| {
            v.named_with("pip-cache", |n| n.ensure_exists())
        })
        .volume("/var/lib/docker", |v| {
            v.named_with("docker-data", |n| n.ensure_exists().disk().size(20.gib()))
        })
        .create()
        .await?;
    let seen = shell(&sb, "cat /cache/wheel /cache/from-host; df -m /var/lib/docker | awk 'NR == 2 {print ($2 > 19000)}'").await?;
    ensure!(seen == "wheel\nhost\n1\n", "{seen}");
    sb.stop().await?;
    Sandbox::remove("worker").await?;

    let refused = |mount: fn(
        microsandbox::NamedVolumeBuilder,
    ) -> microsandbox::NamedVolumeBuilder| async move {
        let sandbox = Sandbox::builder("refused")
            .image("python")
            .volume("/new", |v| v.named_with("made-first", |n| n.create()))
            .volume("/x", |v| v.named_with("pip-cache", mount));
        refusal(sandbox.create().await).map(|error| error.kind())
    };
    let kinds = [
        refused(|n| n.create()).await?,
        refused(|n| n.ensure_exists().disk().size(1.gib())).await?,
        refused(|n| n.ensure_exists().quota(1.gib())).await?,
        refused(|n| n.ensure_exists().label("team", "x")).await?,
    ];
    ensure!(kinds == [ErrorKind::VolumeAlreadyExists; 4], "{kinds:?}");
    let missing = Sandbox::builder("refused")
        .image("python")
        .volume("/x", |v| v.named("missing"))
        .create()
        .await;
    let missing = refusal(missing)?.kind();
    ensure!(missing == ErrorKind::VolumeNotFound, "{missing:?}");
    // Nothing was made, or it was taken back.
    ensure!(
        Volume::get("made-first").await.is_err(),
        "a volume was left"
    );
    ensure!(Sandbox::get("refused").await.is_err(), "a sandbox was left");
    Ok(())
}

#[test]
fn disk_images_and_tmpfs() -> Result<()> {
    let example = async || {
        let sb = Sandbox::builder("seeded")
            .image("alpine")
            .volume("/seed", |v| v.disk("./seed.raw").readonly().noexec())
            .create()
            .await?;
        let seen = shell(&sb, "cat /seed/greeting; /seed/tool; echo $?").await?;
        ensure!(seen == "from the image\n126\n", "{seen}");
        ensure!(
            !sb.shell("touch /seed/new").await?.success(),
            "ro can be written"
        );
        sb.stop().await?;
        Sandbox::remove("seeded").await?;

        let sb = Sandbox::builder("worker")
            .image("alpine")
            .volume("/tmp/scratch", |v| v.tmpfs().size(100).noexec())
            .create()
            .await?;
        let seen = shell(&sb, "df -m /tmp/scratch | awk 'NR == 2 {print $1, $2}'").await?;
        ensure!(seen == "tmpfs 100\n", "{seen}");
        sb.stop().await?;
        Ok(())
    };
    pasted("disk_images_and_tmpfs", example, |msb| {
        // What one process made, another sees.
        assert_eq!(msb.msb(["ls", "-q"])?.out, "worker\n");
        Ok(())
    })
}

#[test]
fn everything_combined() -> Result<()> {
    let example = async || {
        Volume::builder("pip-cache").create().await?;
        let sb = combined().await.context("the example")?;
        let seen = shell(&sb, &everything()).await?;
        ensure!(seen == EVERYTHING, "{seen}");
        sb.stop().await?;
        Ok(())
    };
    pasted("everything_combined", example, relaxed_link)
}

async fn combined() -> MicrosandboxResult<Sandbox> {
    let sb = Sandbox::builder("full")
        .image("python")
        .volume("/app/src", |v| v.bind("./src").readonly().noexec())
        .volume("/app/pyproject.toml", |v| {
            v.bind("./pyproject.toml").readonly()
        })
        .volume("/root/.cache/pip", |v| {
            v.named("pip-cache")
                .stat_virtualization(StatVirtualization::Relaxed)
        })
        .volume("/dataset", |v| {
            v.disk("./dataset.qcow2")
                .format(DiskImageFormat::Qcow2)
                .fstype("ext4")
                .readonly()
        })
        .volume("/tmp", |v| v.tmpfs().size(1024).noexec().nosuid().nodev())
        .create()
        .await?;
    Ok(sb)
}

#[test]
fn a_sandbox_is_made_used_and_found_again() -> Result<()> {
    let example = async || {
        let sb = Sandbox::builder("used")
            .image("alpine")
            .cpus(2)
            .memory(300)
            .root_disk(64)
            .security(SecurityProfile::Restricted)
            .env("COLOUR", "blue")
            .workdir("/srv")
            .user("0:0")
            .hostname("of-builder")
            .entrypoint(["/bin/busybox"])
            .label("team", "x")
            .create()
            .await?;
        let line = "echo $COLOUR $PWD $(hostname) $(nproc); grep NoNewPrivs /proc/self/status";
        let seen = shell(&sb, line).await?;
        ensure!(seen == "blue /srv of-builder 2\nNoNewPrivs:\t1\n", "{seen}");
        let main = sb.main_command(&["true".to_owned()]);
        ensure!(main == ["/bin/busybox", "true"], "{main:?}");
        ensure!(sb.boot_ms().is_some(), "no time");
        commands(&sb).await?;
        copies(&sb).await?;
        found_again(sb).await
    };
    pasted("a_sandbox_is_made_used_and_found_again", example, |msb| {
        assert_eq!(msb.msb(["ls", "-q"])?.out, "");
        Ok(())
    })
}

async fn commands(sb: &Sandbox) -> Result<()> {
    let output = sb
        .exec("sh", ["-c", "echo out; echo err >&2; exit 3"])
        .await?;
    ensure!(
        (output.code(), output.stdout_bytes(), output.stderr_bytes()) == (3, b"out\n", b"err\n"),
        "{output:?}"
    );
    step("input");
    // Input, a terminal and its size, limits.
    let mut sort = sb.exec_with(ExecOptions::new("sort"))?;
    let mut input = sort.take_stdin().context("no input")?;
    input.write(b"b\na\n").await?;
    drop(input);
    ensure!(sort.output().await?.stdout() == "a\nb\n", "not sorted");
    step("terminal");
    let line = "stty size; ulimit -n; id -u; echo $COLOUR $PWD; read x; stty size";
    let options = ExecOptions::new("sh").args(["-c", line]).terminal(20, 70);
    let options = options.rlimit(Resource::Nofile, 64, 128).user("user");
    let mut asked = sb.exec_with(options.env("COLOUR", "red").cwd("/tmp"))?;
    let mut input = asked.take_stdin().context("no input")?;
    asked.control().resize(30, 90);
    input.write(b"\n").await?;
    let seen = asked.output().await?.stdout();
    ensure!(
        seen.contains("64\r\n1000\r\nred /tmp\r\n") && seen.ends_with("30 90\r\n"),
        "{seen:?}"
    );
    // Signals, time, and what is left alone.
    let sleep = || ExecOptions::new("sleep").args(["600"]);
    for _ in 0..8 {
        step("signal");
        let slept = sb.exec_with(sleep())?;
        // It may not even have a process group of its own yet.
        slept.control().signal(libc::SIGTERM);
        ensure!(
            slept.output().await?.code() == 128 + libc::SIGTERM,
            "not by the signal"
        );
    }
    step("timeout");
    let late = sb.exec_with(sleep().timeout(Duration::from_millis(300)))?;
    let late = refusal(late.output().await)?;
    ensure!(late.kind() == ErrorKind::ExecTimeout, "{late}");
    let missing = refusal(sb.exec("no-such-program", [""; 0]).await)?;
    ensure!(missing.kind() == ErrorKind::ExecFailed, "{missing}");
    step("detached");
    // What it prints before it is left alone is for us.
    let line = "until [ -e /tmp/alone ]; do sleep 0.1; done; echo logged";
    let mut server = sb.exec_with(ExecOptions::new("sh").args(["-c", line]))?;
    server.detach().await;
    let begins = server.next().await?;
    ensure!(
        matches!(begins, Some(ExecEvent::Started { .. })),
        "{begins:?}"
    );
    shell(sb, "touch /tmp/alone").await?;
    let ends = server.next().await?;
    ensure!(ends == Some(ExecEvent::Exited { code: 0 }), "{ends:?}");
    let log = fs::read_to_string(sb.dir().output_log())?;
    ensure!(log.contains("logged"), "{log}");
    Ok(())
}

async fn copies(sb: &Sandbox) -> Result<()> {
    step("copies");
    let copied = sb.copy_in("./src", "/tmp/src", &|_| {}).await?;
    ensure!(copied.bytes > 0 && copied.left_out.is_empty(), "{copied:?}");
    sb.copy_out("/tmp/src/main.py", "./copied", &|_| {}).await?;
    ensure!(
        fs::read("copied")? == fs::read("src/main.py")?,
        "they differ"
    );
    step("mounts");
    // A volume that comes and goes.
    sb.mount("/later", |v| v.tmpfs().size(4)).await?;
    let twice = refusal(sb.mount("/later", |v| v.tmpfs()).await)?;
    ensure!(twice.kind() == ErrorKind::InvalidConfig, "{twice}");
    let mounts = sb.mounts()?;
    let [mount] = mounts.as_slice() else {
        bail!("{mounts:?}");
    };
    sb.unmount("/later", false).await?;
    if !unfit(
        &["qemu", "cloud-hypervisor"],
        "it gives a running machine no device",
    ) {
        own(sb).await?;
    }
    sb.add_mount(mount.clone()).await?;
    let seen = shell(sb, "df -m /later | awk 'NR == 2 {print $2}'").await?;
    ensure!(seen == "4\n", "{seen}");
    Ok(())
}

/// One of its own, which a volume of another sandbox at the same place is not.
async fn own(sb: &Sandbox) -> Result<()> {
    sb.mount("/own", |v| v.owned_with(|o| o.quota(8))).await?;
    let seen = shell(sb, "echo x >/own/x; df -m /own | awk 'NR == 2 {print $2}'").await?;
    ensure!(seen == "8\n", "{seen}");
    sb.unmount("/own", false).await?;
    Ok(())
}

async fn found_again(sb: Sandbox) -> Result<()> {
    ensure!(sb.spec().labels["team"] == "x", "{:?}", sb.spec());
    let names: Vec<_> = Sandbox::list().await?;
    let names: Vec<&str> = names.iter().map(|handle| handle.name()).collect();
    ensure!(names == ["used"], "{names:?}");
    let handle = Sandbox::get("used").await?;
    ensure!(
        handle.is_running() && handle.state()?.status == sb.state()?.status,
        "{:?}",
        handle.state()?
    );
    let refused = refusal(handle.remove().await)?;
    ensure!(
        refused.kind() == ErrorKind::SandboxStillRunning,
        "{refused}"
    );
    shell(&sb, "echo kept >/mark; sync").await?;
    step("stop and start");
    handle.stop().await?;
    sb.wait().await?;
    let again = handle.start().await?;
    ensure!(
        shell(&again, "cat /mark").await? == "kept\n",
        "it is another"
    );
    let other = handle.connect().await?;
    ensure!(other.name() == again.name(), "{}", other.name());
    other.kill().await?;
    ensure!(handle.spec()?.mounts.len() == 1, "{:?}", handle.spec()?);
    handle.remove().await?;
    let gone = refusal(Sandbox::get("used").await)?;
    ensure!(gone.kind() == ErrorKind::SandboxNotFound, "{gone}");
    Ok(())
}
