//! Carries vhost-user messages and virtqueues to a device.

#![allow(unsafe_code)]

use std::any::Any;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use smallvec::SmallVec;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryMmap, Permissions};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::{Device, Request, Segments};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Where the front end comes from.
#[derive(Debug)]
pub struct Endpoint {
    listener: OwnedFd,
    path: Option<PathBuf>,
}

/// How a device is served.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Name of the threads.
    pub name: &'static str,
    /// Waits for another front end after one has gone, instead of returning.
    pub reconnect: bool,
}

/// The device cannot be served, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket cannot be made.
    #[error("cannot listen on {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The descriptor is no listening socket.
    #[error("descriptor {fd} is no listening socket")]
    Descriptor {
        /// Its number.
        fd: RawFd,
    },
    /// The transport failed.
    #[error("vhost-user transport failed: {0}")]
    Transport(String),
}

impl Endpoint {
    /// Listens on a new socket at `path`, readable by its owner only.
    ///
    /// # Errors
    ///
    /// [`ServeError::Listen`].
    pub fn bind(path: &Path) -> Result<Self, ServeError> {
        let fail = |source| ServeError::Listen {
            path: path.to_owned(),
            source,
        };
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(fail(io::ErrorKind::AddrInUse.into()));
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
            _ => {}
        }
        let listener = std::os::unix::net::UnixListener::bind(path).map_err(fail)?;
        Ok(Self {
            listener: listener.into(),
            path: Some(path.to_owned()),
        })
    }

    /// Takes over a listening socket that the parent process has passed on.
    ///
    /// # Errors
    ///
    /// [`ServeError::Descriptor`].
    pub fn from_fd(fd: RawFd) -> Result<Self, ServeError> {
        // SAFETY: the descriptor is only borrowed for the call, which fails when it is not open.
        let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        let listener = borrowed
            .try_clone_to_owned()
            .map_err(|_| ServeError::Descriptor { fd })?;
        match rustix::net::sockopt::socket_acceptconn(&listener) {
            Ok(true) => Ok(Self {
                listener,
                path: None,
            }),
            _ => Err(ServeError::Descriptor { fd }),
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            std::fs::remove_file(path).ok();
        }
    }
}

/// Serves `device` until its front end has gone, or SIGTERM or SIGINT asks for the end.
///
/// # Errors
///
/// [`ServeError::Transport`].
pub fn serve<D: Device>(
    endpoint: &Endpoint,
    device: &Arc<D>,
    options: Options,
) -> Result<(), ServeError> {
    let transport = |error: &dyn std::fmt::Debug| ServeError::Transport(format!("{error:?}"));
    let stop = Arc::new(Stop::default());
    stop.watch(&endpoint.listener)
        .map_err(|error| transport(&error))?;
    loop {
        let listener = endpoint
            .listener
            .try_clone()
            .map_err(|error| transport(&error))?;
        // SAFETY: the descriptor was just duplicated and is owned by nobody else.
        let mut listener = unsafe { Listener::from_raw_fd(listener.into_raw_fd()) };
        let memory = Memory::new(GuestMemoryMmap::new());
        let adapter = Arc::new(Adapter {
            device: Arc::clone(device),
            event_idx: AtomicBool::new(false),
            memory: RwLock::new(memory.clone()),
        });
        let mut daemon = VhostUserDaemon::new(options.name.to_owned(), adapter, memory)
            .map_err(|error| transport(&error))?;
        let started = daemon.start(&mut listener);
        if stop.asked() {
            return Ok(());
        }
        started.map_err(|error| transport(&error))?;
        if let Ok(mut connection) = stop.connection.lock() {
            *connection = daemon.shutdown_handle();
        }
        let ended = daemon.wait();
        device.reset();
        if let Err(error) = ended {
            tracing::info!(?error, "front end has gone");
        }
        if stop.asked() || !options.reconnect {
            return Ok(());
        }
    }
}

/// What ends the service from outside.
#[derive(Default)]
struct Stop {
    asked: AtomicBool,
    connection: Mutex<Option<ShutdownHandle>>,
}

impl Stop {
    fn asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// Starts the thread that waits for SIGTERM and SIGINT, which no other thread gets.
    fn watch(self: &Arc<Self>, listener: &OwnedFd) -> io::Result<()> {
        // SAFETY: an all-zero signal set is a valid value to initialise.
        let mut signals: libc::sigset_t = unsafe { std::mem::zeroed() };
        for signal in [libc::SIGTERM, libc::SIGINT] {
            // SAFETY: `signals` is initialised and the number is a valid signal.
            unsafe { libc::sigaddset(&raw mut signals, signal) };
        }
        // SAFETY: both pointers are valid; the mask is inherited by threads started later.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()) };
        let listener = listener.try_clone()?;
        let stop = Arc::clone(self);
        std::thread::Builder::new()
            .name("msb-signals".to_owned())
            .spawn(move || {
                let mut signal = 0;
                // SAFETY: both pointers are valid for the call.
                unsafe { libc::sigwait(&raw const signals, &raw mut signal) };
                stop.asked.store(true, Ordering::Release);
                // Wakes `accept`, when nobody has connected yet.
                rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).ok();
                if let Ok(connection) = stop.connection.lock()
                    && let Some(handle) = connection.as_ref()
                {
                    handle.shutdown();
                }
            })?;
        Ok(())
    }
}

struct Adapter<D> {
    device: Arc<D>,
    event_idx: AtomicBool,
    memory: RwLock<Memory>,
}

impl<D: Device> VhostUserBackend for Adapter<D> {
    type Bitmap = ();
    type Vring = VringRwLock<Memory>;

    fn num_queues(&self) -> usize {
        usize::from(self.device.limits().queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.device.limits().size)
    }

    fn features(&self) -> u64 {
        self.device.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << 30
    }

    fn acked_features(&self, features: u64) {
        self.device.accept_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.device.reset();
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.device.config();
        let mut out = vec![0; size as usize];
        let rest = config.get(offset as usize..).unwrap_or_default();
        let count = rest.len().min(out.len());
        out[..count].copy_from_slice(&rest[..count]);
        out
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        self.device
            .write_config(offset, data)
            .map_err(io::Error::other)
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *self.memory.write().map_err(|_| io::ErrorKind::Other)? = memory;
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.device.limits().queues)
            .map(|queue| 1 << queue)
            .collect()
    }

    /// Without it the workers would never end, and with them the process.
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::CLOEXEC | EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        _event: u16,
        _events: EventSet,
        vrings: &[VringRwLock<Memory>],
        thread: usize,
    ) -> io::Result<()> {
        let queue = u16::try_from(thread).unwrap_or(0);
        let Some(vring) = vrings.first() else {
            return Ok(());
        };
        loop {
            if self.event_idx.load(Ordering::Relaxed) {
                vring.disable_notification().ok();
            }
            self.drain(queue, vring);
            if !self.event_idx.load(Ordering::Relaxed)
                || !vring.enable_notification().unwrap_or(false)
            {
                return Ok(());
            }
        }
    }
}

impl<D: Device> Adapter<D> {
    fn drain(&self, queue: u16, vring: &VringRwLock<Memory>) {
        let Ok(memory) = self.memory.read().map(|memory| memory.clone()) else {
            return;
        };
        let guard = memory.memory();
        let keep: Arc<dyn Any + Send + Sync> = Arc::new(memory.clone());
        loop {
            let chain = match vring
                .get_mut()
                .get_queue_mut()
                .pop_descriptor_chain(guard.clone())
            {
                Some(chain) => chain,
                None => break,
            };
            let head = chain.head_index();
            let (mut readable, mut writable) = (SmallVec::new(), SmallVec::new());
            let mut good = true;
            for descriptor in chain {
                let access = if descriptor.is_write_only() {
                    Permissions::Write
                } else {
                    Permissions::Read
                };
                let Ok(slices) =
                    guard.get_slices(descriptor.addr(), descriptor.len() as usize, access)
                else {
                    good = false;
                    break;
                };
                for slice in slices {
                    let Ok(slice) = slice else {
                        good = false;
                        break;
                    };
                    let span = libc::iovec {
                        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                        iov_len: slice.len(),
                    };
                    if descriptor.is_write_only() {
                        writable.push(span)
                    } else {
                        readable.push(span)
                    }
                }
            }
            let ring = vring.clone();
            let done = move |written| {
                ring.add_used(head, written).ok();
                if ring.needs_notification().unwrap_or(true) {
                    ring.signal_used_queue().ok();
                }
            };
            if !good {
                done(0);
                continue;
            }
            // SAFETY: every span was checked against guest memory, which `keep` holds mapped.
            let readable = unsafe { Segments::from_spans(readable, Arc::clone(&keep)) };
            // SAFETY: as above.
            let writable = unsafe { Segments::from_spans(writable, Arc::clone(&keep)) };
            self.device
                .handle(queue, Request::new(readable, writable, done));
        }
        self.device.end_batch(queue);
    }
}
