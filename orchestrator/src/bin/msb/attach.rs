//! Joins a command in a sandbox with this program's terminal, standard input and output.

use std::io::{IsTerminal, Read, stdin, stdout};
use std::sync::Arc;
use std::time::Duration;

use microsandbox::{Error, ErrorKind, ExecControl, ExecEvent, ExecHandle, ExecStdin};
use rustix::termios::{self, OptionalActions, Termios};
use tokio::io::{AsyncWriteExt, Stderr, Stdout};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};

/// Exit codes of commands that could not be started, as shells give them.
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;

/// How long a command has after a signal before the sandbox is ended under it.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether the command gets a terminal.
pub(crate) fn wants_terminal(asked: bool, refused: bool) -> bool {
    asked || (!refused && stdin().is_terminal() && stdout().is_terminal())
}

/// Size of this program's terminal, as rows and columns.
pub(crate) fn terminal_size() -> (u16, u16) {
    let size = termios::tcgetwinsize(stdout()).or_else(|_| termios::tcgetwinsize(stdin()));
    match size {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        _ => (24, 80),
    }
}

/// How a joined command ended.
pub(crate) enum Joined {
    /// It ended with this code.
    Ended(i32),
    /// This program was told to end by this signal, and the command did not follow in time.
    Interrupted(i32),
}

/// Passes everything on in both directions until the command ends.
pub(crate) async fn join(
    mut handle: ExecHandle,
    terminal: bool,
    with_stdin: bool,
) -> Result<Joined, Error> {
    let raw = if terminal { RawMode::enter() } else { None };
    let control = handle.control();
    match handle.take_stdin() {
        Some(input) if with_stdin => pump_input(input)?,
        // Dropped, so that the command reads the end of its input.
        _ => {}
    }
    let interrupted = Arc::new(Notify::new());
    let signals = tokio::spawn(watch_signals(
        control.clone(),
        terminal,
        Arc::clone(&interrupted),
    ));
    let code = tokio::select! {
        code = pump_output(&mut handle, &control) => code.map(Joined::Ended),
        () = interrupted.notified() => Ok(Joined::Interrupted(128 + libc::SIGTERM)),
    };
    signals.abort();
    drop(raw);
    code
}

/// Leaves a command running, once it runs.
pub(crate) async fn leave(mut handle: ExecHandle) -> Result<Joined, Error> {
    handle.detach().await;
    Ok(Joined::Ended(match handle.next().await? {
        Some(ExecEvent::NotStarted { errno, message }) => not_started(errno, message),
        _ => 0,
    }))
}

/// Says why a command does not run; its exit code.
fn not_started(errno: i32, message: String) -> i32 {
    crate::output::error(&Error::new(ErrorKind::ExecFailed, message));
    match errno {
        libc::ENOENT | libc::ENOTDIR => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    }
}

/// A terminal in raw mode, put back when dropped.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> Option<Self> {
        let before = termios::tcgetattr(stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(stdin(), OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(stdin(), OptionalActions::Now, &self.0);
    }
}

/// Reads standard input on a thread of its own, which may be left waiting at the end.
fn pump_input(mut input: ExecStdin) -> Result<(), Error> {
    let (pieces, mut queue) = mpsc::channel::<Vec<u8>>(4);
    std::thread::Builder::new()
        .name("msb-stdin".to_owned())
        .spawn(move || {
            let mut buffer = vec![0; 32 << 10];
            loop {
                match stdin().lock().read(&mut buffer) {
                    Ok(0) | Err(_) => return,
                    Ok(count) => {
                        let piece = buffer.get(..count).unwrap_or_default().to_vec();
                        if pieces.blocking_send(piece).is_err() {
                            return;
                        }
                    }
                }
            }
        })
        .map_err(|error| Error::io("cannot read standard input", error))?;
    tokio::spawn(async move {
        while let Some(piece) = queue.recv().await {
            if input.write(&piece).await.is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// Where output goes.
struct Sinks {
    out: Stdout,
    err: Stderr,
}

async fn pump_output(handle: &mut ExecHandle, control: &ExecControl) -> Result<i32, Error> {
    let mut sinks = Sinks {
        out: tokio::io::stdout(),
        err: tokio::io::stderr(),
    };
    let mut open = true;
    while let Some(event) = handle.next().await? {
        let written = match &event {
            ExecEvent::Stdout(bytes) if open => write(&mut sinks.out, bytes).await,
            ExecEvent::Stderr(bytes) => write(&mut sinks.err, bytes).await,
            ExecEvent::Exited { code } => return Ok(*code),
            ExecEvent::NotStarted { errno, message } => {
                return Ok(not_started(*errno, message.clone()));
            }
            _ => Ok(()),
        };
        if open && written.is_err() {
            // The reader has gone; the command learns it as it would on the host.
            open = false;
            control.signal(libc::SIGPIPE);
        }
    }
    Err(Error::new(
        ErrorKind::ExecFailed,
        "the command ended without an exit code",
    ))
}

async fn write(sink: &mut (impl AsyncWriteExt + Unpin), bytes: &[u8]) -> std::io::Result<()> {
    sink.write_all(bytes).await?;
    sink.flush().await
}

/// Passes signals on to the command; when it does not end, tells the caller.
async fn watch_signals(control: ExecControl, terminal: bool, interrupted: Arc<Notify>) {
    let kinds = [
        (SignalKind::interrupt(), libc::SIGINT),
        (SignalKind::terminate(), libc::SIGTERM),
        (SignalKind::hangup(), libc::SIGHUP),
        (SignalKind::quit(), libc::SIGQUIT),
    ];
    let (told, mut numbers) = mpsc::unbounded_channel();
    for (kind, number) in kinds {
        let Ok(mut stream) = signal(kind) else {
            continue;
        };
        let told = told.clone();
        tokio::spawn(
            async move { while stream.recv().await.is_some() && told.send(number).is_ok() {} },
        );
    }
    let Ok(mut resized) = signal(SignalKind::window_change()) else {
        return;
    };
    loop {
        tokio::select! {
            Some(number) = numbers.recv() => {
                control.signal(number);
                let again = numbers.recv();
                // A second signal, or none of it: the sandbox is ended.
                let _ = tokio::time::timeout(PATIENCE, again).await;
                interrupted.notify_one();
                return;
            }
            _ = resized.recv(), if terminal => {
                let (rows, cols) = terminal_size();
                control.resize(rows, cols);
            }
        }
    }
}
