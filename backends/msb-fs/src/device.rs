//! The virtio-fs device (virtio 1.3 section 5.11) in front of a session.

use msb_vhost::{Backlog, Device, QueueLimits, Request};

use crate::session::Session;

/// Length of the tag in the configuration space.
pub const TAG_LEN: usize = 36;

/// The queue of FORGETs, which have no reply, and of INTERRUPTs, which Linux drivers do not send.
const HIGH_PRIORITY: u16 = 0;

/// A virtio-fs device. Queue 0 is the one of high priority, the others take requests.
pub struct FsDevice {
    session: Session,
    tag: [u8; TAG_LEN],
    limits: QueueLimits,
}

impl FsDevice {
    /// A device with `request_queues` queues of at most `size` entries, beside the one of high
    /// priority. `tag` is padded with zeroes.
    pub fn new(session: Session, tag: [u8; TAG_LEN], request_queues: u16, size: u16) -> Self {
        let limits = QueueLimits {
            queues: request_queues.saturating_add(1),
            size,
        };
        Self {
            session,
            tag,
            limits,
        }
    }
}

impl Device for FsDevice {
    fn features(&self) -> u64 {
        0
    }

    fn limits(&self) -> QueueLimits {
        self.limits
    }

    fn config(&self) -> Vec<u8> {
        let queues = u32::from(self.limits.queues.saturating_sub(1));
        let mut config = self.tag.to_vec();
        config.extend_from_slice(&queues.to_le_bytes());
        config
    }

    fn is_patient(&self, queue: u16) -> bool {
        queue == HIGH_PRIORITY
    }

    fn attach_backlog(&self, backlog: Backlog) {
        self.session.attach_backlog(backlog);
    }

    fn handle(&self, _queue: u16, request: Request) {
        self.session.handle(request);
    }

    fn reset(&self) {
        self.session.reset();
    }
}
