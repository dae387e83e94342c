//! Replays what fuzzing once broke, and a little more that it might.
//!
//! `MSB_REPLAY_ROUNDS` sets how many inputs are made up beside.

#![allow(clippy::unwrap_used, reason = "a test")]

mod fuzzing;

use std::fs;
use std::path::Path;

fn repeat(folder: &str, target: fn(&[u8])) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/regressions");
    for entry in fs::read_dir(root.join(folder)).unwrap() {
        target(&fs::read(entry.unwrap().path()).unwrap());
    }
    // Numbers that look random and are the same on every run.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let rounds = std::env::var("MSB_REPLAY_ROUNDS");
    let rounds = rounds.map_or(150, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        let data: Vec<u8> = (0..round % 300 * 5)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[3]
            })
            .collect();
        target(&data);
    }
}

#[test]
fn hostile_bytes_do_no_harm() {
    repeat("wire", fuzzing::wire);
}

#[test]
fn operations_do_what_the_model_does() {
    repeat("sequence", fuzzing::sequence);
}
