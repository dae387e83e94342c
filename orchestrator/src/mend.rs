//! Puts right what killed processes left behind, so that every command finds a state that it knows.

use crate::image::ImageStore;
use crate::rundir::Home;
use crate::volume;

/// Removes what was half-made or half-removed: sandboxes, their sockets, volumes, images, drafts.
///
/// What somebody is still at work on is left alone. What cannot be removed now is found again by
/// the next call; nothing depends on its having been removed.
///
/// ```no_run
/// use microsandbox::{mend, rundir::Home};
///
/// # fn main() -> microsandbox::MicrosandboxResult<()> {
/// mend(&Home::from_env()?);
/// # Ok(())
/// # }
/// ```
pub fn mend(home: &Home) {
    home.sweep();
    volume::mend(home);
    ImageStore::of(home).sweep();
}
