//! Keeps a queue filled for a while, and counts.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::device::{Device, Slot};
use super::ring::{Part, Ring, Window};
use super::server::Server;

/// What is asked of a device, over and over. Each queue has one.
pub trait Load: Send {
    /// Writes the next request of a slot; false when there is nothing left to ask.
    fn next(&mut self, slot: Slot, memory: Window, chain: &mut Vec<Part>) -> bool;

    /// Whether the latency of the request that was just sent from a slot counts.
    fn timed(&self, _: Slot) -> bool {
        true
    }

    /// Looks at a reply; returns how many units of work have been completed by it.
    ///
    /// # Errors
    ///
    /// When the reply is not the one that a working server gives.
    fn done(&mut self, slot: Slot, memory: Window, written: u32) -> Result<u64>;
}

/// What one run gave.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Units of work that were completed.
    pub units: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// CPU time of the server meanwhile.
    pub cpu: Duration,
    /// Nanoseconds from sending to completion of each request, in ascending order.
    pub latency: Vec<u32>,
    /// Requests that reached the server, where they are counted.
    pub requests: u64,
    /// What the same took without a server.
    pub native: Duration,
}

impl Sample {
    /// Microseconds of the server's CPU for one unit.
    pub fn cpu_per_unit(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.units.max(1) as f64
    }

    /// The same run as if the server had needed no CPU at all.
    #[must_use]
    pub fn without_server(&self) -> Self {
        Self {
            elapsed: self.elapsed.saturating_sub(self.cpu),
            cpu: Duration::ZERO,
            ..self.clone()
        }
    }

    /// Units a second.
    pub fn rate(&self) -> f64 {
        self.units as f64 / self.elapsed.as_secs_f64()
    }

    /// Microseconds that this part of all requests stayed below.
    pub fn percentile(&self, part: f64) -> f64 {
        let last = self.latency.len().saturating_sub(1);
        let place = (part * last as f64).round() as usize;
        self.latency
            .get(place)
            .map_or(0.0, |nanos| f64::from(*nanos) / 1000.0)
    }
}

/// When a run ends.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// After this time.
    Time(Duration),
    /// When the load has nothing left to ask.
    Done,
}

/// Runs one load in each queue from `first` on: first for `warm`, then counted.
///
/// # Errors
///
/// When the server fails a request.
pub fn measure(
    device: &mut Device,
    first: u16,
    server: &Server,
    loads: &mut [Box<dyn Load>],
    warm: Duration,
    until: Until,
) -> Result<Sample> {
    if !warm.is_zero() {
        all_queues(device, first, loads, Until::Time(warm))?;
    }
    let cpu = server.cpu()?;
    let start = Instant::now();
    let tallies = all_queues(device, first, loads, until)?;
    let elapsed = start.elapsed();
    let cpu = server.cpu()?.saturating_sub(cpu);
    let units = tallies.iter().map(|tally| tally.units).sum();
    let mut latency: Vec<u32> = tallies
        .into_iter()
        .flat_map(|tally| tally.latency)
        .collect();
    latency.sort_unstable();
    Ok(Sample {
        units,
        elapsed,
        cpu,
        requests: latency.len() as u64,
        latency,
        native: Duration::ZERO,
    })
}

#[derive(Default)]
struct Tally {
    units: u64,
    latency: Vec<u32>,
}

fn all_queues(
    device: &mut Device,
    first: u16,
    loads: &mut [Box<dyn Load>],
    until: Until,
) -> Result<Vec<Tally>> {
    let mut queues: Vec<_> = device.queues(first).zip(loads).collect();
    if let [((ring, slots), load)] = queues.as_mut_slice() {
        return Ok(vec![drive(ring, slots, load.as_mut(), until)?]);
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = queues
            .into_iter()
            .map(|((ring, slots), load)| {
                scope.spawn(move || drive(ring, &slots, load.as_mut(), until))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().ok().context("a generator thread panicked")?)
            .collect()
    })
}

fn drive(ring: &mut Ring, slots: &[Slot], load: &mut dyn Load, until: Until) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut chain = Vec::new();
    let mut now = Instant::now();
    let end = match until {
        Until::Time(time) => Some(now + time),
        Until::Done => None,
    };
    let mut started = vec![now; slots.len()];
    let mut busy = 0;
    for slot in slots {
        chain.clear();
        if load.next(*slot, ring.window, &mut chain) {
            ring.push(slot.number, &chain);
            busy += 1;
        }
    }
    ring.publish()?;
    while busy > 0 {
        ring.wait()?;
        now = Instant::now();
        let over = end.is_some_and(|end| now >= end);
        while let Some((number, written)) = ring.pop() {
            let place = usize::from(number);
            let slot = *slots.get(place).context("an answer to no request")?;
            let took = now.duration_since(started[place]).as_nanos();
            if load.timed(slot) {
                tally.latency.push(u32::try_from(took).unwrap_or(u32::MAX));
            }
            tally.units += load.done(slot, ring.window, written)?;
            chain.clear();
            if !over && load.next(slot, ring.window, &mut chain) {
                started[place] = now;
                ring.push(number, &chain);
            } else {
                busy -= 1;
            }
        }
        ring.publish()?;
    }
    Ok(tally)
}
