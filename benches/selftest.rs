//! The harness itself: what it asks is done, and what it counts is what was done.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use msb_benches::disk::loads::{Disk, Kind, Order, Pattern};
use msb_benches::harness::cli::Options;
use msb_benches::harness::device::{Device, Shape};
use msb_benches::harness::load::{Load, Until, measure};
use msb_benches::harness::server::{Contender, Role};
use msb_benches::share::bare::Bare;
use msb_benches::share::rows::ROWS;
use msb_benches::share::tree::{DIRECTORIES, ENTRIES, names};
use msb_testkit::msb::bin_dir;
use tempfile::tempdir;

fn ours(program: &str, flags: &[&str]) -> Contender {
    Contender {
        label: program.to_owned(),
        role: Role::Judged,
        program: bin_dir().join(program),
        flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
    }
}

#[test]
fn rows_of_the_file_server_count_what_the_share_holds() -> Result<()> {
    let folder = tempdir()?;
    let share = names(folder.path(), DIRECTORIES)?;
    let server = ours(
        "msb-fs",
        &[
            "--socket-path={socket}",
            "--shared-dir={subject}",
            "--log-level=error",
        ],
    );
    let options = Options::parse_from(["bench", "--unpinned", "--seconds", "0.05"]);
    for name in ["getattr", "lookup", "readdirplus-cold", "create-qd8"] {
        let row = ROWS.iter().find(|row| row.name == name).context(name)?;
        let sample = row.run(&server, &options, folder.path(), &share)?;
        ensure!(sample.units > 0, "{name} did nothing");
        ensure!(!sample.cpu.is_zero(), "{name} took no CPU of the server");
        if name == "readdirplus-cold" {
            // Each directory lists itself and its parent as well.
            let entries = DIRECTORIES * (ENTRIES + 2);
            ensure!(sample.units == entries as u64, "{} entries", sample.units);
        }
    }
    for row in ROWS.iter() {
        let Some(bare) = row.bare.filter(|bare| !matches!(bare, Bare::Access { .. })) else {
            continue;
        };
        let cost = bare.cost(&share)?;
        ensure!(cost > 0.0 && cost < 1e4, "{}: {cost} µs", row.name);
    }
    // A run that was cut leaves at most what was in flight.
    let left = fs::read_dir(&share)?.count();
    ensure!(left <= 2 + 8, "{left} names are left in the share");
    Ok(())
}

#[test]
fn a_disk_is_written_where_the_pattern_says_and_read_in_two_queues() -> Result<()> {
    const BYTES: u64 = 1 << 20;
    let folder = tempdir()?;
    let image = folder.path().join("disk.raw");
    fs::write(&image, vec![0; usize::try_from(BYTES)?])?;
    let pattern = Pattern {
        kind: Kind::Write,
        order: Order::OnceScattered,
        bytes: 4096,
        span: BYTES,
        apart: 0,
        flush_every: 16,
        mixed: false,
        segments: 1,
    };
    ensure!(run(folder.path(), &image, pattern)? == BYTES / 4096);
    let content = fs::read(&image)?;
    for (place, piece) in content.chunks(4096).enumerate() {
        let stamp = u64::from_le_bytes(*piece.first_chunk().context("a short piece")?);
        ensure!(
            stamp == (place as u64 * 4096) | 1,
            "piece {place} holds {stamp}"
        );
    }
    let reads = Pattern {
        kind: Kind::Read,
        flush_every: 0,
        ..pattern
    };
    ensure!(run(folder.path(), &image, reads)? == BYTES / 4096);
    Ok(())
}

/// How many requests a pattern took, in two queues.
fn run(folder: &Path, image: &Path, pattern: Pattern) -> Result<u64> {
    let server = ours(
        "msb-blk",
        &[
            "--socket-path={socket}",
            "--blk-file={subject}",
            "--num-queues=2",
            "--log-level=error",
        ],
    );
    let server = server.start(folder, image, false)?;
    let shape = Shape {
        queues: 2,
        size: 64,
        depth: 8,
        data_bytes: pattern.bytes,
        spin: false,
    };
    let mut device = Device::connect(server.socket(), shape, 1 << 9 | 1 << 12)?;
    let mut loads: Vec<Box<dyn Load>> = (0..2)
        .map(|lane| Disk::in_queue(pattern, lane, 2))
        .collect();
    let sample = measure(
        &mut device,
        0,
        &server,
        &mut loads,
        Duration::ZERO,
        Until::Done,
    )?;
    ensure!(sample.requests >= sample.units, "fewer requests than units");
    Ok(sample.units)
}
