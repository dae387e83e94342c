//! What a benchmark asks of the machine that it runs on, and gives back.

use std::fs;
use std::path::Path;

use rustix::process::{Resource, Rlimit, getrlimit, setpriority_process, setrlimit};

/// How long an idle CPU of a VM looks around before it halts, in nanoseconds.
const HALT_POLL: &str = "/sys/module/haltpoll/parameters/guest_halt_poll_ns";
/// The kernel's own default. A VM that was started with zero leaves for the hypervisor at each short
/// pause, and a wake-up costs 40 us there instead of 3: more than all that is measured here.
const HALT_POLL_NS: u64 = 200_000;

/// Keeps the machine as it was prepared; afterwards it is as before.
pub struct Prepared {
    halt_poll: Option<String>,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if let Some(before) = &self.halt_poll {
            fs::write(HALT_POLL, before).ok();
        }
    }
}

/// Has idle CPUs look around for as long as kernels usually do; what it was before, if that changed.
fn poll_before_halt() -> Option<String> {
    if !Path::new(HALT_POLL).exists() {
        return None;
    }
    let before = fs::read_to_string(HALT_POLL).ok()?;
    if before.trim().parse::<u64>().is_ok_and(|now| now > 0) {
        return None;
    }
    match fs::write(HALT_POLL, HALT_POLL_NS.to_string()) {
        Ok(()) => Some(before),
        Err(_) => {
            eprintln!("  (idle CPUs of this VM halt at once: each wake-up costs tens of us)");
            None
        }
    }
}

/// What this process and the servers that it starts need of the machine: more descriptors than the
/// usual limit, to come before other work, and CPUs that do not go away for short pauses. It takes
/// privilege; without it the figures are noisier and virtiofsd runs out of descriptors in rows with
/// many files.
#[must_use]
pub fn prepare_machine() -> Prepared {
    let wanted = 1 << 20;
    let most = Rlimit {
        current: Some(wanted),
        maximum: Some(wanted),
    };
    if getrlimit(Resource::Nofile)
        .maximum
        .is_some_and(|maximum| maximum < wanted)
        && setrlimit(Resource::Nofile, most).is_err()
    {
        eprintln!("  (the limit of open files stays as it is)");
    }
    if setpriority_process(None, -20).is_err() {
        eprintln!("  (no privilege to come before other work: expect noise)");
    }
    Prepared {
        halt_poll: poll_before_halt(),
    }
}
