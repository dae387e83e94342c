//! Commands of the host to a disk that is in use: one line each, over a Unix socket.
//!
//! `resize BYTES` makes the disk so long, `resize` a raw disk as long as its file has become. The
//! answer is `ok BYTES`, or `error` with the reason.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Longest command.
const LINE: usize = 64;
/// How long somebody who has connected may take to say what he wants, in nanoseconds.
const PATIENCE: i64 = 200_000_000;

/// What the host can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Another size in bytes, or that of the file.
    Resize(Option<u64>),
}

impl Command {
    /// Reads a command.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn parse(line: &[u8]) -> Result<Self, &'static str> {
        let text = str::from_utf8(line).map_err(|_| "the command is no text")?;
        let mut words = text.split_ascii_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("resize"), None, _) => Ok(Self::Resize(None)),
            (Some("resize"), Some(size), None) => match size.parse::<u64>() {
                Ok(size) if size.is_multiple_of(512) => Ok(Self::Resize(Some(size))),
                _ => Err("a size is a number of bytes, a multiple of 512"),
            },
            _ => Err("the command is `resize [BYTES]`"),
        }
    }
}

/// The socket on which commands arrive.
#[derive(Debug)]
pub struct Control(UnixListener);

impl Control {
    /// Listens at `path`, where only the owner may connect. A socket that a process which has ended
    /// left there is replaced.
    ///
    /// # Errors
    ///
    /// When somebody listens there, or what bind(2) reports.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match UnixStream::connect(path) {
            Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
            }
            Err(_) => {}
        }
        let umask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        let listener = UnixListener::bind(path);
        rustix::process::umask(umask);
        let listener = listener?;
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }

    /// What becomes readable when somebody connects.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Serves one caller; `carry_out` returns the new size or why not.
    pub(crate) fn serve(&self, carry_out: impl FnOnce(Command) -> Result<u64, String>) {
        let Ok((mut stream, _)) = self.0.accept() else {
            return;
        };
        let answer = match hear(&mut stream) {
            Ok(command) => carry_out(command),
            Err(reason) => Err(reason),
        };
        let answer = match answer {
            Ok(size) => {
                tracing::info!(size, "the disk has a new size");
                format!("ok {size}\n")
            }
            Err(reason) => format!("error {reason}\n"),
        };
        // Whoever does not wait for the answer does without.
        stream.write_all(answer.as_bytes()).ok();
    }
}

fn hear(stream: &mut UnixStream) -> Result<Command, String> {
    let mut line = [0; LINE];
    let mut filled = 0;
    while !line.iter().take(filled).any(|byte| *byte == b'\n') {
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: PATIENCE,
        };
        let ready = poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&limit));
        if ready != Ok(1) {
            return Err("no command came in time".to_owned());
        }
        match stream.read(line.get_mut(filled..).unwrap_or_default()) {
            Ok(0) if filled > 0 && filled < LINE => break,
            Ok(0) => return Err("the command is too long, or none".to_owned()),
            Ok(count) => filled += count,
            Err(error) => return Err(error.to_string()),
        }
    }
    let line = line.get(..filled).unwrap_or_default();
    let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
    Command::parse(line).map_err(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands() {
        for (line, expected) in [
            ("resize", Some(None)),
            ("resize 1024", Some(Some(1024))),
            (" resize  512 ", Some(Some(512))),
            ("resize 1000", None),
            ("resize -512", None),
            ("resize 1G", None),
            ("resize 512 512", None),
            ("grow 512", None),
            ("", None),
        ] {
            let parsed = Command::parse(line.as_bytes()).ok();
            assert_eq!(parsed, expected.map(Command::Resize), "{line:?}");
        }
        assert!(Command::parse(&[0xff]).is_err());
    }
}
