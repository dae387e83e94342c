//! Decides how long a worker looks for the next request before it sleeps. Pure.
//!
//! To sleep and to be woken costs more than a short wait. So a queue whose sleeps turn out to be
//! short begins to look around first, longer each time up to a limit; one look in vain that is
//! followed by a long sleep ends that. An idle queue therefore never looks, and never wakes.

use std::time::Duration;

/// The first time that is spent on looking.
const FIRST: Duration = Duration::from_micros(2);
/// What a sleep and its wake-up take by themselves.
const WAKE_COST: Duration = Duration::from_micros(5);
/// Looks between two samples of how often the thread was pushed off its CPU.
const SAMPLE: u32 = 64;
/// Sleeps without a look after a sample that shows that others need the CPU; doubled each time.
const PENANCE: u32 = 500;
const LARGEST_PENANCE: u32 = 64_000;

/// The polling of one queue.
#[derive(Debug)]
pub(crate) struct Polling {
    limit: Duration,
    window: Duration,
    looks: u32,
    pushed_off: u64,
    penance: u32,
    next_penance: u32,
}

impl Polling {
    /// Looks for at most `limit` at a time; zero never does.
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            limit,
            window: Duration::ZERO,
            looks: 0,
            pushed_off: 0,
            penance: 0,
            next_penance: PENANCE,
        }
    }

    /// Whether it may ever look.
    pub(crate) fn is_on(&self) -> bool {
        !self.limit.is_zero()
    }

    /// How long to look now.
    pub(crate) fn window(&self) -> Duration {
        self.window
    }

    /// A look begins. `switches` tells how often the thread was pushed off its CPU so far: when
    /// that happens during one look in four, whoever is looked for waits for this very CPU.
    pub(crate) fn look(&mut self, switches: impl FnOnce() -> u64) {
        self.looks += 1;
        if !self.looks.is_multiple_of(SAMPLE) {
            return;
        }
        let before = std::mem::replace(&mut self.pushed_off, switches());
        if self.looks == SAMPLE {
            return;
        }
        if self.pushed_off.saturating_sub(before) * 4 > u64::from(SAMPLE) {
            self.window = Duration::ZERO;
            self.looks = 0;
            self.penance = self.next_penance;
            self.next_penance = (self.next_penance * 2).min(LARGEST_PENANCE);
        } else {
            self.looks = SAMPLE;
            self.next_penance = PENANCE;
        }
    }

    /// A sleep has ended after `took`.
    pub(crate) fn slept(&mut self, took: Duration) {
        if self.penance > 0 {
            self.penance -= 1;
        } else if took > self.limit + WAKE_COST {
            self.window = Duration::ZERO;
        } else {
            self.window = (self.window * 2).max(FIRST).min(self.limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    #[test]
    fn looks_longer_while_sleeps_are_short_and_stops_when_idle() {
        let mut polling = Polling::new(us(10));
        assert_eq!(polling.window(), us(0));
        for expected in [2, 4, 8, 10, 10] {
            polling.slept(us(6));
            assert_eq!(polling.window(), us(expected));
        }
        polling.slept(us(1000));
        assert_eq!(polling.window(), us(0));
    }

    #[test]
    fn gives_way_where_the_cpu_is_wanted() {
        let mut polling = Polling::new(us(10));
        for penance in [PENANCE, 2 * PENANCE] {
            polling.slept(us(6));
            assert_eq!(polling.window(), us(2));
            let mut switches = 0;
            while !polling.window().is_zero() {
                switches += 1;
                assert!(switches < 1000);
                polling.look(|| switches);
            }
            for _ in 0..penance {
                polling.slept(us(6));
                assert_eq!(polling.window(), us(0));
            }
        }
        polling.slept(us(6));
        (0..10_000).for_each(|_| polling.look(|| 7));
        assert_eq!(polling.window(), us(2));
    }

    #[test]
    fn a_limit_of_zero_never_looks() {
        let mut polling = Polling::new(us(0));
        polling.slept(us(1));
        assert_eq!(polling.window(), us(0));
    }
}
