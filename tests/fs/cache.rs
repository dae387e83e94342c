//! What each cache mode promises while the host edits, renames and removes files.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use msb_testkit::share::{Setup, Share};

use crate::bridge::skipped;

/// A little more than the second that names and attributes may be remembered in `auto`.
const SECOND: Duration = Duration::from_millis(1200);
/// After this, the host's clock has moved on and a version can be told from the next.
const TICK: Duration = Duration::from_millis(60);

fn share(flags: &[&str]) -> Result<Share> {
    let share = Share::new(Setup {
        flags,
        ..Setup::default()
    })?;
    for name in ["edited", "grown", "renamed", "removed"] {
        fs::write(share.host(name), "old")?;
    }
    sleep(TICK);
    Ok(share)
}

/// What the guest sees of a name by opening it anew.
fn seen(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| format!("{:?}", error.kind()))
}

/// Shows all names to the guest, so that it may remember them.
fn look(share: &Share) -> Vec<String> {
    ["edited", "grown", "renamed", "removed", "new"]
        .map(|name| seen(&share.guest(name)))
        .into()
}

/// What the host does behind the guest's back.
fn change(share: &Share) -> Result<()> {
    sleep(TICK);
    fs::write(share.host("edited"), "NEW")?;
    fs::write(share.host("grown"), "longer than before")?;
    fs::rename(share.host("renamed"), share.host("new"))?;
    fs::remove_file(share.host("removed"))?;
    Ok(())
}

const BEFORE: [&str; 5] = ["old", "old", "old", "old", "NotFound"];
const AFTER: [&str; 5] = ["NEW", "longer than before", "NotFound", "NotFound", "old"];

fn requests(share: &Share, names: &[&str]) -> u64 {
    let counts = share.bridge().counts();
    counts
        .iter()
        .filter(|(name, _)| names.contains(name))
        .map(|one| one.1)
        .sum()
}

#[test]
fn none_shows_everything_at_once() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = share(&["--cache", "none"])?;
    ensure!(look(&share) == BEFORE, "{:?}", look(&share));
    let open = fs::File::open(share.guest("edited"))?;
    let mut bytes = [0; 3];
    open.read_exact_at(&mut bytes, 0)?;
    change(&share)?;
    ensure!(look(&share) == AFTER, "{:?}", look(&share));
    open.read_exact_at(&mut bytes, 0)?;
    ensure!(&bytes == b"NEW", "an open file shows {bytes:?}");
    drop(open);
    share.finish()
}

#[test]
fn auto_shows_new_content_at_open_and_all_else_after_a_second() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    for flags in [&[][..], &["--cache", "auto"]] {
        let share = share(flags)?;
        ensure!(look(&share) == BEFORE, "{:?}", look(&share));
        // Nothing has changed: the pages stay.
        share.bridge().reset_counts();
        for _ in 0..20 {
            ensure!(seen(&share.guest("edited")) == "old", "nothing has changed");
        }
        ensure!(
            requests(&share, &["READ"]) == 0,
            "{:?}",
            share.bridge().counts()
        );
        change(&share)?;
        ensure!(seen(&share.guest("edited")) == "NEW", "not seen at open");
        sleep(SECOND);
        ensure!(look(&share) == AFTER, "{:?}", look(&share));
        share.finish()?;
    }
    Ok(())
}

#[test]
fn metadata_remembers_names_and_no_content() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = share(&["--cache", "metadata"])?;
    ensure!(look(&share) == BEFORE, "{:?}", look(&share));
    share.bridge().reset_counts();
    sleep(SECOND);
    for _ in 0..10 {
        ensure!(
            fs::metadata(share.guest("grown"))?.len() == 3,
            "another size"
        );
    }
    let asked = requests(&share, &["LOOKUP", "GETATTR"]);
    ensure!(asked == 0, "{:?}", share.bridge().counts());
    change(&share)?;
    ensure!(
        seen(&share.guest("edited")) == "NEW",
        "content was remembered"
    );
    share.finish()
}

#[test]
fn a_single_file_follows_an_atomic_save_and_open_handles_do_not() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = Share::new(Setup {
        file: Some("config"),
        ..Setup::default()
    })?;
    fs::write(share.host("config"), "first")?;
    ensure!(seen(&share.guest("config")) == "first", "not shown");
    ensure!(
        fs::read_dir(share.guest(""))?.count() == 1,
        "more than the one file"
    );
    let open = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(share.guest("config"))?;
    for round in 0..3 {
        fs::write(
            share.host("config.tmp"),
            format!("saved {round}, and longer"),
        )?;
        fs::rename(share.host("config.tmp"), share.host("config"))?;
        let now = seen(&share.guest("config"));
        ensure!(
            now == format!("saved {round}, and longer"),
            "round {round}: {now}"
        );
        ensure!(!share.guest("config.tmp").exists(), "a sibling shows");
    }
    let mut bytes = [0; 5];
    open.read_exact_at(&mut bytes, 0)?;
    ensure!(&bytes == b"first", "an open handle shows {bytes:?}");
    open.write_all_at(b"FIRST", 0)?;
    ensure!(
        fs::read_to_string(share.host("config"))? == "saved 2, and longer",
        "overwritten"
    );
    // In place, both ways.
    fs::write(share.host("config"), "in place")?;
    ensure!(
        seen(&share.guest("config")) == "in place",
        "an edit in place"
    );
    fs::write(share.guest("config"), "by the guest")?;
    ensure!(
        fs::read_to_string(share.host("config"))? == "by the guest",
        "the guest's edit"
    );
    fs::remove_file(share.host("config"))?;
    ensure!(
        seen(&share.guest("config")) == "NotFound",
        "a removed file shows"
    );
    drop(open);
    share.finish()
}
