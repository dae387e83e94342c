//! libkrun's C API, recorded: every call that makes a machine, and every way it can fail.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{Said, binary, said};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder with a stand-in, an agent and the agent's socket.
struct Bench {
    folder: TempDir,
    _agent: UnixListener,
}

impl Bench {
    fn new(defines: &[&str]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("msb-krun.").tempdir()?;
        crate::libkrun(folder.path(), defines)?;
        fs::write(folder.path().join("msb-agent"), "the agent")?;
        let agent = UnixListener::bind(folder.path().join("agent"))?;
        Ok(Self {
            folder,
            _agent: agent,
        })
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn machine(&self) -> Value {
        json!({
            "library": self.path("libkrun.so.1"),
            "cpus": 2,
            "memory_mib": 512,
            "init": self.path("msb-agent"),
            "agent": self.path("agent"),
            "devices": [
                {"kind": 26, "name": "root_1", "socket": "/run/d0", "queue_sizes": [1024, 1024]},
                {"kind": 2, "name": "disk_2", "socket": "/run/d1", "queue_sizes": [256]},
            ],
        })
    }

    /// `msb krun` with a terminal on standard input.
    fn become_machine(&self, machine: &Value, environment: &[(&str, &str)]) -> Result<Said> {
        let (_ours, theirs) = terminal()?;
        let mut command = Command::new(binary("msb"));
        command
            .args(["krun", &machine.to_string()])
            .env("KRUN_RECORD", self.folder.path().join("record"))
            .envs(environment.iter().copied())
            .stdin(Stdio::from(theirs));
        said(&command.output()?)
    }

    /// The recorded calls.
    fn record(&self) -> Result<String> {
        let text = fs::read_to_string(self.folder.path().join("record"))?;
        Ok(text.replace(&self.path(""), "FOLDER/"))
    }
}

fn terminal() -> Result<(OwnedFd, OwnedFd)> {
    use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
    let theirs = rustix::fs::open(name, flags, rustix::fs::Mode::empty())?;
    Ok((ours, theirs))
}

#[test]
fn a_machine_is_made_by_these_calls() -> Result<()> {
    let bench = Bench::new(&[])?;
    let done = bench.become_machine(&bench.machine(), &[("KRUN_STATUS", "5")])?;
    assert_eq!((done.code, done.out.as_str()), (5, "started\n"), "{done:?}");
    let expected = "\
        krun_create_ctx()\n\
        krun_set_log_level(2)\n\
        krun_set_vm_config(7, 2, 512)\n\
        krun_disable_implicit_console(7)\n\
        krun_disable_implicit_vsock(7)\n\
        krun_disable_implicit_init(7)\n\
        krun_add_virtiofs3(7, /dev/root, NULL, 0, 1)\n\
        krun_fs_add_overlay_dir(7, /dev/root, dev, 40755)\n\
        krun_fs_add_overlay_dir(7, /dev/root, proc, 40755)\n\
        krun_fs_add_overlay_dir(7, /dev/root, sys, 40755)\n\
        krun_fs_add_overlay_dir(7, /dev/root, lower, 40755)\n\
        krun_fs_add_overlay_dir(7, /dev/root, upper, 40755)\n\
        krun_fs_add_overlay_dir(7, /dev/root, root, 40755)\n\
        krun_fs_add_overlay_dir(7, /dev/root, staging, 40755)\n\
        krun_fs_add_overlay_file(7, /dev/root, init.krun, the agent, 100755, 0)\n\
        krun_add_virtio_console_multiport(7)\n\
        krun_add_console_port_tty(7, 3, '', terminal)\n\
        krun_add_console_port_inout(7, 3, 'PORT', socket, socket)\n\
        krun_add_vhost_user_device(7, 26, /run/d0, root_1, 1024 1024)\n\
        krun_add_vhost_user_device(7, 2, /run/d1, disk_2, 256)\n\
        krun_start_enter(7)\n";
    let expected = expected.replace("PORT", msb_protocol::PORT_NAME);
    assert_eq!(bench.record()?, expected);
    Ok(())
}

#[test]
fn a_machine_may_not_do_what_no_machine_does() -> Result<()> {
    let bench = Bench::new(&[])?;
    let done = bench.become_machine(&bench.machine(), &[("KRUN_ATTACK", "1")])?;
    let expected = "\
        execve: EPERM\n\
        fork: EPERM\n\
        clone3: ENOSYS\n\
        kill: EPERM\n\
        tgkill: EPERM\n\
        own tgkill: done\n\
        ptrace: EPERM\n\
        socket inet: EPERM\n\
        socket netlink: EPERM\n\
        socket unix: done\n\
        mount: EPERM\n\
        unshare: EPERM\n\
        setuid: EPERM\n\
        bpf: EPERM\n\
        keyctl: EPERM\n\
        io_uring_setup: EPERM\n\
        started\n";
    assert_eq!(done.out, expected, "{done:?}");
    Ok(())
}

#[test]
fn every_call_that_fails_is_named() -> Result<()> {
    let bench = Bench::new(&[])?;
    bench.become_machine(&bench.machine(), &[])?;
    let record = bench.record()?;
    let calls = record.lines().filter_map(|line| line.split('(').next());
    for call in calls {
        let failed = bench.become_machine(&bench.machine(), &[("KRUN_FAIL", call)])?;
        ensure!(
            failed.code != 0 && !failed.out.contains("started"),
            "{call}: {failed:?}"
        );
        // Without a context the library is of no use at all, whatever it is called.
        ensure!(
            failed.err.contains(call) || call == "krun_create_ctx",
            "{call}: {failed:?}"
        );
    }
    Ok(())
}

#[test]
fn an_unfit_library_is_told_from_a_fit_one() -> Result<()> {
    let probe = |library: &Path, fail: &str| {
        let mut command = Command::new(binary("msb"));
        command
            .args(["krun", "--probe"])
            .arg(library)
            .env("KRUN_FAIL", fail);
        said(&command.output()?)
    };
    let bench = Bench::new(&[])?;
    let library = bench.folder.path().join("libkrun.so.1");
    assert_eq!(probe(&library, "")?.code, 0);
    let without = probe(&library, "krun_add_vhost_user_device")?;
    ensure!(
        without.code != 0 && without.err.contains("without its feature vhost-user"),
        "{without:?}"
    );
    let missing = probe(&bench.folder.path().join("none.so"), "")?;
    ensure!(
        missing.code != 0 && missing.err.contains("none.so"),
        "{missing:?}"
    );
    fs::write(bench.folder.path().join("libkrunfw.so.5"), "no library")?;
    let kernel = probe(&library, "")?;
    ensure!(
        kernel.err.contains("kernel") && kernel.err.contains("libkrunfw"),
        "{kernel:?}"
    );

    let old = Bench::new(&["NO_VHOST_USER"])?;
    let refused = probe(&old.folder.path().join("libkrun.so.1"), "")?;
    ensure!(
        refused
            .err
            .contains("no function krun_add_vhost_user_device"),
        "{refused:?}"
    );
    ensure!(
        refused.err.contains("MSB_LIBKRUN"),
        "the way to get it: {refused:?}"
    );
    Ok(())
}

#[test]
fn a_supervisor_that_is_gone_starts_no_machine() -> Result<()> {
    let bench = Bench::new(&[])?;
    let mut machine = bench.machine();
    *machine.get_mut("agent").context("agent")? = json!("/nonexistent");
    let refused = bench.become_machine(&machine, &[])?;
    ensure!(
        refused.code != 0 && refused.err.contains("supervisor"),
        "{refused:?}"
    );
    ensure!(!bench.record()?.contains("start_enter"));
    Ok(())
}
