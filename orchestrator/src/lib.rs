//! Storage for microVM sandboxes: turns a sandbox request into running processes and back.

#![deny(unsafe_code)]

mod agent;
pub mod backend;
mod builder;
mod error;
pub mod evidence;
pub mod host;
pub mod image;
mod initramfs;
mod mend;
pub mod plan;
pub mod rundir;
pub mod sandbox;
pub mod spec;
pub mod supervisor;
mod usage;
mod vmlinux;
pub mod vmm;
pub mod volume;

pub use builder::{MountBuilder, NamedVolumeBuilder, SandboxBuilder};
pub use error::{Error, ErrorKind, MicrosandboxResult};
pub use mend::mend;
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
    FsEntry, FsEntryKind, FsMetadata, Volume, VolumeBuilder, VolumeFsHandle, VolumeHandle,
    VolumeReadStream, VolumeUse, VolumeWriteStream,
};
