//! Copies files and directories between the host and a running sandbox, as streams of the agent's.

use std::io::{self, Read, Write};
use std::path::Path;

use msb_protocol::{Builtin, Exec};
use tokio::sync::mpsc;

use super::{ExecEvent, ExecHandle, Sandbox};
use crate::{Error, ErrorKind, MicrosandboxResult};

mod land;
mod pack;

/// Pieces that may wait between the connection and the disk.
const PIECES: usize = 16;

/// What was copied.
///
/// ```no_run
/// # use microsandbox::{MicrosandboxResult, Sandbox};
/// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
/// sandbox.copy_in("./data", "/srv/data", &|_| {}).await?;
/// let copied = sandbox.copy_out("/srv/result", "./result", &|_| {}).await?;
/// println!("{} bytes", copied.bytes);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes of the stream: all content, and some for names and modes.
    pub bytes: u64,
    /// What was left out, and why: special files.
    pub left_out: Vec<String>,
}

impl Sandbox {
    /// Copies a file or directory of the host into the sandbox, as the sandbox's user.
    ///
    /// If `to` is a directory, it is put into that; the content of a directory is, when `from` ends
    /// with `/.`. Modes are kept, owners and set-id bits are not. `progress` is called with the
    /// number of bytes so far.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let copied = sandbox.copy_in("./data", "/srv", &|bytes| eprint!("\r{bytes}")).await?;
    /// for left_out in copied.left_out {
    ///     eprintln!("left out: {left_out}");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when one of the sides cannot read or write.
    pub async fn copy_in(
        &self,
        from: impl AsRef<Path>,
        to: &str,
        progress: &(dyn Fn(u64) + Sync),
    ) -> MicrosandboxResult<Copied> {
        let from = from.as_ref().to_owned();
        // What cannot be read at all is found before the sandbox is asked for anything.
        pack::check(&from)?;
        let name = pack::name_of(&from.to_string_lossy());
        let work = Builtin::Unpack {
            path: absolute(to)?,
            name,
        };
        let mut handle = self.transfer(work)?;
        let input = handle.take_stdin();
        let (pieces, mut queue) = mpsc::channel::<Vec<u8>>(PIECES);
        let packing = tokio::task::spawn_blocking(move || pack::pack(&from, Pieces(pieces)));
        let mut bytes = 0;
        let feed = async {
            let Some(mut input) = input else { return };
            while let Some(piece) = queue.recv().await {
                bytes += piece.len() as u64;
                progress(bytes);
                if input.write(&piece).await.is_err() {
                    return;
                }
            }
        };
        let ended = {
            let (feed, end) = (std::pin::pin!(feed), finish(handle, None));
            let mut end = std::pin::pin!(end);
            // A guest that has given up is sent no more.
            tokio::select! {
                ended = &mut end => ended,
                () = feed => end.await,
            }
        };
        drop(queue);
        let packed = packing.await.map_err(interrupted)?;
        // When the guest refuses, the host only sees that nobody takes the rest.
        ended?;
        let left_out = packed?;
        Ok(Copied { bytes, left_out })
    }

    /// Copies a file or directory of the sandbox to the host.
    ///
    /// Where it goes is decided as in [`Sandbox::copy_in`]. The sandbox is not trusted: nothing is
    /// written outside of the place that `to` names, set-id bits are dropped, and special files are
    /// left out. Symbolic links are copied as they are, and lead where their maker chose.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// // The content of `/srv/result`, not the directory itself.
    /// sandbox.copy_out("/srv/result/.", "./result", &|_| {}).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when one of the sides cannot read or write, or the sandbox sends what no
    /// copy is.
    pub async fn copy_out(
        &self,
        from: &str,
        to: impl AsRef<Path>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> MicrosandboxResult<Copied> {
        let path = absolute(from)?;
        let (to, name) = (to.as_ref().to_owned(), pack::name_of(&path));
        let handle = self.transfer(Builtin::Pack { path })?;
        let (pieces, queue) = mpsc::channel::<Vec<u8>>(PIECES);
        let landing = tokio::task::spawn_blocking(move || {
            land::land(&to, name.as_deref(), Queue::new(queue))
        });
        let sink = Sink {
            pieces,
            bytes: 0,
            progress,
        };
        let (left_out, bytes) = match finish(handle, Some(sink)).await {
            Ok(told) => told,
            Err(error) => {
                let _ = landing.await;
                return Err(error);
            }
        };
        landing.await.map_err(interrupted)??;
        Ok(Copied { bytes, left_out })
    }

    fn transfer(&self, work: Builtin) -> MicrosandboxResult<ExecHandle> {
        let defaults = self.defaults();
        let exec = Exec {
            argv: vec!["copy".to_owned()],
            env: Vec::new(),
            cwd: None,
            user: defaults.user,
            terminal: None,
            limits: Vec::new(),
            builtin: Some(work),
        };
        ExecHandle::start(&self.client, &exec, None)
    }
}

/// Where what the guest sends goes.
struct Sink<'a> {
    pieces: mpsc::Sender<Vec<u8>>,
    bytes: u64,
    progress: &'a (dyn Fn(u64) + Sync),
}

/// Waits for the guest's end of a copy; what it complained of, and how many bytes it sent.
async fn finish(
    mut handle: ExecHandle,
    mut sink: Option<Sink<'_>>,
) -> MicrosandboxResult<(Vec<String>, u64)> {
    let mut said = Vec::new();
    while let Some(event) = handle.next().await? {
        match (event, &mut sink) {
            (ExecEvent::Stdout(piece), Some(sink)) => {
                sink.bytes += piece.len() as u64;
                (sink.progress)(sink.bytes);
                if sink.pieces.send(piece).await.is_err() {
                    // The host's end has given up and says why.
                    return Ok((Vec::new(), sink.bytes));
                }
            }
            // More than a guest has to say is not kept.
            (ExecEvent::Stderr(text), _) if said.len() < 64 << 10 => said.extend(text),
            (ExecEvent::NotStarted { message, .. }, _) => {
                return Err(Error::new(ErrorKind::ExecFailed, message));
            }
            (ExecEvent::Exited { code }, sink) => {
                let text = String::from_utf8_lossy(&said);
                let lines: Vec<String> = text.lines().map(str::to_owned).collect();
                if code == 0 {
                    return Ok((lines, sink.as_ref().map_or(0, |sink| sink.bytes)));
                }
                let why = lines.last().map_or("the copy was ended", String::as_str);
                let message = format!("in the sandbox, {why}");
                return Err(Error::new(ErrorKind::Io, message));
            }
            _ => {}
        }
    }
    Err(Error::new(ErrorKind::Io, "the copy ended without a word"))
}

/// A guest path, which is taken from `/` when it is relative.
fn absolute(path: &str) -> MicrosandboxResult<String> {
    if path.is_empty() || path.contains('\0') {
        let message = format!("`{path}` is no path in a sandbox");
        return Err(Error::new(ErrorKind::InvalidConfig, message).with_value(path));
    }
    Ok(if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    })
}

fn interrupted(error: tokio::task::JoinError) -> Error {
    Error::new(ErrorKind::Io, "the copy was interrupted").with_source(error)
}

/// Writes into a queue of pieces.
struct Pieces(mpsc::Sender<Vec<u8>>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(bytes.to_vec());
        sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads from a queue of pieces.
struct Queue {
    pieces: mpsc::Receiver<Vec<u8>>,
    piece: io::Cursor<Vec<u8>>,
}

impl Queue {
    fn new(pieces: mpsc::Receiver<Vec<u8>>) -> Self {
        Self {
            pieces,
            piece: io::Cursor::default(),
        }
    }
}

impl Read for Queue {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.piece.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = io::Cursor::new(piece),
                None => return Ok(0),
            }
        }
    }
}
