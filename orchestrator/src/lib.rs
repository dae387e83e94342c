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
pub mod plan;
pub mod rundir;
pub mod sandbox;
pub mod spec;
pub mod supervisor;
mod vmlinux;
pub mod vmm;
pub mod volume;

pub use builder::{MountBuilder, NamedVolumeBuilder, SandboxBuilder};
pub use error::{Error, ErrorKind, MicrosandboxResult};
pub use sandbox::{
    ExecControl, ExecEvent, ExecHandle, ExecOptions, ExecOutput, ExecStdin, Launch, Sandbox,
};
pub use spec::{
    Accel, CachePolicy, DiskImageFormat, HostPermissions, Mebibytes, NameError, NamedVolumeMode,
    SecurityProfile, SizeError, SizeExt, StatVirtualization, VmmKind, VolumeKind,
};
pub use volume::{
    FsEntry, FsEntryKind, FsMetadata, Volume, VolumeBuilder, VolumeFsHandle, VolumeHandle,
    VolumeReadStream, VolumeUse, VolumeWriteStream,
};
