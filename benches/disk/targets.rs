//! The rows of the block servers and their targets.

use super::image::{BYTES, HUGE, HUGE_PIECES, Image};
use super::loads::{Kind, Order, Pattern};
use super::peers::{Peer, SPDK_BYTES, Wish};
use super::rows::Row;
use crate::harness::compare::Measure::{Cpu, Latency, Rate, Tail};
use crate::harness::table::{Against, Goal, goal};

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
        wish: Wish::PLAIN,
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

pub(super) const READ: Pattern = pattern(Kind::Read, Order::Random, 4096);
const WRITE: Pattern = pattern(Kind::Write, Order::Random, 4096);
const ALLOCATE: Pattern = pattern(Kind::Write, Order::OnceThrough, 64 << 10);
const SCATTER: Pattern = Pattern {
    // One write into each cluster, or the whole image would be written.
    apart: 64 << 10,
    ..pattern(Kind::Write, Order::OnceScattered, 4096)
};

const CLOUD: Wish = Wish {
    direct: true,
    peer: Peer::CloudHypervisor,
    ..Wish::PLAIN
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
            ..Wish::PLAIN
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
            direct: true,
            native: true,
            ..Wish::PLAIN
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
    Row {
        wish: CLOUD,
        spread: true,
        ..row(
            "direct-slow",
            &[goal(
                "B12",
                "raw, O_DIRECT, random reads 4 KiB, 32 in flight, a disk that takes 1 ms",
                Rate,
                8.0,
            )],
            Image::Slow,
            32,
            READ,
        )
    },
    Row {
        wish: Wish {
            native: true,
            ..CLOUD
        },
        ..row(
            "direct-cloud",
            &[goal("B12", "the same on this machine's disk", Rate, 8.0)],
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
    Row {
        wish: Wish {
            peer: Peer::Spdk,
            ..Wish::PLAIN
        },
        ..row(
            "memory-spdk",
            &[goal(
                "B17",
                "raw on tmpfs, random reads 4 KiB, 32 in flight, against a disk in SPDK's memory",
                Rate,
                0.33,
            )],
            Image::RawMemory,
            32,
            Pattern {
                span: SPDK_BYTES,
                ..READ
            },
        )
    },
    Row {
        wish: Wish {
            peer: Peer::Imago,
            ..Wish::PLAIN
        },
        ..row(
            "qcow2-imago",
            &[Goal {
                against: Against::Native,
                ..goal(
                    "B13",
                    "qcow2, random reads 4 KiB, 32 in flight, against imago without a device",
                    Cpu,
                    0.8,
                )
            }],
            Image::Qcow2,
            32,
            READ,
        )
    },
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
            itself: true,
            ..Wish::PLAIN
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
