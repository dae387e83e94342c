//! Looks at the process as the kernel shows it, after everything was done.

use std::fs::File;
use std::io::Read;

use super::{CapabilitySet, JailError};

/// Opens the status of this process; it can be read when no path leads there any more.
pub(super) fn open_status() -> Option<File> {
    File::open("/proc/self/status").ok()
}

/// Compares the status with what the jail promises.
pub(super) fn holds(status: Option<File>, kept: CapabilitySet) -> Result<(), JailError> {
    let mut text = String::new();
    let read = status.map(|mut file| file.read_to_string(&mut text));
    if !matches!(read, Some(Ok(_))) {
        return Err(JailError::NotHeld(
            "the status of the process cannot be read".to_owned(),
        ));
    }
    judge(&text, kept).map_err(JailError::NotHeld)
}

fn judge(status: &str, kept: CapabilitySet) -> Result<(), String> {
    let field = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(str::trim)
            .ok_or_else(|| format!("there is no {name}"))
    };
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let value = field(name)?;
        let set = u64::from_str_radix(value, 16).map_err(|_| format!("{name} is {value}"))?;
        if !kept.contains(CapabilitySet::from_bits_retain(set)) {
            return Err(format!("{name} is {value}"));
        }
    }
    for (name, wanted) in [("NoNewPrivs", "1"), ("Seccomp", "2")] {
        let value = field(name)?;
        if value != wanted {
            return Err(format!("{name} is {value}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const JAILED: &str = "Name:\tmsb-fs\nThreads:\t1\nCapInh:\t0000000000000000\n\
        CapPrm:\t0000000000000002\nCapEff:\t0000000000000002\nCapBnd:\t0000000000000002\n\
        CapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t2\n";

    #[test]
    fn the_status_is_judged() {
        let kept = CapabilitySet::DAC_OVERRIDE;
        assert_eq!(judge(JAILED, kept), Ok(()));
        assert_eq!(
            judge(JAILED, CapabilitySet::empty()),
            Err("CapPrm is 0000000000000002".into())
        );
        for (from, to) in [
            ("Privs:\t1", "Privs:\t0"),
            ("comp:\t2", "comp:\t0"),
            ("CapAmb", "x"),
        ] {
            assert!(judge(&JAILED.replace(from, to), kept).is_err(), "{to}");
        }
    }
}
