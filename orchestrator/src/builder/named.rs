//! What a mount asks of a named volume, described by calls.

use crate::error::MicrosandboxResult;
use crate::spec::{
    Mebibytes, MountSource, NamedVolumeMode, ShareOptions, VolumeKind, VolumeName, VolumeRequest,
};

/// Describes what is asked of a named volume when a sandbox mounts it.
///
/// Used in [`MountBuilder::named_with`](super::MountBuilder::named_with).
///
/// ```
/// use microsandbox::{Sandbox, SizeExt};
///
/// let spec = Sandbox::builder("worker")
///     .image("python")
///     .volume("/cache", |v| v.named_with("pip-cache", |n| n.ensure_exists().quota(1.gib())))
///     .volume("/var/lib/docker", |v| {
///         v.named_with("docker-data", |n| n.ensure_exists().disk().size(20.gib()))
///     })
///     .build()?;
/// assert_eq!(spec.mounts.len(), 2);
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "return it from the closure of `named_with`"]
pub struct NamedVolumeBuilder {
    name: String,
    mode: NamedVolumeMode,
    request: VolumeRequest,
}

impl NamedVolumeBuilder {
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            mode: NamedVolumeMode::Existing,
            request: VolumeRequest::default(),
        }
    }

    /// Asks for another volume.
    ///
    /// ```
    /// # use microsandbox::{MountBuilder, spec::MountSource};
    /// let mount = MountBuilder::new("/x").named_with("cache", |n| n.name("cache-2")).build()?;
    /// let MountSource::Named { name, .. } = &mount.source else { panic!() };
    /// assert_eq!(name.as_str(), "cache-2");
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// It must exist. This is the default.
    ///
    /// ```
    /// # use microsandbox::{NamedVolumeMode, Sandbox, spec::MountSource};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let spec = sb.volume("/cache", |v| v.named_with("cache", |n| n.existing())).build()?;
    /// let MountSource::Named { mode, .. } = &spec.mounts[0].source else { panic!() };
    /// assert_eq!(*mode, NamedVolumeMode::Existing);
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn existing(mut self) -> Self {
        self.mode = NamedVolumeMode::Existing;
        self
    }

    /// It is made, and must not exist.
    ///
    /// ```
    /// # use microsandbox::{NamedVolumeMode, Sandbox, spec::MountSource};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let spec = sb.volume("/cache", |v| v.named_with("cache", |n| n.create())).build()?;
    /// let MountSource::Named { mode, .. } = &spec.mounts[0].source else { panic!() };
    /// assert_eq!(*mode, NamedVolumeMode::Create);
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn create(mut self) -> Self {
        self.mode = NamedVolumeMode::Create;
        self
    }

    /// It is made when it is missing, and reused when it is what is asked for.
    ///
    /// ```
    /// # use microsandbox::{NamedVolumeMode, Sandbox, spec::MountSource};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let spec = sb.volume("/cache", |v| v.named_with("cache", |n| n.ensure_exists())).build()?;
    /// let MountSource::Named { mode, .. } = &spec.mounts[0].source else { panic!() };
    /// assert_eq!(*mode, NamedVolumeMode::EnsureExists);
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn ensure_exists(mut self) -> Self {
        self.mode = NamedVolumeMode::EnsureExists;
        self
    }

    /// It is a directory. This is the default.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, VolumeKind, spec::MountSource};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let spec = sb.volume("/x", |v| v.named_with("x", |n| n.create().directory())).build()?;
    /// let MountSource::Named { request, .. } = &spec.mounts[0].source else { panic!() };
    /// assert_eq!(request.kind, Some(VolumeKind::Directory));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn directory(mut self) -> Self {
        self.request.kind = Some(VolumeKind::Directory);
        self.request.size = None;
        self
    }

    /// It is a raw disk image with ext4; to make one, [`size`](Self::size) is needed.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, VolumeKind, spec::MountSource};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let spec = sb.volume("/db", |v| v.named_with("db", |n| n.disk())).build()?;
    /// let MountSource::Named { request, .. } = &spec.mounts[0].source else { panic!() };
    /// assert_eq!(request.kind, Some(VolumeKind::Disk));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn disk(mut self) -> Self {
        self.request.kind = Some(VolumeKind::Disk);
        self.request.quota = None;
        self
    }

    /// Capacity of a disk.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, SizeExt};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let sb = sb.volume("/db", |v| v.named_with("db", |n| n.create().disk().size(1.gib())));
    /// assert!(sb.build().is_ok());
    /// ```
    pub fn size(mut self, size: impl Into<Mebibytes>) -> Self {
        self.request.size = Some(size.into());
        self
    }

    /// Quota of a directory.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, SizeExt};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let sb = sb.volume("/cache", |v| {
    ///     v.named_with("pip-cache", |n| n.ensure_exists().quota(1.gib()))
    /// });
    /// assert!(sb.build().is_ok());
    /// ```
    pub fn quota(mut self, size: impl Into<Mebibytes>) -> Self {
        self.request.quota = Some(size.into());
        self
    }

    /// A label that a new volume gets, and that one that exists must have.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, spec::MountSource};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let spec = sb.volume("/x", |v| v.named_with("x", |n| n.label("team", "ml"))).build()?;
    /// let MountSource::Named { request, .. } = &spec.mounts[0].source else { panic!() };
    /// assert_eq!(request.labels["team"], "ml");
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.labels.insert(key.into(), value.into());
        self
    }

    pub(super) fn build(self, share: ShareOptions) -> MicrosandboxResult<MountSource> {
        let mut request = self.request;
        // Whoever may make the volume says what it is by saying nothing: a directory.
        if self.mode != NamedVolumeMode::Existing {
            request.kind.get_or_insert(VolumeKind::Directory);
        }
        let name = VolumeName::try_from(self.name)?;
        Ok(MountSource::Named {
            name,
            mode: self.mode,
            request,
            share,
        })
    }
}
