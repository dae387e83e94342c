//! A client's connection to the supervisor of a sandbox.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use msb_protocol::{Channel, Frame, FromAgent, Kind, STDIN_WINDOW};
use tokio::net::UnixStream;
use tokio::sync::{Mutex as AsyncMutex, Semaphore, mpsc};

use crate::agent::{self, FrameReader, FrameSender};
use crate::supervisor::control::{FromSupervisor, ToSupervisor};
use crate::{Error, ErrorKind, MicrosandboxResult};

/// A connection that several commands share.
#[derive(Debug)]
pub(super) struct Client {
    sender: FrameSender,
    routes: Arc<Mutex<Routes>>,
    control: AsyncMutex<mpsc::UnboundedReceiver<FromSupervisor>>,
    next: AtomicU32,
}

#[derive(Debug, Default)]
struct Routes {
    channels: BTreeMap<Channel, Route>,
    closed: bool,
}

#[derive(Debug)]
struct Route {
    frames: mpsc::UnboundedSender<Frame>,
    window: Arc<Semaphore>,
}

/// One command's share of a connection.
#[derive(Debug)]
pub(super) struct ChannelEnd {
    pub(super) number: Channel,
    pub(super) frames: mpsc::UnboundedReceiver<Frame>,
    /// How many bytes of standard input may still be sent.
    pub(super) window: Arc<Semaphore>,
}

impl Client {
    /// Connects to the control socket of a running sandbox.
    pub(super) async fn connect(path: &Path) -> std::io::Result<Arc<Self>> {
        Ok(Self::over(UnixStream::connect(path).await?))
    }

    /// Speaks over a socket whose other end the supervisor was given.
    pub(super) fn adopt(stream: StdUnixStream) -> std::io::Result<Arc<Self>> {
        stream.set_nonblocking(true)?;
        Ok(Self::over(UnixStream::from_std(stream)?))
    }

    fn over(stream: UnixStream) -> Arc<Self> {
        let (reader, sender, _) = agent::split(stream);
        let routes = Arc::new(Mutex::new(Routes::default()));
        let (told, control) = mpsc::unbounded_channel();
        tokio::spawn(dispatch(reader, Arc::clone(&routes), told));
        Arc::new(Self {
            sender,
            routes,
            control: AsyncMutex::new(control),
            next: AtomicU32::new(1),
        })
    }

    /// Says something to the supervisor itself.
    pub(super) fn tell(&self, message: &ToSupervisor) {
        self.sender.message(0, message);
    }

    /// What the supervisor says next; nothing when it has ended.
    pub(super) async fn told(&self) -> Option<FromSupervisor> {
        self.control.lock().await.recv().await
    }

    /// Waits until the supervisor has ended.
    pub(super) async fn closed(&self) {
        while self.told().await.is_some() {}
    }

    pub(super) fn sender(&self) -> &FrameSender {
        &self.sender
    }

    /// Opens a channel for a command.
    pub(super) fn open(&self) -> MicrosandboxResult<ChannelEnd> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (frames, receiver) = mpsc::unbounded_channel();
        let window = Arc::new(Semaphore::new(STDIN_WINDOW));
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if routes.closed {
            return Err(Error::new(
                ErrorKind::SandboxNotRunning,
                "the sandbox is not running any more",
            ));
        }
        routes.channels.insert(
            number,
            Route {
                frames,
                window: Arc::clone(&window),
            },
        );
        Ok(ChannelEnd {
            number,
            frames: receiver,
            window,
        })
    }

    pub(super) fn close(&self, channel: Channel) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        routes.channels.remove(&channel);
    }
}

/// Hands each frame to whom it is for, until the supervisor has ended.
async fn dispatch(
    mut reader: FrameReader,
    routes: Arc<Mutex<Routes>>,
    told: mpsc::UnboundedSender<FromSupervisor>,
) {
    while let Ok(Some(frame)) = reader.next().await {
        if frame.channel == 0 {
            if let Ok(message) = frame.message() {
                let _ = told.send(message);
            }
            continue;
        }
        let mut routes = routes.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(route) = routes.channels.get(&frame.channel) else {
            continue;
        };
        if frame.kind == Kind::Control
            && let Ok(FromAgent::StdinTaken { bytes }) = frame.message()
        {
            // A guest that claims more than there is must not overflow the count.
            let room = STDIN_WINDOW.saturating_sub(route.window.available_permits());
            route
                .window
                .add_permits(usize::try_from(bytes).unwrap_or(usize::MAX).min(room));
            continue;
        }
        let channel = frame.channel;
        if route.frames.send(frame).is_err() {
            routes.channels.remove(&channel);
        }
    }
    let mut routes = routes.lock().unwrap_or_else(PoisonError::into_inner);
    routes.closed = true;
    for route in std::mem::take(&mut routes.channels).into_values() {
        route.window.close();
    }
}
