//! pjdfstest, a POSIX test suite that nobody here wrote, in all modes and as both kinds of user.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use msb_testkit::share::{ORDINARY, Setup, Share};

use crate::bridge::skipped;
use crate::tools::tool;

const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
stat_st_birthtime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.01
allow_remount = true
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// Tests that must fail, each with its reason: an exact name, or `*` and what all names end with.
type Exceptions<'a> = &'a [(&'a str, &'a str)];

/// What an ordinary user who serves in the mode off cannot do: no file has attributes but those
/// of the host, and all of them belong to this user.
const OFF_BY_AN_ORDINARY_USER: Exceptions<'_> = &[
    ("*::block", NO_SPECIAL_FILES),
    ("*::char", NO_SPECIAL_FILES),
    ("*::fifo", NO_SPECIAL_FILES),
    ("*::socket", NO_SPECIAL_FILES),
    ("mkfifo::changed_time_fields_success", NO_SPECIAL_FILES),
    ("mkfifo::permission_bits_from_mode", NO_SPECIAL_FILES),
    ("mkfifo::uid_gid_eq_euid_egid", NO_SPECIAL_FILES),
    ("mknod::changed_time_fields_success", NO_SPECIAL_FILES),
    ("mknod::permission_bits_from_mode", NO_SPECIAL_FILES),
    ("mknod::uid_gid_eq_euid_egid", NO_SPECIAL_FILES),
    ("open::fifo_nonblock_wronly", NO_SPECIAL_FILES),
    ("open::socket_error", NO_SPECIAL_FILES),
    ("chmod::change_perm::dir", NOT_LOCKED_OUT),
    ("chmod::change_perm::regular", NOT_LOCKED_OUT),
    ("mkdir::permission_bits_from_mode", NOT_LOCKED_OUT),
    ("open::permission_bits_from_mode", NOT_LOCKED_OUT),
    ("chmod::clear_isgid_bit", ONE_OWNER),
    ("link::share_metadata::regular", ONE_OWNER),
    ("mkdir::uid_gid_eq_euid_egid", ONE_OWNER),
    ("open::uid_gid_eq_euid_egid", ONE_OWNER),
];
const NO_SPECIAL_FILES: &str = "off makes special files for root alone";
const NOT_LOCKED_OUT: &str = "the server keeps its own access: 0600 and 0700 are the least";
const ONE_OWNER: &str = "an ordinary user cannot give files away";
const NO_DEVICES: &str = "the jail makes no devices on the host";

/// Tests that do not run, by how their names begin, and why.
const SKIPPED: [(&str, &str); 1] = [(
    "link::link_count_max",
    "FUSE does not tell how many links a file may have",
)];

/// Who serves and who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Users {
    /// The server belongs to root, and so does the program in the guest.
    Root,
    /// An ordinary user of the host serves root of the guest.
    OrdinaryServer,
    /// An ordinary user of the host serves an ordinary user of the guest, for whom the suite has
    /// fewer tests.
    Ordinary,
}

/// Runs the whole suite and compares what fails with what must.
fn suite(mode: &str, users: Users, exceptions: Exceptions<'_>) -> Result<()> {
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
    let mut wrong = Vec::new();
    let mut count = BTreeMap::new();
    for (name, outcome) in &seen {
        let excepted = exceptions.iter().any(|(pattern, _)| fits(pattern, name));
        let rootless = users == Users::Ordinary
            && ["requires root privileges", "CAP_SYS_ADMIN"]
                .iter()
                .any(|reason| outcome.contains(reason));
        let kind = match outcome.as_str() {
            "ok" if excepted => "passed, and is listed as an exception",
            "ok" => "ok",
            text if text.starts_with("skipped") => {
                let known = SKIPPED.iter().any(|(begin, _)| name.starts_with(begin));
                if known || rootless {
                    "skipped"
                } else {
                    "skipped without a reason of ours"
                }
            }
            _ if excepted => "excepted",
            _ => "failed",
        };
        *count.entry(kind).or_insert(0_u32) += 1;
        if !["ok", "skipped", "excepted"].contains(&kind) {
            wrong.push(format!("{name} {kind}: {outcome}"));
        }
    }
    for (pattern, _) in exceptions {
        if !seen.keys().any(|name| fits(pattern, name)) {
            wrong.push(format!("{pattern} is an exception for no test"));
        }
    }
    println!("{mode}, {users:?}: {count:?}");
    ensure!(wrong.is_empty(), "{mode}, {users:?}:\n{}", wrong.join("\n"));
    let expected = if users == Users::Ordinary { 150 } else { 390 };
    let ran = ["ok", "excepted"].map(|kind| count.get(kind).copied().unwrap_or(0));
    ensure!(ran.iter().sum::<u32>() >= expected, "{count:?}");
    Ok(())
}

fn fits(pattern: &str, name: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(end) => name.ends_with(end),
        None => name == pattern,
    }
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
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(text.contains("Summary"), "pjdfstest ended early:\n{text}");
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    let mut last = String::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [name, outcome @ ("ok" | "FAILED" | "skipped")] if !line.starts_with('\t') => {
                last = (*name).to_owned();
                seen.insert(last.clone(), (*outcome).to_owned());
            }
            // What the suite says about the test before, without the backtrace.
            [first, ..] if line.starts_with('\t') && !first.contains("::") => {
                if let Some(outcome) = seen.get_mut(&last) {
                    outcome.push_str(line);
                }
            }
            _ => {}
        }
    }
    Ok(seen)
}

#[test]
fn strict_for_root() -> Result<()> {
    suite("strict", Users::Root, &[])
}

#[test]
fn strict_by_an_ordinary_user() -> Result<()> {
    suite("strict", Users::OrdinaryServer, &[])?;
    suite("strict", Users::Ordinary, &[])
}

#[test]
fn relaxed_for_root() -> Result<()> {
    suite("relaxed", Users::Root, &[])
}

#[test]
fn relaxed_by_an_ordinary_user() -> Result<()> {
    suite("relaxed", Users::OrdinaryServer, &[])?;
    suite(
        "relaxed",
        Users::Ordinary,
        &[(
            "utimensat::follow_symlink",
            "a real link cannot hold an override, so that it belongs to the default owner",
        )],
    )
}

#[test]
fn off_for_root() -> Result<()> {
    suite(
        "off",
        Users::Root,
        &[
            ("*::block", NO_DEVICES),
            ("mknod::changed_times_success::char", NO_DEVICES),
            ("mknod::device_files::char", NO_DEVICES),
        ],
    )
}

#[test]
fn off_by_an_ordinary_user() -> Result<()> {
    suite("off", Users::OrdinaryServer, OFF_BY_AN_ORDINARY_USER)?;
    suite("off", Users::Ordinary, OFF_BY_AN_ORDINARY_USER)
}
