//! The byte stream to the host: frames in, frames out, never waiting.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use msb_protocol::{
    Channel, Decoder, Frame, FrameError, FromAgent, Kind, PORT_NAME, VSOCK_PORT, VSOCK_WORD,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

const PORTS: &str = "sys/class/virtio-ports";
/// How long the port may take to appear, and the host to open its end.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a look is taken meanwhile; nothing tells of either.
const INTERVAL: Duration = Duration::from_millis(2);

/// Output is taken from commands only while less than this waits for the host, in bytes.
const FULL: usize = 512 << 10;

/// The agent's end of the stream.
#[derive(Debug)]
pub(crate) struct Port {
    file: File,
    decoder: Decoder,
    outgoing: Vec<u8>,
    sent: usize,
}

/// The stream cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PortError {
    /// No virtio port has the name, or nobody opened its other end.
    #[error("no host at the port {PORT_NAME}")]
    Absent,
    /// The host closed its end.
    #[error("the host closed the port")]
    HungUp,
    /// The port fails.
    #[error("cannot use the port")]
    Io(#[from] std::io::Error),
    /// The kernel refuses to wait.
    #[error("cannot wait for events")]
    Wait(#[from] rustix::io::Errno),
    /// What the host sent are no frames.
    #[error("the host does not speak the protocol")]
    Protocol(#[from] FrameError),
}

impl Port {
    /// Waits for the port and for the host to open it.
    pub(crate) fn open() -> Result<Self, PortError> {
        let deadline = Instant::now() + PATIENCE;
        let line = std::fs::read_to_string("proc/cmdline").unwrap_or_default();
        let file = if line.split_whitespace().any(|word| word == VSOCK_WORD) {
            // The device may not have been found yet.
            let socket = retry(
                deadline,
                || Ok(crate::sys::connect_to_host(VSOCK_PORT).ok()),
            )?;
            rustix::io::ioctl_fionbio(&socket, true).map_err(std::io::Error::from)?;
            File::from(socket)
        } else {
            open_port(deadline)?
        };
        Ok(Self {
            file,
            decoder: Decoder::default(),
            outgoing: vec![],
            sent: 0,
        })
    }

    /// Puts a message into the queue.
    pub(crate) fn send(&mut self, channel: Channel, message: &FromAgent) {
        match Frame::control(channel, message) {
            Ok(frame) => self.outgoing.extend_from_slice(&frame.encode()),
            Err(error) => eprintln!("msb-agent: {}", crate::describe(&error)),
        }
    }

    /// Puts a piece of a command's output into the queue.
    pub(crate) fn send_output(&mut self, channel: Channel, kind: Kind, bytes: &[u8]) {
        self.outgoing
            .extend_from_slice(&Frame::header(channel, kind, bytes.len()));
        self.outgoing.extend_from_slice(bytes);
    }

    /// Whether anything waits to be written.
    pub(crate) fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether so much waits that no more output should be produced.
    pub(crate) fn is_full(&self) -> bool {
        self.outgoing.len() - self.sent >= FULL
    }

    /// Writes what the port takes now.
    pub(crate) fn write(&mut self) -> Result<(), PortError> {
        while let Some(rest) = self
            .outgoing
            .get(self.sent..)
            .filter(|rest| !rest.is_empty())
        {
            match self.file.write(rest) {
                Ok(0) => return Err(PortError::HungUp),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        if self.sent == self.outgoing.len() || self.sent >= FULL {
            self.outgoing.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }

    /// Writes everything, for at most `patience`.
    pub(crate) fn flush(&mut self, patience: Duration) -> Result<(), PortError> {
        let deadline = Instant::now() + patience;
        while self.has_outgoing() && Instant::now() < deadline {
            wait(self.file.as_fd(), PollFlags::OUT, deadline)?;
            self.write()?;
        }
        Ok(())
    }

    /// Reads what has arrived, up to some piece.
    pub(crate) fn read(&mut self) -> Result<(), PortError> {
        let mut piece = [0; 64 << 10];
        match self.file.read(&mut piece) {
            Ok(0) => Err(PortError::HungUp),
            Ok(count) => {
                self.decoder.feed(piece.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The next frame of those that have been read.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Frame>, PortError> {
        Ok(self.decoder.next_frame()?)
    }

    /// Waits for the next frame, for as long as it takes.
    pub(crate) fn wait_frame(&mut self) -> Result<Frame, PortError> {
        loop {
            if let Some(frame) = self.next_frame()? {
                return Ok(frame);
            }
            poll(&mut [PollFd::new(&self.file, PollFlags::IN)], None)
                .map_err(std::io::Error::from)?;
            self.read()?;
        }
    }
}

fn open_port(deadline: Instant) -> Result<File, PortError> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let path = retry(deadline, || find(PORTS))?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)?;
    retry(deadline, || Ok(has_host(file.as_fd())?.then_some(())))?;
    Ok(file)
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn retry<T>(
    deadline: Instant,
    mut attempt: impl FnMut() -> Result<Option<T>, PortError>,
) -> Result<T, PortError> {
    loop {
        if let Some(found) = attempt()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(PortError::Absent);
        }
        std::thread::sleep(INTERVAL);
    }
}

/// The device file of the port with our name. The name arrives some time after the device.
fn find(ports: &str) -> Result<Option<String>, PortError> {
    let entries = match std::fs::read_dir(ports) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT_NAME {
            return Ok(Some(format!("dev/{}", entry.file_name().to_string_lossy())));
        }
    }
    Ok(None)
}

fn has_host(port: BorrowedFd<'_>) -> Result<bool, PortError> {
    let mut ports = [PollFd::from_borrowed_fd(port, PollFlags::OUT)];
    poll(
        &mut ports,
        Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }),
    )
    .map_err(std::io::Error::from)?;
    Ok(ports
        .iter()
        .all(|port| !port.revents().contains(PollFlags::HUP)))
}

fn wait(port: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> Result<(), PortError> {
    let rest = deadline.saturating_duration_since(Instant::now());
    let rest = Timespec::try_from(rest).unwrap_or(Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    });
    match poll(&mut [PollFd::from_borrowed_fd(port, events)], Some(&rest)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(std::io::Error::from(error).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_found_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let ports = folder.path().to_str().unwrap();
        assert!(find(&format!("{ports}/absent")).unwrap().is_none());
        for (port, name) in [
            ("vport0p1", "org.other\n"),
            ("vport0p2", ""),
            ("vport1p1", PORT_NAME),
        ] {
            std::fs::create_dir(folder.path().join(port)).unwrap();
            std::fs::write(folder.path().join(port).join("name"), name).unwrap();
        }
        assert_eq!(find(ports).unwrap().as_deref(), Some("dev/vport1p1"));
    }
}
