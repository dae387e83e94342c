//! What one front end has set up, changed message by message.
//!
//! A request that cannot be carried out is refused and nothing else happens: the connection goes
//! on. Only a stream that is no longer one of messages ends it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::connection::{Connection, Message};
use crate::device::FrontEnd;
use crate::message::{Body, Code, RegionMessage, feature};
use crate::queue::{Addresses, Inflight, PATIENCE, Queue, QueueError, stride};
use crate::sys::{Area, Memory, Region};
use crate::{ConfigError, Device};

/// Largest number of memory regions that a front end may have.
const MAX_MEMORY_SLOTS: u64 = 509;

/// Number in a vring descriptor message that says that no descriptor comes with it.
const NO_FD: u64 = 1 << 8;

/// VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX and
/// VHOST_USER_F_PROTOCOL_FEATURES.
const VERSION_1: u64 = 1 << 32;
const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// A connected front end and what it has set up.
pub(crate) struct Session<'a, D> {
    device: &'a D,
    queues: &'a [Arc<Queue>],
    connection: Connection<'a>,
    memory: Memory,
    protocol: u64,
}

/// A request that is not carried out.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("the message is too short")]
    Short,
    #[error("there is no queue {0}")]
    NoQueue(u32),
    #[error("a descriptor is missing")]
    NoDescriptor,
    #[error("unknown request {0}")]
    Unknown(u32),
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("memory regions overlap, are unknown or too many")]
    Regions,
    #[error("memory cannot be mapped")]
    Map(#[source] io::Error),
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// What is answered, apart from an acknowledgement.
enum Answer {
    Done,
    Bytes(Vec<u8>),
    WithFd(Vec<u8>, OwnedFd),
}

impl<'a, D: Device> Session<'a, D> {
    pub(crate) fn new(device: &'a D, queues: &'a [Arc<Queue>], connection: Connection<'a>) -> Self {
        Self {
            device,
            queues,
            connection,
            memory: Memory::default(),
            protocol: 0,
        }
    }

    pub(crate) fn connection(&self) -> &Connection<'a> {
        &self.connection
    }

    /// Takes and answers one message; false when the front end has gone.
    pub(crate) fn handle_message(&mut self) -> io::Result<bool> {
        let Some(message) = self.connection.receive()? else {
            return Ok(false);
        };
        let (code, header) = (message.code, message.header);
        // What has a reply of its own gets one in any case, or the front end waits for ever.
        let negative = match code {
            // An empty body is how a failed read of the configuration is told.
            Code::GetConfig => Some(Vec::new()),
            Code::GetVringBase | Code::GetInflightFd => Some(vec![0; message.body.len()]),
            _ => None,
        };
        let result = self.carry_out(message);
        if let Err(refusal) = &result {
            tracing::warn!(?code, "refused: {refusal}");
        }
        match (result, negative) {
            (Ok(Answer::Bytes(body)), _) | (Err(_), Some(body)) => {
                self.connection.reply(header, &body, None)?;
            }
            (Ok(Answer::WithFd(body, fd)), _) => {
                self.connection.reply(header, &body, Some(fd.as_fd()))?;
            }
            (other, _) => {
                if header.need_reply && self.protocol & feature::REPLY_ACK != 0 {
                    let failed = u64::from(other.is_err());
                    self.connection.reply(header, &failed.to_ne_bytes(), None)?;
                }
            }
        }
        Ok(true)
    }

    /// Stops every queue and makes the device forget its driver.
    ///
    /// All queues together have `patience` for their open requests.
    pub(crate) fn close(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        for queue in self.queues {
            queue.reset(deadline.saturating_duration_since(Instant::now()));
        }
        self.device.reset();
        self.memory = Memory::default();
    }

    fn carry_out(&mut self, message: Message) -> Result<Answer, Refusal> {
        let mut body = Body(&message.body);
        let mut fds = message.fds.into_iter();
        match message.code {
            Code::GetFeatures => return Ok(word(self.features())),
            Code::SetFeatures => self.set_features(body.u64().ok_or(Refusal::Short)?)?,
            Code::GetProtocolFeatures => return Ok(word(feature::OFFERED)),
            Code::SetProtocolFeatures => {
                let features = body.u64().ok_or(Refusal::Short)?;
                if features & !feature::OFFERED != 0 {
                    return Err(Refusal::Features(features));
                }
                self.protocol = features;
            }
            // Ownership has no meaning for a connection that only one front end can have; libkrun
            // claims it again at every start of the driver.
            Code::SetOwner => {}
            Code::ResetOwner | Code::ResetDevice => self.reset_device(),
            Code::GetQueueNum => return Ok(word(u64::try_from(self.queues.len()).unwrap_or(0))),
            Code::GetMaxMemSlots => return Ok(word(MAX_MEMORY_SLOTS)),
            Code::SetMemTable => self.set_memory_table(body, fds)?,
            Code::AddMemReg => {
                let region = padded_region(&mut body)?;
                let file = fds.next().ok_or(Refusal::NoDescriptor)?;
                self.add_region(region, &file)?;
            }
            Code::RemMemReg => self.remove_region(padded_region(&mut body)?)?,
            Code::SetVringNum => {
                let (queue, size) = self.queue_and(&mut body)?;
                queue.set_size(size, self.device.limits().size)?;
            }
            Code::SetVringAddr => self.set_addresses(body)?,
            Code::SetVringBase => {
                let (queue, base) = self.queue_and(&mut body)?;
                queue.set_base(base)?;
            }
            Code::GetVringBase => {
                let index = body.u32().ok_or(Refusal::Short)?;
                let base = u32::from(self.queue(index)?.stop(PATIENCE));
                return Ok(Answer::Bytes(
                    [index.to_ne_bytes(), base.to_ne_bytes()].concat(),
                ));
            }
            Code::SetVringKick | Code::SetVringCall | Code::SetVringErr => {
                self.set_descriptor(message.code, body, fds.next())?;
            }
            Code::SetVringEnable => {
                let (queue, on) = self.queue_and(&mut body)?;
                queue.enable(on != 0, PATIENCE);
            }
            Code::SetBackendReqFd => {
                let channel = fds.next().ok_or(Refusal::NoDescriptor)?;
                self.device.attach(FrontEnd::new(channel));
            }
            Code::GetConfig => return self.config(body),
            Code::SetConfig => self.set_config(body)?,
            Code::GetInflightFd => return self.make_inflight(body),
            Code::SetInflightFd => self.set_inflight(body, fds.next())?,
            Code::Other(number) => return Err(Refusal::Unknown(number)),
        }
        Ok(Answer::Done)
    }

    fn features(&self) -> u64 {
        self.device.features() | VERSION_1 | INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        if features & !self.features() != 0 {
            return Err(Refusal::Features(features));
        }
        for queue in self.queues {
            queue.set_event_idx(features & EVENT_IDX != 0);
            // Without protocol features there is no message to enable a ring.
            if features & PROTOCOL_FEATURES == 0 {
                queue.enable(true, PATIENCE);
            }
        }
        self.device.accept_features(features);
        Ok(())
    }

    fn reset_device(&mut self) {
        for queue in self.queues {
            queue.enable(false, PATIENCE);
            queue.stop(PATIENCE);
        }
        self.device.reset();
    }

    fn set_memory_table(
        &mut self,
        mut body: Body<'_>,
        mut fds: impl Iterator<Item = OwnedFd>,
    ) -> Result<(), Refusal> {
        let count = body.u32().ok_or(Refusal::Short)?;
        body.u32().ok_or(Refusal::Short)?;
        let mut memory = Memory::default();
        for _ in 0..count {
            let place = RegionMessage::parse(&mut body).ok_or(Refusal::Short)?;
            let file = fds.next().ok_or(Refusal::NoDescriptor)?;
            insert(&mut memory, place, &file)?;
        }
        self.use_memory(memory);
        Ok(())
    }

    fn add_region(&mut self, place: RegionMessage, file: &OwnedFd) -> Result<(), Refusal> {
        if u64::try_from(self.memory.regions.len()).unwrap_or(u64::MAX) >= MAX_MEMORY_SLOTS {
            return Err(Refusal::Regions);
        }
        let mut memory = self.memory.clone();
        insert(&mut memory, place, file)?;
        self.use_memory(memory);
        Ok(())
    }

    fn remove_region(&mut self, place: RegionMessage) -> Result<(), Refusal> {
        let mut memory = self.memory.clone();
        let same = |region: &Region| {
            (region.guest, region.user, region.size) == (place.guest, place.user, place.size)
        };
        let found = memory.regions.iter().position(|region| same(region));
        memory.regions.remove(found.ok_or(Refusal::Regions)?);
        self.use_memory(memory);
        Ok(())
    }

    /// The descriptors of the files are closed by now: the mappings are all that is needed, and
    /// nobody who breaks into the process can resize the guest's memory through them.
    fn use_memory(&mut self, memory: Memory) {
        self.memory = memory.clone();
        let memory = Arc::new(memory);
        for queue in self.queues {
            queue.set_memory(&memory);
        }
    }

    fn set_addresses(&self, mut body: Body<'_>) -> Result<(), Refusal> {
        let (queue, _flags) = self.queue_and(&mut body)?;
        let mut next = || body.u64().ok_or(Refusal::Short);
        let (descriptors, used, available) = (next()?, next()?, next()?);
        queue.set_addresses(Addresses {
            descriptors,
            available,
            used,
        })?;
        Ok(())
    }

    fn set_descriptor(
        &self,
        code: Code,
        mut body: Body<'_>,
        fd: Option<OwnedFd>,
    ) -> Result<(), Refusal> {
        let value = body.u64().ok_or(Refusal::Short)?;
        let fd = match (value & NO_FD != 0, fd) {
            (true, _) => None,
            (false, None) => return Err(Refusal::NoDescriptor),
            (false, fd) => fd,
        };
        let index = (value & 0xff) as u32;
        let queue = self.queue(index)?;
        match code {
            Code::SetVringKick => queue.set_kick(fd)?,
            Code::SetVringCall => queue.set_call(fd)?,
            _ => queue.set_err(fd)?,
        }
        Ok(())
    }

    fn config(&self, mut body: Body<'_>) -> Result<Answer, Refusal> {
        let (offset, size, flags) = config_header(&mut body)?;
        let config = self.device.config();
        let mut part: Vec<u8> = config.get(offset..).unwrap_or_default().to_vec();
        part.resize(size, 0);
        let mut answer = Vec::with_capacity(12 + size);
        for word in [offset, size] {
            let word = u32::try_from(word).map_err(|_| Refusal::Short)?;
            answer.extend_from_slice(&word.to_ne_bytes());
        }
        answer.extend_from_slice(&flags.to_ne_bytes());
        answer.extend_from_slice(&part);
        Ok(Answer::Bytes(answer))
    }

    fn set_config(&self, mut body: Body<'_>) -> Result<(), Refusal> {
        let (offset, size, _flags) = config_header(&mut body)?;
        let data = body.rest().get(..size).ok_or(Refusal::Short)?;
        let offset = u32::try_from(offset).map_err(|_| Refusal::Short)?;
        Ok(self.device.write_config(offset, data)?)
    }

    /// Makes the memory in which open requests are recorded. The front end keeps it.
    fn make_inflight(&self, mut body: Body<'_>) -> Result<Answer, Refusal> {
        // Front ends differ in how they pad the structure: the answer is as long as the question.
        let asked = body.rest().len();
        let (_, count, size) = inflight_header(&mut body)?;
        if usize::from(count) > self.queues.len() || !self.fits(size) {
            return Err(Refusal::NoQueue(u32::from(count)));
        }
        let length =
            u64::try_from(stride(size) * usize::from(count)).map_err(|_| Refusal::Short)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("inflight", flags)
            .and_then(|file| rustix::fs::ftruncate(&file, length).map(|()| file))
            .map_err(|error| Refusal::Map(error.into()))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(|error| Refusal::Map(error.into()))?;
        let mut answer = Vec::new();
        answer.extend_from_slice(&length.to_ne_bytes());
        answer.extend_from_slice(&0_u64.to_ne_bytes());
        answer.extend_from_slice(&count.to_ne_bytes());
        answer.extend_from_slice(&size.to_ne_bytes());
        answer.resize(asked.max(answer.len()), 0);
        Ok(Answer::WithFd(answer, file))
    }

    fn set_inflight(&self, mut body: Body<'_>, fd: Option<OwnedFd>) -> Result<(), Refusal> {
        let ((length, offset), count, size) = inflight_header(&mut body)?;
        let file = fd.ok_or(Refusal::NoDescriptor)?;
        let needed = u64::try_from(stride(size) * usize::from(count)).unwrap_or(u64::MAX);
        let known = usize::from(count) <= self.queues.len() && self.fits(size);
        if !known || length < needed {
            return Err(Refusal::NoQueue(u32::from(count)));
        }
        let place = RegionMessage {
            guest: 0,
            user: 0,
            size: length,
            offset,
        };
        let region = Region::map(place, &file)
            .map(Arc::new)
            .map_err(Refusal::Map)?;
        for (number, queue) in (0_u64..u64::from(count)).zip(self.queues) {
            let at = number.saturating_mul(u64::try_from(stride(size)).unwrap_or(u64::MAX));
            let area = Area::new(&region, at, stride(size)).ok_or(Refusal::Regions)?;
            queue.set_inflight(Some(Inflight::new(area, size)));
        }
        Ok(())
    }

    fn fits(&self, size: u16) -> bool {
        size.is_power_of_two() && size <= self.device.limits().size
    }

    fn queue(&self, index: u32) -> Result<&'a Arc<Queue>, Refusal> {
        let place = usize::try_from(index).map_err(|_| Refusal::NoQueue(index))?;
        self.queues.get(place).ok_or(Refusal::NoQueue(index))
    }

    /// Reads a queue's number and the word after it.
    fn queue_and(&self, body: &mut Body<'_>) -> Result<(&'a Arc<Queue>, u32), Refusal> {
        let index = body.u32().ok_or(Refusal::Short)?;
        let word = body.u32().ok_or(Refusal::Short)?;
        Ok((self.queue(index)?, word))
    }
}

fn word(value: u64) -> Answer {
    Answer::Bytes(value.to_ne_bytes().to_vec())
}

/// A region after 64 bits of padding, as ADD_MEM_REG and REM_MEM_REG carry it.
fn padded_region(body: &mut Body<'_>) -> Result<RegionMessage, Refusal> {
    body.u64().ok_or(Refusal::Short)?;
    RegionMessage::parse(body).ok_or(Refusal::Short)
}

fn insert(memory: &mut Memory, place: RegionMessage, file: &OwnedFd) -> Result<(), Refusal> {
    let region = Region::map(place, file).map_err(Refusal::Map)?;
    let apart = |a: u64, a_len: u64, b: u64, b_len: u64| {
        a.saturating_add(a_len) <= b || b.saturating_add(b_len) <= a
    };
    let overlaps = memory.regions.iter().any(|other| {
        !apart(other.guest, other.size, region.guest, region.size)
            || !apart(other.user, other.size, region.user, region.size)
    });
    if overlaps {
        return Err(Refusal::Regions);
    }
    memory.regions.push(Arc::new(region));
    Ok(())
}

/// Offset, size and flags of a configuration message.
fn config_header(body: &mut Body<'_>) -> Result<(usize, usize, u32), Refusal> {
    let mut next = || body.u32().ok_or(Refusal::Short);
    let (offset, size, flags) = (next()?, next()?, next()?);
    // A device's configuration space is at most this large (vhost-user.rst).
    if size > 256 {
        return Err(Refusal::Short);
    }
    let size = usize::try_from(size).map_err(|_| Refusal::Short)?;
    let offset = usize::try_from(offset).map_err(|_| Refusal::Short)?;
    Ok((offset, size, flags))
}

/// Length and offset of the memory, number of queues, and their size.
fn inflight_header(body: &mut Body<'_>) -> Result<((u64, u64), u16, u16), Refusal> {
    let length = body.u64().ok_or(Refusal::Short)?;
    let offset = body.u64().ok_or(Refusal::Short)?;
    let count = body.u16().ok_or(Refusal::Short)?;
    let size = body.u16().ok_or(Refusal::Short)?;
    Ok(((length, offset), count, size))
}
