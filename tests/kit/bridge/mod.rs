//! Plays the virtio-fs driver towards any vhost-user-fs server and mounts it on the host's kernel.
//!
//! Requests of /dev/fuse go over virtqueues as they are, and replies back, so that test programs
//! and benchmarks of the host judge a server without a VM. It differs from a guest with Linux 6.12
//! in this:
//!
//! - Data is copied once more each way: a guest's pages are the descriptors.
//! - FORGETs come in batches; RELEASE is not waited for; INTERRUPT exists; the host's newer kernel
//!   reads directories in larger pieces and asks for COPY_FILE_RANGE_64 once.
//! - Submounts are not offered and SYNCFS is not sent: both are virtiofs's alone.
//! - Guest and host share one page cache's memory, and a request's queue is not the CPU's but that
//!   of whichever thread was free.

mod mount;
mod relay;
mod ring;
mod wire;

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

pub use self::mount::{obstacle, private_mounts};
pub use self::wire::Agreed;

use self::mount::Mount;
use self::relay::{CHAIN, SLOT, Shared};
use self::ring::Consumer;
use crate::frontend::{DATA, EVENT_IDX, FrontEnd, PROTOCOL_FEATURES, code};

const VERSION_1: u64 = 1 << 32;
/// VHOST_USER_PROTOCOL_F_MQ.
const MQ: u64 = 1;
/// VHOST_USER_PROTOCOL_F_REPLY_ACK.
const REPLY_ACK: u64 = 1 << 3;

/// How a server is mounted.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Number of request queues, each with two threads.
    pub queues: u16,
    /// Requests in flight on each of them.
    pub slots: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            slots: 64,
        }
    }
}

/// A mounted server. It is unmounted when this is dropped.
pub struct Bridge {
    shared: Arc<Shared>,
    mount: Arc<Mount>,
    /// One for each request queue, to the server.
    submitters: Vec<JoinHandle<()>>,
    /// One for each queue, from the server.
    completers: Vec<JoinHandle<()>>,
}

impl Bridge {
    /// Connects to the server at `socket` and mounts it on the directory `point`.
    ///
    /// # Errors
    ///
    /// When nobody listens, the server refuses, or this process may not mount.
    pub fn mount(socket: &Path, point: &Path, options: Options) -> Result<Self> {
        let (queues, slots) = (options.queues, options.slots.next_power_of_two());
        ensure!((1..=15).contains(&queues), "1 to 15 request queues");
        ensure!((1..=256).contains(&slots), "1 to 256 slots");
        let total = queues * slots;
        ensure!(total <= 1024, "queues times slots must not exceed 1024");
        let bytes = usize::try_from(DATA)? + usize::from(total) * SLOT;
        let mut front = FrontEnd::connect(socket, bytes)?;
        let event_idx = handshake(&mut front, queues, slots)?;
        for queue in &front.queues {
            // Threads wait in read(2).
            let flags = fcntl_getfl(&queue.call)?;
            fcntl_setfl(&queue.call, flags - OFlags::NONBLOCK)?;
        }
        let front = Arc::new(front);
        let at = point.to_owned();
        let keeper = spawn("bridge-start", move || start(&front, &at, slots, event_idx))?;
        let bridge = keeper
            .join()
            .map_err(|_| anyhow!("the bridge's start panicked"))??;
        // Waits for the answer to INIT, and shows that the root can be seen.
        std::fs::metadata(point)
            .with_context(|| format!("the mounted root; {}", bridge.complaints().join("; ")))?;
        Ok(bridge)
    }

    /// How many requests the kernel has sent since the last [`Bridge::reset_counts`], by name.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        self.shared.counts()
    }

    /// Begins to count anew.
    pub fn reset_counts(&self) {
        self.shared.reset_counts();
    }

    /// What the server agreed to.
    pub fn agreed(&self) -> Option<Agreed> {
        self.shared.agreed()
    }

    /// What the server did against the protocol.
    pub fn complaints(&self) -> Vec<String> {
        self.shared.complaints()
    }

    /// Whether the server has closed the connection.
    pub fn is_lost(&self) -> bool {
        self.shared.front.is_closed()
    }

    /// Whether the mount is gone, taken away by somebody else or for want of a server.
    pub fn is_over(&self) -> bool {
        self.submitters.iter().all(JoinHandle::is_finished)
    }

    /// Unmounts, and says what went wrong since the begin.
    ///
    /// # Errors
    ///
    /// When the server has broken the protocol, or the mount cannot be taken away.
    pub fn finish(mut self) -> Result<()> {
        // That files are still open is no fault: another bridge of this process, which begins with
        // a copy of the table of descriptors, may hold them.
        self.end()?;
        let complaints = self.complaints();
        ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
        Ok(())
    }

    fn end(&mut self) -> Result<bool> {
        if self.completers.is_empty() {
            return Ok(true);
        }
        // Joining threads that cannot end would hang for ever: better to leave them.
        let submitters = std::mem::take(&mut self.submitters);
        let completers = std::mem::take(&mut self.completers);
        let idle = self.mount.end().context("unmounting")?;
        self.shared.close();
        for thread in submitters {
            thread.join().ok();
        }
        if !self.is_lost() {
            self.shared.destroy();
        }
        self.shared.stop()?;
        for thread in completers {
            thread.join().ok();
        }
        Ok(idle)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("bridge: {error:#}");
        }
    }
}

/// Mounts, and starts the threads that relay. Runs in a thread of its own, whose table of
/// descriptors they share.
fn start(front: &Arc<FrontEnd>, point: &Path, slots: u16, event_idx: bool) -> Result<Bridge> {
    let queues = front.queues.len() - 1;
    let (mount, files) = Mount::new(point, queues)?;
    let shared = Arc::new(Shared::new(Arc::clone(front), files, slots, event_idx));
    let mut bridge = Bridge {
        shared,
        mount: Arc::new(mount),
        submitters: Vec::new(),
        completers: Vec::new(),
    };
    let ring = Consumer::new(front, 0, event_idx);
    let (shared, mount) = (Arc::clone(&bridge.shared), Arc::clone(&bridge.mount));
    bridge.completers.push(spawn("bridge-hiprio", move || {
        shared.watch(ring, || {
            mount.abort().ok();
        });
    })?);
    for queue in 0..queues {
        let ring = Consumer::new(front, queue + 1, event_idx);
        let shared = Arc::clone(&bridge.shared);
        let run = move || shared.complete(queue, ring);
        bridge.completers.push(spawn("bridge-out", run)?);
        let shared = Arc::clone(&bridge.shared);
        let run = move || shared.submit(queue);
        bridge.submitters.push(spawn("bridge-in", run)?);
    }
    Ok(bridge)
}

fn spawn<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let builder = std::thread::Builder::new().name(name.to_owned());
    builder.spawn(run).context("starting a thread")
}

/// The messages of QEMU, in its order. Returns whether both sides use EVENT_IDX.
fn handshake(front: &mut FrontEnd, queues: u16, slots: u16) -> Result<bool> {
    let offered = front.get(code::GET_FEATURES)?;
    let both = offered & (VERSION_1 | EVENT_IDX | PROTOCOL_FEATURES);
    ensure!(both & VERSION_1 != 0, "the device does not speak virtio 1");
    ensure!(both & PROTOCOL_FEATURES != 0, "no protocol features");
    let protocol = front.get(code::GET_PROTOCOL_FEATURES)? & (MQ | REPLY_ACK);
    ensure!(protocol & REPLY_ACK != 0, "no acknowledgements");
    front.ask(code::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[])?;
    if protocol & MQ != 0 {
        let most = front.get(code::GET_QUEUE_NUM)?;
        ensure!(
            u64::from(queues) < most,
            "the device has {most} queues, and {} are wanted",
            queues + 1
        );
    }
    front.ask(code::SET_OWNER, &[], &[])?;
    front.ask(code::SET_FEATURES, &both.to_ne_bytes(), &[])?;
    front.share_memory()?;
    for queue in 0..=queues {
        // The queue of high priority has a place for every slot.
        let size = if queue == 0 {
            (queues * slots).next_power_of_two()
        } else {
            slots * CHAIN
        };
        front.start_queue(queue, size, 0)?;
        front.enable(queue, true)?;
    }
    Ok(both & EVENT_IDX != 0)
}
