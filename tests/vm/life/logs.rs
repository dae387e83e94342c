//! What a sandbox printed, by line, time and stream.

use std::io::BufRead;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{Msb, Said};
use serde_json::Value;

pub(super) fn logs(msb: &Msb) -> Result<()> {
    // What nobody waited for is in the log.
    msb.msb([
        "exec",
        "-d",
        "life",
        "--",
        "sh",
        "-c",
        "echo one; echo two; echo three >&2",
    ])?;
    for _ in 0..50 {
        if msb.msb(["logs", "life"])?.out.contains("three") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let log = |args: &[&str]| -> Result<Said> {
        let said = msb.msb([&["logs", "life"], args].concat())?;
        ensure!(said.code == 0, "logs {args:?}: {said:?}");
        Ok(said)
    };
    // What was printed where is printed there.
    let both = log(&[])?;
    ensure!(
        both.out == "one\ntwo\n" && both.err == "three\n",
        "{both:?}"
    );
    for (args, out) in [
        (&["--tail", "2", "--source", "stdout"][..], "one\ntwo\n"),
        (&["-n", "1", "--source", "stdout"], "two\n"),
        (&["--tail", "all", "--grep", "ne"], "one\n"),
        (&["--since", "1h", "--until", "1m"], ""),
        (&["--since", "2020-01-01", "--grep", "t"], "two\n"),
        (&["--source", "stderr"], ""),
    ] {
        let said = log(args)?;
        ensure!(said.out == out, "logs {args:?}: {said:?}");
    }
    let timed = log(&["-t", "--grep", "one"])?.out;
    let (time, line) = timed.split_once(' ').context("no time")?;
    ensure!(
        time.len() == 24 && time.ends_with('Z') && line == "one\n",
        "{timed}"
    );
    // The time that it shows is one that it takes.
    ensure!(
        log(&["--since", time, "--grep", "one"])?.out == "one\n",
        "{time}"
    );
    ensure!(
        log(&["--until", time, "--grep", "one"])?.out.is_empty(),
        "{time}"
    );
    let rows = log(&["--format", "json", "--source", "stderr"])?.out;
    ensure!(
        log(&["--json", "--source", "stderr"])?.out == rows,
        "{rows}"
    );
    let row: Value = serde_json::from_str(&rows)?;
    ensure!(row["source"] == "stderr" && row["line"] == "three", "{row}");
    let system = log(&["--source", "system", "--timestamps"])?.out;
    ensure!(
        system.contains("Z  INFO mount /data: its jail holds"),
        "{system}"
    );
    // Followed while it runs.
    let mut follow = msb.command(["logs", "-f", "--tail", "0", "life"]);
    let mut follow = follow.stdout(Stdio::piped()).spawn()?;
    let line = "sleep 1; printf half; sleep 1; echo ' way'";
    msb.msb(["exec", "-d", "life", "--", "sh", "-c", line])?;
    let mut heard = String::new();
    std::io::BufReader::new(follow.stdout.take().context("no output")?).read_line(&mut heard)?;
    follow.kill()?;
    follow.wait()?;
    ensure!(heard == "half way\n", "{heard}");
    Ok(())
}
