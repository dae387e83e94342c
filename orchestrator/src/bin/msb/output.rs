//! What is printed: aligned tables, JSON, errors with hints; colours only on a terminal.

use std::error::Error as _;
use std::io::{IsTerminal, Write, stderr, stdout};
use std::time::SystemTime;

use microsandbox::{Error, ErrorKind};
use serde::Serialize;

/// Columns of text under a heading.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(heading: &[&str]) -> Self {
        Self {
            rows: vec![heading.iter().map(|&cell| cell.to_owned()).collect()],
        }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Prints it, with every column as wide as its widest cell.
    pub(crate) fn print(&self) -> Result<(), Error> {
        let bold = stdout().is_terminal();
        let mut text = String::new();
        for (number, line) in self.lines().into_iter().enumerate() {
            if number == 0 && bold {
                text.push_str(&format!("\x1b[1m{line}\x1b[0m\n"));
            } else {
                text.push_str(&line);
                text.push('\n');
            }
        }
        print(&text)
    }

    fn lines(&self) -> Vec<String> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}   "));
            }
            line.truncate(line.trim_end().len());
            line
        };
        self.rows.iter().map(line).collect()
    }
}

/// Prints text to standard output; a reader that went away is no error.
pub(crate) fn print(text: &str) -> Result<(), Error> {
    let mut out = stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("cannot write to standard output", error))
        }
        _ => Ok(()),
    }
}

/// Prints a value as indented JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).map_err(|error| {
        Error::new(ErrorKind::Io, "cannot write the result as JSON").with_source(error)
    })?;
    print(&format!("{text}\n"))
}

/// Prints a value as one line of JSON.
pub(crate) fn json_line(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string(value).map_err(|error| {
        Error::new(ErrorKind::Io, "cannot write the result as JSON").with_source(error)
    })?;
    print(&format!("{text}\n"))
}

/// A moment as programs read it (RFC 3339, in UTC).
pub(crate) fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// How long ago a moment was, as people say it.
pub(crate) fn age(time: SystemTime) -> String {
    let seconds = time.elapsed().unwrap_or_default().as_secs();
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86400),
    }
}

/// A number of bytes as people read it: whole up to KiB, then with one decimal.
pub(crate) fn bytes(count: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    // In tenths of the unit, rounded, so that no floating point is needed.
    let mut tenths = count.saturating_mul(10) / 1024;
    let mut unit = 0;
    while tenths >= 10240 && unit + 1 < units.len() {
        tenths /= 1024;
        unit += 1;
    }
    let name = units.get(unit).unwrap_or(&"KiB");
    if tenths.is_multiple_of(10) {
        format!("{} {name}", tenths / 10)
    } else {
        format!("{}.{} {name}", tenths / 10, tenths % 10)
    }
}

/// Tells of something that worked, on standard error.
pub(crate) fn done(what: &str) {
    note("✓", "32", what);
}

/// Says something on standard error that is no result.
pub(crate) fn say(what: &str) {
    // Nobody is left to tell when standard error is gone.
    let _ = writeln!(stderr().lock(), "{what}");
}

/// Tells of something worth knowing, on standard error.
pub(crate) fn hint(what: &str) {
    note("  →", "36", what);
}

/// Tells of an error, its causes and what can be done about it, on standard error.
pub(crate) fn error(error: &Error) {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        message.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    note("error:", "31;1", &message);
    if let Some(text) = error.hint() {
        hint(text);
    }
    for other in error.also() {
        self::error(other);
    }
}

fn note(mark: &str, colour: &str, text: &str) {
    let mut err = stderr().lock();
    // Nobody is left to tell when standard error is gone.
    let _ = if err.is_terminal() {
        writeln!(err, "\x1b[{colour}m{mark}\x1b[0m {text}")
    } else {
        writeln!(err, "{mark} {text}")
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_bytes_are_readable() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (20 << 30, "20 GiB"),
            ((1 << 30) + (1 << 29), "1.5 GiB"),
            (u64::MAX, "1638.3 PiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["NAME", "SIZE"]);
        table.row(["a-long-name".to_owned(), "-".to_owned()]);
        table.row(["ä".to_owned(), "20 GiB".to_owned()]);
        assert_eq!(
            table.lines(),
            [
                "NAME          SIZE",
                "a-long-name   -",
                "ä             20 GiB"
            ]
        );
    }
}
