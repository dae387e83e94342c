//! The flags of the verbs that make sandboxes, find them and end them.

use std::process::Stdio;

use anyhow::{Result, ensure};
use msb_testkit::msb::{Msb, Said, said};

fn good(msb: &Msb, line: &str) -> Result<String> {
    let said = msb.msb(line.split(' '))?;
    ensure!(said.code == 0, "msb {line}: {said:?}");
    Ok(said.out)
}

#[test]
fn a_sandbox_is_as_its_flags_say() -> Result<()> {
    let msb = Msb::new()?;
    // libkrun gives its guests some MiB below the kernel on top.
    let script = "nproc; hostname; pwd; id -un; echo $A $GIVEN; df -m / | awk 'NR == 2 {print ($2 > 20 && $2 < 64)}';
        awk '/MemTotal/ {print ($2 > 200000 && $2 < 320 * 1024)}' /proc/meminfo";
    let mut command = msb.command(
        "run demo --entrypoint sh -c 2 -m 300 --root-disk 64 --hostname of-flags -e A=b -e GIVEN -w /srv -u user -q -- -c"
            .split(' ')
            .chain([script]),
    );
    let seen = said(&command.env("GIVEN", "passed on").output()?)?;
    ensure!(
        seen.out == "2\nof-flags\n/srv\nuser\nb passed on\n1\n1\n" && seen.code == 0,
        "{seen:?}"
    );
    // Nothing of it is left, for it had no name.
    ensure!(good(&msb, "ps -a -q")?.is_empty(), "it is still there");
    Ok(())
}

#[test]
fn sandboxes_are_found_ended_and_replaced_by_name_and_label() -> Result<()> {
    let msb = Msb::new()?;
    let made = good(
        &msb,
        "create demo --name one --label team=x --label n=1 -m 96 -q",
    )?;
    ensure!(made.is_empty(), "{made}");
    let loud = ["sh", "-c", "echo up; exec sleep 600"];
    let detached = "run -d demo --name two --label team=x --".split(' ');
    let said = msb.msb(detached.chain(loud))?;
    ensure!(said.code == 0 && said.out == "two\n", "{said:?}");
    let missing = msb.msb("run -d demo --name three --label team=y -- none".split(' '))?;
    ensure!(
        missing.code == 127 && missing.out == "three\n" && missing.err.contains("none: not found"),
        "{missing:?}"
    );
    streams(&msb)?;
    listed(&msb, "one\nthree\ntwo\n", "")?;
    ensure!(good(&msb, "logs two")? == "up\n", "it printed nothing");
    let stopped = msb.msb(["stop", "-q", "-t", "5", "--label", "team=x"])?;
    ensure!(stopped.code == 0 && stopped.err.is_empty(), "{stopped:?}");
    listed(&msb, "three\n", "one\ntwo\n")?;
    good(&msb, "stop -f three")?;
    good(&msb, "start -q one")?;
    replaced(&msb)?;
    let both = msb.msb(["rm", "-f", "one", "none", "three"])?;
    ensure!(
        both.code == 1 && both.err.contains("Removed one") && both.err.contains("Removed three"),
        "{both:?}"
    );
    good(&msb, "rm -q --label team=x")?;
    ensure!(good(&msb, "ls -q")?.is_empty(), "not all are gone");
    Ok(())
}

/// What is listed as running, and what as stopped.
fn listed(msb: &Msb, running: &str, stopped: &str) -> Result<()> {
    for (line, wanted) in [
        ("ls -q --running", running.to_owned()),
        ("ps -q", running.to_owned()),
        ("ls -q --stopped", stopped.to_owned()),
        ("status -a -q --filter label=team=y", "three\n".to_owned()),
        ("list -q --label n=1 --label team=x", "one\n".to_owned()),
    ] {
        let names = good(msb, line)?;
        ensure!(names == wanted, "{line}: {names}");
    }
    Ok(())
}

/// Without a standard input, and without a terminal where there is one.
fn streams(msb: &Msb) -> Result<()> {
    let mut command = msb.command(["exec", "--no-stdin", "one", "--", "wc", "-c"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // It may have ended by now.
        let _ = std::io::Write::write_all(&mut input, b"typed");
    }
    let counted = said(&child.wait_with_output()?)?;
    ensure!(counted.out.trim() == "0", "{counted:?}");
    for (line, wanted) in [
        ("exec one -- tty", "/dev/pts/"),
        ("exec --no-tty one -- tty", "not a tty"),
    ] {
        let shown: Said = super::on_a_terminal(msb, line)?;
        ensure!(shown.out.contains(wanted), "{line}: {shown:?}");
    }
    Ok(())
}

/// One takes the place of another, whose root disk goes.
fn replaced(msb: &Msb) -> Result<()> {
    let refused = msb.msb(["create", "demo", "--name", "one"])?;
    ensure!(
        refused.code == 1 && refused.err.contains("there is a sandbox `one` already"),
        "{refused:?}"
    );
    for flags in ["--replace", "--replace-with-timeout 1"] {
        msb.exec("one", "touch /mark")?;
        good(msb, &format!("create demo --name one {flags} --label n=2"))?;
        let said = msb.exec("one", "ls /mark")?;
        ensure!(said.code != 0, "{flags}: {said:?}");
    }
    Ok(())
}
