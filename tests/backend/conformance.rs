//! The vhost-user contract: every order of messages a front end is known to use, and every wrong one.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use msb_testkit::frontend::{
    DATA, EVENT_IDX, FrontEnd, PROTOCOL_FEATURES, Part, Raw, code, memory_table, pair, peek,
};
use msb_vhost::{Device, Endpoint, Options, QueueLimits, Request, ServeError, serve};
use rustix::event::{EventfdFlags, eventfd};
use tempfile::TempDir;

const MEMORY: usize = 4 << 20;
const SIZE: u16 = 64;

/// Answers each request with its own bytes. One that begins with `hold` is kept until the test
/// sends something.
struct Echo {
    held: Mutex<Vec<Request>>,
    release: Mutex<Receiver<()>>,
}

impl Device for Echo {
    fn features(&self) -> u64 {
        1
    }

    fn limits(&self) -> QueueLimits {
        QueueLimits {
            queues: 2,
            size: 256,
        }
    }

    fn config(&self) -> Vec<u8> {
        (0..60).collect()
    }

    fn handle(&self, _queue: u16, mut request: Request) {
        let bytes = request.readable.to_vec();
        if bytes.starts_with(b"hold") {
            self.held.lock().expect("lock").push(request);
            if let Ok(release) = self.release.lock()
                && release.recv_timeout(Duration::from_secs(5)).is_ok()
            {
                self.held.lock().expect("lock").clear();
            }
            return;
        }
        let len = bytes.len().min(request.writable.len());
        request.writable.write_all(&bytes[..len]).expect("room");
        request.complete(u32::try_from(len).unwrap_or(0));
    }
}

/// The device in a thread of this process, and its socket.
struct Server {
    path: PathBuf,
    release: Sender<()>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
    _folder: TempDir,
}

impl Server {
    fn start(reconnect: bool) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("socket");
        let endpoint = Endpoint::bind(&path)?;
        let (release, receiver) = channel();
        let device = Arc::new(Echo {
            held: Mutex::default(),
            release: Mutex::new(receiver),
        });
        let options = Options {
            name: "echo",
            reconnect,
            poll_limit: Duration::from_micros(10),
        };
        let thread = std::thread::spawn(move || serve(&endpoint, &device, options));
        Ok(Self {
            path,
            release,
            thread: Some(thread),
            _folder: folder,
        })
    }

    fn connect(&self) -> Result<FrontEnd> {
        FrontEnd::connect(&self.path, MEMORY)
    }

    /// Waits for the end, which must come by itself once the front end has gone.
    fn join(mut self) -> Result<()> {
        let thread = self.thread.take().context("joined twice")?;
        Ok(thread
            .join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))??)
    }
}

fn echo(front: &mut FrontEnd, queue: u16, text: &[u8]) -> Result<()> {
    let len = u32::try_from(text.len())?;
    front.memory.write(DATA, text);
    front.memory.write(DATA + 4096, &vec![0; text.len()]);
    let head = front.put(queue, &[Part::Out(DATA, len), Part::In(DATA + 4096, len)]);
    front.kick(queue)?;
    let done = front.wait(queue)?;
    ensure!(done == (head, len), "{done:?} instead of {:?}", (head, len));
    ensure!(
        front.memory.read(DATA + 4096, text.len()) == text,
        "other bytes came back"
    );
    Ok(())
}

fn started(features: u64) -> Result<(Server, FrontEnd)> {
    let server = Server::start(false)?;
    let mut front = server.connect()?;
    front.start(2, SIZE, features)?;
    Ok((server, front))
}

#[test]
fn requests_come_back_with_every_ring_feature() -> Result<()> {
    for (features, indirect) in [(0, false), (0, true), (EVENT_IDX, false), (EVENT_IDX, true)] {
        let (server, mut front) = started(features)?;
        if indirect {
            front.use_indirect(0);
            front.use_indirect(1);
        }
        for round in 0..300_u32 {
            echo(
                &mut front,
                (round % 2) as u16,
                format!("round {round}").as_bytes(),
            )?;
        }
        drop(front);
        server.join()?;
    }
    Ok(())
}

#[test]
fn many_requests_at_once_all_come_back_once() -> Result<()> {
    let (_server, mut front) = started(EVENT_IDX)?;
    let mut seen = 0;
    for _ in 0..200 {
        for slot in 0..u64::from(SIZE / 2) {
            front.memory.write(DATA + slot * 64, &slot.to_ne_bytes());
            front.put(
                0,
                &[
                    Part::Out(DATA + slot * 64, 8),
                    Part::In(DATA + 8192 + slot * 64, 8),
                ],
            );
        }
        front.kick(0)?;
        for _ in 0..SIZE / 2 {
            let (_, written) = front.wait(0)?;
            ensure!(written == 8, "{written}");
            seen += 1;
        }
    }
    ensure!(
        seen == 200 * u32::from(SIZE / 2) && front.finished(0).is_none(),
        "{seen}"
    );
    Ok(())
}

#[test]
fn libkrun_claims_the_device_again_at_each_start() -> Result<()> {
    // Protocol features before SET_OWNER; the driver's reset only disables the queues; the next
    // start sends everything again on the same connection, with base 0 and rings that begin anew.
    let server = Server::start(false)?;
    let mut front = server.connect()?;
    front.get(code::GET_FEATURES)?;
    front.negotiate()?;
    ensure!(front.get(code::GET_QUEUE_NUM)? == 2, "number of queues");
    for round in 0..3 {
        front.ask(code::SET_OWNER, &[], &[])?;
        front.share_memory()?;
        front.set(
            code::SET_FEATURES,
            &(PROTOCOL_FEATURES | (1 << 32)).to_ne_bytes(),
        )?;
        front.start_queue(0, SIZE, 0)?;
        front.enable(0, true)?;
        echo(&mut front, 0, format!("start {round}").as_bytes())?;
        front.enable(0, false)?;
    }
    Ok(())
}

#[test]
fn rings_may_be_enabled_before_the_features_are_set() -> Result<()> {
    let server = Server::start(false)?;
    let mut front = server.connect()?;
    front.negotiate()?;
    front.enable(0, true)?;
    front.share_memory()?;
    front.set(
        code::SET_FEATURES,
        &(PROTOCOL_FEATURES | (1 << 32)).to_ne_bytes(),
    )?;
    front.start_queue(0, SIZE, 0)?;
    echo(&mut front, 0, b"enabled early")
}

#[test]
fn without_protocol_features_rings_are_enabled_from_the_start() -> Result<()> {
    let server = Server::start(false)?;
    let mut front = server.connect()?;
    front.negotiate()?;
    front.share_memory()?;
    front.set(code::SET_FEATURES, &(1_u64 << 32).to_ne_bytes())?;
    front.start_queue(0, SIZE, 0)?;
    echo(&mut front, 0, b"never enabled")
}

#[test]
fn a_kick_before_enabling_is_not_lost() -> Result<()> {
    let server = Server::start(false)?;
    let mut front = server.connect()?;
    front.negotiate()?;
    front.share_memory()?;
    front.set(
        code::SET_FEATURES,
        &(PROTOCOL_FEATURES | (1 << 32)).to_ne_bytes(),
    )?;
    front.start_queue(0, SIZE, 0)?;
    front.put(0, &[Part::Out(DATA, 4), Part::In(DATA + 64, 4)]);
    front.kick(0)?;
    ensure!(
        !front.interrupted(0, Duration::from_millis(50))? || front.finished(0).is_none(),
        "served while disabled"
    );
    front.enable(0, true)?;
    front.wait(0)?;
    Ok(())
}

#[test]
fn a_disabled_ring_is_left_alone_and_goes_on_where_it_stood() -> Result<()> {
    let (_server, mut front) = started(0)?;
    echo(&mut front, 0, b"before")?;
    front.enable(0, false)?;
    front.put(0, &[Part::Out(DATA, 4), Part::In(DATA + 64, 4)]);
    front.kick(0)?;
    std::thread::sleep(Duration::from_millis(50));
    ensure!(front.finished(0).is_none(), "served while disabled");
    front.enable(0, true)?;
    front.wait(0)?;
    Ok(())
}

#[test]
fn stopping_a_ring_tells_where_it_stands_and_it_can_start_again() -> Result<()> {
    let (_server, mut front) = started(EVENT_IDX)?;
    for _ in 0..5 {
        echo(&mut front, 0, b"x")?;
    }
    let base = front.stop_queue(0)?;
    ensure!(base == 5, "{base}");
    front.start_queue(0, SIZE, base)?;
    echo(&mut front, 0, b"after")
}

#[test]
fn stopping_a_ring_waits_for_its_open_requests() -> Result<()> {
    let (server, mut front) = started(0)?;
    front.memory.write(DATA, b"hold");
    front.put(0, &[Part::Out(DATA, 4), Part::In(DATA + 64, 4)]);
    front.kick(0)?;
    std::thread::sleep(Duration::from_millis(30));
    ensure!(
        front.finished(0).is_none(),
        "the device did not hold the request"
    );
    let release = server.release.clone();
    let helper = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        release.send(())
    });
    front.stop_queue(0)?;
    ensure!(front.finished(0).is_some(), "stopped with a request open");
    helper.join().map_err(|_| anyhow::anyhow!("helper"))??;
    Ok(())
}

#[test]
#[expect(clippy::too_many_lines, reason = "most of it is the table")]
fn refused_requests_leave_the_connection_alive() -> Result<()> {
    let (_server, mut front) = started(0)?;
    let size = front.memory_size();
    let short = front.other_memory(4096)?;
    let whole = front.other_memory(size)?;
    let overlap = memory_table(&[(0, size, 1 << 40, 0), (size / 2, size, 2 << 40, 0)]);
    let claims = memory_table(&[(0, size, 1 << 40, 0)]);
    let wraps = memory_table(&[(u64::MAX - 4096, size, 1 << 40, 0)]);
    let no_fd = (1_u64 << 8).to_ne_bytes();
    let null = std::fs::File::open("/dev/null")?;
    let (pipe, _writer) = std::io::pipe()?;
    let refused: &[(&str, u32, Vec<u8>, Vec<_>)] = &[
        ("an unknown request", 99, vec![], vec![]),
        ("GET_STATUS", 40, vec![], vec![]),
        (
            "a body that is too short",
            code::SET_FEATURES,
            vec![0; 4],
            vec![],
        ),
        (
            "features that were not offered",
            code::SET_FEATURES,
            vec![0xff; 8],
            vec![],
        ),
        (
            "a queue that does not exist",
            code::SET_VRING_NUM,
            pair(7, 64),
            vec![],
        ),
        (
            "a queue size of zero",
            code::SET_VRING_NUM,
            pair(1, 0),
            vec![],
        ),
        (
            "a queue size of 1000",
            code::SET_VRING_NUM,
            pair(1, 1000),
            vec![],
        ),
        (
            "a queue size above the limit",
            code::SET_VRING_NUM,
            pair(1, 512),
            vec![],
        ),
        (
            "another size for a running queue",
            code::SET_VRING_NUM,
            pair(0, 32),
            vec![],
        ),
        (
            "rings outside memory",
            code::SET_VRING_ADDR,
            [pair(1, 0), vec![0x10; 32]].concat(),
            vec![],
        ),
        (
            "overlapping regions",
            code::SET_MEM_TABLE,
            overlap,
            vec![whole.as_fd(), whole.as_fd()],
        ),
        (
            "a file shorter than its region",
            code::SET_MEM_TABLE,
            claims.clone(),
            vec![short.as_fd()],
        ),
        (
            "a region without its file",
            code::SET_MEM_TABLE,
            claims,
            vec![],
        ),
        (
            "a region that wraps around",
            code::SET_MEM_TABLE,
            wraps,
            vec![whole.as_fd()],
        ),
        (
            "a kick without its descriptor",
            code::SET_VRING_KICK,
            vec![1, 0, 0, 0, 0, 0, 0, 0],
            vec![],
        ),
        (
            "a kick that is a device",
            code::SET_VRING_KICK,
            vec![1, 0, 0, 0, 0, 0, 0, 0],
            vec![null.as_fd()],
        ),
        (
            "a kick that is a pipe",
            code::SET_VRING_KICK,
            vec![1, 0, 0, 0, 0, 0, 0, 0],
            vec![pipe.as_fd()],
        ),
        (
            "a write to a read-only configuration",
            code::SET_CONFIG,
            vec![0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7],
            vec![],
        ),
        (
            "an in-flight record without its memory",
            code::SET_INFLIGHT_FD,
            vec![0; 24],
            vec![],
        ),
    ];
    for (what, number, body, fds) in refused {
        ensure!(
            front.acknowledged(*number, body, fds).is_err(),
            "{what} was accepted"
        );
        echo(&mut front, 0, b"still here").with_context(|| format!("after {what}"))?;
    }
    // An error descriptor may be taken away at any time.
    front.acknowledged(code::SET_VRING_ERR, &no_fd, &[])?;
    Ok(())
}

#[test]
fn messages_may_arrive_in_pieces() -> Result<()> {
    let (_server, mut front) = started(0)?;
    let body = pair(1, 1);
    let mut bytes: Vec<u8> = [code::SET_VRING_ENABLE, 1 | 8, 8]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    bytes.extend_from_slice(&body);
    for byte in bytes {
        front.send_bytes(&[byte], &[])?;
        std::thread::sleep(Duration::from_millis(1));
    }
    let (number, reply, _) = front.receive()?;
    ensure!(
        (number, reply) == (code::SET_VRING_ENABLE, vec![0; 8]),
        "another reply"
    );
    Ok(())
}

#[test]
fn the_configuration_is_as_long_as_asked() -> Result<()> {
    let (_server, mut front) = started(0)?;
    let whole = front.config(0, 256)?;
    ensure!(
        whole[..60] == (0..60).collect::<Vec<u8>>() && whole[60..].iter().all(|byte| *byte == 0),
        "{whole:?}"
    );
    ensure!(front.config(58, 4)? == [58, 59, 0, 0], "at the end");
    ensure!(front.config(200, 4)? == [0; 4], "behind the end");
    // Too much is answered with an empty body, and the connection lives.
    let reply = front.ask(code::GET_CONFIG, &[0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0], &[])?;
    ensure!(
        reply.is_some_and(|reply| reply.is_empty()),
        "257 bytes were given"
    );
    echo(&mut front, 0, b"alive")
}

#[test]
fn memory_can_be_added_while_the_rings_run() -> Result<()> {
    let (_server, mut front) = started(0)?;
    ensure!(front.get(code::GET_MAX_MEM_SLOTS)? >= 32, "memory slots");
    let more = front.other_memory(1 << 20)?;
    let region = |guest: u64, user: u64| {
        let mut body = vec![0; 8];
        for word in [guest, 1 << 20, user, 0] {
            body.extend_from_slice(&word.to_ne_bytes());
        }
        body
    };
    front.acknowledged(
        code::ADD_MEM_REG,
        &region(1 << 32, 5 << 40),
        &[more.as_fd()],
    )?;
    let twice = front.acknowledged(
        code::ADD_MEM_REG,
        &region(1 << 32, 6 << 40),
        &[more.as_fd()],
    );
    ensure!(twice.is_err(), "the same region twice");
    // A request whose answer lies in the new memory.
    front.memory.write(DATA, b"far");
    front.put(0, &[Part::Out(DATA, 3), Part::In(1 << 32, 3)]);
    front.kick(0)?;
    front.wait(0)?;
    ensure!(peek(&more, 3)? == b"far", "not written there");
    Ok(())
}

#[test]
fn another_front_end_may_follow() -> Result<()> {
    let server = Server::start(true)?;
    for round in 0..20 {
        let mut front = server.connect()?;
        front.start(2, SIZE, EVENT_IDX)?;
        echo(&mut front, 1, format!("front end {round}").as_bytes())?;
    }
    Ok(())
}

#[test]
fn requests_that_were_open_are_done_again_in_their_order() -> Result<()> {
    let server = Server::start(true)?;
    // The record of an earlier process: requests 3, 1 and 2 were open, begun in this order.
    let mut front = server.connect()?;
    front.negotiate()?;
    let ask = [
        vec![0; 16],
        1_u16.to_ne_bytes().to_vec(),
        SIZE.to_ne_bytes().to_vec(),
        vec![0; 4],
    ]
    .concat();
    front.send(code::GET_INFLIGHT_FD, 0, &ask, &[])?;
    let (_, reply, fds) = front.receive()?;
    ensure!(reply.len() == ask.len(), "reply of {} bytes", reply.len());
    let record = fds.into_iter().next().context("no memory for the record")?;
    let put = |at: u64, bytes: &[u8]| rustix::io::pwrite(&record, bytes, at);
    put(8, &1_u16.to_ne_bytes())?;
    put(10, &SIZE.to_ne_bytes())?;
    for (counter, head) in [(5_u64, 3_u64), (6, 1), (9, 2)] {
        put(16 + 16 * head, &[1])?;
        put(24 + 16 * head, &counter.to_ne_bytes())?;
    }
    front.share_memory()?;
    front.set(
        code::SET_FEATURES,
        &(PROTOCOL_FEATURES | (1 << 32)).to_ne_bytes(),
    )?;
    front.acknowledged(code::SET_INFLIGHT_FD, &reply, &[record.as_fd()])?;
    for head in 0..4_u64 {
        // Four descriptors that are each a whole request, of which three are open.
        let raw: Vec<u8> = [
            (DATA + 64 * head).to_ne_bytes().to_vec(),
            8_u32.to_ne_bytes().to_vec(),
            2_u16.to_ne_bytes().to_vec(),
            0_u16.to_ne_bytes().to_vec(),
        ]
        .concat();
        front.memory.write(16 * head, &raw);
    }
    // Cloud-hypervisor would say base 3 here: what the record says counts.
    front.start_queue(0, SIZE, 0)?;
    front.set_available_index(0, 3);
    front.enable(0, true)?;
    let order: Vec<u16> = (0..3)
        .map(|_| front.wait(0).map(|done| done.0))
        .collect::<Result<_>>()?;
    ensure!(order == [3, 1, 2], "{order:?}");
    ensure!(front.finished(0).is_none(), "one was done twice");
    let after = peek(&record, 16 + 16 * 4)?;
    ensure!(
        (1..4).all(|head| after[16 + 16 * head] == 0),
        "still marked as open"
    );
    Ok(())
}

#[test]
fn malformed_chains_come_back_empty_and_the_ring_goes_on() -> Result<()> {
    let (_server, mut front) = started(EVENT_IDX)?;
    let size = front.memory_size();
    let raw = |address, len, flags, next| Raw {
        address,
        len,
        flags,
        next,
    };
    let table = |front: &FrontEnd, descriptors: &[(u64, u32, u16, u16)]| {
        for (place, (address, len, flags, next)) in (0_u64..).zip(descriptors) {
            let bytes: Vec<u8> = [
                address.to_ne_bytes().to_vec(),
                len.to_ne_bytes().to_vec(),
                flags.to_ne_bytes().to_vec(),
                next.to_ne_bytes().to_vec(),
            ]
            .concat();
            front.memory.write(DATA + 65536 + 16 * place, &bytes);
        }
    };
    table(
        &front,
        &[(DATA, 8, 1, 1), (DATA, 8, 1, 0), (DATA + 65536, 32, 4, 0)],
    );
    let indirect = DATA + 65536;
    for _ in 0..1000 {
        let bad: [(&str, Vec<Raw>); 10] = [
            ("outside memory", vec![raw(size, 8, 0, 0)]),
            ("across the end of memory", vec![raw(size - 4, 8, 2, 0)]),
            ("wrapping around", vec![raw(u64::MAX - 3, 8, 2, 0)]),
            ("next beyond the table", vec![raw(DATA, 8, 1, 999)]),
            (
                "readable after writable",
                vec![raw(DATA, 8, 2 | 1, 1), raw(DATA, 8, 0, 0)]
                    .into_iter()
                    .collect(),
            ),
            ("indirect table of 15 bytes", vec![raw(indirect, 15, 4, 0)]),
            ("indirect table of nothing", vec![raw(indirect, 0, 4, 0)]),
            ("indirect with next", vec![raw(indirect, 16, 4 | 1, 0)]),
            ("a loop in an indirect table", vec![raw(indirect, 32, 4, 0)]),
            ("indirect in indirect", vec![raw(indirect + 32, 16, 4, 0)]),
        ];
        for (what, chain) in bad {
            let slots = front.queues[0].size;
            let head = front.put_raw(0, &chain);
            // The chain of two names its second descriptor by position.
            if chain.len() == 2 {
                front.memory.write(
                    16 * u64::from(head) + 14,
                    &((head + 1) % slots).to_ne_bytes(),
                );
            }
            front.kick(0)?;
            let done = front.wait(0).with_context(|| what.to_owned())?;
            ensure!(done == (head, 0), "{what}: {done:?}");
        }
    }
    echo(&mut front, 0, b"the ring goes on")
}

#[test]
fn a_broken_ring_is_reported_and_harms_no_other() -> Result<()> {
    let (_server, mut front) = started(0)?;
    let err = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    front.acknowledged(code::SET_VRING_ERR, &0_u64.to_ne_bytes(), &[err.as_fd()])?;
    front.set_available_index(0, 1000);
    front.kick(0)?;
    let mut value = [0; 8];
    for _ in 0..500 {
        if rustix::io::read(&err, &mut value).is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    ensure!(u64::from_ne_bytes(value) == 1, "the error was not reported");
    for _ in 0..100 {
        echo(&mut front, 1, b"the other queue works")?;
    }
    // A reset by the driver mends it.
    front.stop_queue(0)?;
    front.start_queue(0, SIZE, 0)?;
    echo(&mut front, 0, b"mended")
}

#[test]
fn surplus_descriptors_are_closed() -> Result<()> {
    let (_server, mut front) = started(0)?;
    let null = std::fs::File::open("/dev/null")?;
    let count = || std::fs::read_dir("/proc/self/fd").map(Iterator::count);
    echo(&mut front, 0, b"settled")?;
    let before = count()?;
    for number in 0..60_u32 {
        for surplus in [1, 8, 32, 100] {
            // A closed connection would fail the echo below.
            let fds = vec![null.as_fd(); surplus];
            if [31, 34, 4].contains(&number) {
                continue;
            }
            front.send(number, 0, &[0xee; 4], &fds)?;
        }
    }
    // Replies that were not asked for in this test are still to be read.
    front.send(code::SET_VRING_ENABLE, 8, &pair(1, 1), &[])?;
    while front.receive()?.0 != code::SET_VRING_ENABLE {}
    echo(&mut front, 0, b"alive")?;
    let after = count()?;
    ensure!(after <= before, "{before} descriptors became {after}");
    Ok(())
}

#[test]
fn a_stream_of_other_bytes_closes_only_its_connection() -> Result<()> {
    let server = Server::start(true)?;
    for _ in 0..50 {
        let mut front = server.connect()?;
        front.send_bytes(&[0xff; 64], &[])?;
        ensure!(front.receive().is_err(), "garbage was answered");
        let mut good = server.connect()?;
        good.start(1, SIZE, 0)?;
        echo(&mut good, 0, b"next")?;
    }
    Ok(())
}
