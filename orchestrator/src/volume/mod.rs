//! Named volumes: a store with locks and crash-safe metadata, and access to what they hold.

mod disk;
mod fit;
mod fs;
mod handle;
mod owned;
mod record;
mod root;
mod store;
mod users;

pub(crate) use disk::make_ext4;

pub(crate) use fit::fit;
pub use fit::{Misfit, VolumeFacts, VolumeProblem};
pub use fs::{
    FsEntry, FsEntryKind, FsMetadata, VolumeFsHandle, VolumeReadStream, VolumeWriteStream,
};
pub use handle::{Volume, VolumeBuilder, VolumeConfig, VolumeHandle};
pub(crate) use record::folder;
pub(crate) use record::{DISK_IMAGE, QUOTA_ACCOUNTS};
pub(crate) use store::mend;
pub use store::{Prepared, prepare};
pub use users::{VolumeUse, uses};

use crate::rundir::Home;
use crate::spec::{VolumeKind, VolumeName};
use crate::{Error, MicrosandboxResult};

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

/// Every volume and what it is.
pub(crate) fn kinds(home: &Home) -> MicrosandboxResult<Vec<(VolumeName, VolumeKind)>> {
    let records = store::list(home)?.into_iter();
    Ok(records.map(|record| (record.name, record.kind)).collect())
}

/// Runs what may block where it holds nobody up.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> MicrosandboxResult<T> + Send + 'static,
) -> MicrosandboxResult<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| {
        Error::io(
            "the work on a volume was interrupted",
            std::io::Error::other(error),
        )
    })?
}
