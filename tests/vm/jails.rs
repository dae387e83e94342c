//! Jails of a running sandbox as /proc shows them, and what happens to a backend without one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{Msb, Said, binary, host, said};
use serde_json::Value;

const NOBODY: &str = "65534";

#[test]
fn a_backend_that_is_in_no_jail_gets_no_vm() -> Result<()> {
    let msb = Msb::new()?;
    msb.dir("share")?;
    for program in ["msb-fs", "msb-blk"] {
        // The real one, told to do without its jail.
        let folder = msb.dir(&format!("fake-{program}"))?;
        let script = format!(
            "#!/bin/sh\nbefore=\nfor word do\nshift\n\
             [ \"$before\" = --sandbox ] && word=none\nbefore=$word\n\
             set -- \"$@\" \"$word\"\ndone\nexec {} \"$@\"\n",
            binary(program).display()
        );
        let fake = folder.join(program);
        fs::write(&fake, script)?;
        fs::set_permissions(&fake, fs::Permissions::from_mode(0o755))?;
        let mut command = msb.command(["run", "demo", "-v", "./share:/x", "--", "true"]);
        let refused = said(&command.env("MSB_BIN_DIR", &folder).output()?)?;
        assert_ne!(refused.code, 0, "{program}: {refused:?}");
        ensure!(
            refused.err.contains("is not in its jail") && !refused.err.contains("console"),
            "{program}: {refused:?}"
        );
        let left = msb.processes()?;
        assert!(left.is_empty(), "{program} left {left:?}");
    }
    Ok(())
}

#[test]
fn every_process_of_a_sandbox_is_locked_in() -> Result<()> {
    let msb = Msb::new()?;
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root sees everything of a jail from outside");
        return Ok(());
    }
    msb.dir("share")?;
    // What a shell may leave open for the programs that it starts.
    let left = fs::File::open(msb.write("left-open", "")?)?;
    let left = rustix::io::dup(&left)?;
    let flags = [
        "--name",
        "jailed",
        "demo",
        "-v",
        "./share:/x",
        "--mount-dir",
        "./share:/off:stat-virt=off",
    ];
    let created = msb.msb(["create"].iter().chain(&flags))?;
    ensure!(created.code == 0, "{created:?}");
    drop(left);
    let shown = msb.msb(["inspect", "jailed", "--evidence", "--format", "json"])?;
    let text = msb.msb(["inspect", "jailed", "--evidence"])?;
    let removed = msb.msb(["rm", "-f", "jailed"])?;
    ensure!(
        shown.code == 0 && removed.code == 0,
        "{shown:?} {removed:?}"
    );
    ensure!(text.out.contains("no_new_privs 1"), "{text:?}");
    ensure!(!text.out.contains("left-open"), "{text:?}");
    let processes: Vec<Value> = serde_json::from_str(&shown.out)?;
    let count = |name: &str| processes.iter().filter(|p| p["name"] == name).count();
    // Image, share and share in `off`; the root disk; each one that serves and one that waits.
    assert_eq!((count("msb-fs"), count("msb-blk")), (6, 2), "{}", shown.out);
    let mut with_capabilities = 0;
    for process in &processes {
        let name = process["name"].as_str().unwrap_or_default();
        if name == "msb-supervisor" {
            continue;
        }
        assert_eq!(process["no_new_privs"], true, "{process}");
        // cloud-hypervisor's filters are its own, one for each thread but the first, which waits.
        let unlike = process["odd_threads"].as_array().map_or(0, Vec::len);
        if name.starts_with("cloud-hyp") {
            assert_eq!(process["threads"], unlike + 1, "{process}");
        } else {
            assert_eq!(
                (&process["seccomp"], unlike),
                (&Value::from(2), 0),
                "{process}"
            );
        }
        assert_ne!(
            process["namespaces"]["net"], processes[0]["namespaces"]["net"],
            "{process}"
        );
        let effective = process["capabilities"]["CapEff"]
            .as_str()
            .context("CapEff")?;
        if name.starts_with("msb-") {
            assert_eq!(process["environment"], 0, "{process}");
            with_capabilities += usize::from(!effective.trim_start_matches('0').is_empty());
        } else {
            // The VMM: at most root's power over files, bounded by Landlock.
            ensure!(
                ["0", "2"].contains(&effective.trim_start_matches("000000000000000")),
                "{process}"
            );
        }
    }
    assert_eq!(
        with_capabilities, 1,
        "only the share in `off` keeps any: {}",
        text.out
    );
    Ok(())
}

#[test]
fn an_ordinary_user_has_the_same_jails() -> Result<()> {
    let msb = Msb::new()?;
    if !rustix::process::geteuid().is_root() {
        println!("skipped: the other tests run as an ordinary user already");
        return Ok(());
    }
    msb.write("share/file", "of the host")?;
    let scratch = msb.path("");
    host("chown", ["-R", NOBODY, &scratch.display().to_string()])?;
    let script =
        "cat /x/file && chown 7:8 /x/file && chmod 4711 /x/file && stat -c %u:%g:%a /x/file";
    let inner = msb.command(["run", "demo", "-v", "./share:/x", "--", "sh", "-c", script]);
    let done = as_nobody(&inner)?;
    assert_eq!(
        (done.code, done.out.as_str()),
        (0, "of the host7:8:4711\n"),
        "{done:?}"
    );
    Ok(())
}

/// Runs a command as an ordinary user without groups.
fn as_nobody(inner: &Command) -> Result<Said> {
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .stdin(std::process::Stdio::null());
    for (name, value) in inner.get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    if let Some(folder) = inner.get_current_dir() {
        command.current_dir(folder);
    }
    said(&command.output()?)
}
