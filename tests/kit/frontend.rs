//! A vhost-user front end without a VM: messages by hand, guest memory, and a driver for each queue.
//!
//! Nothing here shares code with the server: it is the other side of the contract.

mod resume;

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::retry_on_intr;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Request numbers of vhost-user.rst.
pub mod code {
    #![allow(missing_docs, reason = "the names are those of the specification")]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// Feature bits that every device of ours offers.
pub const EVENT_IDX: u64 = 1 << 29;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Where guest memory begins in the front end's address space, as QEMU would tell it.
const USER: u64 = 0x7f00_0000_0000;
const NEED_REPLY: u32 = 1 << 3;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Memory that the front end and the device share.
pub struct GuestMemory {
    file: File,
    base: NonNull<u8>,
    size: usize,
}

// SAFETY: the mapping is owned, and only accessed through raw pointers and atomics.
unsafe impl Send for GuestMemory {}

// SAFETY: as above; threads hand parts of it to each other through the rings' atomics.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    fn new(size: usize) -> Result<Self> {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, u64::try_from(size)?)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe { mmap(std::ptr::null_mut(), size, access, MapFlags::SHARED, &fd, 0) }?;
        Ok(Self {
            file: fd.into(),
            base: NonNull::new(base.cast()).context("mapped at zero")?,
            size,
        })
    }

    /// Copies `bytes` to guest address `at`.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let to = self.pointer(at, bytes.len());
        // SAFETY: `pointer` checked that the bytes lie in the mapping; `bytes` is not part of it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// The `len` bytes at guest address `at`.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let from = self.pointer(at, len);
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len) };
        bytes
    }

    /// The first bytes at guest address `at`.
    pub(crate) fn array<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let from = self.pointer(at, N);
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), N) };
        bytes
    }

    /// Where guest address 0 lies in this process, for a driver of the caller's own.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn index(&self, at: u64) -> &AtomicU16 {
        #[expect(clippy::cast_ptr_alignment, reason = "ring parts are aligned")]
        let pointer = self.pointer(at, 2).cast::<u16>();
        // SAFETY: in the mapping and even, because every ring part begins at a multiple of 16.
        unsafe { AtomicU16::from_ptr(pointer) }
    }

    pub(crate) fn pointer(&self, at: u64, len: usize) -> *mut u8 {
        let at = usize::try_from(at).expect("guest address");
        assert!(at + len <= self.size, "the test leaves its guest memory");
        // SAFETY: checked on the line above.
        unsafe { self.base.as_ptr().add(at) }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: made in `new` with this length; nothing borrows from it any more.
        unsafe { munmap(self.base.as_ptr().cast(), self.size) }.expect("unmap guest memory");
    }
}

/// One piece of a request: guest address and length.
#[derive(Debug, Clone, Copy)]
pub enum Part {
    /// The device reads it.
    Out(u64, u32),
    /// The device writes it.
    In(u64, u32),
}

/// The driver's side of one queue.
pub struct Driver {
    /// Number of entries.
    pub size: u16,
    pub(crate) base: u64,
    next_slot: u16,
    used: u16,
    indirect: bool,
    pub(crate) kick: OwnedFd,
    pub(crate) call: OwnedFd,
}

/// A raw descriptor, for chains that no driver would make.
#[derive(Debug, Clone, Copy)]
pub struct Raw {
    /// Guest address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// NEXT 1, WRITE 2, INDIRECT 4.
    pub flags: u16,
    /// Number of the next descriptor.
    pub next: u16,
}

/// A connected front end.
pub struct FrontEnd {
    socket: UnixStream,
    /// Guest memory; ring parts lie at its begin, the rest is for requests.
    pub memory: GuestMemory,
    /// The queues that were set up.
    pub queues: Vec<Driver>,
}

/// First guest address that belongs to no ring, whatever the number of queues up to 16.
pub const DATA: u64 = 1 << 20;

/// Bytes that each queue's rings take in guest memory.
const RING_SPACE: u64 = 1 << 16;

impl FrontEnd {
    /// Connects to `path`, waiting up to five seconds for the server to listen.
    ///
    /// # Errors
    ///
    /// When nobody listens, or guest memory cannot be made.
    pub fn connect(path: &Path, memory_bytes: usize) -> Result<Self> {
        for _ in 0..500 {
            if let Ok(socket) = UnixStream::connect(path) {
                return Self::on(socket, memory_bytes);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("nobody listens on {}", path.display())
    }

    /// Uses a connected socket.
    ///
    /// # Errors
    ///
    /// When guest memory cannot be made.
    pub fn on(socket: UnixStream, memory_bytes: usize) -> Result<Self> {
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Self {
            socket,
            memory: GuestMemory::new(memory_bytes)?,
            queues: Vec::new(),
        })
    }

    /// The usual handshake: features, memory, `count` queues of `size` entries, all enabled.
    ///
    /// # Errors
    ///
    /// When the device refuses a step.
    pub fn start(&mut self, count: u16, size: u16, features: u64) -> Result<()> {
        self.ask(code::SET_OWNER, &[], &[])?;
        self.negotiate()?;
        self.share_memory()?;
        self.set(
            code::SET_FEATURES,
            &(features | PROTOCOL_FEATURES | (1 << 32)).to_ne_bytes(),
        )?;
        for index in 0..count {
            self.start_queue(index, size, 0)?;
            self.enable(index, true)?;
        }
        Ok(())
    }

    /// Accepts every protocol feature that is offered.
    ///
    /// # Errors
    ///
    /// When the device refuses.
    pub fn negotiate(&mut self) -> Result<u64> {
        let offered = self.get(code::GET_PROTOCOL_FEATURES)?;
        self.ask(code::SET_PROTOCOL_FEATURES, &offered.to_ne_bytes(), &[])?;
        Ok(offered)
    }

    /// Hands guest memory to the device.
    ///
    /// # Errors
    ///
    /// When the device refuses it.
    pub fn share_memory(&mut self) -> Result<()> {
        let size = u64::try_from(self.memory.size)?;
        let body = memory_table(&[(0, size, USER, 0)]);
        let file = self.memory.file.try_clone()?;
        self.acknowledged(code::SET_MEM_TABLE, &body, &[file.as_fd()])
    }

    /// Sets one queue up, with `base` as the next entry of its available ring.
    ///
    /// # Errors
    ///
    /// When the device refuses a step.
    pub fn start_queue(&mut self, index: u16, size: u16, base: u16) -> Result<()> {
        let at = RING_SPACE * u64::from(index);
        let driver = Driver {
            size,
            base: at,
            next_slot: 0,
            used: base,
            indirect: false,
            kick: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            call: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        };
        self.memory
            .index(driver.available() + 2)
            .store(base, Ordering::Release);
        self.memory
            .index(driver.used() + 2)
            .store(base, Ordering::Release);
        self.set(code::SET_VRING_NUM, &pair(index, u32::from(size)))?;
        self.set(code::SET_VRING_BASE, &pair(index, u32::from(base)))?;
        self.set(code::SET_VRING_ADDR, &driver.addresses(index))?;
        let word = u64::from(index).to_ne_bytes();
        self.acknowledged(code::SET_VRING_KICK, &word, &[driver.kick.as_fd()])?;
        self.acknowledged(code::SET_VRING_CALL, &word, &[driver.call.as_fd()])?;
        let place = usize::from(index);
        if place < self.queues.len() {
            self.queues[place] = driver;
        } else {
            self.queues.push(driver);
        }
        Ok(())
    }

    /// Enables or disables a queue.
    ///
    /// # Errors
    ///
    /// When the device refuses.
    pub fn enable(&mut self, index: u16, on: bool) -> Result<()> {
        self.set(code::SET_VRING_ENABLE, &pair(index, u32::from(on)))
    }

    /// Stops a queue; returns where its available ring stands.
    ///
    /// # Errors
    ///
    /// When the device does not answer.
    pub fn stop_queue(&mut self, index: u16) -> Result<u16> {
        let reply = self
            .ask(code::GET_VRING_BASE, &pair(index, 0), &[])?
            .context("no reply")?;
        let base = reply.get(4..8).context("short reply")?;
        Ok(u16::try_from(u32::from_ne_bytes(base.try_into()?))?)
    }

    /// `len` bytes of the configuration space.
    ///
    /// # Errors
    ///
    /// When the device does not answer with as many.
    pub fn config(&mut self, offset: u32, len: u32) -> Result<Vec<u8>> {
        let mut body = words(&[offset, len, 0]);
        body.resize(12 + usize::try_from(len)?, 0);
        let reply = self
            .ask(code::GET_CONFIG, &body, &[])?
            .context("no reply")?;
        ensure!(
            reply.len() == body.len(),
            "{} bytes instead of {}",
            reply.len(),
            body.len()
        );
        Ok(reply[12..].to_vec())
    }

    /// Sends a message that is answered with a number.
    ///
    /// # Errors
    ///
    /// When it is not.
    pub fn get(&mut self, number: u32) -> Result<u64> {
        let reply = self.ask(number, &[], &[])?.context("no reply")?;
        Ok(u64::from_ne_bytes(
            reply.as_slice().try_into().context("not a number")?,
        ))
    }

    /// Sends a message and asks for its acknowledgement.
    ///
    /// # Errors
    ///
    /// When the device refuses it.
    pub fn set(&mut self, number: u32, body: &[u8]) -> Result<()> {
        self.acknowledged(number, body, &[])
    }

    /// The same with descriptors.
    ///
    /// # Errors
    ///
    /// When the device refuses it.
    pub fn acknowledged(&mut self, number: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.send(number, NEED_REPLY, body, fds)?;
        let (_, reply, _) = self.receive()?;
        ensure!(reply == 0_u64.to_ne_bytes(), "request {number} was refused");
        Ok(())
    }

    /// Sends a message; waits for the reply if it is one that has a reply of its own.
    ///
    /// # Errors
    ///
    /// When the connection is gone.
    pub fn ask(
        &mut self,
        number: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Option<Vec<u8>>> {
        self.send(number, 0, body, fds)?;
        let replies = [
            code::GET_FEATURES,
            code::GET_PROTOCOL_FEATURES,
            code::GET_QUEUE_NUM,
            code::GET_VRING_BASE,
            code::GET_CONFIG,
            code::GET_INFLIGHT_FD,
            code::GET_MAX_MEM_SLOTS,
        ];
        if !replies.contains(&number) {
            return Ok(None);
        }
        let (answered, reply, _) = self.receive()?;
        ensure!(
            answered == number,
            "reply to {answered} instead of {number}"
        );
        Ok(Some(reply))
    }

    /// Sends any message.
    ///
    /// # Errors
    ///
    /// When the connection is gone.
    pub fn send(
        &mut self,
        number: u32,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let size = u32::try_from(body.len())?;
        let mut bytes = words(&[number, 1 | flags, size]);
        bytes.extend_from_slice(body);
        self.send_bytes(&bytes, fds)
    }

    /// Sends any bytes.
    ///
    /// # Errors
    ///
    /// When the connection is gone.
    pub fn send_bytes(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ensure!(
                ancillary.push(SendAncillaryMessage::ScmRights(fds)),
                "too many descriptors"
            );
        }
        let sent = sendmsg(
            &self.socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        ensure!(sent == bytes.len(), "the message was cut");
        Ok(())
    }

    /// The next message of the device: number, body, descriptors.
    ///
    /// # Errors
    ///
    /// When none comes within ten seconds, or the connection is gone.
    pub fn receive(&mut self) -> Result<(u32, Vec<u8>, Vec<OwnedFd>)> {
        let mut header = [0_u8; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut header)];
        let received = retry_on_intr(|| {
            let flags = RecvFlags::CMSG_CLOEXEC;
            recvmsg(&self.socket, &mut slices, &mut ancillary, flags)
        })?;
        ensure!(received.bytes == 12, "the device has closed the connection");
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let size = u32::from_ne_bytes(header[8..].try_into()?);
        let mut body = vec![0; usize::try_from(size)?];
        self.socket.read_exact(&mut body)?;
        Ok((u32::from_ne_bytes(header[..4].try_into()?), body, fds))
    }

    /// Puts a request into a queue without telling the device; returns its number.
    pub fn put(&mut self, queue: u16, parts: &[Part]) -> u16 {
        let driver = &mut self.queues[usize::from(queue)];
        let chain: Vec<Raw> = parts
            .iter()
            .enumerate()
            .map(|(place, part)| {
                let last = place + 1 == parts.len();
                let (address, len, write) = match *part {
                    Part::Out(address, len) => (address, len, 0),
                    Part::In(address, len) => (address, len, WRITE),
                };
                Raw {
                    address,
                    len,
                    flags: write | if last { 0 } else { NEXT },
                    next: 0,
                }
            })
            .collect();
        if driver.indirect {
            let head = driver.next_slot % driver.size;
            // Tables lie behind the rings, 16 descriptors for each slot.
            let table = driver.base + (RING_SPACE / 2) + u64::from(head) * 256;
            for (place, raw) in (0_u16..).zip(&chain) {
                let raw = Raw {
                    next: place + 1,
                    ..*raw
                };
                self.memory
                    .write(table + 16 * u64::from(place), &raw.bytes());
            }
            let len = 16 * u32::try_from(chain.len()).expect("a short chain");
            let one = Raw {
                address: table,
                len,
                flags: INDIRECT,
                next: 0,
            };
            return self.put_raw(queue, &[one]);
        }
        let chain: Vec<Raw> = chain;
        self.put_linked(queue, &chain)
    }

    /// Makes every later request use an indirect table.
    pub fn use_indirect(&mut self, queue: u16) {
        self.queues[usize::from(queue)].indirect = true;
    }

    fn put_linked(&mut self, queue: u16, chain: &[Raw]) -> u16 {
        let driver = &self.queues[usize::from(queue)];
        let (size, first) = (driver.size, driver.next_slot);
        let linked: Vec<Raw> = (1_u16..)
            .zip(chain)
            .map(|(place, raw)| Raw {
                next: first.wrapping_add(place) % size,
                ..*raw
            })
            .collect();
        self.put_raw(queue, &linked)
    }

    /// Puts descriptors as they are into the next slots and announces the first.
    pub fn put_raw(&mut self, queue: u16, chain: &[Raw]) -> u16 {
        let driver = &mut self.queues[usize::from(queue)];
        let head = driver.next_slot % driver.size;
        for raw in chain {
            let slot = driver.next_slot % driver.size;
            self.memory
                .write(driver.base + 16 * u64::from(slot), &raw.bytes());
            driver.next_slot = driver.next_slot.wrapping_add(1) % driver.size;
        }
        self.announce(queue, head);
        head
    }

    /// Adds `head` to the available ring, whatever it is.
    pub fn announce(&mut self, queue: u16, head: u16) {
        let driver = &self.queues[usize::from(queue)];
        let index = self.memory.index(driver.available() + 2);
        let now = index.load(Ordering::Relaxed);
        let slot = u64::from(now % driver.size);
        self.memory
            .write(driver.available() + 4 + 2 * slot, &head.to_ne_bytes());
        index.store(now.wrapping_add(1), Ordering::Release);
    }

    /// Sets the available index to any value.
    pub fn set_available_index(&mut self, queue: u16, value: u16) {
        let driver = &self.queues[usize::from(queue)];
        self.memory
            .index(driver.available() + 2)
            .store(value, Ordering::Release);
    }

    /// Tells the device to look, whether it wants to be told or not.
    ///
    /// # Errors
    ///
    /// When the eventfd cannot be written.
    pub fn kick(&self, queue: u16) -> Result<()> {
        fence(Ordering::SeqCst);
        rustix::io::write(&self.queues[usize::from(queue)].kick, &1_u64.to_ne_bytes())?;
        Ok(())
    }

    /// Puts a request into a queue with EVENT_IDX, and kicks when the device wants that; whether it
    /// did.
    ///
    /// # Errors
    ///
    /// When the eventfd cannot be written.
    pub fn offer(&mut self, queue: u16, parts: &[Part]) -> Result<bool> {
        let index = self.queues[usize::from(queue)].available() + 2;
        let before = self.memory.index(index).load(Ordering::Relaxed);
        self.put(queue, parts);
        let wanted = self.wants_kick(usize::from(queue), before, true);
        if wanted {
            self.kick(queue)?;
        }
        Ok(wanted)
    }

    /// Whether the device wants a kick for the one chain that was made available at index `before`.
    pub(crate) fn wants_kick(&self, queue: usize, before: u16, event_idx: bool) -> bool {
        let driver = &self.queues[queue];
        // The new index must be visible before the device's wish is read.
        fence(Ordering::SeqCst);
        if event_idx {
            let wish = driver.used() + 4 + 8 * u64::from(driver.size);
            self.memory.index(wish).load(Ordering::Relaxed) == before
        } else {
            self.memory.index(driver.used()).load(Ordering::Relaxed) & 1 == 0
        }
    }

    /// The next finished request: its number and how many bytes the device wrote. Does not wait.
    pub fn finished(&mut self, queue: u16) -> Option<(u16, u32)> {
        let driver = &mut self.queues[usize::from(queue)];
        let used = self.memory.index(driver.used() + 2).load(Ordering::Acquire);
        if used == driver.used {
            return None;
        }
        let slot = u64::from(driver.used % driver.size);
        let entry = self.memory.read(driver.used() + 4 + 8 * slot, 8);
        driver.used = driver.used.wrapping_add(1);
        // With EVENT_IDX: an interrupt for the next one, please.
        let wish = driver.available() + 4 + 2 * u64::from(driver.size);
        self.memory
            .index(wish)
            .store(driver.used, Ordering::Release);
        let head = u32::from_ne_bytes(entry[..4].try_into().ok()?);
        Some((head as u16, u32::from_ne_bytes(entry[4..].try_into().ok()?)))
    }

    /// Waits up to ten seconds for the next finished request, for its interrupt and not by looking.
    ///
    /// # Errors
    ///
    /// When none finishes.
    pub fn wait(&mut self, queue: u16) -> Result<(u16, u32)> {
        for _ in 0..1000 {
            fence(Ordering::SeqCst);
            if let Some(done) = self.finished(queue) {
                return Ok(done);
            }
            if !self.interrupted(queue, Duration::from_secs(10))? {
                break;
            }
        }
        bail!("no request of queue {queue} finished")
    }

    /// Waits for an interrupt of a queue; false when none comes in time.
    ///
    /// # Errors
    ///
    /// When poll(2) fails.
    pub fn interrupted(&self, queue: u16, limit: Duration) -> Result<bool> {
        let call = &self.queues[usize::from(queue)].call;
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs())?,
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        // A fuzzer's timer interrupts whatever waits.
        let ready = retry_on_intr(|| poll(&mut [PollFd::new(call, PollFlags::IN)], Some(&limit)))?;
        if ready > 0 {
            rustix::io::read(call, &mut [0_u8; 8])?;
        }
        Ok(ready > 0)
    }

    /// Whether the device has closed the connection. Looks without waiting and takes nothing.
    pub fn is_closed(&self) -> bool {
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        matches!(
            rustix::net::recv(&self.socket, &mut byte[..], flags),
            Ok((0, _))
        )
    }

    /// The connection, to wait for its end with poll(2).
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// A second file of `len` bytes, for memory that is not what it claims to be.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn other_memory(&self, len: u64) -> Result<OwnedFd> {
        let fd = memfd_create("other", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len)?;
        Ok(fd)
    }

    /// Size of guest memory in bytes.
    pub fn memory_size(&self) -> u64 {
        self.memory.size as u64
    }
}

impl Raw {
    pub(crate) fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_ne_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[14..].copy_from_slice(&self.next.to_ne_bytes());
        bytes
    }
}

impl Driver {
    /// Guest address of the descriptors.
    pub fn descriptors(&self) -> u64 {
        self.base
    }

    /// Guest address of the available ring.
    pub fn available(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    /// What the driver signals.
    pub fn kick(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// What the device signals.
    pub fn call(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// Guest address of the used ring.
    pub fn used(&self) -> u64 {
        (self.available() + 6 + 2 * u64::from(self.size)).next_multiple_of(16)
    }

    /// The body of SET_VRING_ADDR.
    pub fn addresses(&self, index: u16) -> Vec<u8> {
        let mut body = pair(index, 0);
        for at in [self.base, self.used(), self.available(), 0] {
            body.extend_from_slice(&(USER + at).to_ne_bytes());
        }
        body
    }
}

/// The body of SET_MEM_TABLE: guest address, size, user address and file offset of each region.
pub fn memory_table(regions: &[(u64, u64, u64, u64)]) -> Vec<u8> {
    let mut body = words(&[u32::try_from(regions.len()).unwrap_or(0), 0]);
    for (guest, size, user, offset) in regions {
        for word in [guest, size, user, offset] {
            body.extend_from_slice(&word.to_ne_bytes());
        }
    }
    body
}

/// A queue's number and a word, as most ring messages carry them.
pub fn pair(index: u16, word: u32) -> Vec<u8> {
    words(&[u32::from(index), word])
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The first `len` bytes of a shared file, such as the in-flight record.
///
/// # Errors
///
/// When it is shorter.
pub fn peek(file: &OwnedFd, len: usize) -> Result<Vec<u8>> {
    // SAFETY: the duplicate was just made and is owned by the new file alone.
    let file = unsafe { File::from_raw_fd(file.try_clone()?.into_raw_fd()) };
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
