//! The host end of the protocol with the guest, and the same framing towards our own clients.
//!
//! Whatever comes in is hostile: a frame that breaks the rules ends the connection, and nothing
//! is kept beyond one frame.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use msb_protocol::{Decoder, Frame, FrameError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

/// What ends a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("the connection cannot be read")]
    Read(#[source] io::Error),
    #[error("the other side broke the protocol")]
    Protocol(#[from] FrameError),
}

/// The reading half of a connection.
#[derive(Debug)]
pub(crate) struct FrameReader {
    stream: OwnedReadHalf,
    decoder: Decoder,
    buffer: Vec<u8>,
}

/// The writing half of a connection; frames are queued and written by a task of its own, so that
/// nobody waits for a slow reader.
#[derive(Debug, Clone)]
pub(crate) struct FrameSender {
    queue: mpsc::UnboundedSender<Frame>,
    pending: Arc<Pending>,
}

/// What was queued and is not written yet.
#[derive(Debug, Default)]
struct Pending {
    bytes: AtomicUsize,
    frames: AtomicUsize,
    written: Notify,
}

/// Cuts a connection in two. The task writes what is queued until every sender is gone.
pub(crate) fn split(stream: UnixStream) -> (FrameReader, FrameSender, JoinHandle<()>) {
    let (read, write) = stream.into_split();
    let (queue, frames) = mpsc::unbounded_channel();
    let pending = Arc::new(Pending::default());
    let writer = tokio::spawn(write_all(write, frames, Arc::clone(&pending)));
    let reader = FrameReader {
        stream: read,
        decoder: Decoder::default(),
        buffer: vec![0; 64 << 10],
    };
    (reader, FrameSender { queue, pending }, writer)
}

impl FrameReader {
    /// The next frame; nothing when the other side has closed the connection. Nothing is lost when
    /// the future is dropped.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, LinkError> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            let count = match self.stream.read(&mut self.buffer).await {
                Ok(0) => return Ok(None),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(LinkError::Read(error)),
            };
            self.decoder
                .feed(self.buffer.get(..count).unwrap_or_default());
        }
    }
}

impl FrameSender {
    /// Queues a frame; a connection that is gone takes it as well.
    pub(crate) fn send(&self, frame: Frame) {
        let pending = &self.pending;
        pending
            .bytes
            .fetch_add(frame.payload.len(), Ordering::Relaxed);
        pending.frames.fetch_add(1, Ordering::Relaxed);
        if self.queue.send(frame).is_err() {
            pending.frames.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Queues a message on a channel.
    pub(crate) fn message(&self, channel: u32, message: &impl serde::Serialize) {
        match Frame::control(channel, message) {
            Ok(frame) => self.send(frame),
            Err(error) => tracing::error!("a message could not be sent: {error}"),
        }
    }

    /// How many bytes wait to be written.
    pub(crate) fn backlog(&self) -> usize {
        self.pending.bytes.load(Ordering::Relaxed)
    }

    /// Waits until everything that was queued is written, or the connection is gone.
    pub(crate) async fn flushed(&self) {
        loop {
            let written = self.pending.written.notified();
            if self.pending.frames.load(Ordering::Acquire) == 0 || self.queue.is_closed() {
                return;
            }
            written.await;
        }
    }
}

async fn write_all(
    mut stream: OwnedWriteHalf,
    mut queue: mpsc::UnboundedReceiver<Frame>,
    pending: Arc<Pending>,
) {
    while let Some(frame) = queue.recv().await {
        if stream.write_all(&frame.encode()).await.is_err() {
            queue.close();
            pending.written.notify_waiters();
            return;
        }
        pending
            .bytes
            .fetch_sub(frame.payload.len(), Ordering::Relaxed);
        pending.frames.fetch_sub(1, Ordering::Release);
        pending.written.notify_waiters();
    }
    let _ = stream.shutdown().await;
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn flushed_means_that_the_other_side_can_read_it() {
        let (near, far) = UnixStream::pair().unwrap();
        let (_reader, sender, _writer) = split(near);
        for _ in 0..3 {
            sender.message(7, &"as little as this");
        }
        sender.flushed().await;
        assert_eq!(sender.backlog(), 0);
        let mut bytes = vec![0; 4096];
        assert!(far.try_read(&mut bytes).unwrap() > 3 * "as little as this".len());

        drop(far);
        for _ in 0..64 {
            sender.message(7, &"x".repeat(60_000));
        }
        let gone = tokio::time::timeout(Duration::from_secs(5), sender.flushed()).await;
        assert!(gone.is_ok(), "it waits for a connection that is gone");
    }
}
