//! pjdfstest, a POSIX test suite that nobody here wrote, in all modes and as both kinds of user.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use msb_testkit::share::{ORDINARY, Setup, Share};
use msb_testkit::suites::{CONFIGURATION, Users, judge, outcomes, tool};

use crate::bridge::skipped;

/// Runs the whole suite and compares what fails with what must.
fn suite(mode: &str, users: Users) -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = Share::new(Setup {
        flags: &["--stat-virt", mode],
        ordinary: users != Users::Root,
        ..Setup::default()
    })?;
    let mut seen = BTreeMap::new();
    // Some tests leave files open, after which nothing can be mounted read-only: those that do so
    // have a process of their own.
    for pattern in ["", "erofs"] {
        for (name, outcome) in run(&share, users, pattern)? {
            if name.contains("erofs") != pattern.is_empty() {
                seen.insert(name, outcome);
            }
        }
    }
    share.finish()?;
    judge(mode, users, &seen)
}

/// Runs the tests whose names contain `pattern`; returns each with what came of it.
fn run(share: &Share, users: Users, pattern: &str) -> Result<BTreeMap<String, String>> {
    let configuration = share.beside("pjdfstest.toml");
    fs::write(&configuration, CONFIGURATION)?;
    let (other, place) = (share.beside("other"), share.guest("place"));
    fs::create_dir_all(&other)?;
    let mut command = Command::new(tool("pjdfstest")?);
    command
        .arg("-c")
        .arg(&configuration)
        .arg("-s")
        .arg(&other)
        .arg("-p");
    if users == Users::Ordinary {
        fs::create_dir_all(&place)?;
        for path in [&other, &place] {
            chown(path, Some(ORDINARY), Some(ORDINARY))?;
        }
        command.arg(place).uid(ORDINARY).gid(ORDINARY);
    } else {
        command.arg(share.guest(""));
    }
    let output = command
        .arg(pattern)
        .env("NO_COLOR", "1")
        .output()
        .context("pjdfstest")?;
    outcomes(&String::from_utf8_lossy(&output.stdout))
}

#[test]
fn strict_for_root() -> Result<()> {
    suite("strict", Users::Root)
}

#[test]
fn strict_by_an_ordinary_user() -> Result<()> {
    suite("strict", Users::OrdinaryServer)?;
    suite("strict", Users::Ordinary)
}

#[test]
fn relaxed_for_root() -> Result<()> {
    suite("relaxed", Users::Root)
}

#[test]
fn relaxed_by_an_ordinary_user() -> Result<()> {
    suite("relaxed", Users::OrdinaryServer)?;
    suite("relaxed", Users::Ordinary)
}

#[test]
fn off_for_root() -> Result<()> {
    suite("off", Users::Root)
}

#[test]
fn off_by_an_ordinary_user() -> Result<()> {
    suite("off", Users::OrdinaryServer)?;
    suite("off", Users::Ordinary)
}
