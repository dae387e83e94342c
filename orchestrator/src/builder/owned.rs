//! What a volume of a sandbox's own is, described by calls.

use crate::spec::{Mebibytes, MountSource, ShareOptions, VolumeKind, VolumeRequest};

/// Describes a volume of a sandbox's own: a directory, unless it is made a disk.
///
/// Used in [`MountBuilder::owned_with`](super::MountBuilder::owned_with).
///
/// ```
/// use microsandbox::{Sandbox, SizeExt};
///
/// let spec = Sandbox::builder("worker")
///     .image("python")
///     .volume("/cache", |v| v.owned_with(|o| o.quota(1.gib())))
///     .volume("/var/lib/docker", |v| v.owned_with(|o| o.disk().size(20.gib())))
///     .build()?;
/// assert_eq!(spec.mounts.len(), 2);
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
#[must_use = "return it from the closure of `owned_with`"]
pub struct OwnedVolumeBuilder {
    request: VolumeRequest,
}

impl OwnedVolumeBuilder {
    /// It is a directory. This is the default.
    ///
    /// ```
    /// # use microsandbox::{MountBuilder, VolumeKind, spec::MountSource};
    /// let mount = MountBuilder::new("/x").owned_with(|o| o.directory()).build()?;
    /// let MountSource::Owned { request, .. } = mount.source else { panic!() };
    /// assert_eq!(request.kind, Some(VolumeKind::Directory));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn directory(mut self) -> Self {
        self.request.kind = Some(VolumeKind::Directory);
        self.request.size = None;
        self
    }

    /// It is a raw disk image with ext4, which needs a [`size`](Self::size).
    ///
    /// ```
    /// # use microsandbox::{MountBuilder, SizeExt};
    /// assert!(MountBuilder::new("/db").owned_with(|o| o.disk().size(1.gib())).build().is_ok());
    /// assert!(MountBuilder::new("/db").owned_with(|o| o.disk()).build().is_err());
    /// ```
    pub fn disk(mut self) -> Self {
        self.request.kind = Some(VolumeKind::Disk);
        self.request.quota = None;
        self
    }

    /// Capacity of a disk.
    ///
    /// ```
    /// # use microsandbox::{MountBuilder, SizeExt, spec::MountSource};
    /// let mount = MountBuilder::new("/db").owned_with(|o| o.disk().size(1.gib())).build()?;
    /// let MountSource::Owned { request, .. } = mount.source else { panic!() };
    /// assert_eq!(request.size, Some(1.gib()));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn size(mut self, size: impl Into<Mebibytes>) -> Self {
        self.request.size = Some(size.into());
        self
    }

    /// Quota of a directory.
    ///
    /// ```
    /// # use microsandbox::{MountBuilder, SizeExt};
    /// assert!(MountBuilder::new("/x").owned_with(|o| o.quota(1.gib())).build().is_ok());
    /// ```
    pub fn quota(mut self, size: impl Into<Mebibytes>) -> Self {
        self.request.quota = Some(size.into());
        self
    }

    pub(super) fn build(self, share: ShareOptions) -> MountSource {
        MountSource::Owned {
            request: self.request,
            share,
        }
    }
}
