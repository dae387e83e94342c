//! The log of commands that nobody waits for: one record a line, with its time and its stream.
//!
//! `2026-01-31T12:00:00.250Z stdout F text`, the format of Kubernetes' container logs: `F` ends a
//! line of the command, `P` is a part of one that goes on in the next record of that stream.

use std::io::{self, Write};

/// Which of a command's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// How it is called.
    pub fn word(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// A record of the log.
#[derive(Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// When it was written, as RFC 3339 has it.
    pub time: &'a str,
    /// Where the command wrote it.
    pub stream: Stream,
    /// Whether the command's line ends here.
    pub ends: bool,
    /// What the command wrote, without the end of the line.
    pub text: &'a [u8],
}

impl<'a> Record<'a> {
    /// Reads a line of the log, without its end; nothing when it is none.
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.splitn(4, |byte| *byte == b' ');
        let time = str::from_utf8(fields.next()?).ok()?;
        let stream = match fields.next()? {
            b"stdout" => Stream::Stdout,
            b"stderr" => Stream::Stderr,
            _ => return None,
        };
        let ends = match fields.next()? {
            b"F" => true,
            b"P" => false,
            _ => return None,
        };
        let text = fields.next()?;
        Some(Self {
            time,
            stream,
            ends,
            text,
        })
    }
}

/// Adds what a command wrote at the time `now`, in milliseconds since the epoch.
pub(crate) fn append(
    log: &mut impl Write,
    stream: Stream,
    output: &[u8],
    now: u64,
) -> io::Result<()> {
    let (time, stream) = (rfc3339(now), stream.word());
    let mut records = Vec::new();
    for piece in output.split_inclusive(|byte| *byte == b'\n') {
        let text = piece.strip_suffix(b"\n");
        let tag = if text.is_some() { 'F' } else { 'P' };
        write!(records, "{time} {stream} {tag} ")?;
        records.extend_from_slice(text.unwrap_or(piece));
        records.push(b'\n');
    }
    log.write_all(&records)
}

/// A moment in milliseconds since the epoch, in UTC.
pub(crate) fn rfc3339(millis: u64) -> String {
    let (seconds, millis) = (millis / 1000, millis % 1000);
    let (days, second) = (seconds / 86400, seconds % 86400);
    // The calendar repeats every 400 years of 146,097 days; years begin in March, so that the day
    // that may be missing is their last.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_the_calendar_has_them() {
        for (millis, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_001, "2000-02-29T00:00:00.001Z"),
            (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
            (1_735_689_600_000, "2025-01-01T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(millis), text);
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut log = Vec::new();
        append(&mut log, Stream::Stdout, b"one\n\ntwo", 0).unwrap();
        append(&mut log, Stream::Stderr, b"\xff x\n", 0).unwrap();
        let records: Vec<_> = log
            .split(|byte| *byte == b'\n')
            .filter_map(Record::parse)
            .map(|record| (record.stream, record.ends, record.text))
            .collect();
        assert_eq!(
            records,
            [
                (Stream::Stdout, true, b"one".as_slice()),
                (Stream::Stdout, true, b""),
                (Stream::Stdout, false, b"two"),
                (Stream::Stderr, true, b"\xff x"),
            ]
        );
        assert_eq!(Record::parse(b"some other line of text"), None);
    }
}
