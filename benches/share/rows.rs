//! The rows that drive a file server's queues directly.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use rustix::fs::{Advice, fadvise};

use super::bare::Bare;
use super::loads::{List, MakeAndRemove, Replay};
use super::peers::Wish;
use super::session::{REQUESTS, Session};
use super::tree::{DATA_BYTES, DIRECTORIES, SMALL_FILES, small};
use super::wire::{Request, libc_flags};
use crate::harness::cli::Options;
use crate::harness::compare::Measure::{Cpu, Latency, Rate};
use crate::harness::device::Shape;
use crate::harness::load::{Load, Sample, Until, measure};
use crate::harness::server::{Contender, Role, unpin};
use crate::harness::table::{Against, Goal, goal};

type Loads = Vec<Box<dyn Load>>;

/// One row.
pub struct Row {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What is judged.
    pub goal: Goal,
    /// What it wants of the servers.
    pub wish: Wish,
    /// The system calls whose bare cost belongs beside the result.
    pub bare: Option<Bare>,
    /// The share lies on tmpfs, where writing costs a copy and nothing else.
    pub in_memory: bool,
    depth: u16,
    data: u32,
    extent: Extent,
    prepare: fn(&mut Session, &Plan) -> Result<Loads>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// For a while, warmed up.
    Timed,
    /// Once over everything, with a server that has seen nothing.
    Once,
    /// For a while, with the host's cache of the data emptied before.
    ColdHost,
}

/// What a run knows when it prepares its loads.
struct Plan {
    queues: usize,
    scattered: bool,
}

const NEVER: &[&str] = &["--inode-file-handles=never"];
const POOL: &[&str] = &["--inode-file-handles=never", "--thread-pool-size=4"];

const fn access(file: &'static str, len: usize, write: bool) -> Option<Bare> {
    Some(Bare::Access { file, len, write })
}

const fn row(
    name: &'static str,
    goal: Goal,
    depth: u16,
    prepare: fn(&mut Session, &Plan) -> Result<Loads>,
) -> Row {
    Row {
        name,
        goal,
        wish: Wish {
            queues: 1,
            tuned: NEVER,
        },
        bare: None,
        in_memory: false,
        depth,
        data: 4096,
        extent: Extent::Timed,
        prepare,
    }
}

/// All rows, in the order of the targets.
pub const ROWS: &[Row] = &[
    Row {
        bare: Some(Bare::Stat),
        ..row(
            "getattr",
            goal("F1", "GETATTR, 32 in flight", Cpu, 5.0),
            32,
            getattr,
        )
    },
    Row {
        bare: Some(Bare::Find),
        ..row(
            "lookup",
            goal("F1", "LOOKUP of known names, 32 in flight", Cpu, 5.0),
            32,
            lookup,
        )
    },
    row(
        "getattr-qd1",
        goal("F2", "GETATTR, 1 in flight", Latency, 1.15),
        1,
        getattr,
    ),
    Row {
        bare: access("data", 4096, false),
        ..row(
            "read4k",
            goal("F3", "READ 4 KiB, 32 in flight", Cpu, 2.5),
            32,
            read4k,
        )
    },
    Row {
        in_memory: true,
        bare: access("written", 4096, true),
        ..row(
            "write4k",
            goal("F3", "WRITE 4 KiB on tmpfs, 32 in flight", Cpu, 2.5),
            32,
            write4k,
        )
    },
    Row {
        bare: access("written", 4096, true),
        ..row(
            "write4k-disk",
            goal("F3", "WRITE 4 KiB on the disk, 32 in flight", Cpu, 2.5),
            32,
            write4k,
        )
    },
    Row {
        wish: Wish {
            queues: 2,
            tuned: POOL,
        },
        bare: access("data", 4096, false),
        ..row(
            "read4k-queues",
            Goal {
                against: Against::Default,
                ..goal(
                    "F4",
                    "READ 4 KiB, 64 in flight, our 2 queues, unpinned",
                    Rate,
                    3.0,
                )
            },
            32,
            read4k,
        )
    },
    Row {
        extent: Extent::Once,
        bare: Some(Bare::List { first: true }),
        ..row(
            "readdirplus-cold",
            goal("F5", "READDIRPLUS, each entry, first time", Cpu, 5.0),
            1,
            list,
        )
    },
    Row {
        bare: Some(Bare::List { first: false }),
        ..row(
            "readdirplus",
            goal("F5", "READDIRPLUS, each entry, again", Cpu, 5.0),
            1,
            list_again,
        )
    },
    Row {
        bare: Some(Bare::Make),
        ..row(
            "create",
            goal(
                "F6",
                "CREATE + RELEASE + UNLINK + FORGET, 1 in flight",
                Cpu,
                2.5,
            ),
            1,
            create,
        )
    },
    Row {
        bare: Some(Bare::Make),
        ..row(
            "create-qd8",
            goal(
                "F6",
                "CREATE + RELEASE + UNLINK + FORGET, 8 in flight",
                Cpu,
                2.5,
            ),
            8,
            create,
        )
    },
    Row {
        in_memory: true,
        bare: Some(Bare::Make),
        ..row(
            "create-memory",
            goal("F6", "the same on tmpfs, 1 in flight", Cpu, 2.5),
            1,
            create,
        )
    },
    Row {
        in_memory: true,
        bare: Some(Bare::Make),
        ..row(
            "create-memory-qd8",
            goal("F6", "the same on tmpfs, 8 in flight", Cpu, 2.5),
            8,
            create,
        )
    },
    Row {
        data: 128 << 10,
        bare: access("data", 128 << 10, false),
        ..row(
            "seqread",
            goal("F18", "sequential READ 128 KiB, 8 in flight", Cpu, 1.2),
            8,
            seqread,
        )
    },
    Row {
        wish: Wish {
            queues: 2,
            tuned: POOL,
        },
        data: 128 << 10,
        bare: access("data", 128 << 10, false),
        ..row(
            "seqread-queues",
            Goal {
                against: Against::Default,
                ..goal(
                    "F18",
                    "READ 128 KiB, 16 in flight, our 2 queues, unpinned",
                    Rate,
                    1.6,
                )
            },
            8,
            seqread,
        )
    },
    Row {
        data: 128 << 10,
        bare: access("written", 128 << 10, true),
        ..row(
            "seqwrite",
            goal("F19", "sequential WRITE 128 KiB, 8 in flight", Cpu, 1.15),
            8,
            seqwrite,
        )
    },
    Row {
        wish: Wish {
            queues: 1,
            tuned: POOL,
        },
        extent: Extent::ColdHost,
        ..row(
            "coldread",
            Goal {
                against: Against::Default,
                ..goal(
                    "F21",
                    "READ 4 KiB, 32 in flight, host cache cold",
                    Rate,
                    3.0,
                )
            },
            32,
            read4k,
        )
    },
];

impl Row {
    /// Runs it once with one contender.
    ///
    /// # Errors
    ///
    /// When the server cannot be started or fails a request.
    pub fn run(
        &self,
        contender: &Contender,
        options: &Options,
        folder: &Path,
        share: &Path,
    ) -> Result<Sample> {
        remove_made(share)?;
        if self.extent == Extent::ColdHost {
            let data = File::open(share.join("data"))?;
            fadvise(&data, 0, None, Advice::DontNeed)?;
        }
        let single = self.wish.queues == 1;
        let pinned = single && !options.unpinned && self.extent != Extent::ColdHost;
        if !pinned {
            unpin()?;
        }
        let server = contender.start(folder, share, pinned)?;
        let ours = matches!(contender.role, Role::Judged | Role::Ours);
        let queues = if ours { self.wish.queues } else { 1 };
        // As many requests in flight altogether, however many queues there are.
        let depth = options.depth.unwrap_or(self.depth) * (self.wish.queues / queues);
        let shape = Shape {
            queues: queues + REQUESTS,
            size: 256,
            depth,
            data_bytes: self.data.max(8192),
            spin: options.spin,
        };
        let mut session = Session::start(&server, shape)?;
        let plan = Plan {
            queues: usize::from(queues),
            scattered: options.scattered,
        };
        let mut loads = (self.prepare)(&mut session, &plan)?;
        let (warm, until) = match self.extent {
            Extent::Timed => (Duration::from_millis(80), Until::Time(options.time())),
            Extent::Once => (Duration::ZERO, Until::Done),
            Extent::ColdHost => (Duration::ZERO, Until::Time(options.time())),
        };
        measure(
            &mut session.device,
            REQUESTS,
            &server,
            &mut loads,
            warm,
            until,
        )
    }
}

/// What a run that was cut short may have left.
fn remove_made(share: &Path) -> Result<()> {
    for entry in std::fs::read_dir(share)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("made-") {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn replay(plan: &Plan, requests: impl Fn(usize) -> Vec<Request>) -> Loads {
    (0..plan.queues)
        .map(|queue| Replay::of(requests(queue), plan.scattered))
        .collect()
}

fn getattr(session: &mut Session, plan: &Plan) -> Result<Loads> {
    let nodes: Result<Vec<u64>> = (0..SMALL_FILES)
        .map(|number| session.find(&small(number)))
        .collect();
    let nodes = nodes?;
    Ok(replay(plan, |_| {
        nodes.iter().copied().map(Request::getattr).collect()
    }))
}

fn lookup(session: &mut Session, plan: &Plan) -> Result<Loads> {
    let parent = session.find("files")?;
    let one = |number| Request::lookup(parent, &small(number)["files/".len()..]);
    Ok(replay(plan, |_| (0..SMALL_FILES).map(one).collect()))
}

fn read4k(session: &mut Session, plan: &Plan) -> Result<Loads> {
    let (node, handle) = open(session, "data", libc_flags::O_RDONLY)?;
    Ok(replay(plan, |queue| {
        let at = |place| Request::read(node, handle, place, 4096);
        random(queue, 4096).map(at).collect()
    }))
}

fn write4k(session: &mut Session, plan: &Plan) -> Result<Loads> {
    let (node, handle) = open(session, "written", libc_flags::O_RDWR)?;
    Ok(replay(plan, |queue| {
        let at = |place| Request::write(node, handle, place, 4096);
        random(queue, 4096).map(at).collect()
    }))
}

fn seqread(session: &mut Session, plan: &Plan) -> Result<Loads> {
    let (node, handle) = open(session, "data", libc_flags::O_RDONLY)?;
    Ok(replay(plan, |_| {
        let at = |place| Request::read(node, handle, place, 128 << 10);
        (0..DATA_BYTES).step_by(128 << 10).map(at).collect()
    }))
}

fn seqwrite(session: &mut Session, plan: &Plan) -> Result<Loads> {
    let (node, handle) = open(session, "written", libc_flags::O_RDWR)?;
    Ok(replay(plan, |_| {
        let at = |place| Request::write(node, handle, place, 128 << 10);
        (0..DATA_BYTES).step_by(128 << 10).map(at).collect()
    }))
}

fn list(session: &mut Session, _: &Plan) -> Result<Loads> {
    Ok(vec![Box::new(List::new(directories(session)?, true))])
}

fn list_again(session: &mut Session, _: &Plan) -> Result<Loads> {
    Ok(vec![Box::new(List::new(directories(session)?, false))])
}

fn create(_: &mut Session, plan: &Plan) -> Result<Loads> {
    Ok((0..plan.queues).map(MakeAndRemove::in_queue).collect())
}

fn directories(session: &mut Session) -> Result<Vec<(u64, u64)>> {
    (0..DIRECTORIES)
        .map(|number| {
            let node = session.find(&format!("many/d{number:04}"))?;
            Ok((node, session.open_directory(node)?))
        })
        .collect()
}

fn open(session: &mut Session, path: &str, flags: u32) -> Result<(u64, u64)> {
    let node = session.find(path)?;
    Ok((node, session.open(node, flags)?))
}

/// Places in the data, different for each queue but the same in every run.
fn random(queue: usize, len: u64) -> impl Iterator<Item = u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ (queue as u64 + 1).rotate_left(17);
    (0..16_384).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % (DATA_BYTES / len) * len
    })
}
