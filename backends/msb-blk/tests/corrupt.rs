//! Damage of every kind, after what QEMU's tests 059, 060 and 080 try.
//!
//! It is refused with the reason or becomes an I/O error, is marked as corrupt where QEMU marks it,
//! and is never a crash, nor more than 64 MiB of memory.

#![allow(
    clippy::unwrap_used,
    clippy::too_many_lines,
    reason = "tables of a test"
)]

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use msb_blk::file::Emptying;
use msb_blk::image::{Image, ImageError};
use msb_vhost::Segments;
use support::*;

const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;
const PACKED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const MOST_KIB: u64 = 64 << 10;

/// What is done with the damaged image, at this byte of the disk.
#[derive(Debug, Clone, Copy)]
enum Do {
    Read(u64),
    Write(u64),
    /// Discards a cluster, then flushes.
    Discard(u64),
    Zero(u64),
}

#[derive(Debug, Clone, Copy)]
enum Then {
    /// It is not opened for writing, for this reason.
    Refused(&'static str),
    /// The operation fails, and from then on the image is marked as corrupt.
    Marked(Do),
    /// The operation fails.
    Fails(Do),
    /// Nothing is wrong with this.
    Works(Do),
}

use Do::{Discard, Read, Write, Zero};
use Then::{Fails, Marked, Refused, Works};

type Pokes = Vec<(u64, Vec<u8>)>;

struct Case {
    name: &'static str,
    image: &'static str,
    pokes: Pokes,
    then: Then,
}

fn case(name: &'static str, image: &'static str, pokes: Pokes, then: Then) -> Case {
    Case {
        name,
        image,
        pokes,
        then,
    }
}

fn word(at: u64, value: u64) -> Pokes {
    vec![(at, value.to_be_bytes().to_vec())]
}

fn half(at: u64, value: u32) -> Pokes {
    vec![(at, value.to_be_bytes().to_vec())]
}

/// The same in the other byte order, for VMDK.
fn little(at: u64, value: u32) -> Pokes {
    vec![(at, value.to_le_bytes().to_vec())]
}

fn little_long(at: u64, value: u64) -> Pokes {
    vec![(at, value.to_le_bytes().to_vec())]
}

/// Sets the refcount of a cluster, 16 bits wide.
fn count(image: &Qcow2, cluster: u64, value: u16) -> Pokes {
    vec![(image.block + cluster * 2, value.to_be_bytes().to_vec())]
}

/// Where the tables of a small image are.
struct Qcow2 {
    table: u64,
    block: u64,
    l1: u64,
    l2: u64,
    /// Host offset of the first data cluster.
    data: u64,
    snapshots: u64,
}

impl Qcow2 {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let word =
            |at: u64| u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
        let (table, l1) = (word(48), word(40));
        let l2 = word(l1) & OFFSET;
        Self {
            table,
            block: word(table),
            l1,
            l2,
            data: word(l2) & OFFSET,
            snapshots: word(64),
        }
    }
}

fn prepare(dir: &Path) {
    // Packs well, so that each cluster is packed.
    let text: Vec<u8> = (0..1 << 20)
        .map(|at| b'a' + (at / 600 % 26) as u8)
        .collect();
    fs::write(dir.join("base.raw"), text).unwrap();
    for (name, create, then) in [
        ("good.qcow2", "create -f qcow2 good.qcow2 4M", ""),
        ("snap.qcow2", "create -f qcow2 snap.qcow2 4M", "snapshot"),
        ("zero.qcow2", "create -f qcow2 zero.qcow2 4M", "zero"),
        (
            "wide.qcow2",
            "create -f qcow2 -o extended_l2=on wide.qcow2 4M",
            "",
        ),
        (
            "packed.qcow2",
            "convert -c -f raw -O qcow2 base.raw packed.qcow2",
            "none",
        ),
        (
            "packed2.qcow2",
            "convert -c -f raw -O qcow2 -o compression_type=zstd base.raw packed2.qcow2",
            "none",
        ),
        ("good.vmdk", "create -f vmdk good.vmdk 4M", ""),
        (
            "stream.vmdk",
            "convert -f raw -O vmdk -o subformat=streamOptimized base.raw stream.vmdk",
            "none",
        ),
    ] {
        let args: Vec<&str> = create.split(' ').collect();
        run_in(dir, "qemu-img", &args);
        if then == "none" {
            continue;
        }
        run_in(dir, "qemu-io", &["-c", "write -P 1 0 256k", name]);
        if then == "snapshot" {
            run_in(dir, "qemu-img", &["snapshot", "-c", "one", name]);
            run_in(dir, "qemu-io", &["-c", "write -P 2 0 128k", name]);
        } else if then == "zero" {
            run_in(dir, "qemu-io", &["-c", "write -z 0 64k", name]);
        }
    }
}

/// QEMU's test 060: tables that point where they must not.
fn tables(dir: &Path) -> Vec<Case> {
    let good = Qcow2::read(&dir.join("good.qcow2"));
    let snap = Qcow2::read(&dir.join("snap.qcow2"));
    let zero = Qcow2::read(&dir.join("zero.qcow2"));
    let second = good.l2 + 8;
    let mut cases = Vec::new();
    for (name, target) in [
        ("data in the L1 table", good.l1),
        ("data in the refcount table", good.table),
        ("data in a refcount block", good.block),
        ("data in an L2 table", good.l2),
    ] {
        let pokes = || word(second, target | COPIED);
        cases.push(case(name, "good.qcow2", pokes(), Marked(Write(CLUSTER))));
        cases.push(case(
            name,
            "good.qcow2",
            pokes(),
            Marked(Zero(CLUSTER + 512)),
        ));
    }
    let bytes = fs::read(dir.join("snap.qcow2")).unwrap();
    let at = |at: u64| u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
    let old_l1 = at(snap.snapshots);
    for (name, target) in [
        ("data in the L1 table of a snapshot", old_l1),
        ("data in the L2 table of a snapshot", at(old_l1) & OFFSET),
        ("data in the snapshot table", snap.snapshots),
    ] {
        let pokes = word(snap.l2 + 8, target | COPIED);
        cases.push(case(name, "snap.qcow2", pokes, Marked(Write(CLUSTER))));
    }
    for (name, place) in [
        ("the header counts as free", 0),
        ("the refcount table counts as free", good.table),
        ("a refcount block counts as free", good.block),
        ("the L1 table counts as free", good.l1),
        ("an L2 table counts as free", good.l2),
    ] {
        let pokes = count(&good, place / CLUSTER, 0);
        cases.push(case(name, "good.qcow2", pokes, Marked(Write(2 << 20))));
    }
    let data = good.data / CLUSTER;
    let on = |pokes, then| case("", "good.qcow2", pokes, then);
    let unaligned = good.data + 512;
    let far = 1u64 << 40;
    let named = [
        (
            "an unaligned L1 entry",
            on(
                word(good.l1, (good.l2 + 512) | COPIED),
                Refused("L2 table is not aligned"),
            ),
        ),
        (
            "an L1 entry beyond the file",
            on(word(good.l1, far | COPIED), Refused("beyond the end")),
        ),
        (
            "an L1 entry with nothing but flags",
            on(word(good.l1, COPIED), Works(Write(0))),
        ),
        (
            "an L2 table in the refcount table",
            on(word(good.l1, good.table | COPIED), Refused("two tables")),
        ),
        (
            "an L2 table in a refcount block",
            on(word(good.l1, good.block | COPIED), Refused("two tables")),
        ),
        (
            "an L2 table in the L1 table",
            on(word(good.l1, good.l1 | COPIED), Refused("two tables")),
        ),
        (
            "an L1 entry that is not marked as copied",
            on(word(good.l1, good.l2), Works(Write(CLUSTER))),
        ),
        (
            "an unaligned refcount block",
            on(
                word(good.table, good.block + 512),
                Refused("refcount block is not aligned"),
            ),
        ),
        (
            "a refcount block beyond the file",
            on(word(good.table, far), Refused("beyond the end")),
        ),
        (
            "a refcount block in the L1 table",
            on(word(good.table, good.l1), Refused("two tables")),
        ),
        (
            "one refcount block twice",
            on(word(good.table + 8, good.block), Refused("two tables")),
        ),
        (
            "no refcount block",
            on(word(good.table, 0), Marked(Write(2 << 20))),
        ),
        (
            "the refcount table in the L1 table",
            on(word(48, good.l1), Refused("beyond the end")),
        ),
        (
            "the L1 table in the refcount table",
            on(word(40, good.table), Refused("two tables")),
        ),
        (
            "an unaligned data cluster, read",
            on(word(good.l2, unaligned | COPIED), Marked(Read(0))),
        ),
        (
            "an unaligned data cluster, written",
            on(word(good.l2, unaligned | COPIED), Marked(Write(0))),
        ),
        (
            "an unaligned data cluster, discarded",
            on(word(good.l2, unaligned | COPIED), Marked(Discard(0))),
        ),
        (
            "a data cluster beyond the file, written",
            on(word(good.l2, far | COPIED), Marked(Write(0))),
        ),
        (
            "a data cluster beyond the file, read",
            on(word(good.l2, far | COPIED), Works(Read(0))),
        ),
        (
            "a data cluster beyond the file, discarded",
            on(word(good.l2, far | COPIED), Marked(Discard(0))),
        ),
        (
            "a data cluster in a table, discarded",
            on(word(good.l2, good.l1 | COPIED), Marked(Discard(0))),
        ),
        (
            "a free data cluster, discarded",
            on(count(&good, data, 0), Marked(Discard(0))),
        ),
        (
            "a dirty image",
            on(word(72, 1), Refused("not closed cleanly")),
        ),
        (
            "a corrupt image",
            on(word(72, 2), Refused("marked corrupt")),
        ),
        (
            "a huge L1 table",
            on(
                [half(36, 4 << 20), word(24, 1 << 50)].concat(),
                Refused("beyond the end"),
            ),
        ),
        (
            "a huge refcount table",
            on(half(56, 128), Refused("beyond the end")),
        ),
        (
            "a refcount table beyond the file",
            on(word(48, far), Refused("beyond the end")),
        ),
        (
            "an L1 table beyond the file",
            on(word(40, far), Refused("beyond the end")),
        ),
    ];
    cases.extend(named.into_iter().map(|(name, case)| Case { name, ..case }));
    let entry = zero.data + 512;
    cases.push(case(
        "an unaligned zero cluster",
        "zero.qcow2",
        word(zero.l2, entry | COPIED | 1),
        Marked(Write(0)),
    ));
    cases
}

/// QEMU's test 080, the part about snapshots; headers are in refuse.rs. Then extended and packed
/// entries.
fn snapshots_and_entries(dir: &Path) -> Vec<Case> {
    let at = Qcow2::read(&dir.join("snap.qcow2")).snapshots;
    let wide = Qcow2::read(&dir.join("wide.qcow2"));
    let packed = Qcow2::read(&dir.join("packed.qcow2"));
    let packed2 = Qcow2::read(&dir.join("packed2.qcow2"));
    let first = |name: &str, l2: u64| {
        let file = fs::File::open(dir.join(name)).unwrap();
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, l2).unwrap();
        u64::from_be_bytes(bytes)
    };
    let shift = 62 - 8;
    let entry = first("packed.qcow2", packed.l2);
    assert_ne!(entry & PACKED, 0, "the first cluster is packed");
    let entry2 = first("packed2.qcow2", packed2.l2);
    let place = entry & ((1 << shift) - 1);
    let place2 = entry2 & ((1 << shift) - 1);
    let on = |pokes, then| case("", "snap.qcow2", pokes, then);
    let wide_on = |bitmap, then| case("", "wide.qcow2", word(wide.l2 + 8, bitmap), then);
    let packed_on = |pokes, then| case("", "packed.qcow2", pokes, then);
    let named = [
        (
            "snapshots beyond the file",
            on(word(64, 1 << 40), Refused("beyond the end")),
        ),
        (
            "snapshots that are not there",
            on(
                [half(60, 65536), word(64, 0x10_0000)].concat(),
                Refused("beyond the end"),
            ),
        ),
        (
            "a huge L1 table of a snapshot",
            on(half(at + 8, u32::MAX), Refused("impossible L1 table")),
        ),
        (
            "a large L1 table of a snapshot",
            on(half(at + 8, 4 << 20), Refused("beyond the end")),
        ),
        (
            "an unaligned L1 table of a snapshot",
            on(word(at, 512), Refused("impossible L1 table")),
        ),
        (
            "an L1 table of a snapshot beyond the file",
            on(word(at, 1 << 40), Refused("beyond the end")),
        ),
        (
            "long names of a snapshot",
            on(half(at + 12, u32::MAX), Refused("two tables")),
        ),
        (
            "much extra data of a snapshot",
            on(
                half(at + 36, u32::MAX),
                Refused("snapshot table is too large"),
            ),
        ),
        (
            "a snapshot with the active L1 table",
            on(
                word(at, Qcow2::read(&dir.join("snap.qcow2")).l1),
                Refused("two tables"),
            ),
        ),
        (
            "a subcluster both zero and data",
            wide_on(1 | 1 << 32, Marked(Read(0))),
        ),
        (
            "a subcluster both zero and data, written",
            wide_on(1 | 1 << 32, Marked(Write(512))),
        ),
        (
            "subclusters without a place",
            case("", "wide.qcow2", word(wide.l2, 0), Marked(Read(0))),
        ),
        (
            "packed with subclusters",
            case(
                "",
                "wide.qcow2",
                [word(wide.l2, PACKED | wide.data), word(wide.l2 + 8, 1)].concat(),
                Marked(Read(0)),
            ),
        ),
        (
            "a packed cluster of rubbish",
            packed_on(vec![(place, vec![0xff; 64])], Fails(Read(0))),
        ),
        (
            "a packed cluster of zeroes",
            packed_on(vec![(place, vec![0; 65536])], Fails(Read(0))),
        ),
        (
            "a packed cluster beyond the file",
            packed_on(word(packed.l2, PACKED | 1 << 45), Fails(Read(0))),
        ),
        (
            "a packed cluster beyond the file, written",
            packed_on(word(packed.l2, PACKED | 1 << 45), Fails(Write(0))),
        ),
        (
            "a packed cluster in the header",
            packed_on(word(packed.l2, PACKED), Fails(Read(0))),
        ),
        (
            "a zstd cluster of rubbish",
            case(
                "",
                "packed2.qcow2",
                vec![(place2, vec![0xff; 64])],
                Fails(Read(0)),
            ),
        ),
        (
            "a zstd frame with a huge window",
            case(
                "",
                "packed2.qcow2",
                vec![(place2, vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0xf0])],
                Fails(Read(0)),
            ),
        ),
    ];
    let cases = named.into_iter();
    cases.map(|(name, case)| Case { name, ..case }).collect()
}

/// QEMU's test 059: extents whose tables lie.
fn extents(dir: &Path) -> Vec<Case> {
    let bytes = fs::read(dir.join("good.vmdk")).unwrap();
    let half =
        |at: u64| u32::from_le_bytes(bytes[at as usize..at as usize + 4].try_into().unwrap());
    let (redundant, directory, overhead) = (half(48), half(56), half(64));
    let table = half(u64::from(directory) * 512);
    let entry = u64::from(table) * 512;
    let first = u64::from(directory) * 512;
    let stream = fs::read(dir.join("stream.vmdk")).unwrap();
    // The first marker of a grain: its sector and its length.
    let marker = 128 * 512;
    assert!(!stream[marker + 8..].is_empty(), "a grain follows");
    let on = |pokes, then| case("", "good.vmdk", pokes, then);
    let stream_on = |pokes, then| case("", "stream.vmdk", pokes, then);
    let named = [
        (
            "a grain in the header",
            on(little(entry, 2), Fails(Write(0))),
        ),
        (
            "a grain in a grain table",
            on(little(entry, table), Fails(Write(0))),
        ),
        (
            "a grain in the directory",
            on(little(entry, directory), Fails(Zero(0))),
        ),
        (
            "a grain before the first place for grains",
            on(little(entry, overhead - 1), Fails(Write(0))),
        ),
        (
            "a grain beyond the file, written",
            on(little(entry, u32::MAX), Fails(Write(0))),
        ),
        (
            "a grain beyond the file, read",
            on(little(entry, u32::MAX), Works(Read(0))),
        ),
        (
            "a grain beyond the file, discarded",
            on(little(entry, u32::MAX), Fails(Discard(0))),
        ),
        (
            "a grain table beyond the file",
            on(little(first, u32::MAX - 8), Refused("beyond the end")),
        ),
        (
            "a grain table in the header",
            on(little(first, 1), Refused("two tables of an extent overlap")),
        ),
        (
            "a grain table in the directory",
            on(
                little(first, directory),
                Refused("two tables of an extent overlap"),
            ),
        ),
        (
            "one directory for two",
            on(
                little_long(48, u64::from(directory)),
                Refused("two tables of an extent overlap"),
            ),
        ),
        (
            "a grain table of the other directory",
            on(
                little(first, half(u64::from(redundant) * 512)),
                Refused("two tables of an extent overlap"),
            ),
        ),
        (
            "the directory beyond the file",
            on(little_long(56, 1 << 30), Refused("beyond the end")),
        ),
        (
            "the descriptor in the directory",
            on(
                [little_long(28, u64::from(directory)), little_long(36, 1)].concat(),
                Refused("not a VMDK"),
            ),
        ),
        (
            "a huge capacity",
            on(little_long(12, 1 << 39), Refused("capacity")),
        ),
        (
            "a large capacity",
            on(little_long(12, 1 << 30), Refused("overlap")),
        ),
        (
            "a packed image",
            stream_on(vec![], Refused("streamOptimized")),
        ),
    ];
    let cases = named.into_iter();
    cases.map(|(name, case)| Case { name, ..case }).collect()
}

fn act(image: &Image, what: Do) -> Result<(), ImageError> {
    match what {
        Read(at) => image.read_at(&mut [0; 512], at),
        Write(at) => image.write(&mut Segments::from_vec(vec![7; 512]), at, 512),
        Zero(at) => image.empty(at, 512, Emptying::Zero),
        Discard(at) => {
            let done = image.empty(at, CLUSTER, Emptying::Discard);
            done.and_then(|()| image.flush())
        }
    }
}

/// The most memory this process has had since the last call, in KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap().parse();
    fs::write("/proc/self/clear_refs", "5").unwrap();
    kib.unwrap()
}

fn try_case(dir: &Path, case: &Case) -> Result<(), String> {
    let path: PathBuf = dir.join(format!("bad-{}", case.image));
    fs::copy(dir.join(case.image), &path).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    for (at, bytes) in &case.pokes {
        file.write_all_at(bytes, *at).unwrap();
    }
    drop(file);
    let before = fs::read(&path).unwrap();
    // Looking is allowed or refused, but changes nothing, whatever is looked at.
    if let Ok(image) = try_open(&path, true) {
        let mut bytes = vec![0; 512];
        for at in (0..image.size()).step_by(CLUSTER as usize).take(64) {
            let _ = image.read_at(&mut bytes, at);
        }
        let _ = image.close();
    }
    if fs::read(&path).unwrap() != before {
        return Err("looking has changed the image".to_owned());
    }
    let opened = try_open(&path, false);
    let (what, fails, marked) = match (case.then, &opened) {
        (Refused(reason), Err(error)) if chain(error).contains(reason) => {
            return if fs::read(&path).unwrap() == before {
                Ok(())
            } else {
                Err("a refused image has changed".to_owned())
            };
        }
        (_, Err(error)) => return Err(format!("refused: {}", chain(error))),
        (Refused(_), Ok(_)) => return Err("opened".to_owned()),
        (Marked(what), _) => (what, true, true),
        (Fails(what), _) => (what, true, false),
        (Works(what), _) => (what, false, false),
    };
    let image = opened.map_err(|error| chain(&error))?;
    let done = act(&image, what);
    if done.is_ok() == fails {
        return Err(format!("the operation gave {done:?}"));
    }
    // The process lives: what is sound can be read, and the end is orderly.
    let _ = image.read_at(&mut [0; 512], 3 * CLUSTER);
    let closed = image.close();
    drop(image);
    let is_marked = case.image.ends_with("qcow2") && fs::read(&path).unwrap()[79] & 2 != 0;
    if marked != is_marked {
        return Err(format!(
            "marked as corrupt: {is_marked}, after {done:?}, close {closed:?}"
        ));
    }
    if marked {
        let error = try_open(&path, false).err().map(|error| chain(&error));
        if !error.is_some_and(|error| error.contains("marked corrupt")) {
            return Err("it was opened again".to_owned());
        }
    }
    Ok(())
}

/// One test, because it measures the memory of its process.
#[test]
fn damaged_images() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut cases = tables(dir.path());
    cases.extend(snapshots_and_entries(dir.path()));
    cases.extend(extents(dir.path()));
    let mut wrong = Vec::new();
    for case in &cases {
        peak();
        let start = peak();
        let result = try_case(dir.path(), case);
        let more = peak().saturating_sub(start);
        println!("{:<12} {:<45} {more} KiB", case.image, case.name);
        if let Err(reason) = result {
            wrong.push(format!("{} ({}): {reason}", case.name, case.image));
        }
        if more > MOST_KIB {
            wrong.push(format!("{} ({}): {more} KiB", case.name, case.image));
        }
    }
    assert!(cases.len() >= 60, "only {} cases", cases.len());
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}
