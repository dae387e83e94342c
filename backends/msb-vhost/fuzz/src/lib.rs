//! Hostile bytes as messages of a front end, or as the rings of a driver.
//!
//! Each input gets a device of its own on a socket pair, served as a backend does it. An error is
//! a broken promise: a device that does not end, a chain that does not come back.

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use msb_testkit::frontend::{DATA, EVENT_IDX, FrontEnd, Part, Raw};
use msb_vhost::{Device, Endpoint, Options, QueueLimits, Request, ServeError, serve};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const SIZE: u16 = 64;
const MEMORY: usize = 2 << 20;

/// Reads what it is sent and writes nothing, so that the driver's rings stay as they are.
struct Reader {
    patient: bool,
}

impl Device for Reader {
    fn features(&self) -> u64 {
        0
    }

    fn limits(&self) -> QueueLimits {
        QueueLimits {
            queues: 1,
            size: SIZE,
        }
    }

    fn config(&self) -> Vec<u8> {
        vec![7; 60]
    }

    fn is_patient(&self, _queue: u16) -> bool {
        self.patient
    }

    fn handle(&self, _queue: u16, mut request: Request) {
        let mut bytes = vec![0; request.readable.len().min(4096)];
        request.readable.read_exact(&mut bytes).expect("len");
        let sum = bytes.iter().fold(0_u32, |sum, byte| sum + u32::from(*byte));
        request.complete(sum);
    }
}

type Server = JoinHandle<Result<(), ServeError>>;

fn device(patient: bool) -> Result<(UnixStream, Server)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(Duration::from_secs(10)))?;
    let endpoint = Endpoint::from_fd(theirs.as_raw_fd())?;
    let options = Options {
        name: "fuzz",
        reconnect: false,
        poll_limit: Duration::from_micros(10),
    };
    drop(theirs);
    let server =
        std::thread::spawn(move || serve(&endpoint, &Arc::new(Reader { patient }), options));
    Ok((ours, server))
}

fn join(server: Server) -> Result<()> {
    Ok(server
        .join()
        .map_err(|_| anyhow!("the device panicked"))??)
}

/// `data` as messages: number, descriptors and flags, length of the body, body.
pub fn messages(data: &[u8]) -> Result<()> {
    let (mut socket, server) = device(data.len().is_multiple_of(2))?;
    let memory: OwnedFd = memfd_create("fuzz", MemfdFlags::CLOEXEC)?;
    ftruncate(&memory, 1 << 20)?;
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let mut front = FrontEnd::on(socket.try_clone()?, 4096)?;
    let mut rest = data;
    while let Some(([number, how, len], tail)) = rest.split_first_chunk() {
        let (body, tail) = tail.split_at(usize::from(*len).min(tail.len()));
        rest = tail;
        let fds: Vec<BorrowedFd<'_>> = match how & 7 {
            0..=2 => vec![],
            3 | 4 => vec![event.as_fd()],
            5 => vec![memory.as_fd()],
            6 => vec![memory.as_fd(), memory.as_fd()],
            _ => vec![event.as_fd(); 20],
        };
        let flags = u32::from(how & 8);
        if front.send(u32::from(*number), flags, body, &fds).is_err() {
            break;
        }
    }
    socket.shutdown(Shutdown::Write)?;
    std::io::copy(&mut (&mut socket).take(1 << 20), &mut std::io::sink()).ok();
    drop((front, socket));
    join(server)
}

/// `data` as descriptors of a table and of an indirect one, each of which heads a chain.
pub fn chain(data: &[u8]) -> Result<()> {
    let how = data.first().copied().unwrap_or_default();
    let (socket, server) = device(how & 2 != 0)?;
    let mut front = FrontEnd::on(socket, MEMORY)?;
    let features = u64::from(how & 1) * EVENT_IDX;
    front.start(1, SIZE, features)?;
    let data = data.get(1..).unwrap_or_default();
    front.memory.write(DATA, data.get(..4096).unwrap_or(data));
    let mut count = 0;
    for bytes in data.chunks_exact(12).take(usize::from(SIZE)) {
        let [kind, a, b, c, d, e, f, g, h, flags, next, _] = *bytes else {
            continue;
        };
        let near = u64::from(u32::from_le_bytes([a, b, c, 0]));
        let address = match kind & 3 {
            0 | 1 => DATA + near % (MEMORY as u64 - DATA + 64),
            2 => DATA,
            _ => near << 40 | u64::from(d),
        };
        let len = u32::from_le_bytes([e, f, g & (kind >> 2), h & (kind >> 4)]);
        let raw = Raw {
            address,
            len,
            flags: u16::from(flags & 7),
            next: u16::from(next),
        };
        front.put_raw(0, &[raw]);
        count += 1;
    }
    front.kick(0)?;
    for number in 0..count {
        front.wait(0).with_context(|| format!("chain {number}"))?;
    }
    front.memory.write(DATA, &[1, 2, 3, 4]);
    let head = front.put(0, &[Part::Out(DATA, 4)]);
    front.kick(0)?;
    let done = front.wait(0)?;
    ensure!(done == (head, 10), "{done:?} instead of {head}");
    drop(front);
    join(server)
}
