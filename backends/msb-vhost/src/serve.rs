//! Waits for a front end, starts the workers, and ends them.
//!
//! The calling thread handles the front end's messages; each queue has a thread of its own. Both
//! begin here, so that nothing runs beside the caller before its jail is up.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use crate::connection::{Connection, wait};
use crate::device::Backlog;
use crate::queue::{PATIENCE, Queue};
use crate::session::Session;
use crate::{Device, sys};

/// How long open requests have when the process is told to end: whoever told it may send SIGKILL
/// soon (vhost-user.rst, "Backend program conventions").
const LAST_PATIENCE: Duration = Duration::from_secs(1);

/// Where the front end comes from.
#[derive(Debug)]
pub struct Endpoint {
    socket: OwnedFd,
    listening: bool,
    path: Option<PathBuf>,
}

/// How a device is served.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Prefix of the workers' names, at most 11 bytes: the kernel keeps 15.
    pub name: &'static str,
    /// Waits for another front end after one has gone, instead of returning.
    pub reconnect: bool,
    /// How long a worker whose requests come in quick succession looks for the next one before it
    /// sleeps; zero never does. An idle device sleeps in any case.
    pub poll_limit: Duration,
}

/// The device cannot be served, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket cannot be made.
    #[error("cannot listen on `{path}`")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The descriptor is no socket.
    #[error("descriptor {fd} is no unix stream socket")]
    Descriptor {
        /// Its number.
        fd: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A worker cannot be started.
    #[error("cannot start the workers")]
    Workers(#[source] io::Error),
    /// Waiting for the front end failed.
    #[error("cannot wait for the front end")]
    Wait(#[source] io::Error),
}

impl Endpoint {
    /// Listens on a new socket at `path`. One that a process which has ended left there is
    /// replaced; one that somebody listens on is not.
    ///
    /// # Errors
    ///
    /// [`ServeError::Listen`].
    pub fn bind(path: &Path) -> Result<Self, ServeError> {
        let fail = |source| ServeError::Listen {
            path: path.to_owned(),
            source,
        };
        match UnixStream::connect(path) {
            Ok(_) => return Err(fail(io::ErrorKind::AddrInUse.into())),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(fail)?;
            }
            Err(_) => {}
        }
        // Only the owner may connect: whoever does can make the device read and write.
        let umask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        let listener = UnixListener::bind(path);
        rustix::process::umask(umask);
        Ok(Self {
            socket: listener.map_err(fail)?.into(),
            listening: true,
            path: Some(path.to_owned()),
        })
    }

    /// Takes over a socket that the parent process has passed on, listening or connected
    /// (vhost-user.rst, "Backend program conventions").
    ///
    /// # Errors
    ///
    /// [`ServeError::Descriptor`].
    pub fn from_fd(fd: i32) -> Result<Self, ServeError> {
        let fail = |source| ServeError::Descriptor { fd, source };
        let socket = sys::duplicate(fd).map_err(fail)?;
        let listening =
            rustix::net::sockopt::socket_acceptconn(&socket).map_err(|error| fail(error.into()))?;
        Ok(Self {
            socket,
            listening,
            path: None,
        })
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // In a jail the name is out of reach; whoever started the process removes it then.
            std::fs::remove_file(path).ok();
        }
    }
}

/// Serves `device` until its front end has gone, or SIGTERM or SIGINT asks for the end.
///
/// # Errors
///
/// [`ServeError::Workers`] and [`ServeError::Wait`]. A front end that breaks the protocol is no
/// error: its connection is closed.
pub fn serve<D: Device>(
    endpoint: &Endpoint,
    device: &Arc<D>,
    options: Options,
) -> Result<(), ServeError> {
    let end = sys::end_signals().map_err(ServeError::Workers)?;
    let limits = device.limits();
    let queues = (0..limits.queues)
        .map(|_| Queue::new(limits.size).map(Arc::new))
        .collect::<io::Result<Vec<_>>>()
        .map_err(ServeError::Workers)?;
    let patient = (0..).zip(&queues);
    let patient = patient.filter(|(number, _)| device.is_patient(*number));
    let patient = patient.map(|(_, queue)| Arc::clone(queue)).collect();
    device.attach_backlog(Backlog::new(patient));
    let mut workers = Vec::new();
    let result = start_workers(&queues, device, options, &mut workers)
        .map_err(ServeError::Workers)
        .and_then(|()| {
            accept_all(endpoint, device, &queues, options, &end).map_err(ServeError::Wait)
        });
    for queue in &queues {
        queue.end();
    }
    let deadline = Instant::now() + LAST_PATIENCE;
    for worker in workers {
        // One that hangs in a request of a dead disk ends with the process.
        while !worker.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    result
}

fn start_workers<D: Device>(
    queues: &[Arc<Queue>],
    device: &Arc<D>,
    options: Options,
    workers: &mut Vec<JoinHandle<()>>,
) -> io::Result<()> {
    for (number, queue) in (0..).zip(queues) {
        let (queue, device) = (Arc::clone(queue), Arc::clone(device));
        let worker = Builder::new()
            .name(format!("{}-q{number}", options.name))
            .spawn(move || {
                let abort = AbortOnPanic;
                if let Err(error) = queue.work(number, device.as_ref(), options.poll_limit) {
                    panic!("queue {number} cannot wait for events: {error}");
                }
                std::mem::forget(abort);
            })?;
        workers.push(worker);
    }
    Ok(())
}

/// Ends the process when a worker unwinds: a device without its queue would hang the guest.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        std::process::abort();
    }
}

fn accept_all<D: Device>(
    endpoint: &Endpoint,
    device: &Arc<D>,
    queues: &[Arc<Queue>],
    options: Options,
    end: &OwnedFd,
) -> io::Result<()> {
    loop {
        let socket = if endpoint.listening {
            if !wait_serving(&endpoint.socket, device.as_ref(), end)? {
                return Ok(());
            }
            match accept_with(&endpoint.socket, SocketFlags::CLOEXEC) {
                Err(Errno::INTR | Errno::AGAIN | Errno::CONNABORTED) => continue,
                result => result?,
            }
        } else {
            endpoint.socket.try_clone()?
        };
        let mut session = Session::new(
            device.as_ref(),
            queues,
            Connection::new(socket, end.as_fd()),
        );
        let go_on = converse(&mut session, device.as_ref(), end);
        let patience = if matches!(go_on, Ok(true)) {
            PATIENCE
        } else {
            LAST_PATIENCE
        };
        session.close(patience);
        if !go_on? || !options.reconnect || !endpoint.listening {
            return Ok(());
        }
    }
}

/// Handles messages until the front end has gone (true) or the end is asked for (false).
fn converse<D: Device>(
    session: &mut Session<'_, D>,
    device: &D,
    end: &OwnedFd,
) -> io::Result<bool> {
    loop {
        if !wait_serving(session.connection(), device, end)? {
            return Ok(false);
        }
        match session.handle_message() {
            Ok(true) => {}
            // Either the front end has gone, or the end was asked for in the middle of a message.
            Ok(false) => return goes_on(end),
            Err(_) if !goes_on(end)? => return Ok(false),
            Err(error) => {
                tracing::warn!(%error, "closing the connection of the front end");
                return Ok(true);
            }
        }
    }
}

/// Waits until `socket` can be read, and serves the host meanwhile; false when the end is asked for
/// first.
fn wait_serving<D: Device>(socket: impl AsFd, device: &D, end: &OwnedFd) -> io::Result<bool> {
    let Some(control) = device.control_fd() else {
        return wait(socket, PollFlags::IN, end.as_fd());
    };
    let mut fds = [
        PollFd::new(end, PollFlags::IN),
        PollFd::new(&socket, PollFlags::IN),
        PollFd::from_borrowed_fd(control, PollFlags::IN),
    ];
    loop {
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            result => result?,
        };
        let [ended, readable, asked] = fds.each_ref().map(|fd| !fd.revents().is_empty());
        if ended || readable {
            return Ok(!ended);
        }
        if asked {
            device.control();
        }
    }
}

/// Whether no end was asked for.
fn goes_on(end: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(end, PollFlags::IN)];
    Ok(poll(&mut fds, Some(&rustix::event::Timespec::default()))? == 0)
}
