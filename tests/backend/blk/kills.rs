//! kill -9 under load, and what is on the disk afterwards.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use msb_testkit::frontend::{FrontEnd, Part};

use super::{BODY, HEADER, OK, READ, SIZE, WRITE, folder_with, header, request, serve};

const SECTORS: u64 = SIZE / 512;

/// A write under way: its number, first sector, count of sectors and byte.
type Write = (u16, u64, u64, u8);

/// Random writes, and what each sector may hold.
struct Load {
    seed: u64,
    allowed: Vec<Vec<u8>>,
    under_way: Vec<Write>,
}

impl Load {
    fn next(&mut self, limit: u64) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % limit
    }

    /// Puts up to sixteen writes that do not touch each other into the queue.
    fn put(&mut self, front: &mut FrontEnd) {
        for slot in 0..16_u64 {
            let (first, count) = (self.next(SECTORS - 24), 1 + self.next(24));
            let byte = 1 + self.next(255) as u8;
            let clashes =
                |&(_, other, len, _): &Write| first < other + len && other < first + count;
            if self.under_way.iter().any(clashes) {
                continue;
            }
            let (head, body) = (HEADER + slot * 32, BODY + slot * 16384);
            front.memory.write(head, &header(WRITE, first));
            front.memory.write(body, &vec![byte; count as usize * 512]);
            let parts = [
                Part::Out(head, 16),
                Part::Out(body, count as u32 * 512),
                Part::In(head + 16, 1),
            ];
            let number = front.put(0, &parts);
            self.under_way.push((number, first, count, byte));
        }
    }

    /// Notes what has been answered.
    fn take(&mut self, front: &mut FrontEnd) -> Result<()> {
        while let Some((number, _)) = front.finished(0) {
            let found = self.under_way.iter().position(|write| write.0 == number);
            let found = found.context("an answer to no request")?;
            let (_, first, count, byte) = self.under_way.swap_remove(found);
            self.allowed[first as usize..(first + count) as usize].fill(vec![byte]);
        }
        Ok(())
    }

    /// What was not answered may have happened.
    fn give_up(&mut self) {
        for (_, first, count, byte) in self.under_way.drain(..) {
            for sector in &mut self.allowed[first as usize..(first + count) as usize] {
                sector.push(byte);
            }
        }
    }

    fn run_until(&mut self, front: &mut FrontEnd, end: Instant) -> Result<()> {
        while Instant::now() < end {
            self.put(front);
            front.kick(0)?;
            while !self.under_way.is_empty() && Instant::now() < end {
                self.take(front)?;
            }
        }
        Ok(())
    }
}

/// Fails unless qemu-img finds no error. The kernel frees the lock of a killed process when its
/// last transfer has ended, which is a moment later.
fn judge(image: &Path, format: &str) -> Result<()> {
    let verb = if format == "raw" { "info" } else { "check" };
    for _ in 0..500 {
        let output = Command::new("qemu-img")
            .args([verb, "-f", format])
            .arg(image)
            .output()?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        if said.contains("lock") {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        }
        ensure!(matches!(output.status.code(), Some(0 | 3)), "{said}");
        return Ok(());
    }
    bail!("the lock of a killed process stays")
}

/// kill -9 at any moment under load: what was answered is there, and the next process gets the lock.
/// `MSB_KILLS` sets how often.
#[test]
fn whatever_is_killed_keeps_what_was_answered() -> Result<()> {
    let asked = std::env::var("MSB_KILLS").ok();
    let kills: u64 = asked.and_then(|n| n.parse().ok()).unwrap_or(12);
    for (image, format) in [("a.qcow2", "qcow2"), ("a.vmdk", "vmdk"), ("a.raw", "raw")] {
        let folder = folder_with(image, format)?;
        let mut load = Load {
            seed: 88_172_645_463_325_252,
            allowed: vec![vec![0]; usize::try_from(SECTORS)?],
            under_way: Vec::new(),
        };
        for kill in 0..kills {
            let what = format!("{image}, kill {kill}");
            let (mut backend, mut front) = serve(folder.path(), image, &[])?;
            check_sectors(&mut front, &mut load.allowed).context(what.clone())?;
            let time = Duration::from_micros(load.next(30_000));
            load.run_until(&mut front, Instant::now() + time)?;
            backend.kill()?;
            load.take(&mut front)?;
            load.give_up();
            judge(&folder.path().join(image), format).context(what)?;
        }
    }
    Ok(())
}

/// Reads the whole disk and narrows what each sector may hold down to what it does hold.
fn check_sectors(front: &mut FrontEnd, allowed: &mut [Vec<u8>]) -> Result<()> {
    for (nth, part) in allowed.chunks_mut(2048).enumerate() {
        let (status, back) = request(front, 1, READ, nth as u64 * 2048, &[], 1 << 20)?;
        ensure!(status == OK, "a read gave {status}");
        for (at, (sector, allowed)) in back.chunks(512).zip(part).enumerate() {
            let torn = sector.iter().any(|byte| *byte != sector[0]);
            let number = nth * 2048 + at;
            ensure!(
                !torn && allowed.contains(&sector[0]),
                "sector {number} holds {} and not {allowed:?}",
                sector[0]
            );
            *allowed = vec![sector[0]];
        }
    }
    Ok(())
}
