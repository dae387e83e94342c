//! Carries requests from /dev/fuse to the rings and replies back.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, retry_on_intr};

use super::ring::{Consumer, Producer};
use super::wire::{self, Agreed, DATA_MAX, IN_HEADER, OUT_HEADER};
use crate::frontend::{DATA, FrontEnd, Raw};

/// Descriptors of a chain: header and body of the request, header and body of the reply.
pub(super) const CHAIN: u16 = 4;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

const PAGE: usize = 4096;
/// A request and a reply of the largest size, each with a page in front for what precedes the
/// data, which so begins at a page as that of a guest does.
const HALF: usize = PAGE + DATA_MAX;
pub(super) const SLOT: usize = 2 * HALF;
/// What precedes the data of a WRITE.
const WRITE_HEAD: usize = IN_HEADER + 40;

/// What all threads share.
pub(super) struct Shared {
    pub(super) front: Arc<FrontEnd>,
    /// Numbers in the table of descriptors of the bridge's threads, and of nobody else.
    files: Vec<RawFd>,
    /// Slots of each request queue.
    pub(super) slots: u16,
    free: Vec<Free>,
    hiprio: Mutex<Producer>,
    /// One for each request queue.
    requests: Vec<Mutex<Producer>>,
    uniques: Vec<AtomicU64>,
    counts: Vec<AtomicU64>,
    agreed: Mutex<Option<Agreed>>,
    complaints: Mutex<Vec<String>>,
    /// Nothing new is to be sent.
    closing: AtomicBool,
    /// Nothing more is awaited.
    stop: AtomicBool,
}

/// The slots of one queue that carry no request.
struct Free {
    list: Mutex<Vec<u16>>,
    returned: Condvar,
}

impl Shared {
    pub(super) fn new(
        front: Arc<FrontEnd>,
        files: Vec<RawFd>,
        slots: u16,
        event_idx: bool,
    ) -> Self {
        let queues = files.len();
        let total = queues * usize::from(slots);
        Self {
            slots,
            free: (0..queues).map(|_| Free::new(slots)).collect(),
            hiprio: Mutex::new(Producer::new(&front, 0, event_idx)),
            requests: (0..queues)
                .map(|queue| Mutex::new(Producer::new(&front, queue + 1, event_idx)))
                .collect(),
            uniques: (0..total).map(|_| AtomicU64::new(0)).collect(),
            counts: (0..wire::OPCODES).map(|_| AtomicU64::new(0)).collect(),
            agreed: Mutex::new(None),
            complaints: Mutex::new(Vec::new()),
            closing: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            files,
            front,
        }
    }

    /// Requests by opcode since the last reset; those that were never sent are left out.
    pub(super) fn counts(&self) -> Vec<(&'static str, u64)> {
        let all = self.counts.iter().enumerate();
        all.map(|(code, count)| (wire::name(code), count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    pub(super) fn reset_counts(&self) {
        for count in &self.counts {
            count.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn agreed(&self) -> Option<Agreed> {
        *lock(&self.agreed)
    }

    pub(super) fn complain(&self, text: String) {
        lock(&self.complaints).push(text);
    }

    pub(super) fn complaints(&self) -> Vec<String> {
        lock(&self.complaints).clone()
    }

    /// Sends nothing more, and lets threads that wait for a slot go.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        for free in &self.free {
            // Under the lock, so that nobody is between looking and waiting.
            let _list = lock(&free.list);
            free.returned.notify_all();
        }
    }

    /// Lets the threads that wait for the device go.
    pub(super) fn stop(&self) -> rustix::io::Result<()> {
        self.stop.store(true, Ordering::Release);
        for queue in &self.front.queues {
            rustix::io::write(&queue.call, &1_u64.to_ne_bytes())?;
        }
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The number of a slot among those of all queues.
    fn place(&self, queue: usize, slot: u16) -> usize {
        queue * usize::from(self.slots) + usize::from(slot)
    }

    /// Guest address of a slot.
    fn slot(&self, queue: usize, slot: u16) -> u64 {
        DATA + (self.place(queue, slot) * SLOT) as u64
    }

    /// Where the request of a slot begins.
    fn request_at(&self, queue: usize, slot: u16) -> u64 {
        self.slot(queue, slot) + (PAGE - WRITE_HEAD) as u64
    }

    /// Where its reply begins.
    fn reply_at(&self, queue: usize, slot: u16) -> u64 {
        self.slot(queue, slot) + (HALF + PAGE - OUT_HEADER) as u64
    }

    /// Takes requests of descriptor `queue` until the mount is gone.
    pub(super) fn submit(&self, queue: usize) {
        while let Some(slot) = self.free[queue].take(&self.closing) {
            let at = self.request_at(queue, slot);
            let len = WRITE_HEAD + DATA_MAX;
            let into = self.front.memory.pointer(at, len);
            let fd = self.files[queue];
            // SAFETY: `pointer` checked that the bytes lie in the shared memory; the slot is free,
            // so that neither the device nor another thread uses them.
            let result = unsafe { libc::read(fd, into.cast(), len) };
            let Ok(len) = usize::try_from(result) else {
                self.free[queue].put(slot);
                match Errno::from_io_error(&std::io::Error::last_os_error()) {
                    // A request that was given up, or a signal.
                    Some(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
                    Some(Errno::NODEV | Errno::CONNABORTED) | None => return,
                    Some(error) => return self.complain(format!("reading /dev/fuse: {error}")),
                }
            };
            if let Err(error) = self.send(queue, slot, len) {
                return self.complain(format!("telling the device: {error}"));
            }
        }
    }

    /// Sends the request of `len` bytes that lies in a slot.
    fn send(&self, queue: usize, slot: u16, len: usize) -> rustix::io::Result<()> {
        let at = self.request_at(queue, slot);
        let memory = &self.front.memory;
        let head: [u8; WRITE_HEAD] = memory.array(at);
        let code = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        let unique = &head[8..16];
        let unique = unique.try_into().map_or(0, u64::from_le_bytes);
        self.counts[wire::place(code)].fetch_add(1, Ordering::Relaxed);
        let body = (len - IN_HEADER) as u32;
        let Some(room) = wire::room(code, &head[IN_HEADER..len.min(WRITE_HEAD)]) else {
            let head = self.place(queue, slot) as u16;
            let one = Raw {
                address: at,
                len: len as u32,
                flags: 0,
                next: 0,
            };
            self.describe(0, head, &one);
            return lock(&self.hiprio).publish(head);
        };
        if code == wire::INIT {
            let mut body = memory.read(at + IN_HEADER as u64, len - IN_HEADER);
            wire::as_guest(&mut body);
            memory.write(at + IN_HEADER as u64, &body);
        }
        self.uniques[self.place(queue, slot)].store(unique, Ordering::Relaxed);
        let reply = self.reply_at(queue, slot);
        let parts = [
            (at, IN_HEADER as u32, 0),
            (at + IN_HEADER as u64, body, 0),
            (reply, OUT_HEADER as u32, WRITE),
            (reply + OUT_HEADER as u64, room as u32, WRITE),
        ];
        let first = slot * CHAIN;
        // Parts without bytes are left out: the device may refuse them.
        let used = parts.iter().filter(|part| part.1 > 0).count() as u16;
        for ((address, len, flags), place) in parts.into_iter().filter(|part| part.1 > 0).zip(0..) {
            let next = if place + 1 < used { NEXT } else { 0 };
            let raw = Raw {
                address,
                len,
                flags: flags | next,
                next: first + place + 1,
            };
            self.describe(queue + 1, first + place, &raw);
        }
        lock(&self.requests[queue]).publish(first)
    }

    fn describe(&self, queue: usize, place: u16, raw: &Raw) {
        let at = self.front.queues[queue].base + 16 * u64::from(place);
        self.front.memory.write(at, &raw.bytes());
    }

    /// Gives replies of request queue `queue` back to the kernel until the bridge ends.
    pub(super) fn complete(&self, queue: usize, mut ring: Consumer) {
        loop {
            while let Some((head, len)) = ring.take() {
                let slot = head / CHAIN;
                if head % CHAIN != 0 || slot >= self.slots {
                    self.complain(format!("the device returned chain {head}"));
                    continue;
                }
                self.reply(queue, slot, len as usize);
                self.free[queue].put(slot);
            }
            if ring.arm() {
                continue;
            }
            if self.stopped() {
                return;
            }
            let call = &self.front.queues[queue + 1].call;
            retry_on_intr(|| rustix::io::read(call, &mut [0_u8; 8])).ok();
        }
    }

    fn reply(&self, queue: usize, slot: u16, len: usize) {
        let at = self.reply_at(queue, slot);
        let unique = self.uniques[self.place(queue, slot)].load(Ordering::Relaxed);
        // The bridge's own DESTROY; virtiofsd answers it with nothing.
        if unique == 0 {
            return;
        }
        let memory = &self.front.memory;
        let mut len = len;
        let told = u32::from_le_bytes(memory.array(at)) as usize;
        let error = i32::from_le_bytes(memory.array(at + 4));
        let echo = u64::from_le_bytes(memory.array(at + 8));
        if !(OUT_HEADER..=HALF).contains(&len)
            || told != len
            || echo != unique
            || !(-511..=0).contains(&error)
        {
            self.complain(format!(
                "a reply of {len} bytes to request {unique} whose header says {told} bytes, errno {error}, request {echo}"
            ));
            let mut own = [0; OUT_HEADER];
            own[..4].copy_from_slice(&(OUT_HEADER as u32).to_le_bytes());
            own[4..8].copy_from_slice(&(-Errno::IO.raw_os_error()).to_le_bytes());
            own[8..].copy_from_slice(&unique.to_le_bytes());
            memory.write(at, &own);
            len = OUT_HEADER;
        }
        let request = u32::from_le_bytes(memory.array(self.request_at(queue, slot) + 4));
        if request == wire::INIT && error == 0 {
            let agreed = Agreed::from_bytes(&memory.read(at + OUT_HEADER as u64, len - OUT_HEADER));
            if agreed.is_none_or(|agreed| agreed.max_write as usize > DATA_MAX) {
                self.complain(format!("the answer to INIT is {agreed:?}"));
            }
            *lock(&self.agreed) = agreed;
        }
        let from = memory.pointer(at, len);
        let fd = self.files[queue];
        // SAFETY: `pointer` checked that the bytes lie in the shared memory, which outlives the
        // call.
        let result = unsafe { libc::write(fd, from.cast(), len) };
        if result < 0 {
            match Errno::from_io_error(&std::io::Error::last_os_error()) {
                // The request was given up, or the mount is gone.
                Some(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED | Errno::PERM) | None => {}
                Some(error) => {
                    self.complain(format!("the kernel refuses the reply to {unique}: {error}"))
                }
            }
        }
    }

    /// Takes back what went out on the queue of high priority until the bridge ends; `lost` is
    /// called when the device closes the connection before.
    pub(super) fn watch(&self, mut ring: Consumer, lost: impl Fn()) {
        let call = &self.front.queues[0].call;
        let mut closed = false;
        loop {
            while let Some((head, _)) = ring.take() {
                let (queue, slot) = (head / self.slots, head % self.slots);
                match self.free.get(usize::from(queue)) {
                    Some(free) => free.put(slot),
                    None => self.complain(format!("the device returned forget {head}")),
                }
            }
            if ring.arm() {
                continue;
            }
            if self.stopped() {
                return;
            }
            let mut fds = vec![PollFd::new(call, PollFlags::IN)];
            if !closed {
                fds.push(PollFd::from_borrowed_fd(
                    self.front.socket(),
                    PollFlags::RDHUP,
                ));
            }
            retry_on_intr(|| poll(&mut fds, None)).ok();
            if !fds[0].revents().is_empty() {
                rustix::io::read(call, &mut [0_u8; 8]).ok();
            }
            if !closed && self.front.is_closed() && !self.stopped() {
                closed = true;
                self.complain("the device has closed the connection".to_owned());
                lost();
            }
        }
    }

    /// Sends DESTROY, as the kernel of a guest does after its last unmount, and waits a while for
    /// what is not answered yet.
    pub(super) fn destroy(&self) {
        let slot = lock(&self.free[0].list).pop();
        if let Some(slot) = slot {
            let mut header = [0; IN_HEADER];
            header[..4].copy_from_slice(&(IN_HEADER as u32).to_le_bytes());
            header[4..8].copy_from_slice(&wire::DESTROY.to_le_bytes());
            self.front.memory.write(self.request_at(0, slot), &header);
            if let Err(error) = self.send(0, slot, IN_HEADER) {
                return self.complain(format!("telling the device: {error}"));
            }
        }
        for _ in 0..500 {
            let mut all = self.free.iter();
            if all.all(|free| lock(&free.list).len() == usize::from(self.slots)) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        self.complain("requests were left without reply".to_owned());
    }
}

impl Free {
    fn new(slots: u16) -> Self {
        Self {
            list: Mutex::new((0..slots).rev().collect()),
            returned: Condvar::new(),
        }
    }

    /// A free slot, the one used last, whose memory is still warm; `None` when the bridge ends.
    fn take(&self, closing: &AtomicBool) -> Option<u16> {
        let mut list = lock(&self.list);
        loop {
            if closing.load(Ordering::Acquire) {
                return None;
            }
            if let Some(slot) = list.pop() {
                return Some(slot);
            }
            list = self
                .returned
                .wait(list)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn put(&self, slot: u16) {
        lock(&self.list).push(slot);
        self.returned.notify_one();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
