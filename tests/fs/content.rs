//! fsx, random reads and writes of one file in every manner, checked against a copy in memory.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use msb_testkit::share::{ORDINARY, Setup, Share};

use crate::bridge::skipped;
use msb_testkit::suites::{fsx_configuration, number, seed, tool};

/// Operations of one run; `MSB_FSX_OPS` asks for more.
const OPERATIONS: u64 = 12_000;

/// Runs fsx on a share with `flags`, with small files and with large operations.
fn exercise(flags: &[&str], ordinary: bool) -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = Share::new(Setup {
        flags,
        ordinary,
        ..Setup::default()
    })?;
    let folder = share.guest("place");
    fs::create_dir(&folder)?;
    if ordinary {
        chown(&folder, Some(ORDINARY), Some(ORDINARY))?;
    }
    let operations = number("MSB_FSX_OPS", OPERATIONS);
    // The second file is larger than any one request.
    let shapes = [
        (256 << 10, 64 << 10, operations),
        (8 << 20, 3 << 20, operations / 40),
    ];
    for (length, largest, count) in shapes {
        let configuration = share.beside("fsx.toml");
        fs::write(&configuration, fsx_configuration(length, largest))?;
        let seed = seed();
        let mut command = Command::new(tool("fsx")?);
        command
            .args(["-N", &count.to_string(), "-S", &seed.to_string()])
            .arg("-P")
            .arg(share.beside(""))
            .arg("-f")
            .arg(&configuration)
            .arg(folder.join(format!("file{length}")));
        if ordinary {
            command.uid(ORDINARY).gid(ORDINARY);
        }
        let output = command.output().context("fsx")?;
        ensure!(
            output.status.success(),
            "fsx -N {count} -S {seed} with {flags:?} and\n{}\n{}",
            fs::read_to_string(&configuration)?,
            String::from_utf8_lossy(&output.stderr)
        );
        println!("{flags:?}: {count} operations on {length} bytes, seed {seed}");
    }
    share.finish()
}

#[test]
fn strict() -> Result<()> {
    exercise(&["--stat-virt", "strict"], false)
}

#[test]
fn strict_by_an_ordinary_user() -> Result<()> {
    exercise(&["--stat-virt", "strict"], true)
}

#[test]
fn relaxed_and_exclusive() -> Result<()> {
    exercise(&["--stat-virt", "relaxed", "--exclusive"], false)
}

#[test]
fn relaxed_and_nothing_cached() -> Result<()> {
    exercise(&["--stat-virt", "relaxed", "--cache", "none"], true)
}

#[test]
fn off_and_only_metadata_cached() -> Result<()> {
    exercise(&["--stat-virt", "off", "--cache", "metadata"], false)
}

#[test]
fn off_with_writes_collected() -> Result<()> {
    exercise(&["--stat-virt", "off", "--writeback"], false)
}

#[test]
fn strict_and_exclusive_with_writes_collected() -> Result<()> {
    exercise(&["--exclusive", "--writeback"], true)
}
