//! A connected device: handshake, guest memory, one ring for each queue.

use std::path::Path;

use anyhow::{Result, ensure};
use msb_testkit::frontend::{DATA, EVENT_IDX, FrontEnd, PROTOCOL_FEATURES, code};

use super::ring::{Part, Ring, Window};

const VERSION_1: u64 = 1 << 32;
/// Offered by all but few servers; without it a guest puts the pieces into the queue itself.
pub(super) const INDIRECT_DESC: u64 = 1 << 28;
/// MQ, REPLY_ACK and CONFIG, as a VMM that keeps no in-flight record asks for.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9;

/// Bytes before a slot's data: headers of requests and replies.
pub const HEADER_BYTES: u64 = 4096;

/// How a device is driven.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Number of queues, hiprio included.
    pub queues: u16,
    /// Entries of each.
    pub size: u16,
    /// Requests in flight in each.
    pub depth: u16,
    /// Largest data of one request.
    pub data_bytes: u32,
    /// The front end spins instead of waiting for interrupts.
    pub spin: bool,
}

/// Where the headers and the data of one slot lie in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// Its number in the queue.
    pub number: u16,
    /// Address of [`HEADER_BYTES`] for headers.
    pub header: u64,
    /// Address of the data.
    pub data: u64,
}

/// A device that is ready for requests.
pub struct Device {
    // Declared first: a ring points into the memory of the front end.
    rings: Vec<Ring>,
    front: FrontEnd,
    features: u64,
    shape: Shape,
}

impl Device {
    /// Connects and starts `shape.queues` queues, with the features of `wanted` that are offered.
    ///
    /// # Errors
    ///
    /// When the server refuses a step.
    pub fn connect(socket: &Path, shape: Shape, wanted: u64) -> Result<Self> {
        let memory = u64::from(shape.queues) * queue_bytes(shape) + DATA;
        let memory = usize::try_from(memory)?;
        let mut front = FrontEnd::connect(socket, memory)?;
        front.ask(code::SET_OWNER, &[], &[])?;
        let offered = front.get(code::GET_FEATURES)?;
        let protocol = front.get(code::GET_PROTOCOL_FEATURES)? & PROTOCOL;
        front.ask(code::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[])?;
        let usual = VERSION_1 | INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES;
        let features = offered & (usual | wanted);
        front.set(code::SET_FEATURES, &features.to_ne_bytes())?;
        front.share_memory()?;
        let window = Window::new(front.memory.base(), memory);
        let mut rings = Vec::new();
        for index in 0..shape.queues {
            front.start_queue(index, shape.size, 0)?;
            front.enable(index, true)?;
            let queue = &front.queues[usize::from(index)];
            let tables = DATA + u64::from(index) * queue_bytes(shape);
            let ring = Ring::new(window, queue, features, tables, shape)?;
            rings.push(ring);
        }
        Ok(Self {
            rings,
            front,
            features,
            shape,
        })
    }

    /// What was negotiated.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Bytes of the configuration space.
    ///
    /// # Errors
    ///
    /// When the device does not answer.
    pub fn config(&mut self, offset: u32, len: u32) -> Result<Vec<u8>> {
        self.front.config(offset, len)
    }

    /// How it is driven.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Queues from `first` on, each with its slots.
    pub fn queues(&mut self, first: u16) -> impl Iterator<Item = (&mut Ring, Vec<Slot>)> {
        let shape = self.shape;
        (0..shape.queues)
            .zip(&mut self.rings)
            .skip(usize::from(first))
            .map(move |(queue, ring)| (ring, slots(shape, queue)))
    }

    /// One request at a time: sends `out` in pieces, returns what the device wrote of `reply` bytes.
    ///
    /// # Errors
    ///
    /// When no answer comes.
    pub fn call(&mut self, queue: u16, out: &[&[u8]], reply: u32) -> Result<Vec<u8>> {
        let slot = slots(self.shape, queue)[0];
        let ring = &mut self.rings[usize::from(queue)];
        ensure!(
            reply <= self.shape.data_bytes,
            "a reply of {reply} bytes has no room"
        );
        let mut chain = Vec::new();
        let mut at = slot.header;
        for piece in out {
            ring.window.write(at, piece);
            chain.push(Part::out(at, u32::try_from(piece.len())?));
            at += (piece.len() as u64).next_multiple_of(64);
        }
        ensure!(at <= slot.data, "too long a request");
        if reply > 0 {
            chain.push(Part::back(slot.data, reply));
        }
        ring.push(slot.number, &chain);
        ring.publish()?;
        ring.wait()?;
        let (_, written) = ring.pop().unwrap_or_default();
        let mut bytes = vec![0; usize::try_from(written.min(reply))?];
        ring.window.read(slot.data, &mut bytes);
        Ok(bytes)
    }
}

fn slot_bytes(shape: Shape) -> u64 {
    HEADER_BYTES + u64::from(shape.data_bytes).next_multiple_of(4096)
}

fn queue_bytes(shape: Shape) -> u64 {
    let tables = Ring::table_space(shape.size).next_multiple_of(4096);
    tables + u64::from(shape.depth) * slot_bytes(shape)
}

fn slots(shape: Shape, queue: u16) -> Vec<Slot> {
    let begin = DATA
        + u64::from(queue) * queue_bytes(shape)
        + Ring::table_space(shape.size).next_multiple_of(4096);
    (0..shape.depth)
        .map(|number| {
            let header = begin + u64::from(number) * slot_bytes(shape);
            Slot {
                number,
                header,
                data: header + HEADER_BYTES,
            }
        })
        .collect()
}
