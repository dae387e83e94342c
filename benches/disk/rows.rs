//! The rows of the block servers.

use std::time::Duration;

use anyhow::Result;

use super::image::{BYTES, Folders, HUGE, HUGE_PIECES, Image};
use super::loads::{Disk, Kind, Order, Pattern};
use super::native;
use super::peers::Wish;
use crate::harness::cli::Options;
use crate::harness::compare::Measure::{self, Cpu, Latency, Rate, Tail};
use crate::harness::device::{Device, Shape};
use crate::harness::load::{Load, Sample, Until, measure};
use crate::harness::server::{Contender, Role, unpin};
use crate::harness::table::{Against, Goal};

/// VIRTIO_BLK_F_SEG_MAX, FLUSH, MQ, CONFIG_WCE, DISCARD and WRITE_ZEROES.
const FEATURES: u64 = 1 << 2 | 1 << 9 | 1 << 12 | 1 << 11 | 1 << 13 | 1 << 14;
/// Offset of max_discard_seg in the configuration space.
const MAX_DISCARD_SEG: u32 = 40;

/// One row.
pub struct Row {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What is judged.
    pub goals: &'static [Goal],
    /// What it wants of the servers.
    pub wish: Wish,
    /// What is served.
    pub image: Image,
    pub(super) pattern: Pattern,
    depth: u16,
    /// The server may use every CPU, because what is measured is how its threads get along.
    spread: bool,
}

const fn goal(id: &'static str, what: &'static str, measure: Measure, target: f64) -> Goal {
    Goal {
        id,
        what,
        measure,
        target,
        against: Against::Best,
    }
}

const fn row(
    name: &'static str,
    goals: &'static [Goal],
    image: Image,
    depth: u16,
    pattern: Pattern,
) -> Row {
    Row {
        name,
        goals,
        wish: Wish {
            queues: 1,
            direct: false,
            native: false,
            itself: false,
        },
        image,
        pattern,
        depth,
        spread: false,
    }
}

const fn pattern(kind: Kind, order: Order, bytes: u32) -> Pattern {
    Pattern {
        kind,
        order,
        bytes,
        span: BYTES,
        apart: 0,
        flush_every: 0,
        mixed: false,
        segments: 1,
    }
}

const READ: Pattern = pattern(Kind::Read, Order::Random, 4096);
const WRITE: Pattern = pattern(Kind::Write, Order::Random, 4096);
const ALLOCATE: Pattern = pattern(Kind::Write, Order::OnceThrough, 64 << 10);
const SCATTER: Pattern = Pattern {
    // One write into each cluster, or the whole image would be written.
    apart: 64 << 10,
    ..pattern(Kind::Write, Order::OnceScattered, 4096)
};

/// All rows, in the order of the targets.
pub const ROWS: &[Row] = &[
    row(
        "randread",
        &[goal(
            "B1",
            "raw, random reads 4 KiB, 32 in flight",
            Cpu,
            2.8,
        )],
        Image::Raw,
        32,
        READ,
    ),
    Row {
        wish: Wish {
            queues: 2,
            direct: false,
            native: false,
            itself: false,
        },
        ..row(
            "randread-queues",
            &[goal(
                "B1",
                "the same in each of 2 queues, unpinned",
                Cpu,
                2.8,
            )],
            Image::Raw,
            32,
            READ,
        )
    },
    row(
        "randread-qd1",
        &[
            goal("B2", "raw, random reads 4 KiB, 1 in flight", Latency, 1.5),
            goal("B2", "raw, random reads 4 KiB, 1 in flight", Cpu, 2.0),
        ],
        Image::Raw,
        1,
        READ,
    ),
    row(
        "randwrite",
        &[goal(
            "B3",
            "raw, random writes 4 KiB, 32 in flight, file written by 1 MiB",
            Cpu,
            1.7,
        )],
        Image::Raw,
        32,
        WRITE,
    ),
    row(
        "randwrite-small",
        &[goal("B3", "the same, file written by 4 KiB", Cpu, 2.5)],
        Image::RawSmall,
        32,
        WRITE,
    ),
    row(
        "randread-tmpfs",
        &[goal(
            "B4",
            "raw on tmpfs, random reads 4 KiB, 32 in flight",
            Cpu,
            3.0,
        )],
        Image::RawMemory,
        32,
        READ,
    ),
    row(
        "randwrite-tmpfs",
        &[goal(
            "B4",
            "raw on tmpfs, random writes 4 KiB, 32 in flight",
            Cpu,
            3.0,
        )],
        Image::RawMemory,
        32,
        WRITE,
    ),
    row(
        "seqread",
        &[goal(
            "B5",
            "raw, sequential reads 128 KiB, 8 in flight",
            Cpu,
            1.2,
        )],
        Image::Raw,
        8,
        pattern(Kind::Read, Order::Sequential, 128 << 10),
    ),
    row(
        "seqwrite",
        &[goal(
            "B5",
            "raw, sequential writes 128 KiB, 8 in flight",
            Cpu,
            1.3,
        )],
        Image::Raw,
        8,
        pattern(Kind::Write, Order::Sequential, 128 << 10),
    ),
    Row {
        wish: Wish {
            queues: 1,
            direct: true,
            native: true,
            itself: false,
        },
        ..row(
            "direct",
            &[
                goal(
                    "B6",
                    "raw, O_DIRECT, random reads 4 KiB, 32 in flight",
                    Rate,
                    1.1,
                ),
                Goal {
                    against: Against::Native,
                    ..goal("B6", "the same, against fio on the file", Rate, 0.97)
                },
            ],
            Image::Raw,
            32,
            READ,
        )
    },
    row(
        "qcow2-randread",
        &[goal(
            "B7",
            "qcow2, random reads 4 KiB, 32 in flight",
            Cpu,
            2.5,
        )],
        Image::Qcow2,
        32,
        READ,
    ),
    row(
        "qcow2-randread-qd1",
        &[goal(
            "B7",
            "qcow2, random reads 4 KiB, 1 in flight",
            Latency,
            1.5,
        )],
        Image::Qcow2,
        1,
        READ,
    ),
    row(
        "qcow2-randwrite",
        &[goal(
            "B8",
            "qcow2, random overwrites 4 KiB, 32 in flight",
            Cpu,
            1.7,
        )],
        Image::Qcow2,
        32,
        WRITE,
    ),
    row(
        "qcow2-randwrite-tmpfs",
        &[goal("B8", "the same on tmpfs", Cpu, 2.5)],
        Image::Qcow2Memory,
        32,
        WRITE,
    ),
    row(
        "qcow2-allocate",
        &[
            goal(
                "B9",
                "qcow2, new clusters 64 KiB in sequence, 32 in flight",
                Cpu,
                1.3,
            ),
            goal(
                "B9",
                "qcow2, new clusters 64 KiB in sequence, 32 in flight",
                Rate,
                1.3,
            ),
        ],
        Image::Fresh,
        32,
        ALLOCATE,
    ),
    row(
        "qcow2-allocate-tmpfs",
        &[
            goal("B9", "the same on tmpfs", Cpu, 2.2),
            goal("B9", "the same on tmpfs", Rate, 2.2),
        ],
        Image::FreshMemory,
        32,
        ALLOCATE,
    ),
    row(
        "qcow2-scatter",
        &[goal(
            "B10",
            "qcow2, 4 KiB into new clusters anywhere, 32 in flight",
            Cpu,
            1.0,
        )],
        Image::Fresh,
        32,
        SCATTER,
    ),
    row(
        "qcow2-scatter-tmpfs",
        &[goal("B10", "the same on tmpfs", Cpu, 2.0)],
        Image::FreshMemory,
        32,
        SCATTER,
    ),
    Row {
        wish: Wish {
            queues: 1,
            direct: false,
            native: false,
            itself: true,
        },
        ..row(
            "qcow2-huge",
            &[
                Goal {
                    against: Against::Itself,
                    ..goal(
                        "B11",
                        "qcow2 of 1 TiB, random reads, against a small image",
                        Cpu,
                        0.87,
                    )
                },
                goal("B11", "the same, against the peer", Cpu, 2.5),
            ],
            Image::Huge,
            32,
            Pattern {
                span: HUGE,
                apart: HUGE / HUGE_PIECES,
                ..READ
            },
        )
    },
    Row {
        spread: true,
        ..row(
            "flush",
            &[
                goal(
                    "B14",
                    "raw, writes 4 KiB with a flush every 16 and reads between, 32 in flight, unpinned",
                    Rate,
                    1.0,
                ),
                goal("B14", "the same, reads", Tail, 2.0),
            ],
            Image::Raw,
            32,
            Pattern {
                flush_every: 16,
                mixed: true,
                ..WRITE
            },
        )
    },
    row(
        "vmdk-flat",
        &[goal(
            "B15",
            "vmdk monolithicFlat, random reads 4 KiB, 32 in flight",
            Cpu,
            2.5,
        )],
        Image::VmdkFlat,
        32,
        READ,
    ),
    row(
        "vmdk-sparse",
        &[goal(
            "B15",
            "vmdk monolithicSparse, random reads 4 KiB, 32 in flight",
            Cpu,
            2.5,
        )],
        Image::VmdkSparse,
        32,
        READ,
    ),
    row(
        "discard",
        &[
            goal(
                "B16",
                "raw, discards of 64 KiB pieces, 8 in flight",
                Rate,
                4.0,
            ),
            goal(
                "B16",
                "raw, discards of 64 KiB pieces, 8 in flight",
                Cpu,
                4.0,
            ),
        ],
        Image::RawAnew,
        8,
        Pattern {
            segments: 16,
            ..pattern(Kind::Discard, Order::OnceThrough, 64 << 10)
        },
    ),
];

impl Row {
    /// Whether the row was asked for.
    pub fn wanted(&self, options: &Options) -> bool {
        self.goals
            .iter()
            .any(|goal| options.wants(goal.id, self.name))
    }

    /// Runs it once with one contender.
    ///
    /// # Errors
    ///
    /// When the server cannot be started or fails a request.
    pub fn run(
        &self,
        contender: &Contender,
        options: &Options,
        folders: &Folders,
    ) -> Result<Sample> {
        let (image, mut pattern) = match contender.role {
            Role::Itself => (Image::Qcow2, READ),
            _ => (self.image, self.pattern),
        };
        let path = folders.image(image)?;
        let depth = options.depth.unwrap_or(self.depth);
        if contender.role == Role::Native {
            return native::random_reads(&path, depth, options.time());
        }
        let pinned = self.wish.queues == 1 && !self.spread && !options.unpinned;
        if !pinned {
            unpin()?;
        }
        let server = contender.start(&folders.disk, &path, pinned)?;
        let shape = Shape {
            queues: self.wish.queues,
            size: 128,
            depth,
            data_bytes: pattern.bytes,
            spin: options.spin,
        };
        let mut device = Device::connect(server.socket(), shape, FEATURES)?;
        if pattern.kind == Kind::Discard {
            // From the begin: qemu-storage-daemon ignores the offset.
            let config = device.config(0, MAX_DISCARD_SEG + 4)?;
            let most = config
                .last_chunk()
                .map_or(1, |most| u32::from_le_bytes(*most));
            pattern.segments = pattern.segments.min(most.max(1));
        }
        let lanes = usize::from(self.wish.queues);
        let mut loads: Vec<Box<dyn Load>> = (0..lanes)
            .map(|lane| Disk::in_queue(pattern, lane, lanes))
            .collect();
        let once = matches!(pattern.order, Order::OnceThrough | Order::OnceScattered);
        let (warm, until) = if once {
            (Duration::ZERO, Until::Done)
        } else {
            (Duration::from_millis(80), Until::Time(options.time()))
        };
        measure(&mut device, 0, &server, &mut loads, warm, until)
    }
}
