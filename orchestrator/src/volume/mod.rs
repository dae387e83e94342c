//! Named volumes: a store with locks and crash-safe metadata, and access to what they hold.

mod disk;
mod fit;
mod record;
mod store;
mod tree;
mod users;

pub(crate) use disk::make_ext4;

pub(crate) use fit::fit;
pub use fit::{Misfit, VolumeFacts, VolumeProblem};
pub(crate) use record::DISK_IMAGE;
pub use store::{Prepared, prepare};
pub use users::VolumeUse;

use crate::MicrosandboxResult;
use crate::rundir::Home;
use crate::spec::VolumeName;

/// What is known about a volume, if it exists whole.
///
/// # Errors
///
/// [`crate::ErrorKind::Io`] when its record cannot be read.
pub(crate) fn facts(home: &Home, name: &VolumeName) -> MicrosandboxResult<Option<VolumeFacts>> {
    let record = record::read(home, name)?;
    Ok(record
        .filter(|record| record.phase == record::Phase::Ready)
        .map(|record| record.facts()))
}
