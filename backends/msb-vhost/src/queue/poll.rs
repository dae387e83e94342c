//! Decides how long a worker looks for the next request before it sleeps. Pure.
//!
//! To sleep and to be woken costs more than a short wait. So a queue whose sleeps turn out to be
//! short begins to look around first, longer each time up to a limit. A look in vain ends that for
//! some sleeps, for more each time that nothing was found in between. An idle queue never looks.
//!
//! That is not so on every host: where it is dear to interrupt a CPU, a driver that is answered
//! before it has fallen asleep is woken later than one that sleeps already. So both are timed, and a
//! queue that gains nothing by looking sleeps for a long while before it tries again.

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

/// Samples between two tries of how long it takes without a look, and sleeps of such a try.
const SAMPLES: u32 = 8;
const TRY: u32 = 4;

/// What a time was on average lately; none yet when zero.
#[derive(Debug, Default)]
struct Mean(Duration);

impl Mean {
    fn note(&mut self, took: Duration) {
        self.0 = if self.0.is_zero() {
            took
        } else {
            self.0 - self.0 / 4 + took / 4
        };
    }
}

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
    /// Sleeps that are left of a try.
    trying: u32,
    /// How long was looked in vain before the sleep that comes now.
    in_vain: Duration,
    /// Until the next request, by looking and by sleeping at once.
    looking: Mean,
    sleeping: Mean,
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
            trying: 0,
            in_vain: Duration::ZERO,
            looking: Mean::default(),
            sleeping: Mean::default(),
        }
    }

    /// Whether it may ever look.
    pub(crate) fn is_on(&self) -> bool {
        !self.limit.is_zero()
    }

    /// How long to look now.
    pub(crate) fn window(&self) -> Duration {
        if self.trying > 0 {
            return Duration::ZERO;
        }
        self.window
    }

    /// A look begins. `switches` tells how often the thread was pushed off its CPU so far: when
    /// that happens during one look in four, whoever is looked for waits for this very CPU.
    pub(crate) fn look(&mut self, switches: impl FnOnce() -> u64) {
        self.looks += 1;
        if !self.looks.is_multiple_of(SAMPLE) {
            return;
        }
        let is_first = self.looks == SAMPLE;
        let before = std::mem::replace(&mut self.pushed_off, switches());
        let pushed_off = self.pushed_off.saturating_sub(before);
        if !is_first && pushed_off * 4 > u64::from(SAMPLE) || self.gains_nothing() {
            self.window = Duration::ZERO;
            self.looks = 0;
            self.looking = Mean::default();
            self.penance = self.next_penance;
            self.next_penance = (self.next_penance * 2).min(LARGEST_PENANCE);
        } else if !is_first {
            self.next_penance = PENANCE;
            if self.looks > SAMPLES * SAMPLE {
                self.looks = SAMPLE;
                self.trying = if self.looking.0.is_zero() { 0 } else { TRY };
            }
        }
    }

    /// Whether the next request comes no sooner, by an eighth at least, when it is looked for.
    fn gains_nothing(&self) -> bool {
        let (looking, sleeping) = (self.looking.0, self.sleeping.0);
        !looking.is_zero() && !sleeping.is_zero() && looking > sleeping - sleeping / 8
    }

    /// A look has ended after `took`; whether it has found something.
    pub(crate) fn looked(&mut self, found: bool, took: Duration) {
        if found {
            self.next_rest = REST;
            self.looking.note(took);
            return;
        }
        self.in_vain = took;
        if self.window >= self.limit {
            self.window = Duration::ZERO;
            self.penance = self.penance.max(self.next_rest);
            self.next_rest = (self.next_rest * 2).min(LARGEST_REST);
        }
    }

    /// A sleep has ended after `took`.
    pub(crate) fn slept(&mut self, took: Duration) {
        let looked = std::mem::take(&mut self.in_vain);
        let is_short = took <= self.limit + WAKE_COST;
        if is_short && looked.is_zero() {
            self.sleeping.note(took);
        } else if is_short {
            self.looking.note(looked + took);
        }
        if self.trying > 0 && is_short {
            self.trying -= 1;
        } else if self.penance > 0 {
            self.penance -= 1;
        } else if is_short {
            self.window = (self.window * 2).max(FIRST).min(self.limit);
        } else {
            self.window = Duration::ZERO;
            self.trying = 0;
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
            polling.looked(false, us(10));
            assert_eq!(polling.window(), us(0));
        }
        assert_eq!(sleeps, [4, 4 + 2, 4 + 4, 4 + 8]);
        polling.looked(true, us(1));
        assert_eq!(polling.next_rest, REST);
    }

    /// A queue that looks as long as it may, after sleeps of `slept`.
    fn looking(slept: u64) -> Polling {
        let mut polling = Polling::new(us(10));
        while polling.window() < us(10) {
            polling.slept(us(slept));
        }
        polling
    }

    #[test]
    fn sleeps_where_looking_is_no_quicker() {
        let mut polling = looking(6);
        for penance in [PENANCE, 2 * PENANCE] {
            let mut looks = 0;
            while !polling.window().is_zero() {
                looks += 1;
                assert!(looks <= SAMPLE, "it looks on");
                polling.look(|| 0);
                polling.looked(true, us(9));
            }
            for _ in 0..penance {
                polling.slept(us(6));
                assert_eq!(polling.window(), us(0));
            }
            while polling.window() < us(10) {
                polling.slept(us(6));
            }
        }
    }

    #[test]
    fn a_look_in_vain_counts_with_the_sleep_that_follows() {
        let mut polling = looking(12);
        polling.look(|| 0);
        polling.looked(false, us(10));
        polling.slept(us(12));
        assert_eq!((polling.looking.0, polling.sleeping.0), (us(22), us(12)));
        assert!(polling.gains_nothing());
    }

    #[test]
    fn looks_on_where_that_is_quicker_and_tries_now_and_then_whether_it_still_is() {
        let mut polling = looking(6);
        let mut tries = 0;
        for _ in 0..100 * SAMPLE {
            if polling.window().is_zero() {
                tries += 1;
                polling.slept(us(6));
            } else {
                polling.look(|| 0);
                polling.looked(true, us(2));
            }
        }
        assert_eq!(polling.window(), us(10));
        assert_eq!(tries, 12 * TRY);
    }

    #[test]
    fn an_idle_queue_does_not_look_after_a_try_either() {
        let mut polling = looking(6);
        while !polling.window().is_zero() {
            polling.look(|| 0);
            polling.looked(true, us(2));
        }
        polling.slept(us(1000));
        assert_eq!((polling.trying, polling.window()), (0, us(0)));
    }

    #[test]
    fn a_limit_of_zero_never_looks() {
        let mut polling = Polling::new(us(0));
        polling.slept(us(1));
        assert_eq!(polling.window(), us(0));
    }
}
