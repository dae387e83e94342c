//! What everything in the state folder takes of the disk, and what of it could be freed.

use serde::Serialize;

use crate::image::ImageStore;
use crate::rundir::Home;
use crate::rundir::tree::{self, Size};
use crate::spec::{ImageSource, VolumeKind};
use crate::volume;
use crate::{MicrosandboxResult, mend};

/// One thing in the state folder.
///
/// ```no_run
/// use microsandbox::{Usage, rundir::Home, usage};
///
/// # fn main() -> microsandbox::MicrosandboxResult<()> {
/// for Usage { name, allocated_bytes, in_use, .. } in usage(&Home::from_env()?)? {
///     println!("{name}: {} MiB{}", allocated_bytes >> 20, if in_use { ", in use" } else { "" });
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// What it is.
    #[serde(rename = "type")]
    pub class: UsageClass,
    /// Its name.
    pub name: String,
    /// Whether a running sandbox uses it, or it is one.
    pub in_use: bool,
    /// Bytes that its files hold, holes included.
    pub logical_bytes: u64,
    /// Bytes that it takes on the disk.
    pub allocated_bytes: u64,
    /// Bytes that removing it would free: nothing while a sandbox, running or not, needs it.
    pub reclaimable_bytes: u64,
}

/// The kinds of things in the state folder.
///
/// ```no_run
/// use microsandbox::{UsageClass, rundir::Home, usage};
///
/// # fn main() -> microsandbox::MicrosandboxResult<()> {
/// let mut all = usage(&Home::from_env()?)?;
/// all.retain(|thing| thing.class == UsageClass::DiskVolume);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum UsageClass {
    /// A sandbox: what it wrote to its root file system, the volumes of its own, and its logs.
    Sandbox,
    /// A volume that is a directory.
    DirVolume,
    /// A volume that is a disk.
    DiskVolume,
    /// An image of the local store.
    Image,
    /// What is made again when it is needed.
    Cache,
}

/// Measures everything in the state folder, kind by kind, by name.
///
/// ```no_run
/// use microsandbox::{rundir::Home, usage};
///
/// # fn main() -> microsandbox::MicrosandboxResult<()> {
/// let free: u64 = usage(&Home::from_env()?)?.iter().map(|thing| thing.reclaimable_bytes).sum();
/// println!("{} MiB could be freed", free >> 20);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// [`crate::ErrorKind::Io`] when the state folder cannot be read.
pub fn usage(home: &Home) -> MicrosandboxResult<Vec<Usage>> {
    mend(home);
    let entry = |class, name: String, in_use: bool, needed: bool, size: Size| Usage {
        class,
        name,
        in_use,
        logical_bytes: size.logical,
        allocated_bytes: size.allocated,
        reclaimable_bytes: if needed || in_use { 0 } else { size.allocated },
    };
    let mut found = Vec::new();
    let mut references = Vec::new();
    for dir in home.list_sandboxes()? {
        if let Ok(spec) = dir.spec()
            && let ImageSource::Stored { reference } = spec.image
        {
            references.push(reference);
        }
        let (name, runs) = (dir.name().to_string(), dir.is_running());
        let size = tree::measure(dir.path());
        found.push(entry(UsageClass::Sandbox, name, runs, false, size));
    }
    let uses = volume::uses(home)?;
    for (name, kind) in volume::kinds(home)? {
        let class = match kind {
            VolumeKind::Directory => UsageClass::DirVolume,
            VolumeKind::Disk => UsageClass::DiskVolume,
        };
        let users = uses.get(&name).map_or(&[][..], Vec::as_slice);
        let runs = users.iter().any(|user| user.running);
        let size = tree::measure(&volume::folder(home, &name));
        found.push(entry(
            class,
            name.to_string(),
            runs,
            !users.is_empty(),
            size,
        ));
    }
    let store = ImageStore::of(home);
    let needed: Vec<_> = references
        .iter()
        .filter_map(|reference| store.find(reference).ok())
        .map(|image| image.record.id)
        .collect();
    for image in store.list()? {
        let name = match image.references.as_slice() {
            [] => image.record.id.clone(),
            names => names.join(", "),
        };
        let size = tree::measure(image.folder());
        let needed = needed.contains(&image.record.id);
        found.push(entry(
            UsageClass::Image,
            name,
            image.is_used(),
            needed,
            size,
        ));
    }
    let cache = tree::measure(&home.cache());
    if cache != Size::default() {
        let name = "cache".to_owned();
        found.push(entry(UsageClass::Cache, name, false, false, cache));
    }
    found.sort_by(|a, b| (a.class, &a.name).cmp(&(b.class, &b.name)));
    Ok(found)
}
