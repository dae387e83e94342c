//! What is asked of a block server: reads, writes, flushes and discards, at places of an image.

use anyhow::{Result, ensure};

use crate::harness::device::Slot;
use crate::harness::load::Load;
use crate::harness::ring::{Part, Window};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;

const SECTOR: u64 = 512;
/// Where the status byte lies behind a slot's header address.
const STATUS: u64 = 2048;
/// A status that no server writes.
const NONE: u8 = 0xee;

/// What one request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Gives space back.
    Discard,
}

/// Where the requests go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Anywhere.
    Random,
    /// One behind the other, and again from the begin.
    Sequential,
    /// One behind the other, and then no more.
    OnceThrough,
    /// Each place once, in an order that looks random.
    OnceScattered,
}

/// How a disk is used.
#[derive(Debug, Clone, Copy)]
pub struct Pattern {
    /// What requests do.
    pub kind: Kind,
    /// Where they go.
    pub order: Order,
    /// Bytes of each, a multiple of 512.
    pub bytes: u32,
    /// Bytes of the disk that are used.
    pub span: u64,
    /// Bytes from one place to the next; 0 when they are adjacent.
    pub apart: u64,
    /// A flush follows each so many requests; 0 is none.
    pub flush_every: u64,
    /// Every other request reads instead.
    pub mixed: bool,
    /// Segments of one discard.
    pub segments: u32,
}

/// The load of one queue.
pub struct Disk {
    pattern: Pattern,
    random: u64,
    count: u64,
    place: u64,
    stride: u64,
    lane: u64,
    lanes: u64,
    flushing: Vec<bool>,
    reading: Vec<bool>,
}

impl Disk {
    /// The load of queue `lane` of `lanes`.
    pub fn in_queue(pattern: Pattern, lane: usize, lanes: usize) -> Box<dyn Load> {
        Box::new(Self {
            pattern,
            random: 0x9e37_79b9_7f4a_7c15 ^ (lane as u64 + 1).rotate_left(17),
            count: 0,
            place: 0,
            stride: coprime(pattern.span / unit(pattern) / lanes as u64),
            lane: lane as u64,
            lanes: lanes as u64,
            flushing: Vec::new(),
            reading: Vec::new(),
        })
    }

    /// Byte at which the next request begins; `None` after the last one.
    fn at(&mut self) -> Option<u64> {
        let unit = unit(self.pattern);
        // Each queue has a part of the disk of its own.
        let places = self.pattern.span / unit / self.lanes;
        let place = match self.pattern.order {
            Order::Random => {
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                self.random % places
            }
            Order::Sequential => self.place % places,
            Order::OnceThrough | Order::OnceScattered if self.place >= places => return None,
            Order::OnceThrough => self.place,
            Order::OnceScattered => self.place * self.stride % places,
        };
        self.place += 1;
        Some((self.lane * places + place) * unit)
    }
}

/// Bytes from one place to the next.
fn unit(pattern: Pattern) -> u64 {
    if pattern.apart > 0 {
        return pattern.apart;
    }
    u64::from(pattern.bytes) * u64::from(pattern.segments.max(1))
}

/// A step that visits every one of `places` once, far from its last place.
fn coprime(places: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let near = places * 618 / 1000;
    (near.max(1)..)
        .find(|step| gcd(*step, places.max(1)) == 1)
        .unwrap_or(1)
}

impl Load for Disk {
    fn next(&mut self, slot: Slot, memory: Window, chain: &mut Vec<Part>) -> bool {
        let number = usize::from(slot.number);
        if self.flushing.len() <= number {
            self.flushing.resize(number + 1, false);
            self.reading.resize(number + 1, false);
        }
        let pattern = self.pattern;
        self.count += 1;
        let flush = pattern.flush_every > 0 && self.count.is_multiple_of(pattern.flush_every + 1);
        self.flushing[number] = flush;
        let (code, at) = if flush {
            (FLUSH, 0)
        } else {
            let Some(at) = self.at() else { return false };
            let read = pattern.mixed && self.count.is_multiple_of(2);
            let code = match pattern.kind {
                Kind::Write if !read => OUT,
                Kind::Discard => DISCARD,
                Kind::Read | Kind::Write => IN,
            };
            (code, at)
        };
        self.reading[number] = code == IN;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&code.to_le_bytes());
        if code != DISCARD {
            header[8..].copy_from_slice(&(at / SECTOR).to_le_bytes());
        }
        memory.write(slot.header, &header);
        chain.push(Part::out(slot.header, 16));
        match code {
            IN => chain.push(Part::back(slot.data, pattern.bytes)),
            OUT => {
                // Different bytes at each place, so that nothing can be taken for zeroes.
                memory.write(slot.data, &(at | 1).to_le_bytes());
                chain.push(Part::out(slot.data, pattern.bytes));
            }
            DISCARD => chain.push(segments(pattern, slot, memory, at)),
            _ => {}
        }
        memory.write(slot.header + STATUS, &[NONE]);
        chain.push(Part::back(slot.header + STATUS, 1));
        true
    }

    fn timed(&self, slot: Slot) -> bool {
        // What users notice of a flush is how long others wait.
        !self.pattern.mixed || self.reading[usize::from(slot.number)]
    }

    fn done(&mut self, slot: Slot, memory: Window, _: u32) -> Result<u64> {
        let [status] = memory.array(slot.header + STATUS);
        ensure!(status == 0, "a request ended with status {status}");
        let flush = self.flushing[usize::from(slot.number)];
        Ok(match self.pattern.kind {
            _ if flush => 0,
            Kind::Discard => u64::from(self.pattern.segments),
            Kind::Read | Kind::Write => 1,
        })
    }
}

/// Writes the ranges of a discard.
fn segments(pattern: Pattern, slot: Slot, memory: Window, at: u64) -> Part {
    let sectors = u64::from(pattern.bytes) / SECTOR;
    for segment in 0..u64::from(pattern.segments) {
        let range = slot.data + 16 * segment;
        memory.write(range, &(at / SECTOR + segment * sectors).to_le_bytes());
        memory.write(range + 8, &sectors.to_le_bytes());
    }
    Part::out(slot.data, 16 * pattern.segments)
}

#[cfg(test)]
mod tests {
    use super::coprime;

    #[test]
    fn a_scattered_walk_meets_every_place_once() {
        for places in [1, 2, 16, 1000, 4096, 16_383] {
            let step = coprime(places);
            let mut seen: Vec<u64> = (0..places).map(|place| place * step % places).collect();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..places), "{places}");
        }
    }
}
