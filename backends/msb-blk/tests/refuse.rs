//! Hostile and damaged images are refused with a clear reason, or cost an I/O error at most.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use msb_blk::image::{Format, Image, ImageError, open};
use msb_vhost::Segments;
use support::*;

const MIB: usize = 1 << 20;

struct Folder(tempfile::TempDir);

impl Folder {
    /// A folder in which these qemu-img commands were run; `None` without qemu-img.
    fn new(commands: &[&str]) -> Option<Self> {
        has_qemu_img().then(|| {
            let folder = Self(tempfile::tempdir().unwrap());
            fs::write(folder.path("base.raw"), pattern(MIB, 1)).unwrap();
            for command in commands {
                folder.qemu_img(command);
            }
            folder
        })
    }

    fn qemu_img(&self, command: &str) {
        run_in(
            self.0.path(),
            "qemu-img",
            &command.split(' ').collect::<Vec<_>>(),
        );
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn poke(path: &Path, offset: u64, bytes: &[u8]) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

fn be64_at(path: &Path, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    fs::File::open(path)
        .unwrap()
        .read_exact_at(&mut bytes, offset)
        .unwrap();
    u64::from_be_bytes(bytes)
}

#[track_caller]
fn refused(path: &Path, read_only: bool, expected: &str) {
    let error = try_open(path, read_only)
        .err()
        .unwrap_or_else(|| panic!("opened: {expected}"));
    let text = chain(&error);
    assert!(
        text.contains(expected),
        "{text:?} does not contain {expected:?}"
    );
}

fn write(image: &Image, at: u64, len: usize) -> Result<(), ImageError> {
    image.write(&mut Segments::from_vec(vec![7; len]), at, len as u64)
}

#[test]
fn qcow2_headers() {
    let Some(folder) = Folder::new(&["create -f qcow2 -b base.raw -F raw good.qcow2 8M"]) else {
        return;
    };
    let good = fs::read(folder.path("good.qcow2")).unwrap();
    let table: &[(u64, &[u8], &str)] = &[
        (0, b"QFI\xfa", "not a qcow2 image"),
        (4, &[0, 0, 0, 1], "version 1 is not supported"),
        (4, &[0, 0, 0, 4], "version 4 is not supported"),
        (20, &[0, 0, 0, 8], "cluster size"),
        (20, &[0, 0, 0, 22], "cluster size"),
        (20, &[0xff; 4], "cluster size"),
        (24, &[0x7f; 8], "disk size"),
        (24, &[0, 0, 0x7f, 0, 0, 0, 0, 0], "disk size"),
        (36, &[0xff; 4], "size of the L1 table"),
        (36, &[0; 4], "disk size"),
        (40, &[0xff; 8], "offset of the L1 table"),
        (40, &[0; 8], "offset of the L1 table"),
        (40, &[0, 0, 0, 0, 0, 3, 0, 1], "offset of the L1 table"),
        (48, &[0xff; 8], "offset of the refcount table"),
        (48, &[0; 8], "offset of the refcount table"),
        (
            48,
            &[0, 0, 0, 0, 0, 1, 2, 0],
            "offset of the refcount table",
        ),
        (56, &[0xff; 4], "size of the refcount table"),
        (56, &[0; 4], "size of the refcount table"),
        (60, &[0, 1, 0, 1], "number of snapshots"),
        (
            60,
            &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1],
            "offset of the snapshot table",
        ),
        (32, &[0, 0, 0, 1], "encrypted (AES)"),
        (32, &[0, 0, 0, 2], "encrypted (LUKS)"),
        (32, &[0, 0, 0, 3], "encryption method"),
        (96, &[0, 0, 0, 7], "refcount width"),
        (100, &[0, 0, 0, 103], "header length"),
        (100, &[0xff; 4], "header length"),
        (104, &[1], "compression type"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 8], "compression type"),
        (72, &[0x80, 0, 0, 0, 0, 0, 0, 0], "unknown features: bit 63"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 0x20], "unknown features: bit 5"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 2], "marked corrupt"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 1], "not closed cleanly"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 4], "data file"),
        (
            8,
            &[0, 0, 0, 0, 0, 0, 0xff, 0xff],
            "name of the backing file",
        ),
        (8, &[0xff; 8], "name of the backing file"),
        (16, &[0, 0, 4, 0], "name of the backing file"),
        (116, &[0xff; 4], "header extension"),
    ];
    let path = folder.path("bad.qcow2");
    for (offset, bytes, expected) in table {
        fs::write(&path, &good).unwrap();
        poke(&path, *offset, bytes);
        refused(&path, false, expected);
    }
    for len in [0, 3, 4, 20, 71, 90, 104] {
        fs::write(&path, &good[..len]).unwrap();
        assert!(try_open(&path, false).is_err(), "{len} bytes");
    }
}

#[test]
fn encrypted_images_of_qemu_img() {
    let Some(folder) = Folder::new(&[
        "create -f qcow2 --object secret,id=s,data=x -o \
         encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks.qcow2 4M",
        "create -f qcow2 --object secret,id=s,data=x -o \
         encrypt.format=aes,encrypt.key-secret=s aes.qcow2 4M",
    ]) else {
        return;
    };
    for read_only in [true, false] {
        refused(&folder.path("luks.qcow2"), read_only, "encrypted (LUKS)");
        refused(&folder.path("aes.qcow2"), read_only, "encrypted (AES)");
    }
}

/// Every reference an image can carry is refused without the flag, and no other file is opened.
#[test]
fn references_need_permission() {
    let Some(folder) = Folder::new(&[
        "create -f qcow2 -b base.raw -F raw backing.qcow2",
        "create -f qcow2 -o data_file=data.raw data.qcow2 1M",
        "convert -f raw -O vmdk base.raw parent.vmdk",
        "create -f vmdk -b parent.vmdk -F vmdk delta.vmdk",
        "convert -f raw -O vmdk -o subformat=monolithicFlat base.raw flat.vmdk",
    ]) else {
        return;
    };
    let strict = |name: &str| {
        let path = folder.path(name);
        let options = support::options(Format::of_path(&path), true);
        let options = msb_blk::image::OpenOptions {
            allow_references: false,
            ..options
        };
        open(&path, &options).err().map(|error| chain(&error))
    };
    for name in ["backing.qcow2", "data.qcow2", "delta.vmdk"] {
        assert!(
            strict(name).is_some_and(|e| e.contains("--allow-references")),
            "{name}"
        );
    }
    // The extent that bears the descriptor's name is the image itself.
    assert_eq!(strict("flat.vmdk"), None);
    fs::rename(folder.path("flat.vmdk"), folder.path("other.vmdk")).unwrap();
    assert!(strict("other.vmdk").is_some_and(|e| e.contains("called after the descriptor")));
    assert!(try_open(&folder.path("other.vmdk"), true).is_ok());
}

#[test]
fn only_plain_regular_files_beside_the_image() {
    let Some(folder) = Folder::new(&["create -f qcow2 -b base.raw -F raw a.qcow2"]) else {
        return;
    };
    symlink("base.raw", folder.path("link")).unwrap();
    fs::create_dir(folder.path("dir")).unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(folder.path("fifo"))
            .status()
            .unwrap()
            .success()
    );
    let plain = "plain file name";
    let table = [
        ("/etc/shadow", plain),
        ("../base.raw", plain),
        ("./base.raw", plain),
        ("dir/../base.raw", plain),
        ("file:base.raw", plain),
        ("nbd://host/x", plain),
        ("nbd:unix:socket", plain),
        ("json:{\"driver\":\"file\"}", plain),
        (".", plain),
        ("..", plain),
        ("/dev/zero", plain),
        ("link", "symbolic link"),
        ("dir", "not a regular file"),
        ("fifo", "not a regular file"),
        ("absent", "No such file"),
        ("a.qcow2", "part of this disk already"),
    ];
    let path = folder.path("a.qcow2");
    for (name, expected) in table {
        fs::remove_file(&path).unwrap();
        folder.qemu_img("create -f qcow2 -b base.raw -F raw a.qcow2");
        run_in(
            path.parent().unwrap(),
            "qemu-img",
            &["rebase", "-u", "-F", "raw", "-b", name, "a.qcow2"],
        );
        refused(&path, true, expected);
        refused(&path, false, expected);
    }
}

#[test]
fn chains_end() {
    let Some(folder) = Folder::new(&["create -f qcow2 0.qcow2 1M"]) else {
        return;
    };
    for n in 1..40 {
        folder.qemu_img(&format!(
            "create -f qcow2 -u -b {}.qcow2 -F qcow2 {n}.qcow2 1M",
            n - 1
        ));
    }
    assert!(try_open(&folder.path("32.qcow2"), true).is_ok());
    refused(&folder.path("39.qcow2"), true, "chain is longer than 32");
    folder.qemu_img("rebase -u -F qcow2 -b 1.qcow2 0.qcow2");
    refused(&folder.path("1.qcow2"), true, "part of this disk already");
    folder.qemu_img("create -f qcow2 x.qcow2 1M");
    // A backing file without a format would have to be probed.
    let mut bytes = fs::read(folder.path("5.qcow2")).unwrap();
    let at = bytes
        .windows(4)
        .position(|w| w == 0xe279_2acau32.to_be_bytes())
        .unwrap();
    bytes[at..at + 4].copy_from_slice(&0x1234_5678u32.to_be_bytes());
    fs::write(folder.path("5.qcow2"), bytes).unwrap();
    refused(&folder.path("5.qcow2"), true, "qemu-img rebase -u -F");
}

/// Guest data may never land on metadata, whatever the tables say (QEMU's test 060).
#[test]
fn data_over_metadata() {
    let Some(folder) = Folder::new(&["create -f qcow2 -o cluster_size=64k good.qcow2 4M"]) else {
        return;
    };
    let good = folder.path("good.qcow2");
    run_in(
        good.parent().unwrap(),
        "qemu-io",
        &["-c", "write -P 1 0 256k", "good.qcow2"],
    );
    let l1 = be64_at(&good, 40);
    let l2 = be64_at(&good, l1) & 0x00ff_ffff_ffff_fe00;
    let reftable = be64_at(&good, 48);
    let refblock = be64_at(&good, reftable);
    let bad = folder.path("bad.qcow2");
    for target in [1 << 16, l1, l2, reftable, refblock] {
        fs::copy(&good, &bad).unwrap();
        poke(&bad, l2 + 8, &(target | 1 << 63).to_be_bytes());
        let before = fs::read(&bad).unwrap();
        let image = try_open(&bad, false).unwrap();
        assert!(
            matches!(write(&image, 65536, 512), Err(ImageError::Corrupt(_))),
            "{target:#x}"
        );
        // From then on nothing is written at all, but what is sound can be read.
        assert!(write(&image, 0, 512).is_err());
        image.read_at(&mut [0; 512], 0).unwrap();
        drop(image);
        let after = fs::read(&bad).unwrap();
        assert!(before[80..] == after[80..], "{target:#x} was written over");
        assert_eq!(after[79] & 2, 2, "the corrupt bit is set");
        refused(&bad, false, "marked corrupt");
        assert!(try_open(&bad, true).is_ok());
    }
}

#[test]
fn broken_tables() {
    let Some(folder) = Folder::new(&["create -f qcow2 good.qcow2 4M"]) else {
        return;
    };
    let good = folder.path("good.qcow2");
    run_in(
        good.parent().unwrap(),
        "qemu-io",
        &["-c", "write -P 1 0 256k", "good.qcow2"],
    );
    let l1 = be64_at(&good, 40);
    let l2 = be64_at(&good, l1) & 0x00ff_ffff_ffff_fe00;
    let reftable = be64_at(&good, 48);
    let refblock = be64_at(&good, reftable);
    let bad = folder.path("bad.qcow2");
    let fresh = |offset, bytes: &[u8]| {
        fs::copy(&good, &bad).unwrap();
        poke(&bad, offset, bytes);
    };
    fresh(l1, &(l2 | 1 << 63 | 512).to_be_bytes());
    refused(&bad, false, "L2 table is not aligned");
    fresh(reftable, &(refblock + 512).to_be_bytes());
    refused(&bad, false, "refcount block is not aligned");
    fresh(l2, &(0x5_0200u64 | 1 << 63).to_be_bytes());
    let image = try_open(&bad, false).unwrap();
    assert!(matches!(
        image.read_at(&mut [0; 512], 0),
        Err(ImageError::Corrupt(_))
    ));
    assert!(write(&image, 0, 512).is_err());
    drop(image);
    // All refcounts zero: the first cluster that looks free is the header.
    fresh(refblock, &[0; 32]);
    let image = try_open(&bad, false).unwrap();
    assert!(matches!(
        write(&image, 2 << 20, 512),
        Err(ImageError::Corrupt(_))
    ));
    drop(image);
    assert_eq!(fs::read(&bad).unwrap()[..4], *b"QFI\xfb");
    // No refcount block at all.
    fresh(reftable, &[0; 8]);
    let image = try_open(&bad, false).unwrap();
    assert!(matches!(
        write(&image, 2 << 20, 512),
        Err(ImageError::Corrupt(_))
    ));
    drop(image);
    // Data and tables beyond the end of the file read as zero, and far offsets do no harm.
    fresh(l2, &(0x00ff_ffff_ffff_0000u64 | 1 << 63).to_be_bytes());
    let image = try_open(&bad, true).unwrap();
    let _ = image.read_at(&mut [0; 512], 0);
    fresh(l2, &(1u64 << 62 | 0x3fff_ffff_ffff_ffff).to_be_bytes());
    let image = try_open(&bad, true).unwrap();
    assert!(image.read_at(&mut [0; 512], 0).is_err());
}

#[test]
fn vmdk_headers() {
    let Some(folder) = Folder::new(&[
        "convert -f raw -O vmdk base.raw good.vmdk",
        "convert -f raw -O vmdk -o subformat=streamOptimized base.raw stream.vmdk",
    ]) else {
        return;
    };
    let good = fs::read(folder.path("good.vmdk")).unwrap();
    let path = folder.path("bad.vmdk");
    let table: &[(u64, &[u8], &str)] = &[
        (0, b"KDMX", "not a VMDK image"),
        (4, &[9, 0, 0, 0], "version"),
        (12, &[0xff; 8], "capacity"),
        (12, &[0; 8], "capacity"),
        (20, &[0; 8], "grain size"),
        (20, &[0xff; 8], "grain size"),
        (20, &[3, 0, 0, 0, 0, 0, 0, 0], "grain size"),
        (28, &[0xff; 8], "descriptor"),
        (36, &[0xff; 8], "descriptor"),
        (44, &[0; 4], "grain table"),
        (44, &[0xff; 4], "grain table"),
        (48, &[0xff; 8], "grain directory"),
        (56, &[0xfe; 8], "grain directory"),
        (56, &[0; 8], "grain directory"),
        (64, &[0xff; 8], "overhead"),
    ];
    for (offset, bytes, expected) in table {
        fs::write(&path, &good).unwrap();
        poke(&path, *offset, bytes);
        refused(&path, false, expected);
    }
    refused(&folder.path("stream.vmdk"), false, "streamOptimized");
    assert!(try_open(&folder.path("stream.vmdk"), true).is_ok());
}

#[test]
fn vmdk_extents() {
    let Some(folder) = Folder::new(&[]) else {
        return;
    };
    fs::write(folder.path("a-flat.vmdk"), vec![0; MIB]).unwrap();
    symlink("base.raw", folder.path("link.vmdk")).unwrap();
    let path = folder.path("a.vmdk");
    let table = [
        ("RW 2048 FLAT \"/etc/shadow\" 0", "plain file name"),
        ("RW 2048 FLAT \"../a-flat.vmdk\" 0", "plain file name"),
        ("RW 2048 FLAT \"link.vmdk\" 0", "symbolic link"),
        ("RW 2049 FLAT \"a-flat.vmdk\" 0", "shorter than"),
        ("RW 2048 FLAT \"a-flat.vmdk\" 1", "shorter than"),
        ("RW 2048 SPARSE \"a-flat.vmdk\"", "not a VMDK"),
        (
            "RW 8 FLAT \"a-flat.vmdk\" 0\nRW 8 FLAT \"a-flat.vmdk\" 7",
            "same bytes",
        ),
        (
            "RW 8 VMFSRDM \"a-flat.vmdk\"",
            "line 2 of the VMDK descriptor",
        ),
        ("", "no extents"),
        ("parentCID=12345678\nRW 8 ZERO", "contradict"),
        ("parentFileNameHint=\"x.vmdk\"\nRW 8 ZERO", "contradict"),
        (
            "parentCID=12345678\nparentFileNameHint=\"/x.vmdk\"\nRW 8 ZERO",
            "plain file name",
        ),
    ];
    for (lines, expected) in table {
        fs::write(&path, format!("# Disk DescriptorFile\n{lines}\n")).unwrap();
        refused(&path, false, expected);
    }
    fs::write(&path, "# Disk DescriptorFile\nRW 8 FLAT \"a-flat.vmdk\" 0\nRW 8 FLAT \"a-flat.vmdk\" 8\nRW 8 ZERO\nencoding=\"UTF-8\"\n").unwrap();
    let image = try_open(&path, false).unwrap();
    assert_eq!(image.size(), 24 * 512);
    write(&image, 4096 - 512, 1024).unwrap();
    assert!(
        write(&image, 2 * 4096, 512).is_err(),
        "zero extents take nothing"
    );
    drop(image);
    fs::write(&path, vec![b'#'; 2 * MIB]).unwrap();
    refused(&path, true, "not a VMDK");
}

/// Looking does not change, and opening for writing changes only what it must.
#[test]
fn foreign_bits_stay() {
    let Some(folder) = Folder::new(&[
        "create -f qcow2 -o lazy_refcounts=on a.qcow2 1M",
        "convert -f raw -O vmdk base.raw b.vmdk",
    ]) else {
        return;
    };
    // A compatible bit nobody knows, and an autoclear bit nobody knows.
    poke(&folder.path("a.qcow2"), 80, &[0x40, 0, 0, 0, 0, 0, 0, 1]);
    poke(&folder.path("a.qcow2"), 88, &[0x20, 0, 0, 0, 0, 0, 0, 0]);
    for name in ["a.qcow2", "b.vmdk"] {
        let path = folder.path(name);
        let before = fs::read(&path).unwrap();
        let image = try_open(&path, true).unwrap();
        content(&image);
        assert!(matches!(write(&image, 0, 512), Err(ImageError::ReadOnly)));
        image.flush().unwrap();
        image.close().unwrap();
        drop(image);
        assert!(before == fs::read(&path).unwrap(), "{name}");
        let image = try_open(&path, false).unwrap();
        image.close().unwrap();
        let mut after = fs::read(&path).unwrap();
        if name == "a.qcow2" {
            assert_eq!(after[88], 0, "an unknown autoclear bit is cleared");
            after[88] = 0x20;
        }
        assert!(before == after, "{name}");
    }
}

/// A raw disk stays raw, whatever the guest writes into it.
#[test]
fn raw_is_never_probed() {
    let Some(folder) = Folder::new(&["create -f qcow2 -b base.raw -F raw trap.qcow2 1M"]) else {
        return;
    };
    let trap = fs::read(folder.path("trap.qcow2")).unwrap();
    let path = folder.path("disk.img");
    fs::write(&path, vec![0; MIB]).unwrap();
    let image = try_open(&path, false).unwrap();
    let head = trap[..65536].to_vec();
    image
        .write(&mut Segments::from_vec(head), 0, 65536)
        .unwrap();
    drop(image);
    let image = try_open(&path, false).unwrap();
    assert_eq!(image.size(), MIB as u64);
    assert!(content(&image)[..65536] == trap[..65536]);
}

#[test]
fn one_writer_or_many_readers() {
    let Some(folder) = Folder::new(&["create -f qcow2 a.qcow2 1M"]) else {
        return;
    };
    let path = folder.path("a.qcow2");
    let locked = |read_only| {
        let options = support::options(Format::Qcow2, read_only);
        open(
            &path,
            &msb_blk::image::OpenOptions {
                lock: true,
                ..options
            },
        )
    };
    // Another test may be starting a child, which holds copies of our descriptors for a moment.
    let soon = |read_only| loop {
        match locked(read_only) {
            Ok(image) => break image,
            Err(_) => std::thread::yield_now(),
        }
    };
    let in_use = |read_only| {
        let text = chain(&locked(read_only).err().unwrap());
        assert!(text.contains("in use by another process"), "{text}");
    };
    let reader = soon(true);
    let other = soon(true);
    in_use(false);
    drop((reader, other));
    let writer = soon(false);
    in_use(false);
    in_use(true);
    drop(writer);
    soon(false);
}

/// QEMU's tools see our lock and we see theirs; the kernel frees it with the process.
#[test]
fn qemu_and_msb_blk_keep_out_of_each_others_way() {
    let Some(folder) = Folder::new(&["create -f qcow2 a.qcow2 1M"]) else {
        return;
    };
    let path = folder.path("a.qcow2");
    let locked = |read_only| {
        let options = support::options(Format::Qcow2, read_only);
        let options = msb_blk::image::OpenOptions {
            lock: true,
            ..options
        };
        open(&path, &options).map_err(|error| chain(&error))
    };
    let qemu_io = |read_only: bool| {
        let mut command = Command::new("qemu-io");
        command
            .args(["-f", "qcow2"])
            .arg(&path)
            .stdin(Stdio::piped());
        if read_only {
            command.arg("-r");
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    // With nothing to do it opens the image and ends.
    let refused_by_qemu = |read_only| {
        let mut child = qemu_io(read_only);
        drop(child.stdin.take());
        let output = child.wait_with_output().unwrap();
        String::from_utf8_lossy(&output.stderr).contains("lock")
    };
    // Another test may be starting a child, which holds copies of our descriptors for a moment.
    let soon = |read_only| loop {
        match locked(read_only) {
            Ok(image) => break image,
            Err(_) => std::thread::yield_now(),
        }
    };
    let writer = soon(false);
    assert!(refused_by_qemu(false) && refused_by_qemu(true));
    drop(writer);
    let reader = soon(true);
    assert!(refused_by_qemu(false));
    while refused_by_qemu(true) {}
    drop(reader);
    for (their_read_only, our_read_only, fits) in [
        (false, false, false),
        (false, true, false),
        (true, false, false),
        (true, true, true),
    ] {
        let mut child = qemu_io(their_read_only);
        let mut prompt = [0; 8];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut prompt)
            .unwrap();
        let opened = locked(our_read_only);
        let what = format!("{their_read_only} {our_read_only}");
        match (&opened, fits) {
            (Ok(_), true) => {}
            (Err(text), false) => assert!(text.contains("in use by another process"), "{what}"),
            (other, _) => panic!("{what}: {:?}", other.as_ref().err()),
        }
        drop(opened);
        child.kill().unwrap();
        child.wait().unwrap();
        drop(soon(our_read_only));
    }
}

#[test]
fn what_is_no_file() {
    let Some(folder) = Folder::new(&[]) else {
        return;
    };
    fs::create_dir(folder.path("dir")).unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(folder.path("fifo"))
            .status()
            .unwrap()
            .success()
    );
    refused(&folder.path("absent.raw"), false, "No such file");
    refused(&folder.path("dir"), false, "directory");
    refused(&folder.path("dir"), true, "directory");
    refused(
        &folder.path("fifo"),
        true,
        "neither a regular file nor a block device",
    );
    refused(
        Path::new("/dev/null"),
        true,
        "neither a regular file nor a block device",
    );
}
