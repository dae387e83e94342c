//! What a server keeps for a guest that has seen a large tree: descriptors and memory.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::loads::List;
use super::peers::{Wish, contenders};
use super::session::{REQUESTS, Session};
use super::tree::many;
use super::wire::Request;
use crate::harness::cli::Options;
use crate::harness::compare::{Measure, median};
use crate::harness::device::Shape;
use crate::harness::load::{Until, measure};
use crate::harness::server::{Contender, Role, unpin};
use crate::harness::table::{Against, Goal, Line};

/// Name of the rows on the command line.
pub const NAME: &str = "census";
/// Their numbers.
pub const IDS: [&str; 2] = ["F22", "F23"];

const ENTRIES: usize = 1000;
/// Nodes that are asked for again after the walk.
const ASKED_AGAIN: usize = 2000;

/// What one server kept.
struct Kept {
    descriptors: f64,
    bytes: f64,
}

/// Walks a tree of `options.files` files through every server.
///
/// # Errors
///
/// When a server fails a request.
pub fn lines(options: &Options, folder: &Path) -> Result<Vec<Line>> {
    let share = folder.join("census");
    let directories = options.files.div_ceil(ENTRIES).max(1);
    many(&share, directories, ENTRIES)?;
    let wish = Wish {
        queues: 1,
        tuned: &["--inode-file-handles=never"],
    };
    let mut contenders = contenders(options, wish)?;
    let mut kept: Vec<Vec<Kept>> = contenders.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.rounds.min(3) {
        for (contender, kept) in contenders.iter().zip(&mut kept) {
            // One descriptor for each inode ends where the host's limit does.
            kept.push(
                walk(contender, folder, &share, directories).unwrap_or_else(|error| {
                    eprintln!("    {}: {error:#}", contender.label);
                    Kept {
                        descriptors: f64::NAN,
                        bytes: f64::NAN,
                    }
                }),
            );
        }
    }
    fs::remove_dir_all(&share)?;
    let figures = |of: &dyn Fn(&Kept) -> f64| -> Vec<f64> {
        let values = |kept: &Vec<Kept>| median(&kept.iter().map(of).collect::<Vec<f64>>());
        kept.iter().map(values).collect()
    };
    let mut descriptors = figures(&|kept| kept.descriptors);
    let mut bytes = figures(&|kept| kept.bytes);
    contenders.push(Contender {
        label: "limit".to_owned(),
        role: Role::Native,
        program: "none".into(),
        flags: Vec::new(),
    });
    descriptors.push(65_536.0);
    bytes.push(160.0);
    let goal = |id, what, unit| Goal {
        id,
        what,
        measure: Measure::Plain(unit),
        target: 1.0,
        against: Against::Native,
    };
    let open = goal(IDS[0], "descriptors after a walk of the large tree", "open");
    let memory = goal(IDS[1], "memory for each inode of the tree", "bytes");
    Ok(vec![
        Line::of(open, &contenders, &descriptors),
        Line::of(memory, &contenders, &bytes),
    ])
}

fn walk(contender: &Contender, folder: &Path, share: &Path, directories: usize) -> Result<Kept> {
    unpin()?;
    let server = contender.start(folder, share, false)?;
    let shape = Shape {
        queues: 1 + REQUESTS,
        size: 128,
        depth: 1,
        data_bytes: 8192,
        spin: false,
    };
    let mut session = Session::start(&server, shape)?;
    let before = server.resident()?;
    let mut found = Vec::new();
    for number in 0..directories {
        let node = session.find(&format!("d{number:04}"))?;
        found.push((node, session.open_directory(node)?));
    }
    let (list, nodes) = List::keeping(found);
    let mut loads: Vec<Box<dyn crate::harness::load::Load>> = vec![Box::new(list)];
    let device = &mut session.device;
    measure(
        device,
        REQUESTS,
        &server,
        &mut loads,
        Duration::ZERO,
        Until::Done,
    )?;
    drop(loads);
    let nodes: Vec<u64> = nodes.iter().collect();
    ensure!(
        nodes.len() == directories * ENTRIES,
        "{} nodes",
        nodes.len()
    );
    let kept = Kept {
        descriptors: server.descriptors()? as f64,
        bytes: server.resident()?.saturating_sub(before) as f64 / nodes.len() as f64,
    };
    // A node that the guest knows must answer, wherever its descriptor has gone.
    for node in nodes.iter().step_by((nodes.len() / ASKED_AGAIN).max(1)) {
        session.ask(&Request::getattr(*node))?;
    }
    Ok(kept)
}
