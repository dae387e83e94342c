//! What each cache mode promises while the host edits, renames and removes files.

use std::fs;
use std::io::Write;
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

/// What the host has under a name.
fn seen_by_host(share: &Share, name: &str) -> String {
    seen(&share.host(name))
}

/// Shows all names to the guest, so that it may remember them.
fn look(share: &Share) -> Vec<String> {
    ["edited", "grown", "renamed", "removed", "new"]
        .map(|name| seen(&share.guest(name)))
        .into()
}

/// Shows all names twice: a read makes the guest's kernel ask for the attributes once more.
fn look_twice(share: &Share) -> Result<()> {
    for _ in 0..2 {
        let seen = look(share);
        ensure!(seen == BEFORE, "{seen:?}");
    }
    Ok(())
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
        fs::metadata(share.guest("grown"))?.len() == 3,
        "the size was not remembered"
    );
    // What had a name keeps it for the guest, and is read from the host each time.
    let names = ["NEW", "longer than before", "old", "old"];
    ensure!(look(&share)[..4] == names, "{:?}", look(&share));
    sleep(SECOND);
    let names = ["NEW", "longer than before", "old", "old", "old"];
    ensure!(look(&share) == names, "{:?}", look(&share));
    share.finish()
}

#[test]
fn always_remembers_all_but_what_was_missing() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let flags = ["--cache", "always"];
    let share = share(&flags)?;
    look_twice(&share)?;
    change(&share)?;
    sleep(SECOND);
    share.bridge().reset_counts();
    let seen = ["old", "old", "old", "old", "old"];
    ensure!(look(&share) == seen, "{:?}", look(&share));
    // The one that had no name before was read, and nothing else.
    let asked = requests(&share, &["LOOKUP", "GETATTR", "READ"]);
    ensure!(asked <= 2, "{:?}", share.bridge().counts());
    ensure!(
        fs::metadata(share.guest("grown"))?.len() == 3,
        "the size was not remembered"
    );
    // What the guest does itself is there at once, also over what it remembers.
    fs::write(share.guest("edited"), "by the guest")?;
    ensure!(
        seen_by_host(&share, "edited") == "by the guest",
        "not on the host"
    );
    fs::rename(share.guest("grown"), share.guest("new"))?;
    fs::remove_file(share.guest("edited"))?;
    let longer = "longer than before";
    let seen = ["NotFound", "NotFound", "old", "old", longer];
    ensure!(look(&share) == seen, "{:?}", look(&share));
    ensure!(
        seen_by_host(&share, "new") == "longer than before",
        "another file was moved"
    );
    // A new mount has nothing to remember.
    let share = share.again(Setup {
        flags: &flags,
        ..Setup::default()
    })?;
    let seen = [
        "NotFound",
        "NotFound",
        "NotFound",
        "NotFound",
        "longer than before",
    ];
    ensure!(look(&share) == seen, "{:?}", look(&share));
    share.finish()
}

#[test]
fn exclusive_asks_nothing_twice() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = share(&["--exclusive"])?;
    fs::create_dir(share.host("dir"))?;
    sleep(TICK);
    let listed = || -> Result<usize> { Ok(fs::read_dir(share.guest("dir"))?.count()) };
    look_twice(&share)?;
    ensure!((listed()?, listed()?) == (0, 0), "something in the folder");
    change(&share)?;
    fs::write(share.host("dir/later"), "x")?;
    sleep(SECOND);
    share.bridge().reset_counts();
    // Nobody else changes the share, and whoever does so all the same is not noticed.
    let (seen_now, listed_now) = (look(&share), listed()?);
    let counts = share.bridge().counts();
    ensure!(
        seen_now == BEFORE && listed_now == 0 && counts.iter().all(|(_, count)| *count == 0),
        "{seen_now:?}, {listed_now} entries, {counts:?}"
    );
    fs::write(share.guest("edited"), "by the guest")?;
    fs::write(share.guest("dir/mine"), "by the guest")?;
    ensure!(
        seen(&share.guest("edited")) == "by the guest",
        "its own change"
    );
    ensure!(
        seen_by_host(&share, "edited") == "by the guest",
        "not on the host"
    );
    // A change of its own makes it look anew.
    ensure!(listed()? == 2, "{} entries", listed()?);
    share.finish()
}

#[test]
fn writeback_collects_writes_until_they_must_be_there() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    for more in [&[][..], &["--exclusive"], &["--cache", "always"]] {
        let share = share(&[&["--writeback"], more].concat())?;
        share.bridge().reset_counts();
        let mut file = fs::OpenOptions::new()
            .append(true)
            .open(share.guest("edited"))?;
        for number in 0..1000 {
            writeln!(file, "{number:015}")?;
        }
        let writes = requests(&share, &["WRITE"]);
        ensure!(writes == 0, "{more:?}: {writes} were not collected");
        ensure!(seen_by_host(&share, "edited") == "old", "{more:?}: early");
        ensure!(file.metadata()?.len() == 16_003, "{more:?}: its own view");
        file.sync_all()?;
        ensure!(
            seen_by_host(&share, "edited").len() == 16_003,
            "{more:?}: fsync"
        );
        let writes = requests(&share, &["WRITE"]);
        ensure!(writes <= 10, "{more:?}: {writes} for 1000");
        // Closing brings it to the host as well, times included. Within the tick of the fsync the
        // guest's kernel would see no new time, and send none.
        sleep(TICK);
        writeln!(file, "closed")?;
        let changed = file.metadata()?.modified()?;
        drop(file);
        ensure!(
            seen_by_host(&share, "edited").ends_with("closed\n"),
            "{more:?}: close"
        );
        ensure!(
            fs::metadata(share.host("edited"))?.modified()? == changed,
            "{more:?}: another time"
        );
        // The other side of it: a size that the guest knows is no longer the host's to change.
        ensure!(seen(&share.guest("grown")) == "old", "{more:?}");
        change(&share)?;
        sleep(SECOND);
        ensure!(
            fs::metadata(share.guest("grown"))?.len() == 3,
            "{more:?}: a size of the host's"
        );
        share.finish()?;
    }
    Ok(())
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
