//! A mounted share: INIT done, names found and files opened, ready for a load.

use anyhow::{Context, Result, ensure};

use super::wire::{ENTRY, OUT_HEADER, ROOT, Request, op};
use crate::harness::device::{Device, Shape};
use crate::harness::server::Server;

/// The first request queue; the one before is for high priority.
pub const REQUESTS: u16 = 1;

/// A file system session over a device.
pub struct Session {
    /// The device, for loads.
    pub device: Device,
}

impl Session {
    /// Connects to a server and sends INIT.
    ///
    /// # Errors
    ///
    /// When the server refuses.
    pub fn start(server: &Server, shape: Shape) -> Result<Self> {
        let device = Device::connect(server.socket(), shape, 0)?;
        let mut session = Self { device };
        session.ask(&Request::init())?;
        Ok(session)
    }

    /// Sends one request; returns the reply after its header.
    ///
    /// # Errors
    ///
    /// When the server answers with an error.
    pub fn ask(&mut self, request: &Request) -> Result<Vec<u8>> {
        let len = OUT_HEADER + request.reply + request.back;
        let out = [request.header.as_slice(), request.arguments.as_slice()];
        let reply = self.device.call(REQUESTS, &out, len)?;
        let error = reply.get(4..8).context("a reply without a header")?;
        let error = i32::from_le_bytes(error.try_into()?);
        let opcode = u32::from_le_bytes(request.header[4..8].try_into()?);
        ensure!(error == 0, "request {opcode} failed with errno {}", -error);
        Ok(reply[16..].to_vec())
    }

    /// Node of a path below the root.
    ///
    /// # Errors
    ///
    /// When a name is missing.
    pub fn find(&mut self, path: &str) -> Result<u64> {
        let mut node = ROOT;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let entry = self
                .ask(&Request::lookup(node, name))
                .with_context(|| format!("looking up {path}"))?;
            ensure!(entry.len() == ENTRY as usize, "a short entry");
            node = u64::from_le_bytes(entry[..8].try_into()?);
        }
        Ok(node)
    }

    /// Opens a file; where the server wants no OPEN the handle is 0.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub fn open(&mut self, node: u64, flags: u32) -> Result<u64> {
        self.handle(&Request::open(op::OPEN, node, flags))
    }

    /// Opens a directory; where the server wants no OPENDIR the handle is 0.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub fn open_directory(&mut self, node: u64) -> Result<u64> {
        self.handle(&Request::open(op::OPENDIR, node, 0))
    }

    fn handle(&mut self, request: &Request) -> Result<u64> {
        const ENOSYS: &str = "errno 38";
        match self.ask(request) {
            Ok(reply) => Ok(u64::from_le_bytes(
                reply.get(..8).context("a short reply")?.try_into()?,
            )),
            Err(error) if error.to_string().ends_with(ENOSYS) => Ok(0),
            Err(error) => Err(error),
        }
    }
}
