//! A hostile guest and a hostile front end against a device in a process of its own.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use msb_testkit::frontend::{DATA, EVENT_IDX, FrontEnd, Part, Raw, code, memory_table, pair};
use msb_testkit::sys::signal_thread;
use msb_vhost::{Device, Endpoint, Options, QueueLimits, Request, serve};
use rustix::event::{EventfdFlags, epoll, eventfd};
use tempfile::TempDir;

const MEMORY: usize = 4 << 20;
const SIZE: u16 = 256;
const CHAINS: usize = 100_000;
const MESSAGES: usize = 100_000;
/// Growth of the resident set that is no leak: stacks, buffers and allocator slack.
const SLACK_KIB: u64 = 4096;
/// Names the socket to the process that [`victim`] becomes.
const SOCKET: &str = "MSB_TEST_VICTIM_SOCKET";

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Reads all it is sent, answers with at most 512 bytes of it, and keeps what begins with `hold`.
#[derive(Default)]
struct Echo(Mutex<Vec<Request>>);

impl Device for Echo {
    fn features(&self) -> u64 {
        0
    }

    fn limits(&self) -> QueueLimits {
        QueueLimits {
            queues: 2,
            size: SIZE,
        }
    }

    fn config(&self) -> Vec<u8> {
        vec![1; 60]
    }

    fn handle(&self, _queue: u16, mut request: Request) {
        let len = request.readable.len().min(512);
        let mut bytes = vec![0; len];
        request.readable.read_exact(&mut bytes).expect("len");
        if bytes.starts_with(b"hold") {
            self.0.lock().expect("lock").push(request);
            return;
        }
        let len = len.min(request.writable.len());
        request.writable.write_all(&bytes[..len]).expect("room");
        request.complete(u32::try_from(len).unwrap_or(0));
    }
}

#[test]
#[ignore = "is the process that the other tests attack"]
fn victim() -> Result<()> {
    let Some(path) = std::env::var_os(SOCKET) else {
        return Ok(());
    };
    let endpoint = Endpoint::bind(Path::new(&path))?;
    let options = Options {
        name: "victim",
        reconnect: true,
        poll_limit: Duration::from_micros(10),
    };
    serve(&endpoint, &Arc::new(Echo::default()), options)?;
    Ok(())
}

/// The device in a process of its own.
struct Victim {
    child: Child,
    path: PathBuf,
    _folder: TempDir,
}

impl Victim {
    fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("socket");
        let child = Command::new(std::env::current_exe()?)
            .args(["--exact", "hostile::victim", "--ignored", "--nocapture"])
            .env(SOCKET, &path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self {
            child,
            path,
            _folder: folder,
        })
    }

    fn connect(&self) -> Result<FrontEnd> {
        FrontEnd::connect(&self.path, MEMORY)
    }

    fn started(&self, features: u64) -> Result<FrontEnd> {
        let mut front = self.connect()?;
        front.start(2, SIZE, features)?;
        Ok(front)
    }

    /// Serves one whole front end, then returns the number of descriptors and the resident KiB
    /// of the process at rest.
    fn weigh(&mut self) -> Result<(usize, u64)> {
        let mut front = self.started(0)?;
        for queue in 0..2 {
            echo(&mut front, queue)?;
        }
        drop(front);
        ensure!(self.child.try_wait()?.is_none(), "the process has ended");
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        // The session is closed some time after its socket.
        let mut last = usize::MAX;
        loop {
            let now = std::fs::read_dir(proc.join("fd"))?.count();
            if now == last {
                break;
            }
            last = now;
            std::thread::sleep(Duration::from_millis(100));
        }
        let status = std::fs::read_to_string(proc.join("status"))?;
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.split_whitespace().next())
            .context("VmRSS")?;
        Ok((last, resident.parse()?))
    }

    /// Compares with an earlier weight.
    fn still_weighs(&mut self, before: (usize, u64)) -> Result<()> {
        let after = self.weigh()?;
        println!("descriptors, KiB: {before:?} before, {after:?} after");
        ensure!(after.0 == before.0, "descriptors: {before:?} to {after:?}");
        ensure!(after.1 <= before.1 + SLACK_KIB, "{before:?} to {after:?}");
        Ok(())
    }

    /// The thread that serves, which the test harness has named after the test.
    fn server_thread(&self) -> Result<u32> {
        for task in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let task = task?;
            let name = std::fs::read_to_string(task.path().join("comm"))?;
            if name.starts_with("hostile") {
                return Ok(task.file_name().to_string_lossy().parse()?);
            }
        }
        bail!("the device does not run")
    }

    /// Asks the process to end; how long that took.
    fn terminate(mut self) -> Result<Duration> {
        let start = Instant::now();
        signal_thread(self.child.id(), self.server_thread()?, libc::SIGTERM)?;
        while start.elapsed() < Duration::from_secs(5) {
            if self.child.try_wait()?.is_some() {
                return Ok(start.elapsed());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("SIGTERM does not end the process")
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A small generator, so that every run does the same.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    fn below(&mut self, end: u64) -> u64 {
        self.roll() % end
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.below(of.len() as u64)).unwrap_or(0)]
    }
}

fn echo(front: &mut FrontEnd, queue: u16) -> Result<()> {
    front.memory.write(DATA, b"good");
    front.memory.write(DATA + 64, &[0; 4]);
    let head = front.put(queue, &[Part::Out(DATA, 4), Part::In(DATA + 64, 4)]);
    front.kick(queue)?;
    let done = front.wait(queue)?;
    ensure!(done == (head, 4), "{done:?} instead of {head}");
    ensure!(front.memory.read(DATA + 64, 4) == b"good", "other bytes");
    Ok(())
}

/// Where indirect tables lie: behind what the device may write to.
const TABLES: u64 = DATA + (1 << 20);

/// A descriptor that is wrong in some way more often than not. What the device may write to is
/// never part of a ring or a table: a guest that garbles its own rings only breaks those.
fn descriptor(dice: &mut Dice, tables: bool) -> Raw {
    let end = MEMORY as u64;
    let mut flags = u16::try_from(dice.below(4)).unwrap_or(0);
    if tables && dice.below(4) == 0 {
        flags |= INDIRECT;
    }
    let len = dice.pick(&[0, 1, 15, 16, 17, 64, 512, 4096, 65_520, 1 << 20, u32::MAX]);
    let address = if flags & INDIRECT != 0 {
        let table = TABLES + 16 * dice.below(4096);
        dice.pick(&[table, table, table, table + 1, end - 16, end, u64::MAX - 15])
    } else if dice.below(8) == 0 {
        dice.pick(&[end, end - 1, u64::MAX, u64::MAX - 4095, 1 << 63])
    } else {
        DATA + dice.below(1 << 19)
    };
    Raw {
        address,
        len,
        flags,
        next: u16::try_from(dice.below(u64::from(SIZE) + 8)).unwrap_or(0),
    }
}

fn fill_tables(front: &FrontEnd, dice: &mut Dice) {
    for slot in 0..4096 {
        let nested = dice.below(16) == 0;
        let raw = descriptor(dice, nested);
        let mut bytes = raw.address.to_ne_bytes().to_vec();
        bytes.extend(raw.len.to_ne_bytes());
        bytes.extend(raw.flags.to_ne_bytes());
        bytes.extend((raw.next % 64).to_ne_bytes());
        front.memory.write(TABLES + 16 * slot, &bytes);
    }
}

/// Takes `count` answers of a queue.
fn collect(front: &mut FrontEnd, queue: u16, count: usize) -> Result<usize> {
    let mut empty = 0;
    for number in 0..count {
        let (_, written) = front.wait(queue).with_context(|| format!("{number}"))?;
        empty += usize::from(written == 0);
    }
    Ok(empty)
}

#[test]
fn a_hundred_thousand_wild_chains_all_come_back() -> Result<()> {
    let mut victim = Victim::start()?;
    let before = victim.weigh()?;
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let (mut sent, mut empty) = (0, 0);
    for features in [0, EVENT_IDX] {
        let mut front = victim.started(features)?;
        for round in 0..CHAINS / 128 / 2 + 1 {
            fill_tables(&front, &mut dice);
            let queue = u16::try_from(round % 2)?;
            // Each descriptor is the head of a chain that wanders through all of the table.
            for _ in 0..128 {
                let raw = descriptor(&mut dice, true);
                front.put_raw(queue, &[raw]);
            }
            front.kick(queue)?;
            empty += collect(&mut front, queue, 128)?;
            sent += 128;
            if round % 8 == 0 {
                echo(&mut front, 0)?;
                echo(&mut front, 1)?;
            }
        }
    }
    println!("{sent} chains, {empty} without an answer");
    ensure!(sent >= CHAINS && empty > sent / 4, "{sent} {empty}");
    victim.still_weighs(before)
}

#[test]
fn rings_that_break_again_and_again_can_be_set_up_anew() -> Result<()> {
    let mut victim = Victim::start()?;
    let before = victim.weigh()?;
    let mut front = victim.started(EVENT_IDX)?;
    for round in 0..500_u16 {
        if round % 2 == 0 {
            front.set_available_index(0, SIZE + 1 + round);
        } else {
            front.announce(0, SIZE + round);
        }
        front.kick(0)?;
        echo(&mut front, 1)?;
        front.stop_queue(0)?;
        front.start_queue(0, SIZE, round.wrapping_mul(331))?;
        echo(&mut front, 0)?;
    }
    drop(front);
    victim.still_weighs(before)
}

/// One message of a front end that has lost its mind.
fn message(dice: &mut Dice) -> (u32, u32, Vec<u8>) {
    let number = u32::try_from(dice.below(48)).unwrap_or(0);
    let mut body = Vec::new();
    match dice.below(6) {
        0 => body.resize(usize::try_from(dice.below(600)).unwrap_or(0), 0xa5),
        1 => {
            let count = dice.pick(&[0, 1, 2, 3, 8]);
            let region = |n: u64| (n << 20, 1 << 20, 0x7f00_0000_0000 + (n << 20), n << 20);
            body = memory_table(&(0..count).map(region).collect::<Vec<_>>());
            if dice.below(4) == 0 {
                body[0] = body[0].wrapping_add(1);
            }
        }
        2 => {
            let index = u16::try_from(dice.below(3)).unwrap_or(0);
            let word = dice.pick(&[0, 1, 2, 64, 256, 1000, 65_535, 65_536, u32::MAX]);
            body = pair(index, word);
        }
        3 => {
            body = pair(u16::try_from(dice.below(3)).unwrap_or(0), 0);
            for _ in 0..4 {
                let at = 0x7f00_0000_0000 + (dice.below(1 << 21) & !15);
                body.extend(dice.pick(&[at, at, at + 1, 0, u64::MAX]).to_ne_bytes());
            }
        }
        _ => {
            for _ in 0..dice.below(8) {
                let word =
                    dice.pick(&[0, 1, 2, 12, 256, 257, 4096, 1 << 20, 0x8000_0001, u32::MAX]);
                body.extend(word.to_ne_bytes());
            }
        }
    }
    (number, u32::try_from(dice.below(2)).unwrap_or(0) << 3, body)
}

/// Throws away what the device has answered; false when it has closed the connection.
fn discard(socket: &UnixStream) -> Result<bool> {
    socket.set_nonblocking(true)?;
    let mut waste = [0; 65_536];
    let alive = loop {
        match (&*socket).read(&mut waste) {
            Ok(0) => break false,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break true,
            Err(_) => break false,
        }
    };
    socket.set_nonblocking(false)?;
    Ok(alive)
}

#[test]
fn a_hundred_thousand_wild_messages_leave_the_device_as_it_was() -> Result<()> {
    let mut victim = Victim::start()?;
    let before = victim.weigh()?;
    let mut dice = Dice(0x0123_4567_89ab_cdef);
    let memory: OwnedFd = rustix::fs::memfd_create("wild", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&memory, 4 << 20)?;
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let null: OwnedFd = std::fs::File::open("/dev/null")?.into();
    let (mut sent, mut connections) = (0, 0);
    while sent < MESSAGES {
        let socket = UnixStream::connect(&victim.path)?;
        let mut front = FrontEnd::on(socket.try_clone()?, 4096)?;
        connections += 1;
        for round in 0..2000 {
            let (number, flags, body) = message(&mut dice);
            let of = [&memory, &memory, &event, &event, &null];
            let count = dice.pick(&[0, 1, 1, 2, 3, 8, 32, 253]);
            let fds: Vec<BorrowedFd<'_>> = (0..count).map(|_| dice.pick(&of).as_fd()).collect();
            if front.send(number, flags, &body, &fds).is_err() {
                break;
            }
            sent += 1;
            if round % 16 == 0 && !discard(&socket)? {
                break;
            }
        }
        // Half a message at the end of every connection.
        front.send_bytes(&[1, 0, 0], &[memory.as_fd()]).ok();
    }
    println!("{sent} messages over {connections} connections");
    victim.still_weighs(before)
}

/// A request that the device keeps.
const HOLD: Raw = Raw {
    address: DATA,
    len: 4,
    flags: 0,
    next: 0,
};

#[test]
fn a_driver_cannot_have_more_requests_open_than_its_ring_holds() -> Result<()> {
    let victim = Victim::start()?;
    let mut front = victim.started(EVENT_IDX)?;
    front.memory.write(DATA, b"hold");
    for _ in 0..8 {
        // None comes back; the driver uses its entries again nevertheless.
        for _ in 0..SIZE {
            front.put_raw(0, &[HOLD]);
        }
        front.kick(0)?;
        std::thread::sleep(Duration::from_millis(20));
    }
    // Behind the used ring the device says which chain it waits for.
    let size = u64::from(SIZE);
    let used = (16 * size + 6 + 2 * size).next_multiple_of(16);
    let taken = front.memory.read(used + 4 + 8 * size, 2);
    let taken = u16::from_ne_bytes(taken.as_slice().try_into()?);
    ensure!(taken <= SIZE, "{taken} requests open in a ring of {SIZE}");
    Ok(())
}

#[test]
fn sigterm_ends_an_idle_connection() -> Result<()> {
    let victim = Victim::start()?;
    let mut front = victim.started(0)?;
    echo(&mut front, 0)?;
    let took = victim.terminate()?;
    ensure!(took < Duration::from_secs(1), "{took:?}");
    Ok(())
}

#[test]
fn sigterm_does_not_wait_long_for_a_request_that_never_ends() -> Result<()> {
    let victim = Victim::start()?;
    let mut front = victim.started(0)?;
    front.memory.write(DATA, b"hold");
    front.put_raw(0, &[HOLD]);
    front.kick(0)?;
    std::thread::sleep(Duration::from_millis(50));
    let took = victim.terminate()?;
    ensure!(took < Duration::from_secs(2), "{took:?}");
    Ok(())
}

#[test]
fn sigterm_ends_a_connection_in_the_middle_of_a_message() -> Result<()> {
    let victim = Victim::start()?;
    let mut front = victim.connect()?;
    front.get(code::GET_FEATURES)?;
    front.send_bytes(&[1, 0, 0, 0], &[])?;
    std::thread::sleep(Duration::from_millis(50));
    let took = victim.terminate()?;
    ensure!(took < Duration::from_secs(1), "{took:?}");
    Ok(())
}

#[test]
fn sigterm_ends_a_connection_whose_answers_nobody_reads() -> Result<()> {
    let victim = Victim::start()?;
    victim.connect()?.get(code::GET_FEATURES)?;
    let socket = UnixStream::connect(&victim.path)?;
    socket.set_nonblocking(true)?;
    let mut front = FrontEnd::on(socket, 4096)?;
    // Until both directions are full.
    while front.send(code::GET_FEATURES, 0, &[], &[]).is_ok() {}
    std::thread::sleep(Duration::from_millis(50));
    while front.send(code::GET_FEATURES, 0, &[], &[]).is_ok() {}
    let took = victim.terminate()?;
    ensure!(took < Duration::from_secs(1), "{took:?}");
    Ok(())
}

#[test]
fn an_interrupt_descriptor_that_blocks_does_not_hang_the_device() -> Result<()> {
    let victim = Victim::start()?;
    let mut front = victim.started(0)?;
    let (reader, writer) = std::io::pipe()?;
    let word = 0_u64.to_ne_bytes();
    let refused = front.acknowledged(code::SET_VRING_CALL, &word, &[writer.as_fd()]);
    if refused.is_ok() {
        for _ in 0..9000 {
            front.put(0, &[Part::Out(DATA, 4), Part::In(DATA + 64, 4)]);
            front.kick(0)?;
            let deadline = Instant::now() + Duration::from_secs(2);
            while front.finished(0).is_none() {
                ensure!(Instant::now() < deadline, "the worker hangs");
                std::hint::spin_loop();
            }
        }
    }
    front.stop_queue(0)?;
    drop(reader);
    Ok(())
}

#[test]
fn a_kick_descriptor_that_is_always_readable_is_refused() -> Result<()> {
    let victim = Victim::start()?;
    let mut front = victim.started(0)?;
    // An epoll instance that is always readable, and cannot be read.
    let ready = eventfd(1, EventfdFlags::CLOEXEC)?;
    let fake = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let data = epoll::EventData::new_u64(0);
    epoll::add(&fake, &ready, data, epoll::EventFlags::IN)?;
    let word = 0_u64.to_ne_bytes();
    let taken = front.acknowledged(code::SET_VRING_KICK, &word, &[fake.as_fd()]);
    ensure!(taken.is_err(), "taken for an eventfd");
    echo(&mut front, 1)
}

#[test]
fn a_kick_that_moves_to_another_descriptor_does_not_hang_the_worker() -> Result<()> {
    let victim = Victim::start()?;
    let mut front = victim.started(0)?;
    let word = 0_u64.to_ne_bytes();
    for _ in 0..20_000 {
        // As crosvm makes them: reading one that holds zero waits.
        let old = eventfd(0, EventfdFlags::CLOEXEC)?;
        let new = eventfd(0, EventfdFlags::CLOEXEC)?;
        front.acknowledged(code::SET_VRING_KICK, &word, &[old.as_fd()])?;
        rustix::io::write(&old, &1_u64.to_ne_bytes())?;
        front.acknowledged(code::SET_VRING_KICK, &word, &[new.as_fd()])?;
    }
    front.stop_queue(0)?;
    Ok(())
}

#[test]
fn a_disabled_ring_has_no_open_requests() -> Result<()> {
    // All that libkrun says at a reset of the driver; the guest then uses its memory again.
    let victim = Victim::start()?;
    let mut front = victim.started(0)?;
    front.memory.write(DATA, b"hold");
    front.put_raw(0, &[HOLD]);
    front.kick(0)?;
    std::thread::sleep(Duration::from_millis(50));
    front.send(code::SET_VRING_ENABLE, 8, &pair(0, 0), &[])?;
    std::thread::sleep(Duration::from_millis(50));
    front.send(code::GET_FEATURES, 0, &[], &[])?;
    // The request never ends, so neither may the acknowledgement come at once.
    let start = Instant::now();
    front.receive().ok();
    ensure!(start.elapsed() > Duration::from_millis(200), "did not wait");
    Ok(())
}

#[test]
fn addresses_of_a_running_ring_do_not_change() -> Result<()> {
    let victim = Victim::start()?;
    let mut front = victim.started(0)?;
    let mut body = pair(0, 0);
    for at in [0_u64, 8192, 4096, 0] {
        body.extend((0x7f00_0000_0000 + (2 << 20) + at).to_ne_bytes());
    }
    let moved = front.set(code::SET_VRING_ADDR, &body);
    ensure!(moved.is_err(), "the rings were moved under the worker");
    echo(&mut front, 0)
}

#[test]
fn an_indirect_table_may_lie_at_any_address() -> Result<()> {
    let victim = Victim::start()?;
    let mut front = victim.started(0)?;
    front.memory.write(DATA, b"good");
    let table = TABLES + 4;
    let descriptors = [(DATA, 4_u32, NEXT, 1_u16), (DATA + 64, 4, WRITE, 0)];
    for (place, (address, len, flags, next)) in (0..).zip(descriptors) {
        let mut bytes = address.to_ne_bytes().to_vec();
        bytes.extend(len.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        front.memory.write(table + 16 * place, &bytes);
    }
    let raw = Raw {
        address: table,
        len: 32,
        flags: INDIRECT,
        next: 0,
    };
    front.put_raw(0, &[raw]);
    front.kick(0)?;
    let (_, written) = front.wait(0)?;
    ensure!(written == 4, "{written} bytes instead of 4");
    Ok(())
}
