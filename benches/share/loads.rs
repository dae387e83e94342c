//! What is asked of a file server: requests again, listings, files made and removed.

use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result, ensure};

use super::wire::{IN_HEADER, OUT_HEADER, ROOT, Request, op};
use crate::harness::device::Slot;
use crate::harness::load::Load;
use crate::harness::ring::{Part, Window};

/// Where the pieces of a slot's request lie behind its header address.
const ARGUMENTS: u64 = 64;
const REPLY_HEADER: u64 = 2048;
const REPLY: u64 = 2112;

/// Lays a request out in guest memory, each piece with a descriptor of its own, as Linux does.
fn lay_out(request: &Request, slot: Slot, memory: Window, page: u32, chain: &mut Vec<Part>) {
    memory.write(slot.header, &request.header);
    chain.push(Part::out(slot.header, IN_HEADER as u32));
    let arguments = slot.header + ARGUMENTS;
    memory.write(arguments, &request.arguments);
    chain.push(Part::out(arguments, request.arguments.len() as u32));
    pieces(slot.data, request.data, page, |at, len| {
        chain.push(Part::out(at, len));
    });
    if u32::from_le_bytes(*request.header[4..].first_chunk().unwrap_or(&[0; 4])) == op::FORGET {
        return;
    }
    chain.push(Part::back(slot.header + REPLY_HEADER, OUT_HEADER));
    if request.reply > 0 {
        chain.push(Part::back(slot.header + REPLY, request.reply));
    }
    pieces(slot.data, request.back, page, |at, len| {
        chain.push(Part::back(at, len));
    });
}

fn pieces(at: u64, len: u32, page: u32, mut each: impl FnMut(u64, u32)) {
    let mut done = 0;
    while done < len {
        let piece = page.min(len - done);
        each(at + u64::from(done), piece);
        done += piece;
    }
}

fn errno(slot: Slot, memory: Window) -> i32 {
    -i32::from_le_bytes(memory.array(slot.header + REPLY_HEADER + 4))
}

fn reply<const N: usize>(slot: Slot, memory: Window, offset: u64) -> [u8; N] {
    memory.array(slot.header + REPLY + offset)
}

/// The same requests in turn, for as long as it is asked to.
pub struct Replay {
    requests: Vec<Request>,
    place: usize,
    /// Largest piece of data: the page size where guest memory is scattered.
    page: u32,
    expected: Vec<u32>,
}

impl Replay {
    /// Data lies in one piece, or in scattered pages.
    pub fn of(requests: Vec<Request>, scattered: bool) -> Box<dyn Load> {
        Box::new(Self {
            requests,
            place: 0,
            page: if scattered { 4096 } else { u32::MAX },
            expected: Vec::new(),
        })
    }
}

impl Load for Replay {
    fn next(&mut self, slot: Slot, memory: Window, chain: &mut Vec<Part>) -> bool {
        let request = &self.requests[self.place];
        self.place = (self.place + 1) % self.requests.len();
        lay_out(request, slot, memory, self.page, chain);
        let number = usize::from(slot.number);
        if self.expected.len() <= number {
            self.expected.resize(number + 1, 0);
        }
        self.expected[number] = OUT_HEADER + request.reply + request.back;
        true
    }

    fn done(&mut self, slot: Slot, memory: Window, written: u32) -> Result<u64> {
        let error = errno(slot, memory);
        let expected = self.expected[usize::from(slot.number)];
        ensure!(
            error == 0 && written == expected,
            "errno {error}, {written} bytes instead of {expected}"
        );
        Ok(1)
    }
}

/// Lists directories with READDIRPLUS, page after page, and counts entries.
pub struct List {
    /// Node and handle of each.
    directories: Vec<(u64, u64)>,
    place: usize,
    offset: u64,
    /// Ends after the last directory instead of beginning again.
    once: bool,
    page: u32,
    /// Where the node of each entry goes, for whom wants them.
    nodes: Option<Sender<u64>>,
}

impl List {
    /// Lists opened directories once, and hands the node of each entry over.
    pub fn keeping(directories: Vec<(u64, u64)>) -> (Self, Receiver<u64>) {
        let (sender, receiver) = channel();
        let mut list = Self::new(directories, true);
        list.nodes = Some(sender);
        (list, receiver)
    }

    /// Lists opened directories, once or again and again.
    pub fn new(directories: Vec<(u64, u64)>, once: bool) -> Self {
        Self {
            directories,
            place: 0,
            offset: 0,
            once,
            page: 4096,
            nodes: None,
        }
    }
}

impl Load for List {
    fn next(&mut self, slot: Slot, memory: Window, chain: &mut Vec<Part>) -> bool {
        if self.place == self.directories.len() {
            if self.once {
                return false;
            }
            self.place = 0;
        }
        let (node, handle) = self.directories[self.place];
        let request = Request::readdirplus(node, handle, self.offset, self.page);
        lay_out(&request, slot, memory, u32::MAX, chain);
        true
    }

    fn done(&mut self, slot: Slot, memory: Window, written: u32) -> Result<u64> {
        let error = errno(slot, memory);
        ensure!(error == 0 && written >= OUT_HEADER, "errno {error}");
        let mut at = 0;
        let mut count = 0;
        let end = u64::from(written - OUT_HEADER);
        while at < end {
            // fuse_direntplus: entry (128), ino, off, namelen, type, name.
            let entry = slot.data + at;
            self.offset = u64::from_le_bytes(memory.array(entry + 136));
            let name = u32::from_le_bytes(memory.array(entry + 144));
            if let Some(nodes) = &self.nodes {
                // "." and ".." have none.
                let node = u64::from_le_bytes(memory.array(entry));
                if node != 0 {
                    nodes.send(node)?;
                }
            }
            at += (152 + u64::from(name)).next_multiple_of(8);
            count += 1;
        }
        ensure!(at == end, "entries end at {at} and the reply at {end}");
        if count == 0 {
            self.place += 1;
            self.offset = 0;
        }
        Ok(count)
    }
}

/// CREATE, RELEASE, UNLINK and FORGET of one name after the other; a unit is all of them.
pub struct MakeAndRemove {
    queue: usize,
    count: u64,
    slots: Vec<Stage>,
}

#[derive(Clone)]
enum Stage {
    Create,
    Release {
        node: u64,
        handle: u64,
        name: String,
    },
    Unlink {
        node: u64,
        name: String,
    },
    Forget {
        node: u64,
    },
}

impl MakeAndRemove {
    /// Names carry the number of the queue, so that several do not meet.
    pub fn in_queue(queue: usize) -> Box<dyn Load> {
        Box::new(Self {
            queue,
            count: 0,
            slots: Vec::new(),
        })
    }

    fn name(&self, number: u64) -> String {
        format!("made-{}-{number}", self.queue)
    }
}

impl Load for MakeAndRemove {
    fn next(&mut self, slot: Slot, memory: Window, chain: &mut Vec<Part>) -> bool {
        let number = usize::from(slot.number);
        if self.slots.len() <= number {
            self.slots.resize(number + 1, Stage::Create);
        }
        let request = match &self.slots[number] {
            Stage::Create => {
                self.count += 1;
                let name = self.name(self.count);
                let request = Request::create(ROOT, &name);
                self.slots[number] = Stage::Release {
                    node: 0,
                    handle: 0,
                    name,
                };
                request
            }
            Stage::Release { node, handle, .. } => Request::release(*node, *handle),
            Stage::Unlink { name, .. } => Request::unlink(ROOT, name),
            Stage::Forget { node } => Request::forget(*node),
        };
        lay_out(&request, slot, memory, u32::MAX, chain);
        true
    }

    fn done(&mut self, slot: Slot, memory: Window, _: u32) -> Result<u64> {
        let error = errno(slot, memory);
        let stage = self.slots.get_mut(usize::from(slot.number));
        let stage = stage.context("an answer to no request")?;
        let forgotten = matches!(stage, Stage::Forget { .. });
        ensure!(forgotten || error == 0, "errno {error}");
        let (following, units) = match stage {
            // Its node is not known yet: this was the answer to CREATE.
            Stage::Release { node: 0, name, .. } => {
                let node = u64::from_le_bytes(reply(slot, memory, 0));
                ensure!(node != 0, "CREATE gave no node");
                let handle = u64::from_le_bytes(reply(slot, memory, 128));
                let name = std::mem::take(name);
                (Stage::Release { node, handle, name }, 0)
            }
            Stage::Release { node, name, .. } => {
                let (node, name) = (*node, std::mem::take(name));
                (Stage::Unlink { node, name }, 0)
            }
            // As a kernel does with an inode that has lost its last name.
            Stage::Unlink { node, .. } => (Stage::Forget { node: *node }, 0),
            Stage::Forget { .. } | Stage::Create => (Stage::Create, 1),
        };
        *stage = following;
        Ok(units)
    }
}
