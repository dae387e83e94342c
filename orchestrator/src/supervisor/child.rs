//! One child process: a task of its own waits for it and keeps the last lines it said.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::process::{Pid, Signal};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::ChildStderr;
use tokio::sync::{mpsc, watch};

use crate::rundir::{millis, rfc3339};
use crate::{Error, ErrorKind, MicrosandboxResult};

/// How many of its last lines are kept.
const LINES: usize = 12;

/// Longest line that is read; a longer one is cut into several.
const LINE_MAX: u64 = 4096;

/// A child process that this one started.
#[derive(Debug, Clone)]
pub(crate) struct Child {
    /// By which its end is told.
    pub(super) number: usize,
    /// Whether the sandbox cannot go on without it; a mount that is just being added or removed is
    /// the matter of whoever does that.
    pub(super) needed: bool,
    /// What it is for, such as `root disk` or `mount /data`.
    pub(crate) purpose: String,
    pid: Option<Pid>,
    ended: watch::Receiver<Option<ExitStatus>>,
    said: Arc<Mutex<VecDeque<String>>>,
}

impl Child {
    /// Starts it. Its standard error goes to `log`; when it ends, its number is sent on `ends`.
    ///
    /// Must be called on the main thread: children end when the thread that made them does.
    pub(crate) fn start(
        purpose: String,
        command: Command,
        log: &File,
        number: usize,
        ends: mpsc::UnboundedSender<usize>,
    ) -> MicrosandboxResult<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let cannot = |error| {
            Error::new(
                ErrorKind::BootStart,
                format!("{purpose}: cannot start `{program}`"),
            )
            .with_source(error)
        };
        let log = log.try_clone().map_err(cannot)?;
        let mut command = tokio::process::Command::from(command);
        let mut child = command.kill_on_drop(true).spawn().map_err(cannot)?;
        let pid = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        let said = Arc::new(Mutex::new(VecDeque::new()));
        let stderr = child.stderr.take();
        let (end, ended) = watch::channel(None);
        let (kept, name) = (Arc::clone(&said), purpose.clone());
        tokio::spawn(async move {
            if let Some(stderr) = stderr {
                // What holds the pipe open longer than the child does is not waited for.
                tokio::select! {
                    () = listen(stderr, &name, log, &kept) => {}
                    () = async { let _ = child.wait().await; tokio::time::sleep(Duration::from_millis(50)).await } => {}
                }
            }
            let status = child.wait().await.unwrap_or_default();
            let _ = end.send(Some(status));
            let _ = ends.send(number);
        });
        Ok(Self {
            number,
            needed: true,
            purpose,
            pid,
            ended,
            said,
        })
    }

    /// Its pid, unless it has ended.
    pub(crate) fn pid(&self) -> Option<u32> {
        let pid = self.pid.filter(|_| self.status().is_none())?;
        u32::try_from(pid.as_raw_nonzero().get()).ok()
    }

    /// How it ended, if it has.
    pub(crate) fn status(&self) -> Option<ExitStatus> {
        *self.ended.borrow()
    }

    /// Waits until it has ended; false when that takes longer than `limit`.
    pub(crate) async fn ended_within(&mut self, limit: Duration) -> bool {
        let ended = self.ended.wait_for(Option::is_some);
        tokio::time::timeout(limit, ended).await.is_ok()
    }

    /// Sends it a signal, unless it has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        // Not yet reported as ended, it has not been waited for, so its pid is still its own.
        if let (None, Some(pid)) = (self.status(), self.pid) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Asks it to end, then makes it.
    pub(crate) async fn end(&mut self, patience: Duration) {
        self.signal(Signal::TERM);
        if !self.ended_within(patience).await {
            tracing::warn!("{}: did not end in time, killed", self.purpose);
            self.kill().await;
        }
    }

    /// Ends it at once.
    pub(crate) async fn kill(&mut self) {
        self.signal(Signal::KILL);
        // A process that the kernel does not let go of must not hold up the others for ever.
        self.ended_within(Duration::from_secs(5)).await;
    }

    /// Why it ended, in one sentence: the last thing it said, or else its exit status.
    pub(crate) fn last_words(&self) -> String {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let line = said.iter().rev().find(|line| !line.trim().is_empty());
        let killed = self.status().and_then(|status| status.signal());
        match (line, self.status(), killed) {
            (_, _, Some(signal)) => format!("killed by signal {signal}"),
            (Some(line), _, _) => line.trim().to_owned(),
            (None, Some(status), _) => format!("it ended with {status}"),
            (None, None, _) => "it said nothing".to_owned(),
        }
    }

    /// Whether it ended in another way than it should.
    pub(crate) fn failed(&self) -> bool {
        self.needed && self.status().is_some_and(|status| !status.success())
    }
}

async fn listen(stderr: ChildStderr, name: &str, mut log: File, said: &Mutex<VecDeque<String>>) {
    let mut reader = BufReader::new(stderr);
    loop {
        let mut line = Vec::new();
        match (&mut reader)
            .take(LINE_MAX)
            .read_until(b'\n', &mut line)
            .await
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        // A full disk must not stop the sandbox.
        let now = rfc3339(millis(SystemTime::now()));
        let _ = writeln!(log, "{now} [{name}] {text}");
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() >= LINES {
            said.pop_front();
        }
        said.push_back(text.to_owned());
    }
}
