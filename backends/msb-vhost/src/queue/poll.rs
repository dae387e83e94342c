//! Decides how long a worker looks for the next request before it sleeps. Pure.
//!
//! To sleep and to be woken costs more than a short wait. So a queue whose sleeps turn out to be
//! short begins to look around first, longer each time up to a limit. A look in vain ends that for
//! some sleeps, for more each time that nothing was found in between. An idle queue never looks.

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

/// Sleeps without a look after one in vain; doubled each time, until one finds something.
const REST: u32 = 2;
const LARGEST_REST: u32 = 1024;

/// The polling of one queue.
#[derive(Debug)]
pub(crate) struct Polling {
    limit: Duration,
    window: Duration,
    looks: u32,
    pushed_off: u64,
    penance: u32,
    next_penance: u32,
    next_rest: u32,
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
            next_rest: REST,
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

    /// A look has ended; whether it has found something.
    pub(crate) fn looked(&mut self, found: bool) {
        if found {
            self.next_rest = REST;
        } else if self.window >= self.limit {
            self.window = Duration::ZERO;
            self.penance = self.penance.max(self.next_rest);
            self.next_rest = (self.next_rest * 2).min(LARGEST_REST);
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
    fn rests_longer_and_longer_while_looks_are_in_vain() {
        let mut polling = Polling::new(us(10));
        let mut sleeps = [0; 4];
        for count in &mut sleeps {
            while polling.window() < us(10) {
                polling.slept(us(12));
                *count += 1;
            }
            polling.looked(false);
            assert_eq!(polling.window(), us(0));
        }
        assert_eq!(sleeps, [4, 4 + 2, 4 + 4, 4 + 8]);
        polling.looked(true);
        assert_eq!(polling.next_rest, REST);
    }

    #[test]
    fn a_limit_of_zero_never_looks() {
        let mut polling = Polling::new(us(0));
        polling.slept(us(1));
        assert_eq!(polling.window(), us(0));
    }
}
