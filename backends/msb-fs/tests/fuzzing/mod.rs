//! A session that is fed hostile bytes, and one that is compared with a model of a file system.
//!
//! Both targets panic when a promise is broken, and check in the end that nothing beside the share
//! was touched. Fuzzing runs them with inputs of its own, `replay` with those that once failed.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test")]
#![allow(
    unreachable_pub,
    missing_docs,
    reason = "the root of a crate when fuzzed"
)]

mod guest;
mod model;
mod sequence;

use guest::{Guest, Kind};
pub use sequence::sequence;

const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;

/// `data` as requests: opcode, node, room for the answer, length of the body, body.
pub fn wire(data: &[u8]) {
    let Some((how, mut rest)) = data.split_first() else {
        return;
    };
    let mut guest = Guest::new(Kind::of(*how));
    let before = guest.contents();
    guest.begin(u32::from(*how) << 12 | 0xfff);
    while let Some(([code, node, room, len], tail)) = rest.split_first_chunk() {
        let (body, tail) = tail.split_at(usize::from(*len).min(tail.len()));
        rest = tail;
        let opcode = match u32::from(*code) {
            code @ 0..=99 => code,
            100..=249 => u32::from(*code) % 53,
            code => u32::MAX - code,
        };
        let node = match node {
            0..=99 => u64::from(*node),
            100..=249 => u64::from(*node % 8),
            _ => u64::MAX - u64::from(*node),
        };
        let mut body = body.to_vec();
        if opcode == FALLOCATE {
            // Not more space than a test may take.
            body.resize(32, 0);
            body[11..16].fill(0);
            body[19..24].fill(0);
        }
        let room = usize::from(*room) * 17;
        let answer = guest.ask(opcode, node, &body, room);
        // A reply can be missing only where there is no room for one, or none is due.
        let silent = matches!(opcode, FORGET | INTERRUPT | BATCH_FORGET);
        assert!(answer.is_some() || silent || room < 16, "opcode {opcode}");
    }
    guest.check_surroundings();
    if Kind::of(*how) == Kind::ReadOnly {
        assert_eq!(guest.contents(), before, "a read-only share changed");
    }
}
