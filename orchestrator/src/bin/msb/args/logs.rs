//! The flags of `msb logs`, and the moments that they take.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};

use super::Format;

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Name of the sandbox
    pub(crate) name: String,
    /// Only the last lines, or `all`
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all", value_parser = tail)]
    pub(crate) tail: Tail,
    /// Only what came since then: a time such as 2026-01-31T12:00:00Z (without an offset it is
    /// UTC), a date, seconds since 1970, or how long ago, such as `10m`
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) since: Option<SystemTime>,
    /// Only what came before then, likewise
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) until: Option<SystemTime>,
    /// Only lines that contain this text
    #[arg(long, value_name = "TEXT")]
    pub(crate) grep: Option<String>,
    /// Begin each line with its time
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// Go on printing what comes
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Which log: what commands printed that nobody waited for, one of its streams, or what the
    /// guest's console, the backends and the VMM say
    #[arg(long, value_enum, default_value_t)]
    pub(crate) source: LogSource,
    /// The same as --format json
    #[arg(long, conflicts_with = "format")]
    pub(crate) json: bool,
    /// `json` prints one object a line
    #[command(flatten)]
    pub(crate) format: Format,
}

/// How many of the last lines are wanted; all when there is no number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tail(pub(crate) Option<usize>);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogSource {
    /// Output of detached commands
    #[default]
    Output,
    /// Their standard output alone
    Stdout,
    /// Their standard error alone
    Stderr,
    /// Console of the guest, backends and VMM
    System,
}

fn tail(text: &str) -> Result<Tail, String> {
    match text {
        "all" => Ok(Tail(None)),
        number => number
            .parse()
            .map(|lines| Tail(Some(lines)))
            .map_err(|_| "write a number of lines, or `all`".to_owned()),
    }
}

fn moment(text: &str) -> Result<SystemTime, String> {
    let read = seconds(text)
        .or_else(|| {
            let ago = humantime::parse_duration(text).ok()?;
            SystemTime::now().checked_sub(ago)
        })
        .or_else(|| date(text));
    read.ok_or_else(|| {
        "write a time such as 2026-01-31T12:00:00Z, a date, seconds since 1970, or how long ago, \
         such as 10m or 1h30m"
            .to_owned()
    })
}

/// Seconds since the epoch, with or without a fraction.
fn seconds(text: &str) -> Option<SystemTime> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return None;
    }
    let nanos = format!("{fraction:0<9}").parse().ok()?;
    UNIX_EPOCH.checked_add(Duration::new(whole.parse().ok()?, nanos))
}

/// A date, with or without a time, in UTC or with an offset from it.
fn date(text: &str) -> Option<SystemTime> {
    let (local, offset) = match text
        .len()
        .checked_sub(6)
        .map(|at| text.split_at_checked(at))
    {
        Some(Some((local, offset))) if text.len() > 10 && offset.starts_with(['+', '-']) => {
            let (hours, minutes) = offset.get(1..)?.split_once(':')?;
            let minutes = hours.parse::<u64>().ok()? * 60 + minutes.parse::<u64>().ok()?;
            (
                local,
                Some((offset.starts_with('+'), Duration::from_secs(minutes * 60))),
            )
        }
        _ => (text, None),
    };
    let local = if local.len() == 10 {
        format!("{local}T00:00:00Z")
    } else {
        local.to_owned()
    };
    let time = humantime::parse_rfc3339_weak(&local).ok()?;
    match offset {
        // East of Greenwich it is later by the clock.
        Some((true, offset)) => time.checked_sub(offset),
        Some((false, offset)) => time.checked_add(offset),
        None => Some(time),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_as_people_write_them() {
        let at = |text| {
            let since = moment(text).unwrap().duration_since(UNIX_EPOCH).unwrap();
            since.as_millis()
        };
        for (text, millis) in [
            ("0", 0),
            ("1700000000", 1_700_000_000_000),
            ("1700000000.25", 1_700_000_000_250),
            ("2023-11-14T22:13:20Z", 1_700_000_000_000),
            ("2023-11-14T22:13:20", 1_700_000_000_000),
            ("2023-11-14 22:13:20.5", 1_700_000_000_500),
            ("2023-11-15T00:13:20+02:00", 1_700_000_000_000),
            ("2023-11-14T16:43:20-05:30", 1_700_000_000_000),
            ("2023-11-14", 1_699_920_000_000),
        ] {
            assert_eq!(at(text), millis, "{text}");
        }
        let ago = moment("1h30m").unwrap().elapsed().unwrap().as_secs();
        assert!((5400..5410).contains(&ago), "{ago}");
        for text in [
            "",
            "yesterday",
            "-5",
            "12:00",
            "2023-13-01",
            "1.2.3",
            "10 parsecs",
        ] {
            assert!(moment(text).is_err(), "{text}");
        }
    }
}
