//! What a virtio device promises to the transport.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use crate::Request;
use crate::queue::Queue;

/// How many queues a device serves, and how large the driver may make them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    /// Number of virtqueues, 1 to 64.
    pub queues: u16,
    /// Largest queue size the driver may choose, a power of two up to 32768.
    pub size: u16,
}

/// A write to the configuration space that the device does not take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("configuration write of {len} bytes at offset {offset} is not allowed")]
pub struct ConfigError {
    /// First byte of the write.
    pub offset: u32,
    /// Length of the write in bytes.
    pub len: usize,
}

/// The way back to the front end, for what it did not ask.
#[derive(Debug, Clone)]
pub struct FrontEnd(Arc<OwnedFd>);

impl FrontEnd {
    pub(crate) fn new(channel: OwnedFd) -> Self {
        Self(Arc::new(channel))
    }

    /// Says that the configuration space has changed, such as the capacity of a disk.
    ///
    /// # Errors
    ///
    /// When the front end has gone.
    pub fn config_changed(&self) -> std::io::Result<()> {
        let message = crate::message::config_change();
        // A front end that has not read so many earlier ones knows already.
        crate::connection::send(self.0.as_fd(), &message, None, || Ok(false))
    }
}

/// What lies in the patient queues of a device (see [`Device::is_patient`]).
#[derive(Clone)]
pub struct Backlog(Vec<Arc<Queue>>);

impl std::fmt::Debug for Backlog {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.debug_tuple("Backlog").field(&self.0.len()).finish()
    }
}

impl Backlog {
    pub(crate) fn new(queues: Vec<Arc<Queue>>) -> Self {
        Self(queues)
    }

    /// Has everything carried out that the driver has put into these queues before this call, and
    /// waits for that, a tenth of a second at most; whether there was anything. Not for the thread
    /// of a patient queue, which would wait for itself.
    pub fn catch_up(&self) -> bool {
        let mut found = false;
        for queue in &self.0 {
            found |= queue.catch_up(BACKLOG_PATIENCE);
        }
        found
    }
}

/// Whoever waits for the backlog has a driver that waits for it.
const BACKLOG_PATIENCE: Duration = Duration::from_millis(100);

/// One virtio device behind a vhost-user socket.
///
/// The transport calls `handle`, `end_turn`, `end_batch` and `reap` of one queue always from that queue's own
/// worker thread, and those of different queues at the same time. The other methods are called
/// from the control thread.
pub trait Device: Send + Sync + 'static {
    /// Feature bits of the device type (virtio 1.3 section 6: bits 0 to 23 and 50 and up). The
    /// transport adds its own: VERSION_1, INDIRECT_DESC, EVENT_IDX, PROTOCOL_FEATURES.
    fn features(&self) -> u64;

    /// Number and largest size of the queues. Constant over the life of the device.
    fn limits(&self) -> QueueLimits;

    /// The whole configuration space as it is now. The transport slices it and pads reads beyond
    /// its end with zeroes.
    fn config(&self) -> Vec<u8>;

    /// Writes `data` at `offset` of the configuration space.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] when the bytes there are read-only; the front end gets a negative reply and
    /// the connection stays.
    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        Err(ConfigError {
            offset,
            len: data.len(),
        })
    }

    /// Gives the device a way back to the front end; called when the front end offers one.
    fn attach(&self, _front_end: FrontEnd) {}

    /// Tells the device which feature bits the driver accepted.
    fn accept_features(&self, _features: u64) {}

    /// Whether nobody waits for what `queue` carries, such as the FORGETs of a file system. After one
    /// of them its driver is asked to kick for a bunch of more only, and what does not fill a bunch
    /// is taken within a few milliseconds. Constant over the life of the device.
    fn is_patient(&self, _queue: u16) -> bool {
        false
    }

    /// Gives the device the means to have its patient queues emptied; called once, before it is
    /// given requests.
    fn attach_backlog(&self, _backlog: Backlog) {}

    /// Carries out one request of `queue`, either before it returns or later: whoever holds the
    /// request ends it with [`Request::complete`]. Must not block for long.
    fn handle(&self, queue: u16, request: Request);

    /// Called after some requests that were taken from the queue together, and before more are taken:
    /// a device may keep them until then to carry them out together.
    fn end_turn(&self, _queue: u16) {}

    /// Called after the last [`Device::handle`] of a batch, to submit what was queued.
    fn end_batch(&self, _queue: u16) {}

    /// A descriptor that becomes readable when requests of `queue` that were left open have
    /// finished, such as the eventfd of an io_uring. `None` when every request is completed inside
    /// [`Device::handle`]. Only a change to readable counts: it need not be read, but then
    /// [`Device::reap`] must take all there is.
    fn completion_fd(&self, _queue: u16) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Completes the finished requests of `queue`; called when [`Device::completion_fd`] has
    /// become readable.
    fn reap(&self, _queue: u16) {}

    /// A descriptor that becomes readable when somebody on the host wants something of the device.
    fn control_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Serves whoever made [`Device::control_fd`] readable. Must not wait long.
    fn control(&self) {}

    /// Forgets everything the driver has set up: the front end has gone, or it has reset the
    /// device. All queues are stopped and no request is open when this is called.
    fn reset(&self) {}
}
