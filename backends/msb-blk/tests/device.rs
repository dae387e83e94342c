//! The device as a driver sees it, over plain buffers instead of a queue.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use msb_blk::device::{BlkDevice, DeviceConfig};
use msb_blk::image::{Format, Image, open};
use msb_vhost::{Device, Request, Segments};
use support::*;

const MIB: usize = 1 << 20;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

struct Driver {
    device: BlkDevice,
    image: Arc<Image>,
}

impl Driver {
    fn new(path: &Path, read_only: bool, deny_writes: bool) -> Self {
        let options = support::options(Format::of_path(path), read_only);
        let image = Arc::new(open(path, &options).unwrap());
        let config = DeviceConfig {
            serial: "twelve-bytes".into(),
            queues: 1,
            queue_size: 256,
            read_only: deny_writes,
        };
        let device = BlkDevice::new(Arc::clone(&image), config).unwrap();
        Self { device, image }
    }

    /// Sends a request with room for `room` bytes and a status; returns data, status, used length.
    fn send(&self, kind: u32, sector: u64, body: &[u8], room: usize) -> (Vec<u8>, u8, u32) {
        let mut readable = kind.to_le_bytes().to_vec();
        readable.extend([0; 4]);
        readable.extend(sector.to_le_bytes());
        readable.extend(body);
        let (writable, used) = self.raw(readable, room + 1);
        let (data, status) = writable.split_at(room);
        (data.to_vec(), status[0], used)
    }

    fn raw(&self, readable: Vec<u8>, writable: usize) -> (Vec<u8>, u32) {
        let writable = Segments::from_vec(vec![0xee; writable]);
        let answer = writable.clone();
        let (done, finished) = channel();
        let request = Request::new(Segments::from_vec(readable), writable, move |used| {
            done.send(used).unwrap();
        });
        self.device.handle(0, request);
        self.device.end_batch(0);
        for _ in 0..1000 {
            match finished.recv_timeout(Duration::from_millis(10)) {
                Ok(used) => return (answer.to_vec(), used),
                Err(_) => {
                    self.device.reap(0);
                    self.device.end_batch(0);
                }
            }
        }
        panic!("no answer within ten seconds");
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

fn disk(bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

#[test]
fn reads_and_writes() {
    let bytes = pattern(MIB, 1);
    let (_dir, path) = disk(&bytes);
    let driver = Driver::new(&path, false, false);
    let (data, status, used) = driver.send(0, 3, &[], 4096);
    assert_eq!((status, used), (OK, 4097));
    assert!(data == bytes[3 * 512..3 * 512 + 4096]);
    let new = Random(5).bytes(2048);
    assert_eq!(driver.send(1, 7, &new, 0), (vec![], OK, 1));
    assert_eq!(driver.send(4, 0, &[], 0), (vec![], OK, 1));
    assert!(fs::read(&path).unwrap()[7 * 512..7 * 512 + 2048] == new);
}

#[test]
fn what_the_driver_gets_wrong_costs_only_its_request() {
    let (_dir, path) = disk(&pattern(MIB, 1));
    let driver = Driver::new(&path, false, false);
    let sound = || assert_eq!(driver.send(0, 0, &[], 512).1, OK);
    for (kind, sector, body, room, expected) in [
        (0, 2048, vec![], 512, IOERR),
        (0, 2047, vec![], 1024, IOERR),
        (0, u64::MAX, vec![], 512, IOERR),
        (0, u64::MAX / 512, vec![], 512, IOERR),
        (0, 0, vec![], 511, IOERR),
        (0, 0, vec![], 0, OK),
        (1, 0, vec![], 0, OK),
        (1, 0, vec![1; 100], 0, IOERR),
        (1, 2048, vec![1; 512], 0, IOERR),
        (2, 0, vec![], 512, UNSUPP),
        (99, 0, vec![], 512, UNSUPP),
        (14, 0, range(0, 1, 0), 0, UNSUPP),
        (11, 0, range(0, 8, 1), 0, UNSUPP),
        (11, 0, range(2048, 8, 0), 0, IOERR),
        (13, 0, range(0, u32::MAX, 0), 0, IOERR),
        (13, 0, vec![0; 7], 0, IOERR),
    ] {
        assert_eq!(
            driver.send(kind, sector, &body, room).1,
            expected,
            "{kind} {sector} {room}"
        );
        sound();
    }
    // No room for a status: nothing is written, the descriptor comes back.
    assert_eq!(driver.raw(vec![0; 16], 0), (vec![], 0));
    // A header that is cut off still gets its status.
    assert_eq!(driver.raw(vec![0; 15], 513).0[512], IOERR);
    assert_eq!(driver.raw(vec![], 1), (vec![IOERR], 1));
    sound();
}

#[test]
fn the_serial_number_is_padded() {
    let (_dir, path) = disk(&pattern(MIB, 1));
    let driver = Driver::new(&path, false, false);
    let (id, status, _) = driver.send(8, 0, &[], 20);
    assert_eq!(
        (&id[..], status),
        (&b"twelve-bytes\0\0\0\0\0\0\0\0"[..], OK)
    );
    assert_eq!(driver.send(8, 0, &[], 6).0, b"twelve");
    assert_eq!(driver.send(8, 0, &[], 0).1, OK);
}

#[test]
fn discards_make_holes_and_zeroes_zero() {
    use std::os::unix::fs::MetadataExt;
    let (_dir, path) = disk(&Random(9).bytes(4 * MIB));
    let driver = Driver::new(&path, false, false);
    let before = fs::metadata(&path).unwrap().blocks();
    let two = [range(2048, 2048, 0), range(6144, 1024, 0)].concat();
    assert_eq!(driver.send(11, 0, &two, 0).1, OK);
    let after = fs::metadata(&path).unwrap();
    assert_eq!(after.len(), 4 * MIB as u64);
    assert!(
        after.blocks() + 3000 <= before,
        "{} of {before} blocks left",
        after.blocks()
    );
    for flags in [0, 1] {
        assert_eq!(driver.send(13, 0, &range(1, 9, flags), 0).1, OK);
    }
    let bytes = fs::read(&path).unwrap();
    assert!(bytes[512..10 * 512].iter().all(|&b| b == 0));
    assert!(
        bytes[..512].iter().any(|&b| b != 0) && bytes[10 * 512..][..512].iter().any(|&b| b != 0)
    );
}

/// Each of the three layers keeps the image unchanged alone.
#[test]
fn read_only_three_times() {
    let bytes = pattern(MIB, 1);
    let (_dir, path) = disk(&bytes);
    let changes = [
        (1, vec![7; 512]),
        (11, range(0, 8, 0)),
        (13, range(0, 8, 0)),
    ];
    // The request gate, over an image that could be written.
    let gate = Driver::new(&path, false, true);
    assert_ne!(
        gate.device.features() & 1 << 5,
        0,
        "the feature says read-only"
    );
    assert_eq!(gate.device.features() & (1 << 13 | 1 << 14), 0);
    // The image, behind a gate that lets everything through.
    let image = Driver::new(&path, true, false);
    for driver in [&gate, &image] {
        for (kind, body) in &changes {
            assert_eq!(driver.send(*kind, 0, body, 0).1, IOERR);
        }
        assert_eq!(driver.send(4, 0, &[], 0).1, OK);
        assert_eq!(driver.send(0, 0, &[], 512).0, bytes[..512]);
    }
    // The descriptor.
    let Ok(extent) = image.image.locate(0, 512) else {
        panic!("raw has data")
    };
    let msb_blk::image::Place::File(file, _) = extent.place else {
        panic!("raw has data")
    };
    assert!(
        file.write_at(&[7; 512], 0, msb_blk::file::Durability::Later)
            .is_err()
    );
    let flags = rustix::fs::fcntl_getfl(file.descriptor().unwrap().as_fd()).unwrap();
    assert!(!flags.intersects(rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::RDWR));
    assert!(fs::read(&path).unwrap() == bytes);
}

#[test]
fn the_configuration_is_complete() {
    let (_dir, path) = disk(&pattern(MIB, 1));
    let driver = Driver::new(&path, false, false);
    let config = driver.device.config();
    let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), 2048);
    assert_eq!((u32_at(8), u32_at(12), u32_at(20)), (0, 254, 512));
    assert_eq!((config[32], config[34]), (1, 1), "writeback, one queue");
    assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (1 << 22, 32, 8));
    assert_eq!((u32_at(48), u32_at(52), config[56]), (1 << 22, 32, 1));
    assert_eq!(config.len(), 60);
    driver.device.write_config(32, &[0]).unwrap();
    assert_eq!(driver.device.config()[32], 0);
    assert_eq!(driver.send(1, 0, &[7; 512], 0).1, OK);
    driver.device.reset();
    assert_eq!(driver.device.config()[32], 1);
    for (offset, data) in [
        (32, &[2][..]),
        (32, &[0, 0]),
        (0, &[0]),
        (u32::MAX, &[1]),
        (32, &[]),
    ] {
        assert!(
            driver.device.write_config(offset, data).is_err(),
            "{offset} {data:?}"
        );
    }
}

/// Pieces the page cache does not have come through the ring, also around holes and the end.
#[test]
fn cold_reads_go_through_the_ring() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bytes = pattern(8 * MIB, 4);
    fs::write(dir.path().join("a.raw"), &bytes).unwrap();
    run_in(
        dir.path(),
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", "a.raw", "b.qcow2"],
    );
    for name in ["a.raw", "b.qcow2"] {
        let path = dir.path().join(name);
        let driver = Driver::new(&path, true, true);
        driver.device.completion_fd(0).unwrap();
        let file = fs::File::open(&path).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut random = Random(7);
        for _ in 0..100 {
            let sectors = 1 + random.below(700) as usize;
            let first = random.below(16384 - sectors as u64) as usize;
            let (data, status, _) = driver.send(0, first as u64, &[], sectors * 512);
            assert_eq!(status, OK);
            assert!(
                data == bytes[first * 512..][..sectors * 512],
                "{name} {first}+{sectors}"
            );
        }
    }
}

#[test]
fn neighbours_of_a_turn_are_written_together() {
    const PIECE: usize = 64 << 10;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let mut expected = vec![0; 2 * MIB];
    if has_qemu_img() {
        qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "2M"]);
    } else {
        fs::write(dir.path().join("disk.raw"), &expected).unwrap();
    }
    let path = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap();
    let driver = Driver::new(&path.path(), false, false);
    let mut random = Random(7);
    let (done, finished) = channel();
    // Twelve neighbours are more than are written at once; then a gap, one from before, and one
    // over the same place, which must win because it comes last.
    let places: Vec<usize> = (0..12).chain([20, 15, 16, 15]).collect();
    let mut send = |at: usize, len: usize| {
        let bytes = random.bytes(len);
        expected[at..at + len].copy_from_slice(&bytes);
        let header = [1_u64.to_le_bytes(), (at as u64 / 512).to_le_bytes()].concat();
        let readable = Segments::from_vec([header, bytes].concat());
        let writable = Segments::from_vec(vec![0xee]);
        let (done, status) = (done.clone(), writable.clone());
        let request = Request::new(readable, writable, move |_| {
            done.send(status.to_vec()).unwrap();
        });
        driver.device.handle(0, request);
    };
    send(30 * PIECE, 512);
    assert_eq!(finished.try_recv(), Ok(vec![OK]), "a short write waits");
    send(0, PIECE);
    assert!(finished.try_recv().is_err(), "a long one does not");
    for &place in places.iter().skip(1) {
        send(place * PIECE, PIECE);
    }
    driver.device.end_turn(0);
    let answers: Vec<Vec<u8>> = finished.try_iter().collect();
    assert_eq!(answers, vec![vec![OK]; places.len()]);
    assert!(content(&driver.image) == expected);
}
