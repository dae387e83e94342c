//! Crashes at every moment: what was flushed is there, whatever part of the later writes arrived.
//!
//! A recorder below the image logs every change of the file. From the log every state is rebuilt
//! that a crash may leave: after the death of the process, a prefix; after the death of the host,
//! any mixture in which each sector is as it was at some moment since the last sync. qemu-img check
//! judges the structure, a model the content. `MSB_CRASH_STATES` sets how many states are tried of
//! each long workload, `MSB_CRASH_WORKLOADS` how many short ones are tried in every state.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::collections::HashSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use msb_blk::image::{Format, OpenOptions, open};
use support::recorder::{Change, Failures, apply};
use support::workload::{check_content, open_recorded, work};
use support::*;

/// The file after the death of the process: the first `upto` changes.
fn after_kill(start: &[u8], log: &[Change]) -> Vec<u8> {
    let mut file = start.to_vec();
    log.iter()
        .for_each(|change| apply(&mut file, change, 0, usize::MAX));
    file
}

/// One of the files the death of the host may leave after these changes: every sector as it was at
/// some moment between its last durable change and the end.
fn after_power_loss(start: &[u8], log: &[Change], random: &mut Random) -> Vec<u8> {
    let synced = log
        .iter()
        .rposition(|c| matches!(c, Change::Sync))
        .map_or(0, |at| at + 1);
    let moment = |from: usize, random: &mut Random| {
        from + random.below((log.len() - from) as u64 + 1) as usize
    };
    let mut sure = synced;
    let whole = after_kill(start, log).len().max(start.len());
    let mut cut = vec![synced; whole.div_ceil(512) + 1];
    for (at, change) in log.iter().enumerate().skip(synced) {
        if let Change::Write {
            offset,
            bytes,
            now: true,
        } = change
        {
            sure = at + 1;
            let last = (offset + bytes.len()).div_ceil(512);
            for sector in cut.iter_mut().take(last).skip(offset / 512) {
                *sector = at + 1;
            }
        }
    }
    // Often all or nothing of the rest arrives, sometimes each sector for itself.
    let style = random.below(3);
    for sector in &mut cut {
        *sector = match style {
            0 => *sector,
            1 if random.below(2) == 0 => log.len(),
            1 => *sector,
            _ => moment(*sector, random),
        };
    }
    let mut file = after_kill(start, &log[..synced]);
    let size_at = moment(sure, random);
    let size = after_kill(start, &log[..size_at]).len();
    for (at, change) in log.iter().enumerate().skip(synced) {
        if let Change::Write { offset, bytes, .. } = change {
            let last = (offset + bytes.len()).div_ceil(512);
            for (sector, &cut) in cut.iter().enumerate().take(last).skip(offset / 512) {
                if at < cut {
                    apply(&mut file, change, sector * 512, sector * 512 + 512);
                }
            }
        }
    }
    file.resize(size, 0);
    file
}

fn states() -> usize {
    std::env::var("MSB_CRASH_STATES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(40)
}

fn check(commands: &[&str], name: &str, seed: u64) {
    check_with_failures(commands, name, seed, 0);
}

/// As [`check`], while one change of the file in so many fails.
fn check_with_failures(commands: &[&str], name: &str, seed: u64, one_in: u64) {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("base.raw"), pattern(2 << 20, seed)).unwrap();
    for command in commands {
        run_in(
            dir.path(),
            "qemu-img",
            &command.split(' ').collect::<Vec<_>>(),
        );
    }
    let path = dir.path().join(name);
    let format = Format::of_path(&path);
    let name = if format == Format::Qcow2 {
        "qcow2"
    } else {
        "vmdk"
    };
    let before = content(&try_open(&path, true).unwrap());
    let (image, recorder, start) = open_recorded(&path, format);
    let mut random = Random(seed);
    if one_in > 0 {
        recorder.fail(Failures::OneIn(one_in, Random(seed)));
    }
    let done = work(&image, &recorder, &mut random, 120);
    let log = recorder.log.lock().unwrap().clone();
    println!(
        "{commands:?}: {} changes of the file, {} states",
        log.len(),
        states()
    );
    let options = OpenOptions {
        lock: false,
        ..options(format, true)
    };
    for state in 0..states() {
        let moment = random.below(log.len() as u64 + 1) as usize;
        let killed = state % 3 == 0;
        let file = if killed {
            after_kill(&start, &log[..moment])
        } else {
            after_power_loss(&start, &log[..moment], &mut random)
        };
        fs::write(&path, file).unwrap();
        qemu_check(&path, name, true);
        let read = content(&open(&path, &options).unwrap_or_else(|e| panic!("{}", chain(&e))));
        let what = format!("{commands:?}, state {state}, after change {moment}, killed {killed}");
        check_content(&read, &before, &done, moment, killed, &what);
    }
}

#[test]
fn qcow2() {
    check(&["create -f qcow2 a.qcow2 2M"], "a.qcow2", 1);
    check(
        &["create -f qcow2 -o cluster_size=512 a.qcow2 2M"],
        "a.qcow2",
        2,
    );
    check(
        &["create -f qcow2 -o compat=0.10,cluster_size=4k a.qcow2 2M"],
        "a.qcow2",
        3,
    );
    check(
        &["create -f qcow2 -o refcount_bits=64,cluster_size=512 a.qcow2 2M"],
        "a.qcow2",
        4,
    );
}

#[test]
fn qcow2_with_subclusters() {
    check(
        &["create -f qcow2 -o extended_l2=on a.qcow2 2M"],
        "a.qcow2",
        5,
    );
    check(
        &["create -f qcow2 -o extended_l2=on -b base.raw -F raw a.qcow2 2M"],
        "a.qcow2",
        6,
    );
}

#[test]
fn qcow2_over_contents() {
    check(
        &["create -f qcow2 -b base.raw -F raw a.qcow2 2M"],
        "a.qcow2",
        7,
    );
    check(
        &["convert -c -f raw -O qcow2 base.raw a.qcow2"],
        "a.qcow2",
        8,
    );
    let snapshot = [
        "convert -f raw -O qcow2 base.raw a.qcow2",
        "snapshot -c one a.qcow2",
    ];
    check(&snapshot, "a.qcow2", 9);
    check(
        &["create -f qcow2 -o preallocation=metadata a.qcow2 2M"],
        "a.qcow2",
        10,
    );
}

#[test]
fn vmdk() {
    check(&["create -f vmdk a.vmdk 2M"], "a.vmdk", 11);
    check(
        &["create -f vmdk -o zeroed_grain=on a.vmdk 2M"],
        "a.vmdk",
        12,
    );
    let delta = [
        "convert -f raw -O vmdk base.raw base.vmdk",
        "create -f vmdk -b base.vmdk -F vmdk a.vmdk",
    ];
    check(&delta, "a.vmdk", 13);
}

#[test]
fn a_host_that_refuses() {
    for (seed, one_in) in [(20, 3), (21, 10), (22, 50)] {
        let check = |commands: &[&str], name| check_with_failures(commands, name, seed, one_in);
        check(
            &["create -f qcow2 -o cluster_size=512 a.qcow2 2M"],
            "a.qcow2",
        );
        check(
            &["create -f qcow2 -o cluster_size=4k -b base.raw -F raw a.qcow2 2M"],
            "a.qcow2",
        );
        check(&["create -f qcow2 -o extended_l2=on a.qcow2 2M"], "a.qcow2");
        check(
            &[
                "convert -f raw -O qcow2 base.raw a.qcow2",
                "snapshot -c one a.qcow2",
            ],
            "a.qcow2",
        );
        check(&["create -f vmdk a.vmdk 2M"], "a.vmdk");
    }
}

/// Small images, so that a state is quickly made and judged.
const SMALL: [&[&str]; 10] = [
    &["create -f qcow2 -o cluster_size=512 a.qcow2 160k"],
    &["create -f qcow2 -o cluster_size=4k a.qcow2 256k"],
    &["create -f qcow2 a.qcow2 512k"],
    &["create -f qcow2 -o compat=0.10,cluster_size=1k -b base.raw -F raw a.qcow2 160k"],
    &["create -f qcow2 -o cluster_size=4k -b base.raw -F raw a.qcow2 256k"],
    &["create -f qcow2 -o extended_l2=on,cluster_size=16k -b base.raw -F raw a.qcow2 256k"],
    &["convert -c -f raw -O qcow2 -o cluster_size=4k base.raw a.qcow2"],
    &[
        "convert -f raw -O qcow2 -o cluster_size=4k base.raw a.qcow2",
        "snapshot -c one a.qcow2",
    ],
    &["create -f vmdk -o zeroed_grain=on a.vmdk 512k"],
    &[
        "convert -f raw -O vmdk base.raw base.vmdk",
        "create -f vmdk -b base.vmdk -F vmdk a.vmdk",
    ],
];

/// Everything one of these images is made into, in memory of the host where there is some.
struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
    format: Format,
    start: Vec<u8>,
    before: Vec<u8>,
}

impl Bench {
    fn new(commands: &[&str]) -> Self {
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() {
            tempfile::tempdir_in(shm).unwrap()
        } else {
            tempfile::tempdir().unwrap()
        };
        fs::write(dir.path().join("base.raw"), pattern(160 << 10, 3)).unwrap();
        for command in commands {
            run_in(
                dir.path(),
                "qemu-img",
                &command.split(' ').collect::<Vec<_>>(),
            );
        }
        let last = commands[commands.len() - 1];
        let name = if last.contains("a.vmdk") {
            "a.vmdk"
        } else {
            "a.qcow2"
        };
        let path = dir.path().join(name);
        Self {
            format: Format::of_path(&path),
            start: fs::read(&path).unwrap(),
            before: content(&try_open(&path, true).unwrap()),
            path,
            _dir: dir,
        }
    }

    /// Judges one state; its structure only if it is not among those judged already.
    fn judge(&self, file: &[u8], judged: &mut HashSet<u64>, check: impl Fn(&[u8])) {
        fs::write(&self.path, file).unwrap();
        if judged.insert(metadata(file, self.format)) {
            let name = if self.format == Format::Vmdk {
                "vmdk"
            } else {
                "qcow2"
            };
            qemu_check(&self.path, name, true);
        }
        let options = options(self.format, true);
        let image = open(&self.path, &options).unwrap_or_else(|e| panic!("{}", chain(&e)));
        check(&content(&image));
    }
}

/// What qemu-img check looks at: for qcow2 all clusters but those that only hold data.
fn metadata(file: &[u8], format: Format) -> u64 {
    let mut hash = DefaultHasher::new();
    file.len().hash(&mut hash);
    if format == Format::Vmdk {
        file.hash(&mut hash);
        return hash.finish();
    }
    let word = |at: usize| {
        let bytes = file
            .get(at..at + 8)
            .map_or([0; 8], |b| b.try_into().unwrap());
        u64::from_be_bytes(bytes) as usize & 0x00ff_ffff_ffff_fe00
    };
    let half = |at: usize| u32::from_be_bytes(file[at..at + 4].try_into().unwrap()) as usize;
    let cluster = 1 << half(20);
    let mut take = |at: usize, len: usize| {
        let end = (at + len).min(file.len());
        file[at.min(end)..end].hash(&mut hash);
    };
    take(0, cluster);
    take(word(48), half(56) * cluster);
    take(word(64), if half(60) > 0 { cluster } else { 0 });
    for block in 0..half(56) * cluster / 8 {
        let at = word(word(48) + block * 8);
        take(at, if at > 0 { cluster } else { 0 });
    }
    let snapshot = if half(60) > 0 { word(word(64)) } else { 0 };
    for l1 in [word(40), snapshot].into_iter().filter(|&at| at > 0) {
        take(l1, half(36) * 8);
        for index in 0..half(36) {
            let at = word(l1 + index * 8);
            take(at, if at > 0 { cluster } else { 0 });
        }
    }
    hash.finish()
}

/// The file when of the changes since the last sync only those in `arrived` have reached the disk;
/// what was durable by itself always has, but for the last change, which was under way.
fn after_reordering(start: &[u8], log: &[Change], arrived: impl Fn(usize) -> bool) -> Vec<u8> {
    let synced = log.iter().rposition(|c| matches!(c, Change::Sync));
    let synced = synced.map_or(0, |at| at + 1);
    let last = log.len().saturating_sub(1);
    let durable = log[synced..]
        .iter()
        .rposition(|c| matches!(c, Change::Write { now: true, .. }))
        .map_or(0, |at| synced + at + 1);
    let mut file = start.to_vec();
    let mut longest = 0;
    for (at, change) in log.iter().enumerate() {
        // A durable write takes the size of the file with it.
        let sure = at < synced
            || (at < last && matches!(change, Change::Write { now: true, .. }))
            || (at + 1 < durable && matches!(change, Change::Size(_)));
        if sure || arrived(at - synced.min(at)) {
            apply(&mut file, change, 0, usize::MAX);
        }
        if at < synced {
            longest = file.len();
        }
    }
    file.resize(file.len().max(longest), 0);
    file
}

/// One short workload: every prefix of its changes, and of the changes since a sync every subset
/// while they are few, otherwise some.
fn every_state(bench: &Bench, seed: u64) -> (usize, usize) {
    const EXHAUSTIVE: usize = 4;
    fs::write(&bench.path, &bench.start).unwrap();
    let (image, recorder, start) = open_recorded(&bench.path, bench.format);
    let mut random = Random(seed);
    let done = work(&image, &recorder, &mut random, 5);
    drop(image);
    let log = recorder.log.lock().unwrap().clone();
    let (mut judged, mut seen, mut states) = (HashSet::new(), HashSet::new(), 0);
    let mut judge = |file: Vec<u8>, moment: usize, killed: bool| {
        let mut hash = DefaultHasher::new();
        (&file, killed.then_some(moment)).hash(&mut hash);
        states += 1;
        if !seen.insert(hash.finish()) {
            return;
        }
        let what = format!(
            "{:?}, seed {seed}, change {moment}, killed {killed}",
            bench.path
        );
        bench.judge(&file, &mut judged, |read| {
            check_content(read, &bench.before, &done, moment, killed, &what);
        });
    };
    for moment in 0..=log.len() {
        let log = &log[..moment];
        judge(after_kill(&start, log), moment, true);
        let synced = log.iter().rposition(|c| matches!(c, Change::Sync));
        let open = moment - synced.map_or(0, |at| at + 1);
        if open <= EXHAUSTIVE {
            for subset in 0..1usize << open {
                let file = after_reordering(&start, log, |at| subset >> at & 1 != 0);
                judge(file, moment, false);
            }
        } else {
            let subset = random.next();
            let file = after_reordering(&start, log, |at| subset >> (at % 64) & 1 != 0);
            judge(file, moment, false);
            judge(after_power_loss(&start, log, &mut random), moment, false);
        }
    }
    (states, judged.len())
}

#[test]
fn every_state_of_short_workloads() {
    if !has_qemu_img() {
        return;
    }
    let asked = std::env::var("MSB_CRASH_WORKLOADS").ok();
    let workloads: u64 = asked.and_then(|n| n.parse().ok()).unwrap_or(10);
    let threads = std::thread::available_parallelism().map_or(2, usize::from) as u64;
    let total = Mutex::new((0u64, 0, 0));
    std::thread::scope(|scope| {
        for first in 0..threads {
            let total = &total;
            scope.spawn(move || {
                let benches: Vec<Bench> =
                    SMALL.iter().map(|commands| Bench::new(commands)).collect();
                for workload in (first..workloads).step_by(threads as usize) {
                    let bench = &benches[workload as usize % benches.len()];
                    let (states, judged) = every_state(bench, 7000 + workload);
                    let mut total = total.lock().unwrap();
                    *total = (total.0 + 1, total.1 + states, total.2 + judged);
                    if total.0.is_multiple_of(50) || total.0 == workloads {
                        let (workloads, states, judged) = *total;
                        println!("{workloads} workloads: {states} states, {judged} by qemu-img");
                    }
                }
            });
        }
    });
}
