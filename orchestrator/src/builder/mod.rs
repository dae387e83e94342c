//! How programs describe sandboxes and their volumes, one call after the other.
//!
//! A setter never fails: what is wrong is reported by `build` and `create`, all of it at once.

mod mount;
mod named;
mod owned;
mod sandbox;

pub use mount::MountBuilder;
pub use named::NamedVolumeBuilder;
pub use owned::OwnedVolumeBuilder;
pub use sandbox::SandboxBuilder;
