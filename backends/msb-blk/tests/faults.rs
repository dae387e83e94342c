//! A host that refuses: the N-th change of the file fails, for every N, and nothing is corrupted.
//!
//! Once as a single error, once as a disk that stays full until the guest has given up. Whatever the
//! operations answered, qemu-img check finds no error and what was flushed is there.
//! `MSB_FAULT_STEP=1` tries every N instead of some.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::fs;

use msb_blk::image::Format;
use support::recorder::Failures;
use support::workload::{check_content, open_recorded, work};
use support::*;

const STEPS: usize = 40;

fn sweep(seed: u64, commands: &[&str]) {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("base.raw"), pattern(256 << 10, seed)).unwrap();
    for command in commands {
        let args: Vec<&str> = command.split(' ').collect();
        run_in(dir.path(), "qemu-img", &args);
    }
    let name = if commands[commands.len() - 1].contains("vmdk") {
        "a.vmdk"
    } else {
        "a.qcow2"
    };
    let path = dir.path().join(name);
    let (format, format_name) = (Format::of_path(&path), name.rsplit('.').next().unwrap());
    let start = fs::read(&path).unwrap();
    let before = content(&try_open(&path, true).unwrap());
    // Without a failure, to learn how many changes there are.
    let (image, recorder, _) = open_recorded(&path, format);
    work(&image, &recorder, &mut Random(seed), STEPS);
    let changes = *recorder.asked.lock().unwrap();
    let asked = std::env::var("MSB_FAULT_STEP").ok();
    let step = asked
        .and_then(|n| n.parse().ok())
        .unwrap_or(changes / 6 + 1);
    let mut points = 0;
    for at in (0..changes).step_by(step) {
        for (errno, last) in [
            (libc::ENOSPC, at + 1),
            (libc::EIO, at + 1),
            (libc::ENOSPC, usize::MAX),
            (libc::EDQUOT, at + 20),
        ] {
            points += 1;
            fs::write(&path, &start).unwrap();
            let (image, recorder, _) = open_recorded(&path, format);
            recorder.fail(Failures::At(at..last, errno));
            let done = work(&image, &recorder, &mut Random(seed), STEPS);
            let what = format!("{commands:?}: errno {errno} at changes {at}..{last} of {changes}");
            let judge = |moment, killed, leaks| {
                fs::write(&path, &*recorder.bytes.lock().unwrap()).unwrap();
                qemu_check(&path, format_name, leaks);
                let read = content(&try_open(&path, true).unwrap());
                check_content(&read, &before, &done, moment, killed, &what);
            };
            // As if the process had been killed, then after an orderly end on a host that recovered.
            judge(recorder.len(), true, true);
            recorder.fail(Failures::None);
            image
                .close()
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            judge(recorder.len(), true, true);
        }
    }
    println!("{commands:?}: {points} points of failure, {changes} changes");
}

#[test]
fn qcow2() {
    sweep(1, &["create -f qcow2 -o cluster_size=512 a.qcow2 1M"]);
    sweep(2, &["create -f qcow2 a.qcow2 1M"]);
    sweep(
        3,
        &["create -f qcow2 -o refcount_bits=64,cluster_size=512 a.qcow2 2M"],
    );
}

#[test]
fn qcow2_over_contents() {
    sweep(
        4,
        &["create -f qcow2 -o cluster_size=4k -b base.raw -F raw a.qcow2 1M"],
    );
    sweep(
        5,
        &["create -f qcow2 -o extended_l2=on -b base.raw -F raw a.qcow2 1M"],
    );
    sweep(
        6,
        &["convert -c -f raw -O qcow2 -o cluster_size=4k base.raw a.qcow2"],
    );
    sweep(
        7,
        &[
            "convert -f raw -O qcow2 -o cluster_size=4k base.raw a.qcow2",
            "snapshot -c one a.qcow2",
        ],
    );
}

#[test]
fn vmdk() {
    sweep(8, &["create -f vmdk a.vmdk 1M"]);
    sweep(
        9,
        &[
            "convert -f raw -O vmdk base.raw base.vmdk",
            "create -f vmdk -o zeroed_grain=on -b base.vmdk -F vmdk a.vmdk",
        ],
    );
}
