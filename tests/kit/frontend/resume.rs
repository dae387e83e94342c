//! What a front end does to outlive its backend: records of open requests, and connecting again.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};

use super::{FrontEnd, PROTOCOL_FEATURES, code, pair};

impl FrontEnd {
    /// Asks for the memory in which the device records its open requests; returns it with the body
    /// that describes it.
    ///
    /// # Errors
    ///
    /// When the device gives none.
    pub fn inflight(&mut self, queues: u16, size: u16) -> Result<(OwnedFd, Vec<u8>)> {
        let mut ask = vec![0; 16];
        ask.extend(queues.to_ne_bytes());
        ask.extend(size.to_ne_bytes());
        ask.extend([0; 4]);
        self.send(code::GET_INFLIGHT_FD, 0, &ask, &[])?;
        let (_, body, fds) = self.receive()?;
        let fd = fds.into_iter().next().context("no memory for the record")?;
        Ok((fd, body))
    }

    /// Closes the connection; memory and rings stay readable.
    pub fn hang_up(&self) {
        self.socket.shutdown(std::net::Shutdown::Both).ok();
    }

    /// Goes on with the next process behind `path` after the last one has died: rings, memory and
    /// the record of open requests stay as they are.
    ///
    /// # Errors
    ///
    /// When nobody listens, or the device refuses a step.
    pub fn resume(
        &mut self,
        path: &Path,
        features: u64,
        record: &(OwnedFd, Vec<u8>),
    ) -> Result<()> {
        self.socket = Self::connect(path, 4096)?.socket;
        self.ask(code::SET_OWNER, &[], &[])?;
        self.negotiate()?;
        self.share_memory()?;
        let features = features | PROTOCOL_FEATURES | (1 << 32);
        self.set(code::SET_FEATURES, &features.to_ne_bytes())?;
        self.acknowledged(code::SET_INFLIGHT_FD, &record.1, &[record.0.as_fd()])?;
        for index in 0..u16::try_from(self.queues.len())? {
            let driver = &self.queues[usize::from(index)];
            let (size, addresses) = (driver.size, driver.addresses(index));
            let (kick, call) = (driver.kick.try_clone()?, driver.call.try_clone()?);
            self.set(code::SET_VRING_NUM, &pair(index, u32::from(size)))?;
            // The record says where the ring stands, whatever is told here.
            self.set(code::SET_VRING_BASE, &pair(index, 0))?;
            self.set(code::SET_VRING_ADDR, &addresses)?;
            let word = u64::from(index).to_ne_bytes();
            self.acknowledged(code::SET_VRING_KICK, &word, &[kick.as_fd()])?;
            self.acknowledged(code::SET_VRING_CALL, &word, &[call.as_fd()])?;
            self.enable(index, true)?;
        }
        Ok(())
    }
}
