//! Crashes at every moment: what was flushed is there, whatever part of the later writes arrived.
//!
//! A recorder below the image logs every change of the file. From the log every state is rebuilt
//! that a crash may leave: after the death of the process, a prefix; after the death of the host,
//! any mixture in which each sector is as it was at some moment since the last sync. qemu-img check
//! judges the structure, a model the content. `MSB_CRASH_STATES` sets how many states are tried.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use msb_blk::file::{Durability, Emptying, HostFile, Wait};
use msb_blk::image::qcow2::{Header, Qcow2};
use msb_blk::image::vmdk::{ExtentKind, ExtentLine, Source, SparseHeader, Vmdk};
use msb_blk::image::{Format, Image, OpenOptions, open};
use msb_vhost::Segments;
use support::*;

#[derive(Clone)]
enum Change {
    Write {
        offset: usize,
        bytes: Vec<u8>,
        now: bool,
    },
    Size(usize),
    Sync,
}

/// A file in memory that remembers how it came about.
#[derive(Default)]
struct Recorder {
    bytes: Mutex<Vec<u8>>,
    log: Mutex<Vec<Change>>,
    /// One change in so many fails, chosen by the generator; none at 0.
    failures: Mutex<(u64, Option<Random>)>,
}

impl Recorder {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            ..Self::default()
        })
    }

    fn len(&self) -> usize {
        self.log.lock().unwrap().len()
    }

    fn fail_one_in(&self, changes: u64, seed: u64) {
        *self.failures.lock().unwrap() = (changes, Some(Random(seed)));
    }

    fn apply(&self, change: Change) -> io::Result<()> {
        if let (one_in @ 1.., Some(random)) = &mut *self.failures.lock().unwrap()
            && random.below(*one_in) == 0
        {
            let errors = [libc::ENOSPC, libc::EIO, libc::EDQUOT];
            let errno = errors[random.below(3) as usize];
            // A write that fails may still have changed part of the range.
            if let Change::Write { offset, bytes, .. } = &change {
                let part = Change::Write {
                    offset: *offset,
                    bytes: bytes[..random.below(bytes.len() as u64 / 512 + 1) as usize * 512]
                        .to_vec(),
                    now: false,
                };
                apply(&mut self.bytes.lock().unwrap(), &part, 0, usize::MAX);
                self.log.lock().unwrap().push(part);
            }
            return Err(io::Error::from_raw_os_error(errno));
        }
        apply(&mut self.bytes.lock().unwrap(), &change, 0, usize::MAX);
        self.log.lock().unwrap().push(change);
        Ok(())
    }
}

/// Applies the part of a change that lies between two offsets.
fn apply(file: &mut Vec<u8>, change: &Change, from: usize, to: usize) {
    match change {
        Change::Write { offset, bytes, .. } => {
            let start = (*offset).max(from);
            let end = (offset + bytes.len()).min(to);
            if start < end {
                if file.len() < end {
                    file.resize(end, 0);
                }
                file[start..end].copy_from_slice(&bytes[start - offset..end - offset]);
            }
        }
        Change::Size(size) => file.resize(*size, 0),
        Change::Sync => {}
    }
}

impl HostFile for Recorder {
    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        let start = (offset as usize).min(bytes.len());
        let len = buf.len().min(bytes.len() - start);
        buf.fill(0);
        buf[..len].copy_from_slice(&bytes[start..start + len]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, durability: Durability) -> io::Result<()> {
        let now = durability == Durability::Now;
        self.apply(Change::Write {
            offset: offset as usize,
            bytes: buf.to_vec(),
            now,
        })
    }

    fn read_into(&self, to: &mut Segments, len: usize, offset: u64, _: Wait) -> io::Result<()> {
        let mut bytes = vec![0; len];
        self.read_at(&mut bytes, offset)?;
        to.write_all(&bytes).map_err(io::Error::other)
    }

    fn write_from(
        &self,
        from: &mut Segments,
        len: usize,
        offset: u64,
        durability: Durability,
    ) -> io::Result<()> {
        let mut bytes = vec![0; len];
        from.read_exact(&mut bytes).map_err(io::Error::other)?;
        self.write_at(&bytes, offset, durability)
    }

    fn empty(&self, offset: u64, len: u64, _: Emptying) -> io::Result<()> {
        let end = self
            .bytes
            .lock()
            .unwrap()
            .len()
            .min((offset + len) as usize);
        let bytes = vec![0; end.saturating_sub(offset as usize)];
        self.apply(Change::Write {
            offset: offset as usize,
            bytes,
            now: false,
        })
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.apply(Change::Size(size as usize))
    }

    fn sync(&self) -> io::Result<()> {
        self.apply(Change::Sync)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

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

enum Action {
    Write(usize, Vec<u8>),
    Discard(usize, usize),
    Flush,
}

/// What was done, and how long the log was before and after. What failed never ended.
struct Done {
    action: Action,
    began: usize,
    ended: usize,
}

fn work(image: &Image, recorder: &Recorder, random: &mut Random, steps: usize) -> Vec<Done> {
    let sectors = image.size() / 512;
    let mut done = Vec::new();
    for _ in 0..steps {
        let began = recorder.len();
        let first = random.below(sectors);
        let most = if random.below(6) == 0 { 300 } else { 12 };
        let count = (1 + random.below(most)).min(sectors - first);
        let (at, len) = (first * 512, count * 512);
        let (action, result) = match random.below(12) {
            0..=1 => (Action::Flush, image.flush()),
            2 => {
                let result = image.empty(at, len, Emptying::Discard);
                (Action::Discard(first as usize, count as usize), result)
            }
            3 => {
                let how = if random.below(2) == 0 {
                    Emptying::Zero
                } else {
                    Emptying::Unmap
                };
                let result = image.empty(at, len, how);
                (Action::Write(first as usize, vec![0; len as usize]), result)
            }
            _ => {
                let bytes = random.bytes(len as usize);
                let result = image.write(&mut Segments::from_vec(bytes.clone()), at, len);
                (Action::Write(first as usize, bytes), result)
            }
        };
        let failing = recorder.failures.lock().unwrap().0 > 0;
        assert!(result.is_ok() || failing, "{result:?}");
        let ended = if result.is_ok() {
            recorder.len()
        } else {
            usize::MAX
        };
        done.push(Done {
            action,
            began,
            ended,
        });
    }
    done
}

/// Fails unless each sector has a content it may have after a crash at `moment`.
fn check_content(
    read: &[u8],
    before: &[u8],
    done: &[Done],
    moment: usize,
    killed: bool,
    what: &str,
) {
    let sectors = read.len() / 512;
    // A write that failed leaves the old or the new bytes, also after the next flush.
    let mut allowed: Vec<Vec<(&[u8], bool)>> = before
        .chunks(512)
        .map(|sector| vec![(sector, true)])
        .collect();
    let mut anything = vec![false; sectors];
    for step in done.iter().take_while(|step| step.began <= moment) {
        let whole = step.ended <= moment;
        match &step.action {
            Action::Write(first, bytes) => {
                for (nth, new) in bytes.chunks(512).enumerate() {
                    let sector = &mut allowed[first + nth];
                    if killed && whole {
                        sector.clear();
                        anything[first + nth] = false;
                    }
                    sector.push((new, step.ended < usize::MAX));
                }
            }
            Action::Discard(first, count) => anything[*first..first + count].fill(true),
            Action::Flush if whole => {
                for (sector, anything) in allowed.iter_mut().zip(&anything) {
                    if !anything {
                        let last = sector.iter().rposition(|(_, sure)| *sure).unwrap_or(0);
                        sector.drain(..last);
                    }
                }
            }
            Action::Flush => {}
        }
    }
    for (number, found) in read.chunks(512).enumerate() {
        let fits = anything[number] || allowed[number].iter().any(|(bytes, _)| *bytes == found);
        assert!(
            fits,
            "{what}: sector {number} has none of its {} contents",
            allowed[number].len()
        );
    }
}

fn states() -> usize {
    std::env::var("MSB_CRASH_STATES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(40)
}

fn open_recorded(path: &Path, format: Format) -> (Image, Arc<Recorder>, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let recorder = Recorder::new(bytes.clone());
    let file = Arc::clone(&recorder) as Arc<dyn HostFile>;
    let image = if format == Format::Qcow2 {
        let header = Header::parse(&bytes).unwrap();
        let backing = header.backing.as_ref().map(|name| {
            let name = String::from_utf8(name.clone()).unwrap();
            Arc::new(try_open(&path.with_file_name(name), true).unwrap())
        });
        Image::Qcow2(Box::new(
            Qcow2::open(header, file, None, backing, false).unwrap(),
        ))
    } else {
        let header = SparseHeader::parse(&bytes).unwrap();
        let kind = ExtentKind::Sparse {
            name: String::new(),
        };
        let line = ExtentLine {
            writable: true,
            sectors: header.capacity,
            kind,
        };
        let source = Source::Sparse(file, header);
        let parent = path.with_file_name("base.vmdk");
        let parent = parent
            .exists()
            .then(|| Arc::new(try_open(&parent, true).unwrap()));
        let vmdk = Vmdk::open(vec![(line, source)], parent, None, None, false).unwrap();
        Image::Vmdk(Box::new(vmdk))
    };
    (image, recorder, bytes)
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
    recorder.fail_one_in(one_in, seed);
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
