//! Storage for microVM sandboxes: turns a sandbox request into running processes and back.

#![deny(unsafe_code)]

mod error;
pub mod host;
pub mod image;
pub mod plan;
pub mod rundir;
pub mod spec;
pub mod volume;

pub use error::{Error, ErrorKind, MicrosandboxResult};
pub use spec::{
    Accel, CachePolicy, DiskImageFormat, HostPermissions, Mebibytes, NameError, NamedVolumeMode,
    SecurityProfile, SizeError, SizeExt, StatVirtualization, VmmKind, VolumeKind,
};
pub use volume::{
    FsEntry, FsEntryKind, FsMetadata, Volume, VolumeBuilder, VolumeFsHandle, VolumeHandle,
    VolumeReadStream, VolumeUse, VolumeWriteStream,
};
