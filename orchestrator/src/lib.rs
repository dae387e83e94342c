//! Storage for microVM sandboxes: turns a sandbox request into running processes and back.

#![deny(unsafe_code)]

mod agent;
// How a backend's process is started, for the supervisor alone.
#[doc(hidden)]
pub mod backend;
mod builder;
mod error;
// What `msb inspect --evidence` shows, and how the supervisor looks a backend's jail over.
#[doc(hidden)]
pub mod evidence;
// What `msb doctor` and a plan look at; `create` and `mount` read the host by themselves.
#[doc(hidden)]
pub mod host;
pub mod image;
mod initramfs;
mod mend;
// What `msb plan` prints; `create` decides by itself.
#[doc(hidden)]
pub mod plan;
pub mod rundir;
pub mod sandbox;
pub mod spec;
// The process behind a sandbox, begun by `msb` and by `create`, never by a user's code.
#[doc(hidden)]
pub mod supervisor;
mod usage;
mod vmlinux;
// How a VMM's process is started, for the supervisor alone.
#[doc(hidden)]
pub mod vmm;
pub mod volume;

pub use builder::{MountBuilder, NamedVolumeBuilder, OwnedVolumeBuilder, SandboxBuilder};
pub use error::{Error, ErrorKind, MicrosandboxResult};
pub use mend::mend;
pub use msb_protocol::Resource;
pub use sandbox::{
    Copied, ExecControl, ExecEvent, ExecHandle, ExecOptions, ExecOutput, ExecStdin, Launch,
    Sandbox, SandboxHandle,
};
pub use spec::{
    Accel, CachePolicy, DiskImageFormat, HostPermissions, Mebibytes, NameError, NamedVolumeMode,
    SecurityProfile, SizeError, SizeExt, StatVirtualization, VmmKind, VolumeKind,
};
pub use usage::{Usage, UsageClass, usage};
pub use volume::{
    FsEntry, FsEntryKind, FsMetadata, Volume, VolumeBuilder, VolumeConfig, VolumeFsHandle,
    VolumeHandle, VolumeReadStream, VolumeUse, VolumeWriteStream,
};
