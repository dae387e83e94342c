//! msb-blk under load against a model of the disk, through deaths and failures of the host.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use msb_testkit::frontend::{DATA, EVENT_IDX, FrontEnd, Part};
use msb_testkit::msb::{binary, host};
use tempfile::TempDir;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const OK: u8 = 0;
const IOERR: u8 = 1;
const SIZE: usize = 16 << 20;
const QUEUE: u16 = 256;
/// Requests of three descriptors after which a ring begins anew: none may be open that long.
const LAP: u64 = 80;
/// Requests at a time, each with room for data of its own in guest memory.
const DEPTH: usize = 24;
const ROOM: u64 = 96 << 10;
const FEATURES: u64 = EVENT_IDX | 1 << 9 | 1 << 12;

/// A small generator, so that every run does the same.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8) % end
    }
}

/// The process that serves the disk; ended when dropped.
struct Backend(Child);

impl Backend {
    fn start(folder: &Path, image: &Path, flags: &[&str]) -> Result<Self> {
        let child = Command::new(binary("msb-blk"))
            .arg("--socket-path")
            .arg(folder.join("socket"))
            .arg("--blk-file")
            .arg(image)
            .args(["--num-queues", "2", "--sandbox", "strict"])
            .args(flags)
            .stdin(Stdio::null())
            .spawn()
            .context("starting msb-blk")?;
        Ok(Self(child))
    }

    /// Kills the process that serves; the one that waits for it follows.
    fn kill(&mut self) -> Result<()> {
        let pid = self.0.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        match children.split_whitespace().next() {
            Some(child) => {
                let child = rustix::process::Pid::from_raw(child.parse()?).context("no pid")?;
                rustix::process::kill_process(child, rustix::process::Signal::KILL)?;
            }
            None => self.0.kill()?,
        }
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.kill().ok();
    }
}

/// What one open request is about.
struct Open {
    number: u64,
    slot: usize,
    kind: u32,
    start: usize,
    len: usize,
    shift: u64,
}

/// A driver with many requests under way and a model of what the disk holds.
struct Load {
    front: FrontEnd,
    dice: Dice,
    model: Vec<u8>,
    /// Sectors whose last write failed: they hold anything.
    unknown: Vec<bool>,
    open: HashMap<(u16, u16), Open>,
    free: Vec<usize>,
    sent: u64,
    failed: usize,
}

impl Load {
    fn new(front: FrontEnd, seed: u64) -> Self {
        Self {
            front,
            dice: Dice(seed),
            model: vec![0; SIZE],
            unknown: vec![false; SIZE / 512],
            open: HashMap::new(),
            free: (0..DEPTH).collect(),
            sent: 0,
            failed: 0,
        }
    }

    /// Whether an open request touches these bytes: what happens then is not for us to say.
    fn is_taken(&self, start: usize, len: usize) -> bool {
        let mut open = self.open.values();
        open.any(|other| start < other.start + other.len && other.start < start + len)
    }

    /// Starts requests until all slots are in use. `shift` moves their data off the page grid.
    fn fill(&mut self, shift: u64) -> Result<()> {
        while let Some(slot) = self.free.pop() {
            let len = 512 * usize::try_from(1 + self.dice.below(160))?;
            let start = 512 * usize::try_from(self.dice.below(((SIZE - len) / 512) as u64))?;
            let oldest = self.open.values().map(|open| open.number).min();
            if oldest.is_some_and(|oldest| oldest + LAP <= self.sent) {
                self.free.push(slot);
                break;
            }
            if self.is_taken(start, len) {
                self.free.push(slot);
                continue;
            }
            let kind = if self.dice.below(3) == 0 { READ } else { WRITE };
            let (header, data) = Self::places(slot, shift);
            let mut head = kind.to_le_bytes().to_vec();
            head.extend([0; 4]);
            head.extend((start as u64 / 512).to_le_bytes());
            self.front.memory.write(header, &head);
            self.front.memory.write(header + 16, &[0xff]);
            let size = u32::try_from(len)?;
            let data = if kind == WRITE {
                let seed = self.dice.below(251);
                let bytes: Vec<u8> = (0..len as u64)
                    .map(|at| ((at / 7 + seed) % 251) as u8)
                    .collect();
                self.front.memory.write(data, &bytes);
                Part::Out(data, size)
            } else {
                Part::In(data, size)
            };
            let queue = u16::try_from(slot % 2)?;
            let parts = [Part::Out(header, 16), data, Part::In(header + 16, 1)];
            let head = self.front.put(queue, &parts);
            let request = Open {
                number: self.sent,
                slot,
                kind,
                start,
                len,
                shift,
            };
            self.sent += 1;
            ensure!(
                self.open.insert((queue, head), request).is_none(),
                "slot {slot} is in use"
            );
        }
        self.front.kick(0)?;
        self.front.kick(1)
    }

    fn places(slot: usize, shift: u64) -> (u64, u64) {
        (
            DATA + 64 * slot as u64,
            DATA + (64 << 10) + ROOM * slot as u64 + shift,
        )
    }

    /// Takes finished requests of a queue; waits for at least one, if some are open.
    fn take(&mut self, queue: u16) -> Result<()> {
        if !self.open.keys().any(|(of, _)| *of == queue) {
            return Ok(());
        }
        let mut next = Some(self.front.wait(queue)?);
        while let Some((head, _)) = next {
            // A head that is not open was finished twice.
            let done = self.open.remove(&(queue, head)).context("finished twice")?;
            self.check(&done)?;
            self.free.push(done.slot);
            next = self.front.finished(queue);
        }
        Ok(())
    }

    fn check(&mut self, done: &Open) -> Result<()> {
        let (header, data) = Self::places(done.slot, done.shift);
        let status = self.front.memory.read(header + 16, 1)[0];
        let bytes = self.front.memory.read(data, done.len);
        let model = &mut self.model[done.start..done.start + done.len];
        let unknown = &mut self.unknown[done.start / 512..][..done.len / 512];
        match (done.kind, status) {
            (READ, OK) => {
                let sectors = bytes.chunks(512).zip(model.chunks(512));
                let mut known = sectors.zip(unknown).filter(|(_, unknown)| !**unknown);
                ensure!(
                    known.all(|((read, expected), _)| read == expected),
                    "read at {} differs",
                    done.start
                );
            }
            (WRITE, OK) => {
                model.copy_from_slice(&bytes);
                unknown.fill(false);
            }
            (WRITE, IOERR) => {
                unknown.fill(true);
                self.failed += 1;
            }
            (READ, IOERR) => self.failed += 1,
            _ => anyhow::bail!("status {status}"),
        }
        Ok(())
    }

    /// What the disk must hold, taking from `found` what may be anything.
    fn expected(&self, found: &[u8]) -> Vec<u8> {
        let mut expected = self.model.clone();
        let sectors = expected.chunks_mut(512).zip(found.chunks(512));
        for ((expected, found), _) in sectors.zip(&self.unknown).filter(|(_, unknown)| **unknown) {
            expected.copy_from_slice(found);
        }
        expected
    }

    fn take_all(&mut self) -> Result<()> {
        for queue in 0..2 {
            while self.open.keys().any(|(of, _)| *of == queue) {
                self.take(queue)?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<u8> {
        let header = DATA + 4096;
        let mut head = FLUSH.to_le_bytes().to_vec();
        head.extend([0; 12]);
        self.front.memory.write(header, &head);
        self.front
            .put(0, &[Part::Out(header, 16), Part::In(header + 16, 1)]);
        self.front.kick(0)?;
        self.front.wait(0)?;
        Ok(self.front.memory.read(header + 16, 1)[0])
    }
}

fn image(folder: &Path, format: &str, more: &[&str]) -> Result<PathBuf> {
    let path = folder.join(format!("disk.{format}"));
    let text = path.display().to_string();
    let size = SIZE.to_string();
    let mut line = vec!["create", "-q", "-f", format];
    line.extend(more);
    line.extend([text.as_str(), size.as_str()]);
    host("qemu-img", line)?;
    Ok(path)
}

/// qemu-img is the judge of what is in the image.
fn judge(path: &Path, format: &str, load: &Load) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (text, raw) = (path.display().to_string(), folder.path().join("judged"));
    let raw_text = raw.display().to_string();
    host(
        "qemu-img",
        ["convert", "-f", format, "-O", "raw", &text, &raw_text],
    )?;
    let found = std::fs::read(&raw)?;
    ensure!(
        found == load.expected(&found),
        "{text} differs from the model"
    );
    if format == "qcow2" {
        host("qemu-img", ["check", "-q", "-f", "qcow2", &text])?;
    }
    Ok(())
}

fn connected(folder: &Path) -> Result<FrontEnd> {
    let mut front = FrontEnd::connect(&folder.join("socket"), 4 << 20)?;
    front.start(2, QUEUE, FEATURES)?;
    Ok(front)
}

#[test]
fn many_requests_at_a_time_in_every_cache_mode() -> Result<()> {
    for (format, more) in [
        ("raw", &[][..]),
        ("qcow2", &[]),
        ("qcow2", &["-o", "preallocation=metadata"]),
    ] {
        for cache in ["none", "writeback", "unsafe"] {
            let folder = tempfile::tempdir()?;
            let path = image(folder.path(), format, more)?;
            let mut backend = Backend::start(folder.path(), &path, &["--cache", cache])?;
            let front = connected(folder.path()).context("no O_DIRECT here?")?;
            let mut load = Load::new(front, 0x9e37_79b9_7f4a_7c15);
            for round in 0..60_u64 {
                // Every fourth round with memory that O_DIRECT does not take.
                load.fill(if round % 4 == 3 {
                    4 + round
                } else {
                    512 * (round % 3)
                })?;
                load.take(u16::try_from(round % 2)?)?;
            }
            load.take_all()?;
            ensure!(
                load.flush()? == OK && load.failed == 0,
                "{} failed",
                load.failed
            );
            load.front.hang_up();
            ensure!(backend.0.wait()?.success(), "msb-blk failed");
            judge(&path, format, &load).with_context(|| format!("{format} {cache}"))?;
        }
    }
    Ok(())
}

/// Killed at any moment under load, started again: every request is finished exactly once, and the
/// disk holds what was written.
#[test]
fn a_killed_backend_is_followed_by_the_next() -> Result<()> {
    for (format, cache) in [
        ("raw", "writeback"),
        ("raw", "none"),
        ("qcow2", "writeback"),
    ] {
        let folder = tempfile::tempdir()?;
        let path = image(folder.path(), format, &[])?;
        let flags = ["--cache", cache, "--reconnect"];
        let mut backend = Backend::start(folder.path(), &path, &flags)?;
        let mut front = FrontEnd::connect(&folder.path().join("socket"), 4 << 20)?;
        front.negotiate()?;
        let record = front.inflight(2, QUEUE)?;
        front.share_memory()?;
        let features = FEATURES | 1 << 30 | 1 << 32;
        front.set(
            msb_testkit::frontend::code::SET_FEATURES,
            &features.to_ne_bytes(),
        )?;
        let set = msb_testkit::frontend::code::SET_INFLIGHT_FD;
        front.acknowledged(set, &record.1, &[std::os::fd::AsFd::as_fd(&record.0)])?;
        for queue in 0..2 {
            front.start_queue(queue, QUEUE, 0)?;
            front.enable(queue, true)?;
        }
        let mut load = Load::new(front, 0x1234_5678_9abc_def1);
        for round in 0..12_u64 {
            for turn in 0..load.dice.below(12) {
                load.fill(0)?;
                load.take(u16::try_from(turn % 2)?)?;
            }
            load.fill(0)?;
            let pause = load.dice.below(1500);
            std::thread::sleep(Duration::from_micros(pause));
            backend.kill()?;
            backend = Backend::start(folder.path(), &path, &flags)?;
            load.front
                .resume(&folder.path().join("socket"), FEATURES, &record)?;
            load.take_all()
                .with_context(|| format!("{format} {cache}: round {round}"))?;
            load.front
                .finished(0)
                .map_or(Ok(()), |_| Err(anyhow::anyhow!("one too many")))?;
        }
        ensure!(
            load.flush()? == OK && load.failed == 0,
            "{} failed",
            load.failed
        );
        backend.kill()?;
        if format == "qcow2" {
            // A death leaks at most the clusters that were in reserve.
            let text = path.display().to_string();
            host(
                "qemu-img",
                ["check", "-q", "-r", "leaks", "-f", "qcow2", &text],
            )?;
        }
        judge(&path, format, &load).with_context(|| format!("{format} {cache}"))?;
    }
    Ok(())
}

/// A file system that is taken down when dropped.
struct Mount(TempDir);

impl Mount {
    /// A tmpfs with these options; `None`, with the reason printed, where that is not allowed.
    fn tmpfs(options: &str) -> Result<Option<Self>> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().display().to_string();
        match host("mount", ["-t", "tmpfs", "-o", options, "tmpfs", &path]) {
            Ok(_) => Ok(Some(Self(folder))),
            Err(error) => {
                println!("skipped: cannot mount a tmpfs with {options}: {error}");
                Ok(None)
            }
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        host("umount", ["-l".as_ref(), self.0.path().as_os_str()]).ok();
    }
}

/// A disk on a host that has less room than the guest is told: writes fail, nothing is lost.
fn outgrow(folder: &Path, format: &str) -> Result<()> {
    let path = image(folder, format, &[])?;
    // Quotas are for ordinary users, as whom the backend serves.
    std::os::unix::fs::chown(&path, Some(65534), Some(65534))?;
    let sockets = tempfile::tempdir()?;
    let mut backend = Backend::start(sockets.path(), &path, &[])?;
    let mut load = Load::new(connected(sockets.path())?, 0x0dd0_beef_0dd0_beef);
    for round in 0..150_u64 {
        load.fill(0)?;
        load.take(u16::try_from(round % 2)?)?;
    }
    load.take_all()?;
    ensure!(load.failed > 0, "the host was large enough");
    ensure!(backend.0.try_wait()?.is_none(), "msb-blk has ended");
    load.flush()?;
    load.front.hang_up();
    backend.0.wait()?;
    judge(&path, format, &load)
}

#[test]
fn a_host_without_room_costs_writes_and_nothing_else() -> Result<()> {
    for options in ["size=6m", "usrquota,usrquota_block_hardlimit=6m"] {
        for format in ["raw", "qcow2", "vmdk"] {
            let Some(mount) = Mount::tmpfs(options)? else {
                continue;
            };
            outgrow(mount.0.path(), format).with_context(|| format!("{options} {format}"))?;
        }
    }
    Ok(())
}

#[test]
fn a_host_disk_that_fails_costs_requests_and_nothing_else() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), "raw", &[])?;
    let text = path.display().to_string();
    let device = match host("losetup", ["--find", "--show", &text]) {
        Ok(device) => device.trim().to_owned(),
        Err(error) => {
            println!("skipped: no loop device: {error}");
            return Ok(());
        }
    };
    let result = (|| {
        let cache = ["--cache", "none"];
        let mut backend = Backend::start(folder.path(), Path::new(&device), &cache)?;
        let mut load = Load::new(connected(folder.path())?, 0xabcd_ef01_2345_6789);
        for round in 0..60_u64 {
            load.fill(0)?;
            load.take(u16::try_from(round % 2)?)?;
        }
        load.take_all()?;
        ensure!(load.failed == 0, "failed too early");
        // What the device stands on loses its upper half: EIO from now on there.
        std::fs::File::options()
            .write(true)
            .open(&path)?
            .set_len(SIZE as u64 / 2)?;
        load.unknown[SIZE / 1024..].fill(true);
        for round in 0..60_u64 {
            load.fill(0)?;
            load.take(u16::try_from(round % 2)?)?;
        }
        load.take_all()?;
        ensure!(load.failed > 0, "nothing failed");
        ensure!(backend.0.try_wait()?.is_none(), "msb-blk has ended");
        load.front.hang_up();
        backend.0.wait()?;
        Ok(())
    })();
    host("losetup", ["--detach", &device])?;
    result
}
