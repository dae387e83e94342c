//! msb-fs against virtiofsd: `cargo bench -p msb-benches --bench fs -- getattr`.

use anyhow::Result;
use clap::Parser;
use msb_benches::harness::cli::Options;
use msb_benches::harness::compare::{in_turns, median};
use msb_benches::harness::machine::prepare_machine;
use msb_benches::harness::table::{Line, detail, markdown};
use msb_benches::share::census;
use msb_benches::share::peers::contenders;
use msb_benches::share::rows::{ROWS, Row};
use msb_benches::share::tree::{share, small_share};

fn main() -> Result<()> {
    let options = Options::parse();
    let rows: Vec<&Row> = ROWS
        .iter()
        .filter(|row| options.wants(row.goal.id, row.name))
        .collect();
    let census = census::IDS.iter().any(|id| options.wants(id, census::NAME));
    if options.list {
        for row in &rows {
            println!("{:<5} {:<20} {}", row.goal.id, row.name, row.goal.what);
        }
        if census {
            println!(
                "{:<5} {:<20} what is kept after a walk",
                "F22",
                census::NAME
            );
        }
        return Ok(());
    }
    if rows.is_empty() && !census {
        return Ok(());
    }
    let _prepared = prepare_machine();
    let scratch = tempfile::Builder::new()
        .prefix("bench.")
        .tempdir_in(options.scratch())?;
    let folder = scratch.path();
    let share = share(folder)?;
    let memory = tempfile::Builder::new()
        .prefix("bench.")
        .tempdir_in("/dev/shm")?;
    let in_memory = small_share(memory.path())?;
    let mut lines = Vec::new();
    for row in &rows {
        eprintln!("  {} {} ({})", row.goal.id, row.goal.what, row.name);
        let share = if row.in_memory { &in_memory } else { &share };
        let contenders = contenders(&options, row.wish)?;
        let mut costs = Vec::new();
        let samples = in_turns(&contenders, options.rounds, |contender| {
            // In each round, as the state of caches and file systems changes.
            if let Some(bare) = row.bare.filter(|_| contender.label == contenders[0].label) {
                costs.push(bare.cost(share)?);
            }
            row.run(contender, &options, folder, share)
        })?;
        let bare = row.bare.map(|_| median(&costs));
        if let Some(cost) = bare {
            eprintln!("    the bare system calls: {cost:.2} µs");
        }
        for (contender, samples) in contenders.iter().zip(&samples) {
            eprintln!("{}", detail(contender, samples));
        }
        lines.push(Line::new(row.goal, &contenders, &samples).beside("bare calls", bare));
    }
    if census {
        eprintln!(
            "  F22 F23 a walk of {} files ({})",
            options.files,
            census::NAME
        );
        lines.extend(census::lines(&options, folder)?);
    }
    println!(
        "{}",
        markdown("msb-fs and virtiofsd, queues driven directly", &lines)
    );
    Ok(())
}
