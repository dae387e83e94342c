//! What a supervisor and its clients say to each other on channel 0 of the control socket.
//!
//! The framing is that of the guest protocol. On every other channel a client speaks with the agent
//! as if it were alone: the supervisor only exchanges the channel numbers.

use serde::{Deserialize, Serialize};

use crate::plan::{Addition, Plan};
use crate::spec::GuestPath;
use crate::{Error, ErrorKind};

/// Name of the control socket in the folder of a sandbox's sockets.
pub(crate) const SOCKET: &str = "ctl";

/// From a client to the supervisor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub(crate) enum ToSupervisor {
    /// Starts the sandbox; only whoever made the supervisor says so, once.
    Start {
        plan: Box<Plan>,
        /// The sandbox ends when this client goes, and not only when it says so.
        attached: bool,
    },
    /// Leaves the channel's command running when this client goes, who still hears when it begins
    /// and ends; its output goes to the log.
    Detach { channel: u32 },
    /// Adds a mount; the answer is `Changed`.
    Mount { addition: Box<Addition> },
    /// Removes a mount; the answer is `Changed`.
    Unmount {
        target: GuestPath,
        /// Also while something in the guest uses it.
        force: bool,
    },
    /// Ends the sandbox; the answer is `Stopped`.
    Stop {
        /// How long commands have after SIGTERM.
        grace_ms: u64,
        /// How long everything may take before it is ended by force.
        limit_ms: u64,
    },
    /// Ends the sandbox at once.
    Kill,
}

/// From the supervisor to a client.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub(crate) enum FromSupervisor {
    /// A step of the start begins.
    Progress { step: String },
    /// The sandbox accepts commands.
    Ready { boot_ms: u64 },
    /// What was asked for has been done, or undone.
    Changed { failure: Option<Failure> },
    /// The sandbox could not be started, or broke down.
    Failed { failure: Failure },
    /// The sandbox has ended.
    Stopped,
}

/// An error on its way from one process to another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Failure {
    /// Whether the request was at fault, or what was started.
    pub(crate) class: FailureClass,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum FailureClass {
    Boot,
    Config,
    InUse,
    NotFound,
    StillRunning,
    NotRunning,
    Unsupported,
    Io,
}

impl Failure {
    /// An error as one sentence with its causes.
    pub(crate) fn of(error: &Error) -> Self {
        let mut message = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(inner) = cause {
            message.push_str(&format!(": {inner}"));
            cause = inner.source();
        }
        let class = match error.kind() {
            ErrorKind::InvalidConfig => FailureClass::Config,
            ErrorKind::InUse => FailureClass::InUse,
            ErrorKind::SandboxNotFound => FailureClass::NotFound,
            ErrorKind::SandboxStillRunning => FailureClass::StillRunning,
            ErrorKind::SandboxNotRunning => FailureClass::NotRunning,
            ErrorKind::Unsupported => FailureClass::Unsupported,
            ErrorKind::Io => FailureClass::Io,
            _ => FailureClass::Boot,
        };
        Self {
            class,
            message,
            hint: error.hint().map(str::to_owned),
        }
    }

    /// The error again.
    pub(crate) fn into_error(self) -> Error {
        let kind = match self.class {
            FailureClass::Boot => ErrorKind::BootStart,
            FailureClass::Config => ErrorKind::InvalidConfig,
            FailureClass::InUse => ErrorKind::InUse,
            FailureClass::NotFound => ErrorKind::SandboxNotFound,
            FailureClass::StillRunning => ErrorKind::SandboxStillRunning,
            FailureClass::NotRunning => ErrorKind::SandboxNotRunning,
            FailureClass::Unsupported => ErrorKind::Unsupported,
            FailureClass::Io => ErrorKind::Io,
        };
        let error = Error::new(kind, self.message);
        match self.hint {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }
}
