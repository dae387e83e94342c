//! One sandbox through its life: commands, terminal, copies, sizes, logs, restart.

use std::fs;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{Msb, Said, said};
use serde_json::Value;

mod copies;
mod logs;
mod verbs;

/// Starts a sandbox with a volume of each kind.
fn begin(msb: &Msb) -> Result<()> {
    msb.write("share/file", "shared\n")?;
    let said = msb.msb([
        "create",
        "demo",
        "--name",
        "life",
        "--label",
        "team=x",
        "--env",
        "COLOUR=blue",
        "-v",
        "./share:/share",
        "-v",
        "cache:/cache",
        "--mount-named",
        "data:/data:kind=disk,size=32M",
    ])?;
    ensure!(said.code == 0 && said.out == "life\n", "{said:?}");
    Ok(())
}

#[test]
fn a_sandbox_lives_through_everything() -> Result<()> {
    let msb = Msb::new()?;
    begin(&msb)?;
    commands(&msb)?;
    copies::copies(&msb)?;
    copies::hostile_copies(&msb)?;
    listings(&msb)?;
    progress(&msb)?;
    restarted_elsewhere(&msb)?;
    // Gone with its root disk; volumes stay.
    let removed = msb.msb(["rm", "-f", "life"])?;
    ensure!(removed.code == 0, "{removed:?}");
    ensure!(
        msb.msb(["ls", "--format", "json"])?.out == "[]\n",
        "it is still listed"
    );
    ensure!(
        msb.msb(["volume", "ls", "-q"])?.out == "cache\ndata\n",
        "volumes went with it"
    );
    Ok(())
}

fn commands(msb: &Msb) -> Result<()> {
    for (command, code) in [
        (&["sh", "-c", "exit 3"][..], 3),
        (&["no-such-program"], 127),
        (&["/etc/passwd"], 126),
        (&["sh", "-c", "kill -TERM $$"], 128 + 15),
        (&["sh", "-c", "kill -SEGV $$"], 128 + 11),
    ] {
        let said = msb.msb(["exec", "life", "--"].iter().chain(command))?;
        ensure!(said.code == code, "{command:?}: {said:?}");
    }
    let slow = msb.msb(["exec", "--timeout", "1", "life", "--", "sleep", "60"])?;
    ensure!(
        slow.code == 124 && slow.err.contains("killed after 1 s"),
        "{slow:?}"
    );
    // What is let go is known to run first.
    let missing = msb.msb(["exec", "-d", "life", "--", "no-such-program"])?;
    ensure!(
        missing.code == 127 && missing.err.contains("no-such-program: not found"),
        "{missing:?}"
    );
    // Everybody can use a new volume, and nobody else's directory can be written.
    for (flags, line, out) in [
        (
            ["-u", "user"],
            "ls -ld /cache | cut -c 1-10",
            "drwxr-xr-x\n",
        ),
        (["-w", "/made/deep"], "stat -c %a . ..", "755\n755\n"),
        (
            ["--rlimit", "nofile=64:128"],
            "ulimit -Sn; ulimit -Hn",
            "64\n128\n",
        ),
    ] {
        let line = ["life", "--", "sh", "-c", line];
        let said = msb.msb(["exec"].iter().chain(&flags).chain(&line))?;
        ensure!(said.out == out, "{flags:?}: {said:?}");
    }
    let said = msb.msb([
        "exec",
        "-e",
        "SIZE=large",
        "-w",
        "/cache",
        "-u",
        "user",
        "life",
        "--",
        "sh",
        "-c",
        "echo $COLOUR $SIZE $PWD $(id -un)",
    ])?;
    ensure!(said.out == "blue large /cache user\n", "{said:?}");
    terminal(msb)
}

/// With its size, its echo and its control characters.
fn terminal(msb: &Msb) -> Result<()> {
    let mut child = msb
        .command([
            "exec",
            "-t",
            "life",
            "--",
            "sh",
            "-c",
            "tty; stty size; read line; echo got $line; sleep 60",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().context("no standard input")?;
    std::io::Write::write_all(&mut input, b"typed\n")?;
    // Interrupts what runs on the terminal, as Ctrl-C does.
    let mut seen = String::new();
    let mut output = child.stdout.take().context("no standard output")?;
    let mut buffer = [0; 4096];
    while !seen.contains("got typed") {
        let count = std::io::Read::read(&mut output, &mut buffer)?;
        ensure!(count > 0, "the terminal ended: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    std::io::Write::write_all(&mut input, b"\x03")?;
    let ended = said_of(child)?;
    ensure!(ended.code == 130, "{ended:?}");
    ensure!(
        seen.contains("/dev/pts/") && seen.contains("24 80"),
        "{seen}"
    );
    Ok(())
}

fn said_of(child: std::process::Child) -> Result<Said> {
    said(&child.wait_with_output()?)
}

fn listings(msb: &Msb) -> Result<()> {
    let json = |line: &str| -> Result<Value> {
        let said = msb.msb(line.split(' '))?;
        ensure!(said.code == 0, "{line}: {said:?}");
        serde_json::from_str(&said.out).with_context(|| format!("{line}: {}", said.out))
    };
    let used = json("df --format json")?;
    let entry = |class: &str, name: &str| {
        let entries = used["entries"].as_array().into_iter().flatten();
        let mut found = entries
            .filter(|e| e["type"] == class && e["name"].as_str().is_some_and(|n| n.contains(name)));
        found
            .next()
            .cloned()
            .with_context(|| format!("{class} {name}: {used}"))
    };
    let disk = entry("disk-volume", "data")?;
    ensure!(
        disk["in_use"] == true && disk["logical_bytes"] == 32 << 20,
        "{disk}"
    );
    ensure!(disk["allocated_bytes"].as_u64() < Some(32 << 20), "{disk}");
    for (class, name) in [
        ("dir-volume", "cache"),
        ("sandbox", "life"),
        ("image", "demo"),
    ] {
        let entry = entry(class, name)?;
        ensure!(
            entry["in_use"] == true && entry["reclaimable_bytes"] == 0,
            "{entry}"
        );
    }
    ensure!(
        entry("dir-volume", "cache")?["allocated_bytes"].as_u64() > Some(5 << 20),
        "{used}"
    );
    let table = msb.msb(["df"])?.out;
    ensure!(
        table.starts_with("TYPE                COUNT   IN USE   LOGICAL"),
        "{table}"
    );

    let volume = json("volume inspect cache --format json")?;
    ensure!(
        volume["used_by"][0]["sandbox"] == "life" && volume["used_by"][0]["running"] == true,
        "{volume}"
    );
    ensure!(volume["used_bytes"].as_u64() > Some(5 << 20), "{volume}");
    let listed = json("ls --format json --label team=x")?;
    ensure!(
        listed[0]["name"] == "life"
            && listed[0]["status"] == "running"
            && listed[0]["created_at"]
                .as_str()
                .is_some_and(|time| time.ends_with('Z')),
        "{listed}"
    );
    let shown = json("ps --format json")?;
    ensure!(
        shown[0]["cpus"] == 1 && shown[0]["supervisor_pid"].is_u64(),
        "{shown}"
    );
    let whole = json("inspect life --format json")?;
    ensure!(
        whole["config"]["mounts"].as_array().map(Vec::len) == Some(3),
        "{whole}"
    );
    logs::logs(msb)
}

/// On a terminal, and there alone, it is said what takes long.
fn progress(msb: &Msb) -> Result<()> {
    fs::File::create(msb.path("sparse"))?.set_len(256 << 20)?;
    let stubborn = "trap '' TERM; while :; do sleep 1; done";
    let said = msb.msb(["exec", "-d", "life", "--", "sh", "-c", stubborn])?;
    ensure!(said.code == 0, "{said:?}");
    for (line, step, end) in [
        ("cp ./sparse life:/dev/null", "copying, ", ""),
        ("stop life", "stopping", "Stopped life"),
        ("start life", "booting", "Started life"),
    ] {
        let shown = on_a_terminal(msb, line)?;
        ensure!(
            shown.code == 0 && shown.out.contains(step) && shown.out.contains(end),
            "{line}: {shown:?}"
        );
    }
    let again = msb.msb(["restart", "life"])?;
    ensure!(
        again.code == 0 && !again.err.contains("booting"),
        "{again:?}"
    );
    Ok(())
}

/// Runs a command line of `msb` with its output on a terminal.
fn on_a_terminal(msb: &Msb, line: &str) -> Result<Said> {
    let command = msb.command(line.split(' '));
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    // In place of the shell that `script` starts: some would run it beside themselves, and what
    // `timeout` makes a group of its own is stopped when it changes the terminal of another.
    let line = format!("exec {}", words.join(" "));
    let mut shown = std::process::Command::new("script");
    shown
        .args(["-qfec", &line, "/dev/null"])
        .current_dir(msb.path(""));
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            shown.env(name, value);
        }
    }
    said(&shown.stdin(Stdio::null()).output()?)
}

fn restarted_elsewhere(msb: &Msb) -> Result<()> {
    msb.exec("life", "echo changed >/etc/motd; rm /bin/vi; echo unsynced >/data/last; echo unsynced >/cache/last")?;
    let restarted = said(&msb.command(["restart", "life"]).current_dir("/").output()?)?;
    ensure!(restarted.code == 0, "{restarted:?}");
    let said = msb.exec(
        "life",
        "cat /etc/motd /share/file /cache/last /data/last; ls /bin/vi /srv/script; echo $COLOUR",
    )?;
    ensure!(
        said.out == "changed\nshared\nunsynced\nunsynced\n/srv/script\nblue\n",
        "{said:?}"
    );
    // A volume that is missing is missed, and not made anew with nothing in it.
    ensure!(msb.msb(["stop", "life"])?.code == 0, "it does not stop");
    ensure!(
        msb.msb(["volume", "rm", "cache"])?.code == 0,
        "a stopped sandbox holds its volume"
    );
    let missed = msb.msb(["start", "life"])?;
    ensure!(
        missed.code == 1 && missed.err.contains("volume `cache` does not exist"),
        "{missed:?}"
    );
    ensure!(
        msb.msb(["volume", "create", "cache"])?.code == 0,
        "it cannot be made again"
    );
    ensure!(
        msb.msb(["exec", "life", "--", "true"])?.code == 0,
        "exec does not start it"
    );
    Ok(())
}
