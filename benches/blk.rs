//! msb-blk against qemu-storage-daemon: `cargo bench -p msb-benches --bench blk -- randread`.

use std::path::Path;

use anyhow::Result;
use clap::Parser;
use msb_benches::disk::idle;
use msb_benches::disk::image::Folders;
use msb_benches::disk::peers::contenders;
use msb_benches::disk::rows::Row;
use msb_benches::disk::targets::ROWS;
use msb_benches::harness::cli::Options;
use msb_benches::harness::compare::in_turns;
use msb_benches::harness::machine::prepare_machine;
use msb_benches::harness::table::{Line, detail, markdown};

fn main() -> Result<()> {
    let options = Options::parse();
    let rows: Vec<&Row> = ROWS.iter().filter(|row| row.wanted(&options)).collect();
    let idle = options.wants(idle::ID, idle::NAME);
    if options.list {
        for row in &rows {
            let goal = row.goals[0];
            println!("{:<5} {:<22} {}", goal.id, row.name, goal.what);
        }
        if idle {
            println!(
                "{:<5} {:<22} memory and wake-ups of an idle disk",
                idle::ID,
                idle::NAME
            );
        }
        return Ok(());
    }
    if rows.is_empty() && !idle {
        return Ok(());
    }
    let _prepared = prepare_machine();
    let named = |folder: &Path| tempfile::Builder::new().prefix("bench.").tempdir_in(folder);
    let (disk, memory) = (named(&options.scratch())?, named(Path::new("/dev/shm"))?);
    let folders = Folders::new(disk.path(), memory.path());
    let (mut lines, mut notes) = (Vec::new(), Vec::new());
    for row in &rows {
        if let Some(reason) = row.wish.lacks() {
            let note = format!(
                "{} ({}) is NOT MEASURED: {reason}",
                row.goals[0].id, row.name
            );
            eprintln!("  {note}");
            notes.push(note);
            continue;
        }
        eprintln!("  {} {} ({})", row.goals[0].id, row.goals[0].what, row.name);
        let bare = row.bare(&folders)?;
        if let Some(cost) = bare {
            eprintln!("    the bare system call: {cost:.2} µs");
        }
        notes.extend(row.note(&options, &folders)?);
        let contenders = contenders(&options, row.wish, row.image, &folders.disk)?;
        let samples = in_turns(&contenders, options.rounds, |contender| {
            row.run(contender, &options, &folders)
        })?;
        for (contender, samples) in contenders.iter().zip(&samples) {
            eprintln!("{}", detail(contender, samples));
        }
        let judged = |goal| Line::new(goal, &contenders, &samples).beside("bare call", bare);
        lines.extend(row.goals.iter().copied().map(judged));
    }
    if idle {
        lines.extend(idle::lines(&options, &folders)?);
    }
    println!("{}", markdown("msb-blk and its peers", &lines));
    for note in notes {
        println!("{note}.");
    }
    Ok(())
}
