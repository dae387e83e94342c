//! Defines every message between the host and the agent in the guest.
//!
//! The host end is the supervisor, the guest end is `msb-agent`, PID 1 of the VM. Both speak over
//! one byte stream (a virtio port named [`PORT_NAME`], or vsock). The agent speaks first with
//! [`FromAgent::Hello`]; the host answers with [`ToAgent::Boot`]; when every mount stands the agent
//! says [`FromAgent::Ready`]. From then on commands may be run, any number at a time, each on a
//! [`Channel`] that the host chooses.

#![forbid(unsafe_code)]

mod frame;
mod message;

pub use frame::{Decoder, Frame, FrameError, Kind, MAX_PAYLOAD};
pub use message::*;

/// Name of the virtio port that carries the protocol.
pub const PORT_NAME: &str = "dev.microsandbox.agent";

/// Port of the host's vsock that carries the protocol where there is no virtio port, which a word of
/// the kernel's command line says ([`VSOCK_WORD`]).
pub const VSOCK_PORT: u32 = 7173;

/// Word of the guest kernel's command line that sends the agent to [`VSOCK_PORT`].
pub const VSOCK_WORD: &str = "msb.agent=vsock";

/// Version of the protocol; the agent refuses a host of another one.
pub const PROTOCOL_VERSION: u32 = 2;

/// How many bytes of standard input the host may send on a channel beyond those that
/// [`FromAgent::StdinTaken`] has confirmed. A host that sends more stalls all its channels until the
/// command has read.
pub const STDIN_WINDOW: usize = 256 << 10;
