//! What the transport promises beyond single requests: batches, quiet rings, eventfds left alone.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use msb_testkit::frontend::{
    DATA, EVENT_IDX, FrontEnd, PROTOCOL_FEATURES, Part, code, memory_table, pair, peek,
};
use msb_vhost::{Backlog, Device, Endpoint, Options, QueueLimits, Request, serve};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, ftruncate, memfd_create};
use tempfile::TempDir;

const MEMORY: usize = 4 << 20;
const SIZE: u16 = 64;

/// The queue for whose requests nobody waits.
const PATIENT: u16 = 1;

/// Answers with one byte; a request that begins with `slow` makes the end of its batch slow.
#[derive(Default)]
struct Counter {
    handled: AtomicU32,
    is_slow: AtomicBool,
    has_ended: AtomicBool,
    backlog: OnceLock<Backlog>,
}

impl Device for Counter {
    fn features(&self) -> u64 {
        0
    }

    fn limits(&self) -> QueueLimits {
        QueueLimits {
            queues: 2,
            size: 256,
        }
    }

    fn is_patient(&self, queue: u16) -> bool {
        queue == PATIENT
    }

    fn attach_backlog(&self, backlog: Backlog) {
        self.backlog.set(backlog).ok();
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn handle(&self, _queue: u16, mut request: Request) {
        self.handled.fetch_add(1, Ordering::SeqCst);
        if request.readable.to_vec().starts_with(b"slow") {
            self.is_slow.store(true, Ordering::SeqCst);
        }
        let written = request.writable.fill(1, 1);
        request.complete(u32::try_from(written).unwrap_or(0));
    }

    fn end_batch(&self, _queue: u16) {
        if self.is_slow.swap(false, Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(200));
            self.has_ended.store(true, Ordering::SeqCst);
        }
    }
}

struct Server {
    device: Arc<Counter>,
    path: PathBuf,
    _folder: TempDir,
}

impl Server {
    fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("socket");
        let endpoint = Endpoint::bind(&path)?;
        let device = Arc::new(Counter::default());
        let options = Options {
            name: "counter",
            reconnect: true,
            poll_limit: Duration::from_micros(10),
        };
        let served = Arc::clone(&device);
        std::thread::spawn(move || serve(&endpoint, &served, options));
        Ok(Self {
            device,
            path,
            _folder: folder,
        })
    }

    fn connect(&self) -> Result<FrontEnd> {
        FrontEnd::connect(&self.path, MEMORY)
    }
}

fn send(front: &mut FrontEnd, text: &[u8; 4]) -> Result<()> {
    front.memory.write(DATA, text);
    front.put(0, &[Part::Out(DATA, 4), Part::In(DATA + 64, 1)]);
    front.kick(0)
}

fn offer(front: &mut FrontEnd, queue: u16) -> Result<bool> {
    front.offer(queue, &[Part::In(DATA + 64, 1)])
}

#[test]
fn the_driver_of_a_patient_queue_kicks_seldom() -> Result<()> {
    let server = Server::start()?;
    let mut front = server.connect()?;
    front.start(2, SIZE, EVENT_IDX)?;
    let mut kicks = 0;
    for _ in 0..200 {
        kicks += u32::from(offer(&mut front, PATIENT)?);
        front.wait(PATIENT)?;
    }
    // One for the first, and one more whenever this machine was too busy to send the next in time.
    ensure!((1..100).contains(&kicks), "{kicks} kicks for 200 requests");
    // A ring that is filled is emptied.
    for _ in 0..20 {
        for _ in 0..SIZE {
            offer(&mut front, PATIENT)?;
        }
        for _ in 0..SIZE {
            front.wait(PATIENT)?;
        }
    }
    // After a while of silence the next request is taken at once.
    let start = Instant::now();
    loop {
        std::thread::sleep(Duration::from_millis(50));
        if offer(&mut front, PATIENT)? {
            break;
        }
        front.wait(PATIENT)?;
        ensure!(start.elapsed() < Duration::from_secs(10), "no kick wanted");
    }
    front.wait(PATIENT)?;
    Ok(())
}

#[test]
fn what_lies_in_a_patient_queue_is_done_when_it_matters() -> Result<()> {
    let server = Server::start()?;
    let mut front = server.connect()?;
    front.start(2, SIZE, EVENT_IDX)?;
    let backlog = server.device.backlog.get().context("no backlog")?;
    let mut there = 0;
    for round in 1..=200 {
        offer(&mut front, PATIENT)?;
        there += u32::from(backlog.catch_up());
        let handled = server.device.handled.load(Ordering::SeqCst);
        ensure!(handled == round, "{handled} of {round}");
        front.wait(PATIENT)?;
    }
    // Those that were kicked for may have been done before.
    ensure!(there > 100, "something was there {there} times of 200");
    std::thread::sleep(Duration::from_millis(50));
    ensure!(!backlog.catch_up(), "nothing was there");
    front.stop_queue(PATIENT)?;
    ensure!(!backlog.catch_up(), "the queue is stopped");
    Ok(())
}

#[test]
fn a_driver_without_event_idx_kicks_for_every_request_of_a_patient_queue() -> Result<()> {
    let server = Server::start()?;
    let mut front = server.connect()?;
    front.start(2, SIZE, 0)?;
    for _ in 0..20 {
        front.put(PATIENT, &[Part::In(DATA + 64, 1)]);
        front.kick(PATIENT)?;
        front.wait(PATIENT)?;
    }
    Ok(())
}

#[test]
fn a_stopped_ring_has_no_batch_half_done() -> Result<()> {
    let server = Server::start()?;
    for stop in [
        |front: &mut FrontEnd| front.stop_queue(0).map(drop),
        |front: &mut FrontEnd| front.enable(0, false),
    ] {
        let mut front = server.connect()?;
        front.start(1, SIZE, EVENT_IDX)?;
        server.device.has_ended.store(false, Ordering::SeqCst);
        send(&mut front, b"slow")?;
        front.wait(0)?;
        stop(&mut front)?;
        ensure!(
            server.device.has_ended.load(Ordering::SeqCst),
            "stopped while the device was in its batch"
        );
    }
    Ok(())
}

#[test]
fn eventfds_keep_the_flags_of_the_front_end() -> Result<()> {
    let server = Server::start()?;
    let mut front = server.connect()?;
    front.start(1, SIZE, 0)?;
    // Both would block: the one when it is read empty, the other when it is written full.
    let kick = eventfd(0, EventfdFlags::CLOEXEC)?;
    let call = eventfd(0, EventfdFlags::CLOEXEC)?;
    let queue = 0_u64.to_ne_bytes();
    front.acknowledged(code::SET_VRING_KICK, &queue, &[kick.as_fd()])?;
    front.acknowledged(code::SET_VRING_CALL, &queue, &[call.as_fd()])?;
    for fd in [&kick, &call] {
        ensure!(
            !fcntl_getfl(fd)?.contains(OFlags::NONBLOCK),
            "made non-blocking"
        );
    }
    // A call that nobody can take must hold nobody up.
    rustix::io::read(&call, &mut [0; 8])?;
    rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes())?;
    for round in 0..50 {
        front.memory.write(DATA, b"fast");
        front.put(0, &[Part::Out(DATA, 4), Part::In(DATA + 64, 1)]);
        rustix::io::write(&kick, &1_u64.to_ne_bytes())?;
        let start = Instant::now();
        while front.finished(0).is_none() {
            ensure!(start.elapsed() < Duration::from_secs(5), "round {round}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    front.stop_queue(0)?;
    Ok(())
}

#[test]
fn messages_with_a_reply_are_answered_also_when_refused() -> Result<()> {
    let server = Server::start()?;
    let mut front = server.connect()?;
    front.start(1, SIZE, 0)?;
    for flags in [0, 8] {
        front.send(code::GET_VRING_BASE, flags, &pair(9, 0), &[])?;
        let (number, body, _) = front.receive()?;
        ensure!(
            (number, body) == (code::GET_VRING_BASE, vec![0; 8]),
            "GET_VRING_BASE"
        );
        // Nine queues where there is one: an answer without memory, as long as the question.
        let mut ask = vec![0; 24];
        ask[16] = 9;
        ask[18] = 64;
        front.send(code::GET_INFLIGHT_FD, flags, &ask, &[])?;
        let (number, body, fds) = front.receive()?;
        ensure!(
            (number, body, fds.len()) == (code::GET_INFLIGHT_FD, vec![0; 24], 0),
            "GET_INFLIGHT_FD"
        );
    }
    send(&mut front, b"fast")?;
    front.wait(0)?;
    Ok(())
}

/// A record of open requests, asked for and written to as an earlier process would have.
struct Record {
    fd: OwnedFd,
    body: Vec<u8>,
}

impl Record {
    fn ask(front: &mut FrontEnd) -> Result<Self> {
        let (fd, body) = front.inflight(1, SIZE)?;
        Ok(Self { fd, body })
    }

    fn header(&self, last: u16, used: u16) -> Result<()> {
        let words = [1, SIZE, last, used].map(u16::to_ne_bytes).concat();
        rustix::io::pwrite(&self.fd, &words, 8)?;
        Ok(())
    }

    fn entry(&self, head: u16, next: u16, counter: u64) -> Result<()> {
        let mut entry = vec![1, 0, 0, 0, 0, 0];
        entry.extend(next.to_ne_bytes());
        entry.extend(counter.to_ne_bytes());
        rustix::io::pwrite(&self.fd, &entry, 16 + 16 * u64::from(head))?;
        Ok(())
    }

    fn is_open(&self, head: u16) -> Result<bool> {
        let bytes = peek(&self.fd, 16 + 16 * usize::from(SIZE))?;
        Ok(bytes[16 + 16 * usize::from(head)] != 0)
    }
}

/// Requests 0 to 9 were begun; `shown` of them, the last ones of the list from request 7 backwards,
/// were in the used ring when the process died before it could note that.
fn recover(list: &[u16], used: u16, noted: u16) -> Result<(Vec<u16>, u32)> {
    let server = Server::start()?;
    let mut front = server.connect()?;
    front.negotiate()?;
    let record = Record::ask(&mut front)?;
    for head in 0..10 {
        let place = list.iter().position(|of| *of == head);
        let next = place.and_then(|place| list.get(place + 1));
        record.entry(head, next.copied().unwrap_or(0xffff), 100 - u64::from(head))?;
        let raw = [
            (DATA + 64 * u64::from(head)).to_ne_bytes().to_vec(),
            8_u32.to_ne_bytes().to_vec(),
            vec![2, 0, 0, 0],
        ];
        front.memory.write(16 * u64::from(head), &raw.concat());
    }
    record.header(list.first().copied().unwrap_or(0), noted)?;
    front.share_memory()?;
    let features = PROTOCOL_FEATURES | (1 << 32);
    front.set(code::SET_FEATURES, &features.to_ne_bytes())?;
    front.acknowledged(code::SET_INFLIGHT_FD, &record.body, &[record.fd.as_fd()])?;
    front.start_queue(0, SIZE, used)?;
    front.set_available_index(0, noted.wrapping_add(10));
    front.enable(0, true)?;
    let open = 10 - used.wrapping_sub(noted).min(10);
    let order = (0..open)
        .map(|_| front.wait(0).map(|done| done.0))
        .collect::<Result<_>>()?;
    front.stop_queue(0)?;
    for head in 0..10 {
        ensure!(!record.is_open(head)?, "{head} is still open");
    }
    Ok((order, server.device.handled.load(Ordering::SeqCst)))
}

#[test]
fn a_batch_that_was_shown_but_not_noted_is_not_done_again() -> Result<()> {
    // Nothing was shown: all is done again, in the order of the counters.
    let (order, handled) = recover(&[7, 3, 5], 40, 40)?;
    ensure!(order == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], "{order:?}");
    ensure!(handled == 10, "{handled}");
    // The last three were shown, also across the end of the index.
    for noted in [40_u16, 0xfffe] {
        let (order, handled) = recover(&[7, 3, 5], noted.wrapping_add(3), noted)?;
        ensure!(order == [9, 8, 6, 4, 2, 1, 0] && handled == 7, "{order:?}");
    }
    Ok(())
}

#[test]
fn a_record_that_makes_no_sense_ends_nothing() -> Result<()> {
    // The list leads out of the table, in a circle, and the index is anything.
    for (last, next, used, noted) in [
        (7, 0xffff, 5, 0),
        (0xffff, 0, 5, 0),
        (7, 7, 64, 0),
        (7, 8, 3, 9000),
    ] {
        let server = Server::start()?;
        let mut front = server.connect()?;
        front.negotiate()?;
        let record = Record::ask(&mut front)?;
        for head in 0..SIZE {
            record.entry(head, next, u64::from(head % 3))?;
        }
        record.header(last, noted)?;
        front.share_memory()?;
        let features = PROTOCOL_FEATURES | (1 << 32);
        front.set(code::SET_FEATURES, &features.to_ne_bytes())?;
        front.acknowledged(code::SET_INFLIGHT_FD, &record.body, &[record.fd.as_fd()])?;
        front.start_queue(0, SIZE, used)?;
        front.enable(0, true)?;
        front.stop_queue(0)?;
        drop(front);
        let mut next = server.connect()?;
        next.start(1, SIZE, 0)?;
        send(&mut next, b"fast")?;
        next.wait(0)?;
    }
    Ok(())
}

#[test]
fn memory_of_huge_pages_may_begin_anywhere() -> Result<()> {
    const HUGE: u64 = 2 << 20;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = memfd_create("huge", flags).and_then(|file| {
        ftruncate(&file, 2 * HUGE)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 2 * HUGE)?;
        Ok(file)
    });
    let Ok(file) = file else {
        println!("skipped: no huge pages (set /proc/sys/vm/nr_hugepages to 2)");
        return Ok(());
    };
    let server = Server::start()?;
    let mut front = server.connect()?;
    front.start(1, SIZE, 0)?;
    // A region in the middle of the first page, beside the ordinary memory.
    let (guest, offset, size) = (1 << 32, 64 << 10, HUGE);
    let mut region = vec![0; 8];
    region.extend(memory_table(&[(guest, size, 6 << 40, offset)]).split_off(8));
    front.acknowledged(code::ADD_MEM_REG, &region, &[file.as_fd()])?;
    front.memory.write(DATA, b"fast");
    front.put(0, &[Part::Out(DATA, 4), Part::In(guest + 5, 1)]);
    front.kick(0)?;
    front.wait(0)?;
    front.acknowledged(code::REM_MEM_REG, &region, &[])?;
    drop(front);
    let mut next = server.connect()?;
    next.start(1, SIZE, 0)?;
    let bytes = peek(&file, usize::try_from(offset)? + 6)?;
    ensure!(bytes.last() == Some(&1), "the answer is elsewhere");
    Ok(())
}
