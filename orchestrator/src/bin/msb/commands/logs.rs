//! `msb logs`: what a sandbox has printed.

use std::fs::File;
use std::io::{Read, Write, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use microsandbox::Error;
use microsandbox::rundir::Home;
use microsandbox::spec::SandboxName;

use crate::args::{LogSource, Logs};

/// How often a log that is followed is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// `msb logs`.
pub(super) async fn logs(args: &Logs) -> Result<ExitCode, Error> {
    let home = Home::from_env()?;
    let dir = home.find_sandbox(&SandboxName::try_from(args.name.clone())?)?;
    let paths = match args.source {
        LogSource::Output => vec![dir.output_log()],
        LogSource::System => vec![dir.console_log(), dir.supervisor_log()],
    };
    let mut readers = Vec::new();
    for path in paths {
        let mut reader = Reader { path, at: 0 };
        let text = reader.more()?;
        print(last_lines(&text, args.tail))?;
        readers.push(reader);
    }
    while args.follow && dir.is_running() {
        tokio::time::sleep(LOOK).await;
        for reader in &mut readers {
            print(&reader.more()?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

struct Reader {
    path: PathBuf,
    at: u64,
}

impl Reader {
    /// What has been added since the last call; a log that does not exist yet is empty.
    fn more(&mut self) -> Result<Vec<u8>, Error> {
        let text = read_from(&self.path, self.at)
            .map_err(|error| Error::io(format!("cannot read `{}`", self.path.display()), error))?;
        self.at = self.at.saturating_add(text.len() as u64);
        Ok(text)
    }
}

fn read_from(path: &Path, at: u64) -> std::io::Result<Vec<u8>> {
    use std::io::Seek;
    let mut file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    file.seek(std::io::SeekFrom::Start(at))?;
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    Ok(text)
}

fn print(text: &[u8]) -> Result<(), Error> {
    let mut out = stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("cannot write to standard output", error))
        }
        _ => Ok(()),
    }
}

/// The last so many lines, or everything.
fn last_lines(text: &[u8], count: Option<usize>) -> &[u8] {
    let Some(count) = count else { return text };
    let whole = text.strip_suffix(b"\n").unwrap_or(text);
    let start = match count {
        0 => text.len(),
        _ => {
            let mut ends = whole
                .iter()
                .enumerate()
                .rev()
                .filter(|(_, byte)| **byte == b'\n');
            ends.nth(count - 1).map_or(0, |(at, _)| at + 1)
        }
    };
    text.get(start..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_counted_in_lines() {
        assert_eq!(last_lines(b"a\nb\nc\n", Some(2)), b"b\nc\n");
        assert_eq!(last_lines(b"a\nb\nc", Some(1)), b"c");
        assert_eq!(last_lines(b"a\n", Some(9)), b"a\n");
        assert_eq!(last_lines(b"a\n", Some(0)), b"");
        assert_eq!(last_lines(b"", Some(3)), b"");
        assert_eq!(last_lines(b"a\nb\n", None), b"a\nb\n");
    }
}
