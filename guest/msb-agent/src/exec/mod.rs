//! Runs one command: starts it, moves its bytes, and tells when it has ended.

mod child;
mod confine;
mod transfer;
mod users;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use child::Streams;
use msb_protocol::{Exec, ExitStatus, FromAgent, Kind, STDIN_WINDOW, WindowSize};
use rustix::fs::{Mode, OFlags, fcntl_setfl, openat};
use rustix::io::{Errno, ioctl_fionread, read, write};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitStatus, kill_process, kill_process_group};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::sys;

/// How long a command that ended may leave its output open to processes it left behind.
const GRACE: Duration = Duration::from_millis(200);
/// The character that ends the input of a terminal.
const END_OF_INPUT: u8 = 4;

/// One of the descriptors through which the agent follows a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Closes when the command runs, or tells why it does not.
    Report,
    /// Standard input, or the terminal's.
    Stdin,
    /// Standard output, or the terminal's.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What to do next about a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Come back when it is ready again.
    Wait,
    /// It is done; forget it.
    Close,
}

/// A command that was started and whose end has not been told yet.
#[derive(Debug)]
pub(crate) struct Command {
    pid: Pid,
    report: Option<OwnedFd>,
    reported: Vec<u8>,
    stdin: Option<OwnedFd>,
    input: VecDeque<u8>,
    input_ends: bool,
    outputs: [Option<Output>; 2],
    /// The agent's end of the terminal, if the command has one.
    terminal: Option<OwnedFd>,
    /// How many more bytes of output the host will take; `None` is without limit.
    credit: Option<u64>,
    status: Option<ExitStatus>,
    /// When output of processes left behind is not waited for any more.
    deadline: Option<Instant>,
}

#[derive(Debug)]
struct Output {
    fd: OwnedFd,
    /// Bytes that the command itself had written when it ended and that are still to be read.
    owed: u64,
}

impl Command {
    /// Starts a command.
    ///
    /// `pts` is the sandbox's `/dev/pts`, for a command with a terminal.
    pub(crate) fn start(exec: &Exec, pts: &OwnedFd, restricted: bool) -> Result<Self, Errno> {
        let (report, child_report) = pipe_with(PipeFlags::CLOEXEC)?;
        let (streams, stdin, outputs, terminal) = match exec.terminal {
            None => {
                let (streams, stdin, outputs) = make_pipes()?;
                (streams, stdin, outputs, None)
            }
            Some(size) => {
                let (master, slave) = make_terminal(pts, size)?;
                let stdin = duplicate(&master)?;
                let output = duplicate(&master)?;
                (
                    Streams::Terminal(slave),
                    stdin,
                    [Some(output), None],
                    Some(master),
                )
            }
        };
        let Some(pid) = sys::fork()? else {
            child::run(exec, &streams, restricted, child_report)
        };
        Ok(Self {
            pid,
            report: Some(report),
            reported: vec![],
            stdin: Some(stdin),
            input: VecDeque::new(),
            input_ends: false,
            outputs: outputs.map(|fd| fd.map(|fd| Output { fd, owed: 0 })),
            terminal,
            credit: None,
            status: None,
            deadline: None,
        })
    }

    /// Process id in the guest; also of its session and process group.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// The descriptor of a stream, while it is open.
    pub(crate) fn fd(&self, stream: Stream) -> Option<BorrowedFd<'_>> {
        match stream {
            Stream::Report => self.report.as_ref().map(AsFd::as_fd),
            Stream::Stdin => self.stdin.as_ref().map(AsFd::as_fd),
            Stream::Stdout | Stream::Stderr => self.output(stream).map(|output| output.fd.as_fd()),
        }
    }

    /// Forgets a stream.
    pub(crate) fn close(&mut self, stream: Stream) {
        match stream {
            Stream::Report => self.report = None,
            Stream::Stdin => {
                self.stdin = None;
                self.input.clear();
            }
            Stream::Stdout => self.outputs[0] = None,
            Stream::Stderr => self.outputs[1] = None,
        }
    }

    /// Reads the child's report; at its end, what to tell the host.
    pub(crate) fn read_report(&mut self) -> Option<FromAgent> {
        let mut piece = [0; 4096];
        let fd = self.report.as_ref()?;
        let count = read(fd, &mut piece).unwrap_or(0);
        if count > 0 {
            self.reported
                .extend_from_slice(piece.get(..count).unwrap_or_default());
            return None;
        }
        let report = child::parse_report(&self.reported);
        Some(match report {
            Some((errno, message)) => FromAgent::ExecFailed { errno, message },
            None => FromAgent::Started {
                pid: self.pid.as_raw_nonzero().get(),
            },
        })
    }

    /// Takes bytes for the standard input; none end it. Says whether it still has one.
    pub(crate) fn push_input(&mut self, bytes: &[u8]) -> bool {
        if self.stdin.is_none() || self.input_ends {
            return false;
        }
        self.input_ends = bytes.is_empty();
        self.input.extend(bytes);
        true
    }

    /// Whether the command has so much input to read that no more should be taken from the host.
    pub(crate) fn lags(&self) -> bool {
        self.input.len() > STDIN_WINDOW
    }

    /// Whether there is something to do about the standard input.
    pub(crate) fn has_input(&self) -> bool {
        !self.input.is_empty() || self.input_ends
    }

    /// Writes what the command takes now; the number of bytes, and whether more can come.
    pub(crate) fn write_input(&mut self) -> (u64, Next) {
        let Some(fd) = &self.stdin else {
            return (0, Next::Close);
        };
        let mut taken = 0;
        while !self.input.is_empty() {
            match write(fd, self.input.as_slices().0) {
                Ok(count) => {
                    self.input.drain(..count);
                    taken += count as u64;
                }
                Err(Errno::AGAIN) => return (taken, Next::Wait),
                Err(Errno::INTR) => {}
                // Nobody will read the rest.
                Err(_) => return (taken + self.input.len() as u64, Next::Close),
            }
        }
        match (self.input_ends, self.terminal.is_some()) {
            (false, _) => (taken, Next::Wait),
            (true, false) => (taken, Next::Close),
            // A terminal stays open; the character alone says that the input ends.
            (true, true) => {
                self.input_ends = false;
                self.input.push_back(END_OF_INPUT);
                let (_, next) = self.write_input();
                (taken, next)
            }
        }
    }

    /// Reads a piece of output into `piece`; how long it is, and whether more can come.
    pub(crate) fn read_output(&mut self, stream: Stream, piece: &mut [u8]) -> (usize, Next) {
        let limit = self.credit.map_or(piece.len(), |credit| {
            piece
                .len()
                .min(usize::try_from(credit).unwrap_or(usize::MAX))
        });
        let ended = self.status.is_some();
        let Some(output) = self.output_mut(stream) else {
            return (0, Next::Close);
        };
        let Some(piece) = piece.get_mut(..limit).filter(|piece| !piece.is_empty()) else {
            return (0, Next::Wait);
        };
        match read(&output.fd, piece) {
            Ok(0) => (0, Next::Close),
            Ok(count) => {
                output.owed = output.owed.saturating_sub(count as u64);
                if let Some(credit) = &mut self.credit {
                    *credit -= count as u64;
                }
                (count, Next::Wait)
            }
            Err(Errno::AGAIN | Errno::INTR) => {
                if ended {
                    output.owed = 0;
                }
                (0, Next::Wait)
            }
            // EIO is how a terminal says that nobody has it open any more.
            Err(_) => (0, Next::Close),
        }
    }

    /// Whether the host takes no more output now.
    pub(crate) fn is_out_of_credit(&self) -> bool {
        self.credit == Some(0)
    }

    /// Lets the command send more.
    pub(crate) fn add_credit(&mut self, bytes: u64) {
        self.credit = Some(self.credit.unwrap_or(0).saturating_add(bytes));
    }

    /// Changes the size of its terminal.
    pub(crate) fn resize(&self, size: WindowSize) -> Result<(), Errno> {
        self.terminal
            .as_ref()
            .map_or(Ok(()), |terminal| tcsetwinsize(terminal, winsize(size)))
    }

    /// Sends a signal to its process group, unless it has ended.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), Errno> {
        let signal = Signal::from_named_raw(signal).ok_or(Errno::INVAL)?;
        if self.status.is_some() {
            return Ok(());
        }
        match kill_process_group(self.pid, signal) {
            // It has only just been forked and is in the agent's group still.
            Err(Errno::SRCH) => kill_process(self.pid, signal),
            result => result,
        }
    }

    /// Notes how the command ended, after it was reaped.
    pub(crate) fn ended(&mut self, status: WaitStatus) {
        for output in self.outputs.iter_mut().flatten() {
            output.owed = ioctl_fionread(&output.fd).unwrap_or(0);
        }
        self.deadline = Some(Instant::now() + GRACE);
        self.status = Some(match status.terminating_signal() {
            Some(signal) => ExitStatus::Signal(signal),
            None => ExitStatus::Code(status.exit_status().unwrap_or(0)),
        });
    }

    /// When [`Self::outcome`] should be asked for again although nothing happened.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// How it ended, once that and all its output are known. Output that processes left behind
    /// may still write is given up at the deadline; what the command itself wrote never is.
    pub(crate) fn outcome(&self, now: Instant) -> Option<ExitStatus> {
        let open = self.outputs.iter().flatten();
        let is_late = self.deadline.is_some_and(|deadline| now >= deadline);
        let is_done = |output: &Output| is_late && output.owed == 0;
        self.status
            .filter(|_| self.report.is_none() && open.into_iter().all(is_done))
    }

    fn output(&self, stream: Stream) -> Option<&Output> {
        self.outputs
            .get(usize::from(stream == Stream::Stderr))?
            .as_ref()
    }

    fn output_mut(&mut self, stream: Stream) -> Option<&mut Output> {
        self.outputs
            .get_mut(usize::from(stream == Stream::Stderr))?
            .as_mut()
    }
}

impl Stream {
    /// The kind of frame that carries its bytes.
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::Report => Kind::Control,
            Self::Stdin => Kind::Stdin,
            Self::Stdout => Kind::Stdout,
            Self::Stderr => Kind::Stderr,
        }
    }
}

type Pipes = (Streams, OwnedFd, [Option<OwnedFd>; 2]);

fn make_pipes() -> Result<Pipes, Errno> {
    let (child_in, stdin) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stdout, child_out) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, child_err) = pipe_with(PipeFlags::CLOEXEC)?;
    // Only the agent's ends: a program need not expect such a thing of its own.
    for fd in [&stdin, &stdout, &stderr] {
        fcntl_setfl(fd, OFlags::NONBLOCK)?;
    }
    Ok((
        Streams::Pipes([child_in, child_out, child_err]),
        stdin,
        [Some(stdout), Some(stderr)],
    ))
}

/// Both ends of a new terminal, the agent's first.
fn make_terminal(pts: &OwnedFd, size: WindowSize) -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master = openat(pts, "ptmx", flags, Mode::empty())?;
    unlockpt(&master)?;
    tcsetwinsize(&master, winsize(size))?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    Ok((master, slave))
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, Errno> {
    fd.try_clone()
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}
