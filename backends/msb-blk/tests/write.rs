//! Random operations on every writable variant, compared with a model and judged by qemu-img.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::path::Path;

use msb_blk::file::Emptying;
use msb_blk::image::Image;
use msb_vhost::Segments;
use support::*;

const MIB: usize = 1 << 20;

fn write(image: &Image, bytes: &[u8], at: usize) {
    let mut from = Segments::from_vec(bytes.to_vec());
    image
        .write(&mut from, at as u64, bytes.len() as u64)
        .expect("the image takes it");
}

/// One random operation on both; `slack` says what a discard may leave behind.
fn step(image: &Image, model: &mut [u8], unknown: &mut [bool], random: &mut Random) {
    let sectors = model.len() / 512;
    let most = if random.below(8) == 0 { 2000 } else { 40 };
    let first = random.below(sectors as u64) as usize;
    let count = (1 + random.below(most) as usize).min(sectors - first);
    let (at, end) = (first * 512, (first + count) * 512);
    match random.below(16) {
        0 => image.flush().expect("flush"),
        1..=2 => {
            image
                .empty(at as u64, (end - at) as u64, Emptying::Discard)
                .expect("discard");
            unknown[first..first + count].fill(true);
        }
        kind @ 3..=4 => {
            let how = if kind == 3 {
                Emptying::Unmap
            } else {
                Emptying::Zero
            };
            image
                .empty(at as u64, (end - at) as u64, how)
                .expect("zero");
            model[at..end].fill(0);
            unknown[first..first + count].fill(false);
        }
        _ => {
            let bytes = random.bytes(end - at);
            write(image, &bytes, at);
            model[at..end].copy_from_slice(&bytes);
            unknown[first..first + count].fill(false);
        }
    }
}

fn compare(read: &[u8], model: &mut [u8], unknown: &mut [bool], what: &str) {
    for (number, sector) in model.chunks_mut(512).enumerate() {
        let found = &read[number * 512..number * 512 + 512];
        if unknown[number] {
            // What a discard left is not specified, but it stays what it is.
            sector.copy_from_slice(found);
            unknown[number] = false;
        }
        assert!(found == sector, "{what}: sector {number} differs");
    }
}

/// Runs random operations on the image at `path` with reopening in between.
fn churn(path: &Path, format: &str, seed: u64, checks: bool) {
    let mut random = Random(seed);
    let mut model = content(&try_open(path, true).unwrap());
    let mut unknown = vec![false; model.len() / 512];
    for round in 0..4 {
        let image = try_open(path, false).unwrap_or_else(|e| panic!("{}", chain(&e)));
        for _ in 0..60 {
            step(&image, &mut model, &mut unknown, &mut random);
        }
        compare(&content(&image), &mut model, &mut unknown, "own view");
        // The death of the process must not matter, only leak what was in reserve.
        if round % 2 == 0 {
            image.close().expect("close");
        }
        drop(image);
        if checks {
            qemu_check(path, format, round > 0);
        }
        compare(
            &qemu_content(path, format),
            &mut model,
            &mut unknown,
            "qemu-img's view",
        );
    }
}

fn check(name: &str, options: &str, seed: u64) {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let format = name.rsplit('.').next().unwrap();
    std::fs::write(dir.path().join("base.raw"), pattern(5 * MIB, seed)).unwrap();
    let base: &[&str] = if options.contains("backing") {
        &["-b", "base.raw", "-F", "raw"]
    } else {
        &[]
    };
    let options = options
        .trim_start_matches("backing,")
        .trim_start_matches("backing");
    let mut args = vec!["create", "-f", format];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend(base);
    args.extend([name, "6M"]);
    run_in(dir.path(), "qemu-img", &args);
    churn(
        &dir.path().join(name),
        format,
        seed,
        format != "raw" && !options.contains("Flat"),
    );
}

#[test]
fn raw() {
    check("a.raw", "", 1);
}

#[test]
fn qcow2_clusters() {
    for (seed, cluster) in ["512", "4k", "64k", "2M"].into_iter().enumerate() {
        check(
            "a.qcow2",
            &format!("cluster_size={cluster}"),
            10 + seed as u64,
        );
        check(
            "a.qcow2",
            &format!("compat=0.10,cluster_size={cluster}"),
            20 + seed as u64,
        );
    }
}

#[test]
fn qcow2_refcount_widths() {
    for (seed, bits) in ["1", "4", "8", "64"].into_iter().enumerate() {
        check(
            "a.qcow2",
            &format!("refcount_bits={bits},cluster_size=512"),
            30 + seed as u64,
        );
    }
}

#[test]
fn qcow2_features() {
    check("a.qcow2", "lazy_refcounts=on", 40);
    check("a.qcow2", "preallocation=metadata", 41);
    check("a.qcow2", "preallocation=falloc,extended_l2=on", 42);
    check("a.qcow2", "extended_l2=on", 43);
    check("a.qcow2", "extended_l2=on,cluster_size=16k", 44);
    check("a.qcow2", "data_file=data.raw,data_file_raw=off", 45);
    check("a.qcow2", "data_file=data.raw,data_file_raw=on", 46);
}

#[test]
fn qcow2_over_a_backing_image() {
    check("a.qcow2", "backing", 50);
    check("a.qcow2", "backing,compat=0.10", 51);
    check("a.qcow2", "backing,cluster_size=4k", 52);
    check("a.qcow2", "backing,extended_l2=on", 53);
}

#[test]
fn vmdk() {
    for (seed, subformat) in [
        "monolithicSparse",
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
    ]
    .into_iter()
    .enumerate()
    {
        check(
            "a.vmdk",
            &format!("subformat={subformat}"),
            60 + seed as u64,
        );
    }
    check("a.vmdk", "zeroed_grain=on", 65);
}

fn prepared(commands: &[&str], name: &str, seed: u64) {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.raw"), pattern(6 * MIB, seed)).unwrap();
    for command in commands {
        let args: Vec<&str> = command.split(' ').collect();
        run_in(dir.path(), "qemu-img", &args);
    }
    churn(
        &dir.path().join(name),
        name.rsplit('.').next().unwrap(),
        seed,
        true,
    );
}

#[test]
fn qcow2_over_compressed_clusters() {
    for (seed, kind) in ["zlib", "zstd"].into_iter().enumerate() {
        let convert =
            format!("convert -c -f raw -O qcow2 -o compression_type={kind} base.raw a.qcow2");
        prepared(&[&convert], "a.qcow2", 70 + seed as u64);
    }
}

#[test]
fn qcow2_over_a_snapshot_that_stays() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = pattern(6 * MIB, 80);
    std::fs::write(dir.path().join("base.raw"), &disk).unwrap();
    for options in ["cluster_size=64k", "extended_l2=on", "cluster_size=512"] {
        let convert = [
            "convert", "-f", "raw", "-O", "qcow2", "-o", options, "base.raw", "a.qcow2",
        ];
        run_in(dir.path(), "qemu-img", &convert);
        run_in(
            dir.path(),
            "qemu-img",
            &["snapshot", "-c", "one", "a.qcow2"],
        );
        churn(&dir.path().join("a.qcow2"), "qcow2", 81, true);
        run_in(
            dir.path(),
            "qemu-img",
            &["snapshot", "-a", "one", "a.qcow2"],
        );
        assert!(
            qemu_content(&dir.path().join("a.qcow2"), "qcow2") == disk,
            "{options}"
        );
    }
}

#[test]
fn vmdk_over_a_parent() {
    prepared(
        &[
            "convert -f raw -O vmdk base.raw base.vmdk",
            "create -f vmdk -b base.vmdk -F vmdk delta.vmdk",
        ],
        "delta.vmdk",
        90,
    );
}

#[test]
fn blocks_come_ahead_of_filled_clusters_alone() {
    use std::os::unix::fs::MetadataExt;
    const CLUSTER: usize = 64 << 10;
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let to = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", to, "64M"]);
    let taken = || std::fs::metadata(&path).unwrap().blocks() * 512;
    let before = taken();
    let image = try_open(&path, false).unwrap();
    // Half filled: the host holds the halves, and tables of four clusters at most.
    for nth in 0..64 {
        write(&image, &vec![7; CLUSTER / 2], nth * CLUSTER);
    }
    image.flush().expect("flush");
    let halves = taken() - before;
    assert!(
        halves <= (32 + 4) * CLUSTER as u64,
        "{halves} bytes for 64 halves"
    );
    for nth in 64..104 {
        write(&image, &vec![7; CLUSTER], nth * CLUSTER);
    }
    image.flush().expect("flush");
    let filled = taken() - before - halves;
    let clusters = |count: u64| count * CLUSTER as u64;
    assert!(
        (clusters(40 + 4)..=clusters(40 + 40 + 4)).contains(&filled),
        "{filled} bytes for 40 clusters: more than they hold, and at most as much again"
    );
    image.close().expect("close");
    drop(image);
    let left = taken() - before;
    assert!(
        left <= clusters(32 + 40 + 4),
        "{left} bytes are left when it is closed"
    );
    qemu_check(&path, "qcow2", false);
    let disk = content(&try_open(&path, true).unwrap());
    assert!(
        disk[64 * CLUSTER..104 * CLUSTER]
            .iter()
            .all(|&byte| byte == 7)
    );
    assert!(disk[104 * CLUSTER..].iter().all(|&byte| byte == 0));
}
