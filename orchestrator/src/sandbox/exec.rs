//! Commands in a running sandbox: what they print, how they end.

use std::sync::Arc;
use std::time::Duration;

use msb_protocol::{Channel, Exec, ExitStatus, Frame, FromAgent, Kind, ToAgent, WindowSize};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout_at};

use super::client::Client;
use crate::supervisor::control::ToSupervisor;
use crate::{Error, ErrorKind, MicrosandboxResult};

/// Output that a command may be ahead of its reader, in bytes.
const OUTPUT_WINDOW: u64 = 1 << 20;

/// Largest piece of standard input that is sent at once.
const STDIN_PIECE: usize = 32 << 10;

/// Something that a running command did.
///
/// ```no_run
/// # use microsandbox::{ExecEvent, ExecHandle, MicrosandboxResult};
/// # async fn example(mut command: ExecHandle) -> MicrosandboxResult<()> {
/// while let Some(event) = command.next().await? {
///     match event {
///         ExecEvent::Stdout(bytes) => print!("{}", String::from_utf8_lossy(&bytes)),
///         ExecEvent::Exited { code } => println!("ended with {code}"),
///         _ => {}
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExecEvent {
    /// It runs, with this process id in the guest.
    Started {
        /// The process id.
        pid: i32,
    },
    /// It wrote to its standard output.
    Stdout(Vec<u8>),
    /// It wrote to its standard error.
    Stderr(Vec<u8>),
    /// It could not be started.
    NotStarted {
        /// The guest's reason; ENOENT when there is no such program.
        errno: i32,
        /// The same in words.
        message: String,
    },
    /// It ended and everything it wrote has been delivered.
    Exited {
        /// Its exit code, or 128 plus the number of the signal that killed it.
        code: i32,
    },
}

/// What a command left when it ended.
///
/// ```no_run
/// # use microsandbox::{MicrosandboxResult, Sandbox};
/// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
/// let output = sandbox.exec("pytest", ["-q"]).await?;
/// if !output.success() {
///     eprintln!("ended with {}: {}", output.code(), output.stderr());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    code: i32,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl ExecOutput {
    /// Its exit code, or 128 plus the number of the signal that killed it.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// assert_eq!(sandbox.shell("exit 3").await?.code(), 3);
    /// assert_eq!(sandbox.shell("kill -9 $$").await?.code(), 128 + 9);
    /// # Ok(())
    /// # }
    /// ```
    pub fn code(&self) -> i32 {
        self.code
    }

    /// Whether it ended with code 0.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let there = sandbox.exec("test", ["-e", "/app/data/seed"]).await?.success();
    /// println!("{}", if there { "seeded" } else { "empty" });
    /// # Ok(())
    /// # }
    /// ```
    pub fn success(&self) -> bool {
        self.code == 0
    }

    /// What it wrote to its standard output, with what is no UTF-8 replaced.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let kernel = sandbox.exec("uname", ["-r"]).await?.stdout();
    /// println!("runs Linux {}", kernel.trim());
    /// # Ok(())
    /// # }
    /// ```
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// What it wrote to its standard error, with what is no UTF-8 replaced.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let output = sandbox.exec("ls", ["/missing"]).await?;
    /// assert!(output.stderr().contains("/missing"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// What it wrote to its standard output, byte for byte.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let archive = sandbox.exec("tar", ["-cz", "/app"]).await?;
    /// assert!(archive.stdout_bytes().starts_with(&[0x1f, 0x8b]));
    /// # Ok(())
    /// # }
    /// ```
    pub fn stdout_bytes(&self) -> &[u8] {
        &self.stdout
    }

    /// What it wrote to its standard error, byte for byte.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let output = sandbox.shell("printf '\\377' >&2").await?;
    /// assert_eq!(output.stderr_bytes(), [0xff]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn stderr_bytes(&self) -> &[u8] {
        &self.stderr
    }
}

/// A command that runs. When it is dropped before it has ended, the command is hung up on.
///
/// ```no_run
/// # use microsandbox::{ExecEvent, ExecOptions, MicrosandboxResult, Sandbox};
/// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
/// let mut command = sandbox.exec_with(ExecOptions::new("make").args(["test"]))?;
/// while let Some(event) = command.next().await? {
///     if let ExecEvent::Stdout(bytes) = event {
///         print!("{}", String::from_utf8_lossy(&bytes));
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ExecHandle {
    client: Arc<Client>,
    channel: Channel,
    frames: mpsc::UnboundedReceiver<Frame>,
    stdin: Option<ExecStdin>,
    /// When it is killed, and after what time that is.
    limit: Option<(Instant, Duration)>,
    /// It is nobody's any more: hanging up does not concern it.
    detached: bool,
    done: bool,
}

/// The standard input of a command that runs.
///
/// ```no_run
/// # use microsandbox::{ExecOptions, MicrosandboxResult, Sandbox};
/// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
/// let mut command = sandbox.exec_with(ExecOptions::new("sort"))?;
/// if let Some(mut stdin) = command.take_stdin() {
///     stdin.write(b"pear\napple\n").await?;
/// }
/// assert_eq!(command.output().await?.stdout(), "apple\npear\n");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ExecStdin {
    client: Arc<Client>,
    channel: Channel,
    window: Arc<Semaphore>,
}

/// Sends signals and sizes to a command that runs.
///
/// ```no_run
/// # use microsandbox::{ExecOptions, MicrosandboxResult, Sandbox};
/// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
/// let command = sandbox.exec_with(ExecOptions::new("sleep").args(["60"]))?;
/// let control = command.control();
/// tokio::spawn(async move { control.signal(libc::SIGTERM) });
/// assert_eq!(command.output().await?.code(), 128 + libc::SIGTERM);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct ExecControl {
    client: Arc<Client>,
    channel: Channel,
}

impl ExecHandle {
    /// Starts it; it is killed after `limit`.
    pub(super) fn start(
        client: &Arc<Client>,
        exec: &Exec,
        limit: Option<Duration>,
    ) -> MicrosandboxResult<Self> {
        let end = client.open()?;
        client
            .sender()
            .message(end.number, &ToAgent::Exec(exec.clone()));
        client.sender().message(
            end.number,
            &ToAgent::OutputCredit {
                bytes: OUTPUT_WINDOW,
            },
        );
        let stdin = ExecStdin {
            client: Arc::clone(client),
            channel: end.number,
            window: end.window,
        };
        Ok(Self {
            client: Arc::clone(client),
            channel: end.number,
            frames: end.frames,
            stdin: Some(stdin),
            limit: limit.and_then(|limit| Some((Instant::now().checked_add(limit)?, limit))),
            detached: false,
            done: false,
        })
    }

    /// Its standard input; only the first call gives it. While it is not closed, the command waits
    /// for more.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecHandle, MicrosandboxResult};
    /// # async fn example(mut command: ExecHandle) -> MicrosandboxResult<()> {
    /// if let Some(mut stdin) = command.take_stdin() {
    ///     stdin.write(b"print(6 * 7)\n").await?;
    /// }
    /// assert!(command.take_stdin().is_none());
    /// # Ok(())
    /// # }
    /// ```
    pub fn take_stdin(&mut self) -> Option<ExecStdin> {
        self.stdin.take()
    }

    /// What sends signals and sizes to it.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecHandle, MicrosandboxResult};
    /// # async fn example(command: ExecHandle) -> MicrosandboxResult<()> {
    /// let control = command.control();
    /// control.signal(libc::SIGINT);
    /// println!("ended with {}", command.output().await?.code());
    /// # Ok(())
    /// # }
    /// ```
    pub fn control(&self) -> ExecControl {
        ExecControl {
            client: Arc::clone(&self.client),
            channel: self.channel,
        }
    }

    /// What it does next; nothing after its end.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecEvent, ExecHandle, MicrosandboxResult};
    /// # async fn example(mut command: ExecHandle) -> MicrosandboxResult<()> {
    /// if let Some(ExecEvent::Started { pid }) = command.next().await? {
    ///     println!("it is process {pid} of the guest");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxNotRunning`] when the sandbox ends before the command does, and
    /// [`ErrorKind::ExecTimeout`] when [`timeout`](super::ExecOptions::timeout) has passed.
    pub async fn next(&mut self) -> MicrosandboxResult<Option<ExecEvent>> {
        while !self.done {
            let frame = match self.limit {
                None => self.frames.recv().await,
                Some((end, limit)) => match timeout_at(end, self.frames.recv()).await {
                    Ok(frame) => frame,
                    Err(_) => return Err(self.overdue(limit)),
                },
            };
            let Some(frame) = frame else {
                self.done = true;
                return Err(self.lost().await);
            };
            if let Some(event) = self.event(frame)? {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    /// Waits for its end and collects what it wrote. Its standard input is closed first, unless it
    /// was taken.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecOptions, MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let output = sandbox.exec_with(ExecOptions::new("env").env("CI", "1"))?.output().await?;
    /// assert!(output.stdout().contains("CI=1"));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ExecFailed`] when it could not be started, and as [`ExecHandle::next`].
    pub async fn output(mut self) -> MicrosandboxResult<ExecOutput> {
        drop(self.stdin.take());
        let mut output = ExecOutput {
            code: 0,
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        while let Some(event) = self.next().await? {
            match event {
                ExecEvent::Started { .. } => {}
                ExecEvent::Stdout(bytes) => output.stdout.extend(bytes),
                ExecEvent::Stderr(bytes) => output.stderr.extend(bytes),
                ExecEvent::Exited { code } => output.code = code,
                ExecEvent::NotStarted { message, .. } => {
                    return Err(Error::new(ErrorKind::ExecFailed, message));
                }
            }
        }
        Ok(output)
    }

    /// Leaves it running when this is dropped; its output goes to the sandbox's log. The caller's
    /// process may end as soon as this has, or learn from [`ExecHandle::next`] that it runs.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecEvent, ExecOptions, MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let server = ExecOptions::new("python").args(["-m", "http.server"]);
    /// let mut server = sandbox.exec_with(server)?;
    /// server.detach().await;
    /// assert!(matches!(server.next().await?, Some(ExecEvent::Started { .. })));
    /// println!("it writes to {}", sandbox.dir().output_log().display());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn detach(&mut self) {
        self.client.tell(&ToSupervisor::Detach {
            channel: self.channel,
        });
        self.detached = true;
        self.client.sender().flushed().await;
    }

    fn event(&mut self, frame: Frame) -> MicrosandboxResult<Option<ExecEvent>> {
        let credit = |bytes: usize| {
            let bytes = bytes as u64;
            self.client
                .sender()
                .message(self.channel, &ToAgent::OutputCredit { bytes });
        };
        Ok(match frame.kind {
            Kind::Stdin => None,
            Kind::Stdout => {
                credit(frame.payload.len());
                Some(ExecEvent::Stdout(frame.payload))
            }
            Kind::Stderr => {
                credit(frame.payload.len());
                Some(ExecEvent::Stderr(frame.payload))
            }
            Kind::Control => {
                let message = frame.message().map_err(|error| {
                    Error::new(ErrorKind::ExecFailed, "the agent broke the protocol")
                        .with_source(error)
                })?;
                self.message(message)
            }
        })
    }

    fn message(&mut self, message: FromAgent) -> Option<ExecEvent> {
        let event = match message {
            FromAgent::Started { pid } => return Some(ExecEvent::Started { pid }),
            FromAgent::ExecFailed { errno, message } => ExecEvent::NotStarted { errno, message },
            FromAgent::Exited(ExitStatus::Code(code)) => ExecEvent::Exited { code },
            FromAgent::Exited(ExitStatus::Signal(signal)) => ExecEvent::Exited {
                code: 128_i32.saturating_add(signal),
            },
            _ => return None,
        };
        self.done = true;
        self.client.close(self.channel);
        Some(event)
    }

    fn overdue(&mut self, limit: Duration) -> Error {
        self.control().signal(libc::SIGKILL);
        self.done = true;
        self.client.close(self.channel);
        let message = format!("the command was killed after {} s", limit.as_secs_f64());
        Error::new(ErrorKind::ExecTimeout, message)
    }

    /// Why the sandbox ended.
    async fn lost(&self) -> Error {
        super::why_ended(&self.client).await.unwrap_or_else(|| {
            Error::new(
                ErrorKind::SandboxNotRunning,
                "the sandbox ended before the command did",
            )
        })
    }
}

impl Drop for ExecHandle {
    fn drop(&mut self) {
        if !self.done {
            if !self.detached {
                self.control().signal(libc::SIGHUP);
            }
            self.client.close(self.channel);
        }
    }
}

impl ExecStdin {
    /// Writes all of `bytes`; waits while the command does not read.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecStdin, MicrosandboxResult};
    /// # async fn example(mut stdin: ExecStdin) -> MicrosandboxResult<()> {
    /// stdin.write(b"a line\n").await?;
    /// // The command reads the end of its input.
    /// drop(stdin);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxNotRunning`] when the sandbox has ended.
    pub async fn write(&mut self, bytes: &[u8]) -> MicrosandboxResult<()> {
        for piece in bytes.chunks(STDIN_PIECE) {
            let permits = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            let gone = |_| Error::new(ErrorKind::SandboxNotRunning, "the sandbox has ended");
            self.window
                .acquire_many(permits)
                .await
                .map_err(gone)?
                .forget();
            if let Ok(frame) = Frame::data(self.channel, Kind::Stdin, piece.to_vec()) {
                self.client.sender().send(frame);
            }
        }
        Ok(())
    }
}

/// The command reads the end of its input.
impl Drop for ExecStdin {
    fn drop(&mut self) {
        if let Ok(end) = Frame::data(self.channel, Kind::Stdin, Vec::new()) {
            self.client.sender().send(end);
        }
    }
}

impl ExecControl {
    /// Sends a signal to the command's process group.
    ///
    /// ```no_run
    /// # use microsandbox::ExecHandle;
    /// # fn example(command: ExecHandle) {
    /// command.control().signal(libc::SIGHUP);
    /// # }
    /// ```
    pub fn signal(&self, signal: i32) {
        self.client
            .sender()
            .message(self.channel, &ToAgent::Signal { signal });
    }

    /// Tells the command's terminal its size.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecOptions, MicrosandboxResult, Sandbox};
    /// # fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let shell = sandbox.exec_with(ExecOptions::new("/bin/sh").terminal(24, 80))?;
    /// shell.control().resize(50, 132);
    /// # Ok(())
    /// # }
    /// ```
    pub fn resize(&self, rows: u16, cols: u16) {
        self.client
            .sender()
            .message(self.channel, &ToAgent::Resize(WindowSize { rows, cols }));
    }
}
