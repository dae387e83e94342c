//! What is printed: aligned tables, JSON, errors with hints; colours only on a terminal.

use std::error::Error as _;
use std::io::{IsTerminal, Write, stderr, stdout};

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

/// Tells of something that worked, on standard error.
pub(crate) fn done(what: &str) {
    note("✓", "32", what);
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
