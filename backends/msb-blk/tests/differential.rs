//! The same random operations done by msb-blk and by qemu-io give the same disk, whoever opens it.
//!
//! Two copies of an image get one list of operations, in turns: what msb-blk has written, qemu-io goes
//! on with, and the other way round. After each turn four readings must agree: each program's of
//! each copy. `MSB_DIFF_SEEDS` sets how many lists each kind of image gets.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use msb_blk::file::Emptying;
use msb_blk::image::Image;
use msb_vhost::Segments;
use support::variants::{Variant, WRITABLE};
use support::*;

const BASE: usize = 3 << 20;
const TURNS: u64 = 4;

#[derive(Debug, Clone, Copy)]
enum Operation {
    Write(u8),
    Zero,
    Unmap,
    Discard,
    Read,
    Flush,
}

/// An operation and its range in bytes.
type Step = (Operation, u64, u64);

fn steps(random: &mut Random, size: u64, count: usize) -> Vec<Step> {
    let sectors = size / 512;
    let mut steps = Vec::with_capacity(count);
    for _ in 0..count {
        // Small and large, often aligned to clusters of some size, sometimes beyond the end.
        let most = [8, 60, 400, 3000][random.below(4) as usize];
        let unit = [1, 1, 8, 128][random.below(4) as usize];
        let first = random.below(sectors) / unit * unit;
        let mut len = 1 + random.below(most);
        if unit > 1 {
            len = len.next_multiple_of(unit);
        }
        if random.below(30) > 0 {
            len = len.min(sectors - first);
        }
        let operation = match random.below(14) {
            0 => Operation::Flush,
            1 => Operation::Zero,
            2 => Operation::Unmap,
            3 | 4 => Operation::Discard,
            5 => Operation::Read,
            _ => Operation::Write(1 + random.below(255) as u8),
        };
        steps.push((operation, first * 512, len * 512));
    }
    steps
}

/// What became of each step: whether it succeeded.
fn ours(path: &Path, steps: &[Step], close: bool) -> Vec<bool> {
    let image = try_open(path, false).unwrap_or_else(|e| panic!("{}", chain(&e)));
    let results = steps.iter().map(|step| ours_one(&image, step)).collect();
    if close {
        image.close().unwrap();
    }
    results
}

fn ours_one(image: &Image, &(operation, at, len): &Step) -> bool {
    match operation {
        Operation::Write(byte) => {
            let mut from = Segments::from_vec(vec![byte; len as usize]);
            image.write(&mut from, at, len).is_ok()
        }
        Operation::Zero => image.empty(at, len, Emptying::Zero).is_ok(),
        Operation::Unmap => image.empty(at, len, Emptying::Unmap).is_ok(),
        Operation::Discard => image.empty(at, len, Emptying::Discard).is_ok(),
        Operation::Read => {
            let mut to = Segments::from_vec(vec![0; len as usize]);
            let wait = msb_blk::file::Wait::Allowed;
            image.read(&mut to, at, len, wait).is_ok()
        }
        Operation::Flush => image.flush().is_ok(),
    }
}

fn theirs(path: &Path, format: &str, steps: &[Step]) -> Vec<bool> {
    let mut command = Command::new("qemu-io");
    command.current_dir(path.parent().unwrap());
    command.args(["-f", format, "-d", "unmap", "-t", "unsafe"]);
    for &(operation, at, len) in steps {
        let text = match operation {
            Operation::Write(byte) => format!("write -P {byte} {at} {len}"),
            Operation::Zero => format!("write -z {at} {len}"),
            Operation::Unmap => format!("write -z -u {at} {len}"),
            Operation::Discard => format!("discard {at} {len}"),
            Operation::Read => format!("read {at} {len}"),
            Operation::Flush => "flush".to_owned(),
        };
        command.args(["-c", &text]);
    }
    let output = command.arg(path).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    // A flush says nothing when it succeeds.
    let mut lines = text.lines().filter(|line| {
        line.contains("failed:")
            || ["wrote ", "read ", "discard "]
                .iter()
                .any(|w| line.starts_with(w))
    });
    let results: Vec<bool> = steps
        .iter()
        .map(|step| match step.0 {
            Operation::Flush => true,
            _ => !lines
                .next()
                .unwrap_or_else(|| panic!("{text}"))
                .contains("failed:"),
        })
        .collect();
    assert_eq!(lines.next(), None, "{text}");
    results
}

/// Sectors whose content a discard has left open until they are written again.
fn note_discards(open: &mut [bool], steps: &[Step], results: &[bool]) {
    for (&(operation, at, len), _) in steps.iter().zip(results).filter(|(_, ok)| **ok) {
        let range = (at / 512) as usize..((at + len) / 512) as usize;
        match operation {
            Operation::Discard => open[range].fill(true),
            Operation::Write(_) | Operation::Zero | Operation::Unmap => open[range].fill(false),
            Operation::Read | Operation::Flush => {}
        }
    }
}

fn same(one: &[u8], other: &[u8], open: &[bool], what: &str) {
    assert_eq!(one.len(), other.len(), "{what}");
    let sectors = one.chunks(512).zip(other.chunks(512));
    for (number, (one, other)) in sectors.enumerate() {
        assert!(
            open[number] || one == other,
            "{what}: sector {number} differs"
        );
    }
}

/// Copies every file of a folder into a new one.
fn copy(from: &Path, to: PathBuf) -> PathBuf {
    fs::create_dir(&to).unwrap();
    for file in fs::read_dir(from).unwrap().map(Result::unwrap) {
        if file.file_type().unwrap().is_file() {
            fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    to
}

fn compare(variant: &Variant, seed: u64) {
    let format = variant.format();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("base.raw"), pattern(BASE, seed)).unwrap();
    for command in variant.commands {
        let args: Vec<&str> = command.split(' ').collect();
        run_in(dir.path(), "qemu-img", &args);
    }
    let has_snapshot = variant.commands.iter().any(|c| c.starts_with("snapshot"));
    let before = has_snapshot.then(|| qemu_content(&dir.path().join(variant.file), format));
    let copies = [
        copy(dir.path(), dir.path().join("one")).join(variant.file),
        copy(dir.path(), dir.path().join("two")).join(variant.file),
    ];
    let mut random = Random(seed);
    let size = try_open(&copies[0], true).unwrap().size();
    let mut open = vec![false; (size / 512) as usize];
    for turn in 0..TURNS {
        let what = format!("{variant:?}, seed {seed}, turn {turn}");
        let steps = steps(&mut random, size, 30);
        let [mine, yours] = if turn % 2 == 0 { [0, 1] } else { [1, 0] };
        // Not closing is what the death of the process leaves.
        let close = random.below(3) > 0;
        let results = ours(&copies[mine], &steps, close);
        let expected = theirs(&copies[yours], format, &steps);
        for (at, (found, expected)) in results.iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "{what}: {:?}", steps[at]);
        }
        note_discards(&mut open, &steps, &results);
        let mut readings = Vec::new();
        for copy in &copies {
            if variant.can_be_checked() {
                qemu_check(copy, format, true);
            }
            let read = content(&try_open(copy, true).unwrap());
            assert!(
                read == qemu_content(copy, format),
                "{what}: read differently"
            );
            readings.push(read);
        }
        same(&readings[0], &readings[1], &open, &what);
        // A data file that is raw holds the disk by itself.
        if variant
            .commands
            .iter()
            .any(|c| c.contains("data_file_raw=on"))
        {
            let data = fs::read(copies[mine].with_file_name("data.bin")).unwrap();
            assert!(data == readings[mine], "{what}: the data file differs");
        }
    }
    for copy in copies.iter().filter(|_| has_snapshot) {
        let dir = copy.parent().unwrap();
        let listed = run_in(dir, "qemu-img", &["snapshot", "-l", variant.file]);
        assert!(listed.contains(" one "), "{listed}");
        run_in(dir, "qemu-img", &["snapshot", "-a", "one", variant.file]);
        let after = qemu_content(copy, format);
        assert!(
            Some(after) == before,
            "{variant:?}, seed {seed}: the snapshot changed"
        );
    }
}

/// Every `of`th kind of image from the `nth` on, so that the halves run at the same time.
fn compare_some(nth: usize, of: usize) {
    if !has_qemu_img() {
        return;
    }
    let seeds = std::env::var("MSB_DIFF_SEEDS")
        .ok()
        .and_then(|n| n.parse().ok());
    for seed in 1..=seeds.unwrap_or(1) {
        for (number, variant) in WRITABLE.iter().enumerate().skip(nth).step_by(of) {
            compare(variant, seed * 1000 + number as u64);
        }
    }
}

#[test]
fn qemu_io_agrees_about_one_half() {
    compare_some(0, 2);
}

#[test]
fn qemu_io_agrees_about_the_other_half() {
    compare_some(1, 2);
}
