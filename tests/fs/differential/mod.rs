//! Random operations on a directory of the host and through msb-fs, compared after each step.
//!
//! `MSB_DIFF_ROUNDS` sets how many lists of operations are made up for each mode, `MSB_SEED` where
//! they begin.

mod operation;
mod view;

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, bail, ensure};
use msb_testkit::share::{ORDINARY, Setup, Share};
use msb_testkit::sys::act_as;

use crate::bridge::skipped;
use msb_testkit::suites::{number, seed};

use self::operation::{Limits, Operation, Random, Side};
use self::view::View;

/// Operations of one list.
const STEPS: u64 = 300;

/// What led to a difference.
const SHOWN: usize = 25;

struct Pair {
    host: Side,
    served: Side,
    views: (View, View),
    limits: Limits,
    history: VecDeque<String>,
}

impl Pair {
    fn step(&mut self, user: u32, operation: &Operation) -> Result<()> {
        act_as(user)?;
        let results = (self.host.apply(operation), self.served.apply(operation));
        act_as(0)?;
        if self.history.len() == SHOWN {
            self.history.pop_front();
        }
        self.history
            .push_back(format!("{user} {operation:?}: {:?}", results.0));
        ensure!(
            results.0 == results.1,
            "{:?}\nserved: {:?}",
            results.0,
            results.1
        );
        let now = (View::of(&self.host.root)?, View::of(&self.served.root)?);
        let before = Some((&self.views.0, &self.views.1));
        if let Some(difference) = now.0.differs(&now.1, before, self.limits) {
            bail!("{difference}");
        }
        self.views = now;
        Ok(())
    }
}

fn limits(mode: &str, reserves: bool) -> Limits {
    Limits {
        devices: mode != "off",
        trusted: mode == "strict",
        owned_links: mode != "relaxed",
        reserves,
    }
}

fn list(share: &Share, number: u64, seed: u64, mode: &str) -> Result<View> {
    let name = format!("tree{number}");
    let (host, served) = (share.beside(&name), share.guest(&name));
    for root in [&host, &served] {
        fs::create_dir(root)?;
        fs::set_permissions(root, fs::Permissions::from_mode(0o777))?;
    }
    let limits = limits(mode, number.is_multiple_of(2));
    let mut pair = Pair {
        views: (View::of(&host)?, View::of(&served)?),
        host: Side::new(host),
        served: Side::new(served),
        limits,
        history: VecDeque::new(),
    };
    let mut random = Random::new(seed);
    for _ in 0..STEPS {
        let operation = Operation::random(&mut random, limits);
        // Whose a symbolic link is decides over its own attributes and names.
        let root_alone = !limits.owned_links
            && matches!(
                operation,
                Operation::Chown(..) | Operation::Utimens(..) | Operation::Link(..)
            );
        let user = match random.below(3) {
            0 if !root_alone => ORDINARY,
            _ => 0,
        };
        if let Err(error) = pair.step(user, &operation) {
            let history: Vec<_> = pair.history.into_iter().collect();
            bail!("{}\n{error:#}", history.join("\n"));
        }
    }
    pair.host.close();
    pair.served.close();
    View::of(&pair.host.root)
}

/// Compares lists of operations in one mode, and what a new server makes of the trees.
fn compare(setup: Setup<'_>, mode: &str) -> Result<()> {
    if skipped() {
        return Ok(());
    }
    // Modes are compared as they are typed.
    rustix::process::umask(rustix::fs::Mode::empty());
    let flags = [&["--stat-virt", mode], setup.flags].concat();
    let setup = Setup {
        flags: &flags,
        ..setup
    };
    let (rounds, first) = (number("MSB_DIFF_ROUNDS", 4), seed());
    let share = Share::new(setup)?;
    let mut hosts = Vec::new();
    for round in 0..rounds {
        let seed = first.wrapping_add(round);
        let view = list(&share, round, seed, mode).with_context(|| {
            format!(
                "MSB_SEED={seed}, list {round} of {flags:?}, reserves {}",
                round.is_multiple_of(2)
            )
        })?;
        hosts.push(view);
    }
    let share = share.again(setup)?;
    for (round, host) in hosts.iter().enumerate() {
        let limits = limits(mode, false);
        let served = View::of(&share.guest(&format!("tree{round}")))?;
        if let Some(difference) = host.differs(&served, None, limits) {
            bail!("after a restart, list {round} from {first}: {difference}");
        }
    }
    println!("{flags:?}: {rounds} lists of {STEPS} operations, seed {first}");
    share.finish()
}

#[test]
fn strict() -> Result<()> {
    compare(Setup::default(), "strict")
}

#[test]
fn strict_served_by_an_ordinary_user() -> Result<()> {
    let setup = Setup {
        ordinary: true,
        ..Setup::default()
    };
    compare(setup, "strict")
}

#[test]
fn strict_and_exclusive() -> Result<()> {
    let setup = Setup {
        flags: &["--exclusive"],
        ..Setup::default()
    };
    compare(setup, "strict")
}

#[test]
fn relaxed() -> Result<()> {
    compare(Setup::default(), "relaxed")
}

#[test]
fn off() -> Result<()> {
    compare(Setup::default(), "off")
}
