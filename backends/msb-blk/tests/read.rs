//! Every variant qemu-img can make reads back as qemu-img itself reads it.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use support::*;

const MIB: usize = 1 << 20;

fn check(name: &str, options: &str, extra: &[&str]) {
    check_disk(9 * MIB + 512 * 7, name, options, extra);
}

/// `qemu-img convert` makes the image of a disk of `len` bytes, and is asked what it reads as.
fn check_disk(len: usize, name: &str, options: &str, extra: &[&str]) {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("source.raw");
    let disk = pattern(len, 1);
    std::fs::write(&raw, &disk).unwrap();
    let format = name.rsplit('.').next().unwrap();
    let image = dir.path().join(name);
    let mut args = vec!["convert", "-f", "raw", "-O", format];
    args.extend(extra);
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([raw.to_str().unwrap(), image.to_str().unwrap()]);
    qemu_img(&args);
    let opened = try_open(&image, true).unwrap_or_else(|e| panic!("{options}: {}", chain(&e)));
    let read = content(&opened);
    assert!(read.starts_with(&disk), "{name} {options} {extra:?}");
    assert!(
        read[disk.len()..].iter().all(|&b| b == 0),
        "{name} {options}: tail"
    );
    drop(opened);
    assert!(
        read == qemu_content(&image, format),
        "{name} {options} {extra:?}: qemu-img"
    );
}

#[test]
fn qcow2_variants() {
    for version in ["0.10", "1.1"] {
        for cluster in ["512", "1k", "4k", "64k", "2M"] {
            check(
                "a.qcow2",
                &format!("compat={version},cluster_size={cluster}"),
                &[],
            );
            check(
                "a.qcow2",
                &format!("compat={version},cluster_size={cluster}"),
                &["-c"],
            );
        }
    }
    for bits in ["1", "2", "4", "8", "32", "64"] {
        check("a.qcow2", &format!("refcount_bits={bits}"), &[]);
    }
    for preallocation in ["metadata", "falloc", "full"] {
        check("a.qcow2", &format!("preallocation={preallocation}"), &[]);
    }
    check("a.qcow2", "lazy_refcounts=on", &[]);
    check("a.qcow2", "compression_type=zstd", &["-c"]);
    check("a.qcow2", "compression_type=zstd,cluster_size=2M", &["-c"]);
    for cluster in ["16k", "64k", "2M"] {
        check(
            "a.qcow2",
            &format!("extended_l2=on,cluster_size={cluster}"),
            &[],
        );
        check(
            "a.qcow2",
            &format!("extended_l2=on,cluster_size={cluster}"),
            &["-c"],
        );
    }
}

/// Every cluster size with every refcount width; each pair gets one of the three compressions and
/// one of the two kinds of L2 entries, and with `MSB_READ_MATRIX=1` all of them.
#[test]
fn qcow2_cluster_sizes_by_refcount_widths() {
    let all = std::env::var_os("MSB_READ_MATRIX").is_some();
    for bits in 9..=21 {
        for order in 0..=6 {
            for kind in 0..6 {
                // Six kinds over rows of seven: neighbours differ in both directions.
                if !all && kind != (bits * 7 + order) % 6 {
                    continue;
                }
                // Subclusters need clusters of 16 KiB.
                let extended = kind >= 3 && bits >= 14;
                let compression = ["zlib", "zlib", "zstd"][kind % 3];
                let extra: &[&str] = if kind % 3 == 0 { &[] } else { &["-c"] };
                let options = format!(
                    "cluster_size={},refcount_bits={},compression_type={compression},extended_l2={}",
                    1 << bits,
                    1 << order,
                    if extended { "on" } else { "off" },
                );
                check_disk(2 * MIB + 512 * 7, "a.qcow2", &options, extra);
            }
        }
    }
}

#[test]
fn vmdk_variants() {
    for subformat in [
        "monolithicSparse",
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
        "streamOptimized",
    ] {
        check("a.vmdk", &format!("subformat={subformat}"), &[]);
    }
    for sparse in ["monolithicSparse", "twoGbMaxExtentSparse"] {
        let options = format!("subformat={sparse},zeroed_grain=on");
        check("a.vmdk", &options, &[]);
    }
}

#[test]
fn raw_of_odd_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let disk = pattern(MIB + 100, 2);
    std::fs::write(&path, &disk).unwrap();
    let image = try_open(&path, true).unwrap();
    assert_eq!(image.size(), (MIB + 512) as u64);
    let read = content(&image);
    assert!(read.starts_with(&disk) && read[disk.len()..].iter().all(|&b| b == 0));
}

/// Runs qemu-img commands in a fresh folder with `base.raw` in it, then compares what each of the
/// named images reads as.
fn check_chain(commands: &[&str], images: &[&str]) {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.raw"), pattern(5 * MIB + 512, 3)).unwrap();
    for command in commands {
        let words: Vec<String> = command
            .split(' ')
            .map(|word| {
                if word.contains('=') {
                    word.into()
                } else {
                    word.replace('_', " ")
                }
            })
            .collect();
        let args: Vec<&str> = words[1..].iter().map(String::as_str).collect();
        run_in(dir.path(), &words[0], &args);
    }
    for name in images {
        let path = dir.path().join(name);
        let format = name.rsplit('.').next().unwrap();
        let opened = try_open(&path, true).unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
        assert!(
            content(&opened) == qemu_content(&path, format),
            "{name} after {commands:?}"
        );
    }
}

#[test]
fn external_data_files() {
    for raw in ["on", "off"] {
        check_chain(
            &[&format!(
                "qemu-img convert -f raw -O qcow2 -o data_file=data.raw,data_file_raw={raw} base.raw a.qcow2"
            )],
            &["a.qcow2"],
        );
    }
}

#[test]
fn backing_chains() {
    check_chain(
        &[
            "qemu-img create -f qcow2 -b base.raw -F raw mid.qcow2 7M",
            "qemu-io -c write_-P_7_1M_100k mid.qcow2",
            "qemu-img create -f qcow2 -o extended_l2=on -b mid.qcow2 -F qcow2 top.qcow2 8M",
            "qemu-io -c write_-P_9_1040k_5k top.qcow2",
            "qemu-io -c discard_2M_1M top.qcow2",
            "qemu-img convert -O vmdk base.raw base.vmdk",
            "qemu-img create -f qcow2 -b base.vmdk -F vmdk over.qcow2",
            "qemu-io -c write_-z_70k_300k over.qcow2",
        ],
        &["mid.qcow2", "top.qcow2", "over.qcow2"],
    );
}

#[test]
fn snapshots_do_not_show() {
    check_chain(
        &[
            "qemu-img convert -f raw -O qcow2 base.raw a.qcow2",
            "qemu-img snapshot -c one a.qcow2",
            "qemu-io -c write_-P_3_1M_1M a.qcow2",
        ],
        &["a.qcow2"],
    );
}

#[test]
fn vmdk_delta_links() {
    check_chain(
        &[
            "qemu-img convert -f raw -O vmdk base.raw base.vmdk",
            "qemu-img create -f vmdk -b base.vmdk -F vmdk delta.vmdk",
            "qemu-io -c write_-P_3_1000k_9k delta.vmdk",
        ],
        &["delta.vmdk"],
    );
}
