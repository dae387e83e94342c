//! `msb logs`: what a sandbox has printed, and when.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write, stderr, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use microsandbox::Error;
use microsandbox::rundir::{Home, Record, SandboxDir, Stream};
use microsandbox::spec::SandboxName;
use serde::Serialize;

use crate::args::{LogSource, Logs, OutputFormat};
use crate::output;

/// How often a log that is followed is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Longest line that is kept together.
const LINE_MAX: usize = 64 << 10;

/// `msb logs`.
pub(super) async fn logs(args: &Logs) -> Result<ExitCode, Error> {
    let home = Home::from_env()?;
    let dir = home.find_sandbox(&SandboxName::try_from(args.name.clone())?)?;
    let mut logs = open(&dir, args.source)?;
    let mut last = VecDeque::new();
    while let Some(line) = next(&mut logs, !args.follow)? {
        match args.tail.0 {
            _ if !wanted(&line, args) => {}
            None => show(&line, args)?,
            Some(count) => {
                last.push_back(line);
                if last.len() > count {
                    last.pop_front();
                }
            }
        }
    }
    for line in last {
        show(&line, args)?;
    }
    while args.follow && args.until.is_none_or(|until| SystemTime::now() < until) {
        // Asked first, so that what it printed last is not missed.
        let runs = dir.is_running();
        tokio::time::sleep(if runs { LOOK } else { Duration::ZERO }).await;
        while let Some(line) = next(&mut logs, !runs)? {
            if wanted(&line, args) {
                show(&line, args)?;
            }
        }
        if !runs {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A line of a log.
struct Line {
    /// When it was printed, if that is known.
    time: Option<SystemTime>,
    source: &'static str,
    text: Vec<u8>,
    /// Whether it is whole, or goes on with the next one.
    ends: bool,
}

/// One line of `msb logs --format json`.
#[derive(Serialize)]
struct Row<'a> {
    time: Option<String>,
    source: &'a str,
    line: &'a str,
}

fn wanted(line: &Line, args: &Logs) -> bool {
    let source = match args.source {
        LogSource::Stdout => line.source == "stdout",
        LogSource::Stderr => line.source == "stderr",
        LogSource::Output | LogSource::System => true,
    };
    // A line whose time nobody knows is shown.
    let since = args
        .since
        .is_none_or(|since| line.time.is_none_or(|time| time >= since));
    let until = args
        .until
        .is_none_or(|until| line.time.is_none_or(|time| time < until));
    source
        && since
        && until
        && args
            .grep
            .as_ref()
            .is_none_or(|text| contains(&line.text, text))
}

fn contains(line: &[u8], text: &str) -> bool {
    text.is_empty()
        || line
            .windows(text.len())
            .any(|window| window == text.as_bytes())
}

/// Prints a line where the command printed it.
fn show(line: &Line, args: &Logs) -> Result<(), Error> {
    let time = line
        .time
        .map(|time| humantime::format_rfc3339_millis(time).to_string());
    let mut text = Vec::new();
    if args.json || args.format.format == OutputFormat::Json {
        let row = Row {
            time,
            source: line.source,
            line: &String::from_utf8_lossy(&line.text),
        };
        return output::json_line(&row);
    }
    if args.timestamps {
        // As wide as a time, so that lines stay aligned.
        text.extend_from_slice(time.unwrap_or_else(|| format!("{:24}", "-")).as_bytes());
        text.push(b' ');
    }
    text.extend_from_slice(&line.text);
    if line.ends {
        text.push(b'\n');
    }
    let done = if line.source == "stderr" {
        stderr().lock().write_all(&text)
    } else {
        let mut out = stdout().lock();
        out.write_all(&text).and_then(|()| out.flush())
    };
    match done {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::io("cannot write what was logged", error))
        }
        _ => Ok(()),
    }
}

/// The next line of all logs, by time; nothing when they have been read as far as they go. What
/// is there of a line that goes on is kept, or given out if it is the `last` that comes.
fn next(logs: &mut [Log], last: bool) -> Result<Option<Line>, Error> {
    for log in logs.iter_mut() {
        if log.ahead.is_none() {
            log.ahead = log.read(last)?;
        }
    }
    let ahead = logs.iter_mut().filter(|log| log.ahead.is_some());
    let earliest = ahead.min_by_key(|log| log.ahead.as_ref().and_then(|line| line.time));
    Ok(earliest.and_then(|log| log.ahead.take()))
}

fn open(dir: &SandboxDir, source: LogSource) -> Result<Vec<Log>, Error> {
    Ok(match source {
        LogSource::System => {
            let started = dir.state()?.started_at_ms.map(Duration::from_millis);
            let booted = UNIX_EPOCH + started.unwrap_or_default();
            vec![
                Log::new(dir.console_log(), Kind::Console(booted)),
                Log::new(dir.supervisor_log(), Kind::Supervisor),
            ]
        }
        _ => vec![Log::new(dir.output_log(), Kind::Output)],
    })
}

/// How the lines of a log tell their time.
#[derive(Clone, Copy)]
enum Kind {
    /// Records of commands' output.
    Output,
    /// Kernel messages tell the time since the guest was started, which was then.
    Console(SystemTime),
    /// Each line begins with it.
    Supervisor,
}

struct Log {
    path: PathBuf,
    kind: Kind,
    file: Option<BufReader<File>>,
    /// What has been read of a line that is not whole yet.
    line: Vec<u8>,
    /// What commands have written of a line to standard output and error.
    parts: [Vec<u8>; 2],
    /// The time of the last line that told it.
    time: Option<SystemTime>,
    /// A line that was read and not yet given out.
    ahead: Option<Line>,
}

impl Log {
    fn new(path: PathBuf, kind: Kind) -> Self {
        Self {
            path,
            kind,
            file: None,
            line: Vec::new(),
            parts: [Vec::new(), Vec::new()],
            time: None,
            ahead: None,
        }
    }

    fn read(&mut self, last: bool) -> Result<Option<Line>, Error> {
        loop {
            let whole = self.more().map_err(|error| {
                Error::io(format!("cannot read `{}`", self.path.display()), error)
            })?;
            if !whole && (!last || self.line.is_empty()) {
                return Ok(if last { self.rest() } else { None });
            }
            let mut line = std::mem::take(&mut self.line);
            let ends = line.ends_with(b"\n");
            if ends {
                line.pop();
            }
            if let Some(line) = self.understand(line, ends) {
                return Ok(Some(line));
            }
        }
    }

    /// Reads on in a line; whether it is whole, or as long as a line may be. A log that does not
    /// exist yet is empty.
    fn more(&mut self) -> std::io::Result<bool> {
        if self.file.is_none() {
            match File::open(&self.path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
                file => self.file = Some(BufReader::new(file?)),
            }
        }
        let Some(file) = &mut self.file else {
            return Ok(false);
        };
        let room = LINE_MAX.saturating_sub(self.line.len());
        let read = file.take(room as u64).read_until(b'\n', &mut self.line)?;
        Ok(self.line.ends_with(b"\n") || (read > 0 && self.line.len() >= LINE_MAX))
    }

    fn understand(&mut self, line: Vec<u8>, ends: bool) -> Option<Line> {
        let (time, source) = match self.kind {
            Kind::Output => match Record::parse(&line) {
                Some(record) => return self.join(&record),
                None => (None, "stdout"),
            },
            Kind::Console(booted) => (uptime(&line).map(|up| booted + up), "console"),
            Kind::Supervisor => {
                let (time, rest) = timed(&line);
                self.time = time.or(self.time);
                let text = rest.to_owned();
                return Some(self.line(text, "supervisor", ends));
            }
        };
        self.time = time.or(self.time);
        Some(self.line(line, source, ends))
    }

    fn line(&self, text: Vec<u8>, source: &'static str, ends: bool) -> Line {
        Line {
            time: self.time,
            source,
            text,
            ends,
        }
    }

    /// Puts the parts of a line together.
    fn join(&mut self, record: &Record<'_>) -> Option<Line> {
        self.time = humantime::parse_rfc3339(record.time).ok().or(self.time);
        let [out, err] = &mut self.parts;
        let parts = match record.stream {
            Stream::Stdout => out,
            Stream::Stderr => err,
        };
        parts.extend_from_slice(record.text);
        let text = (record.ends || parts.len() >= LINE_MAX).then(|| std::mem::take(parts))?;
        Some(self.line(text, record.stream.word(), record.ends))
    }

    /// A line that was begun and will not be ended.
    fn rest(&mut self) -> Option<Line> {
        let [out, err] = &mut self.parts;
        let (parts, stream) = if out.is_empty() {
            (err, Stream::Stderr)
        } else {
            (out, Stream::Stdout)
        };
        let text = std::mem::take(parts);
        (!text.is_empty()).then(|| self.line(text, stream.word(), false))
    }
}

/// The time that a kernel message begins with: `[    1.234567] `.
fn uptime(line: &[u8]) -> Option<Duration> {
    let text = str::from_utf8(line.get(..line.len().min(24))?).ok()?;
    let (number, _) = text.strip_prefix('[')?.split_once(']')?;
    let (seconds, micros) = number.trim_start().split_once('.')?;
    let micros = micros.parse::<u32>().ok().filter(|_| micros.len() == 6)?;
    Some(Duration::new(
        seconds.parse().ok()?,
        micros.saturating_mul(1000),
    ))
}

/// The time that a line begins with, and the rest of the line.
fn timed(line: &[u8]) -> (Option<SystemTime>, &[u8]) {
    let mut fields = line.splitn(2, |byte| *byte == b' ');
    let time = fields.next().and_then(|word| str::from_utf8(word).ok());
    match (time.map(humantime::parse_rfc3339), fields.next()) {
        (Some(Ok(time)), Some(rest)) => (Some(time), rest),
        _ => (None, line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(content: &str, kind: Kind) -> (tempfile::NamedTempFile, Log) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let log = Log::new(file.path().to_owned(), kind);
        (file, log)
    }

    fn lines(logs: &mut [Log], last: bool) -> Vec<(Option<u64>, String, bool)> {
        let mut lines = Vec::new();
        while let Some(line) = next(logs, last).unwrap() {
            let time = line
                .time
                .map(|time| time.duration_since(UNIX_EPOCH).unwrap().as_secs());
            lines.push((time, String::from_utf8(line.text).unwrap(), line.ends));
        }
        lines
    }

    #[test]
    fn parts_of_lines_are_put_together() {
        let (file, log) = log(
            "1970-01-01T00:00:01.000Z stdout P a\n1970-01-01T00:00:02.000Z stderr F e\n\
             1970-01-01T00:00:03.000Z stdout F b\n1970-01-01T00:00:04.000Z stdout P half",
            Kind::Output,
        );
        let mut logs = [log];
        let mut expected = vec![
            (Some(2), "e".to_owned(), true),
            (Some(3), "ab".to_owned(), true),
        ];
        assert_eq!(lines(&mut logs, false), expected);
        // The last record is being written.
        let mut file = File::options().append(true).open(file.path()).unwrap();
        file.write_all(b" way\n").unwrap();
        assert_eq!(lines(&mut logs, false), []);
        expected = vec![(Some(4), "half way".to_owned(), false)];
        assert_eq!(lines(&mut logs, true), expected);
    }

    #[test]
    fn the_logs_of_the_system_are_in_the_order_of_time() {
        let booted = UNIX_EPOCH + Duration::from_secs(10);
        let (_console, console) = log(
            "before\n[    1.500000] kernel\nagent\n[    9.000000] late\n",
            Kind::Console(booted),
        );
        let (_said, said) = log(
            "1970-01-01T00:00:15.000Z [the VMM] moved\n",
            Kind::Supervisor,
        );
        let texts: Vec<_> = lines(&mut [console, said], true)
            .into_iter()
            .map(|(time, text, _)| (time, text))
            .collect();
        let expected = [
            (None, "before"),
            (Some(11), "[    1.500000] kernel"),
            (Some(11), "agent"),
            (Some(15), "[the VMM] moved"),
            (Some(19), "[    9.000000] late"),
        ];
        assert_eq!(texts, expected.map(|(time, text)| (time, text.to_owned())));
    }
}
