//! What users of `msb` wait for, each beside what nobody can do without.

use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use msb_benches::harness::cli::Options;
use msb_benches::harness::compare::median;
use msb_testkit::msb::Msb;

/// A home with this many volumes is listed.
const VOLUMES: usize = 200;

/// Number, name, and what it is compared with.
const ROWS: [(&str, &str, &str); 4] = [
    ("M1", "create to ready", "its guest alone, as `ps` tells"),
    ("M2", "exec round trip", "`msb --version`"),
    ("M3", "volume create, 20 GiB", "mkfs.ext4 of a sparse file"),
    ("M4", "volume ls, 200 volumes", "ls -l of their folder"),
];

fn main() -> Result<()> {
    let options = Options::parse();
    let rows = ROWS.iter().filter(|(id, name, _)| options.wants(id, name));
    if options.list {
        rows.for_each(|(id, name, floor)| println!("{id:<5} {name:<24} {floor}"));
        return Ok(());
    }
    let mut seen: Vec<_> = rows.map(|row| (row, Vec::new(), Vec::new())).collect();
    if seen.is_empty() {
        return Ok(());
    }
    let msb = Msb::new()?;
    must(&msb, "create demo --name box")?;
    for number in 0..VOLUMES {
        must(&msb, &format!("volume create v{number}"))?;
    }
    for _ in 0..options.rounds {
        for ((id, ..), ours, floors) in &mut seen {
            let (own, floor) = measure(&msb, id)?;
            ours.push(own);
            floors.push(floor);
        }
    }
    let disk = disk(&msb)?;
    must(&msb, "rm -f box")?;
    println!("| row | what | msb, ms | beside | ms | ratio |\n|---|---|--:|---|--:|--:|");
    for ((id, name, beside), ours, floors) in seen {
        let (own, floor) = (median(&ours), median(&floors));
        println!(
            "| {id} | {name} | {own:.1} | {beside} | {floor:.1} | {:.2} |",
            own / floor
        );
    }
    println!("\nA disk volume of 20 GiB takes {disk} KiB of the host's disk when it is new.");
    Ok(())
}

/// Milliseconds of ours, and of what is beside it.
fn measure(msb: &Msb, id: &str) -> Result<(f64, f64)> {
    Ok(match id {
        "M1" => {
            let own = must(msb, "create demo --name new")?;
            let shown = msb.msb(["ps", "--filter", "name=new"])?.out;
            let row = shown.lines().nth(1).context("it is not listed")?;
            let boot = row.split_whitespace().rev().nth(1).context("no time")?;
            must(msb, "rm -f new")?;
            (own, boot.parse()?)
        }
        "M2" => (must(msb, "exec box -- true")?, must(msb, "--version")?),
        "M3" => {
            let own = must(msb, "volume create disk --kind disk --size 20G")?;
            must(msb, "volume rm disk")?;
            let file = msb.path("floor.raw");
            std::fs::File::create(&file)?.set_len(20 << 30)?;
            (own, timed(Command::new("mkfs.ext4").arg("-qF").arg(file))?)
        }
        _ => {
            let folder = msb.home().join("volumes");
            let floor = timed(Command::new("ls").arg("-l").arg(folder))?;
            (must(msb, "volume ls")?, floor)
        }
    })
}

/// KiB that a new disk volume of 20 GiB takes.
fn disk(msb: &Msb) -> Result<u64> {
    must(msb, "volume create disk --kind disk --size 20G")?;
    let made = std::fs::metadata(msb.home().join("volumes/disk/disk.raw"))?;
    ensure!(made.len() == 20 << 30, "{} bytes", made.len());
    Ok(made.blocks() / 2)
}

/// Runs `msb LINE`; how many milliseconds it took.
fn must(msb: &Msb, line: &str) -> Result<f64> {
    timed(&mut msb.unlimited(line.split(' '))).with_context(|| format!("msb {line}"))
}

fn timed(command: &mut Command) -> Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let since = Instant::now();
    let status = command.stderr(Stdio::null()).status()?;
    ensure!(status.success(), "{status}");
    Ok(since.elapsed().as_secs_f64() * 1000.0)
}
