//! Volumes as programs see them: made, found, listed, removed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::fit::fit;
use super::fs::VolumeFsHandle;
use super::record::{DISK_IMAGE, Record, folder};
use super::users::{VolumeUse, sandboxes_using};
use super::{blocking, store};
use crate::error::{Error, ErrorKind, MicrosandboxResult};
use crate::rundir::{Home, tree};
use crate::spec::{Mebibytes, NamedVolumeMode, VolumeKind, VolumeName, VolumeRequest};

/// A named volume: storage that lives on its own and is mounted into sandboxes.
///
/// ```no_run
/// use microsandbox::{MicrosandboxResult, Volume};
///
/// # async fn example() -> MicrosandboxResult<()> {
/// let cache = Volume::builder("pip-cache").create().await?;
/// assert_eq!(cache.name(), "pip-cache");
/// for volume in Volume::list().await? {
///     println!("{}", volume.name());
/// }
/// Volume::remove("pip-cache").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Volume {
    handle: VolumeHandle,
}

/// A handle on a named volume that exists.
///
/// ```no_run
/// # use microsandbox::{MicrosandboxResult, Volume, VolumeKind};
/// # async fn example() -> MicrosandboxResult<()> {
/// let handle = Volume::get("docker-data").await?;
/// if handle.kind() == VolumeKind::Disk {
///     println!("{:?} bytes of {:?}", handle.capacity_bytes(), handle.disk_fstype());
/// }
/// println!("takes {} bytes on this host", handle.used_bytes().await?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct VolumeHandle {
    home: Home,
    record: Record,
    fs: VolumeFsHandle,
}

/// Describes a volume that is to be made.
///
/// ```no_run
/// use microsandbox::{MicrosandboxResult, SizeExt, Volume};
///
/// # async fn example() -> MicrosandboxResult<()> {
/// let docker_data = Volume::builder("docker-data").disk().size(20.gib()).create().await?;
/// let cache = Volume::builder("cache").quota(1024).label("team", "build").create().await?;
/// # let _ = (docker_data, cache);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `create` is called"]
pub struct VolumeBuilder {
    name: String,
    kind: VolumeKind,
    size: Option<Mebibytes>,
    quota: Option<u64>,
    labels: BTreeMap<String, String>,
}

/// A volume that is possible, and was not made yet: what [`Volume::create`] takes.
///
/// ```
/// # use microsandbox::{MicrosandboxResult, VolumeConfig, Volume};
/// fn cache(name: &str) -> MicrosandboxResult<VolumeConfig> {
///     Volume::builder(name).quota(1024).label("use", "cache").build()
/// }
/// assert!(cache("pip-cache").is_ok());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeConfig {
    name: VolumeName,
    request: VolumeRequest,
}

impl Volume {
    /// Begins a new volume: a directory, unless [`VolumeBuilder::disk`] says otherwise.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SizeExt, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let cache = Volume::builder("pip-cache").create().await?;
    /// let data = Volume::builder("docker-data").disk().size(20.gib()).create().await?;
    /// # let _ = (cache, data);
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(name: impl Into<String>) -> VolumeBuilder {
        VolumeBuilder {
            name: name.into(),
            kind: VolumeKind::Directory,
            size: None,
            quota: None,
            labels: BTreeMap::new(),
        }
    }

    /// Makes the volume that [`VolumeBuilder::build`] has checked.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SizeExt, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let config = Volume::builder("docker-data").disk().size(20.gib()).build()?;
    /// let data = Volume::create(config).await?;
    /// # let _ = data;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::VolumeAlreadyExists`] when there is one of that name, [`ErrorKind::Io`].
    pub async fn create(config: VolumeConfig) -> MicrosandboxResult<Self> {
        blocking(move || {
            let home = Home::from_env()?;
            let mode = NamedVolumeMode::Create;
            let (record, _) = store::ensure(&home, &config.name, mode, &config.request, None)?;
            Ok(Self {
                handle: VolumeHandle::new(home, record),
            })
        })
        .await
    }

    /// Finds a volume.
    ///
    /// ```no_run
    /// # use microsandbox::{ErrorKind, Volume};
    /// # async fn example() {
    /// match Volume::get("pip-cache").await {
    ///     Ok(volume) => println!("{}", volume.path().display()),
    ///     Err(error) => assert_eq!(error.kind(), ErrorKind::VolumeNotFound),
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::VolumeNotFound`] when there is none of that name.
    pub async fn get(name: &str) -> MicrosandboxResult<VolumeHandle> {
        let name = VolumeName::try_from(name.to_owned())?;
        blocking(move || {
            let home = Home::from_env()?;
            let record = store::find(&home, &name)?;
            Ok(VolumeHandle::new(home, record))
        })
        .await
    }

    /// All volumes, newest first.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let volumes = Volume::list().await?;
    /// println!("{} volumes", volumes.len());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when the store cannot be read.
    pub async fn list() -> MicrosandboxResult<Vec<VolumeHandle>> {
        blocking(|| {
            let home = Home::from_env()?;
            let records = store::list(&home)?;
            Ok(records
                .into_iter()
                .map(|record| VolumeHandle::new(home.clone(), record))
                .collect())
        })
        .await
    }

    /// Removes a volume with everything in it.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// Volume::remove("old-cache").await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InUse`] while a running sandbox mounts it, [`ErrorKind::VolumeNotFound`].
    pub async fn remove(name: &str) -> MicrosandboxResult<()> {
        let name = VolumeName::try_from(name.to_owned())?;
        blocking(move || store::remove(&Home::from_env()?, &name)).await
    }

    /// Its name.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let cache = Volume::builder("pip-cache").create().await?;
    /// let worker = Sandbox::builder("worker").image("python");
    /// let sb = worker.volume("/root/.cache/pip", |v| v.named(cache.name())).create().await?;
    /// # let _ = sb;
    /// # Ok(())
    /// # }
    /// ```
    pub fn name(&self) -> &str {
        self.handle.name()
    }

    /// Its kind.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Volume, VolumeKind};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let cache = Volume::builder("pip-cache").create().await?;
    /// assert_eq!(cache.kind(), VolumeKind::Directory);
    /// # Ok(())
    /// # }
    /// ```
    pub fn kind(&self) -> VolumeKind {
        self.handle.kind()
    }

    /// The folder that is the volume, or holds its disk image.
    ///
    /// ```no_run
    /// # use microsandbox::Volume;
    /// # fn example(volume: &Volume) {
    /// println!("{} is kept in {}", volume.name(), volume.path().display());
    /// # }
    /// ```
    pub fn path(&self) -> &Path {
        self.handle.path()
    }

    /// The image of a disk volume.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SizeExt, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let data = Volume::builder("docker-data").disk().size(20.gib()).create().await?;
    /// assert_eq!(data.disk_path(), Some(data.path().join("disk.raw")));
    /// # Ok(())
    /// # }
    /// ```
    pub fn disk_path(&self) -> Option<PathBuf> {
        self.handle.disk_path()
    }

    /// Capacity of a disk volume in bytes.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SizeExt, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let data = Volume::builder("docker-data").disk().size(20.gib()).create().await?;
    /// assert_eq!(data.capacity_bytes(), Some(20 << 30));
    /// # Ok(())
    /// # }
    /// ```
    pub fn capacity_bytes(&self) -> Option<u64> {
        self.handle.capacity_bytes()
    }

    /// Image format of a disk volume.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SizeExt, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let data = Volume::builder("docker-data").disk().size(20.gib()).create().await?;
    /// assert_eq!(data.disk_format(), Some("raw"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn disk_format(&self) -> Option<&str> {
        self.handle.disk_format()
    }

    /// File system of a disk volume.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SizeExt, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let data = Volume::builder("docker-data").disk().size(20.gib()).create().await?;
    /// assert_eq!(data.disk_fstype(), Some("ext4"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn disk_fstype(&self) -> Option<&str> {
        self.handle.disk_fstype()
    }

    /// Its files, from the host.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let cache = Volume::builder("pip-cache").create().await?;
    /// cache.fs().write("README", "filled by the host").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn fs(&self) -> VolumeFsHandle {
        self.handle.fs()
    }
}

impl VolumeHandle {
    fn new(home: Home, record: Record) -> Self {
        let fs = VolumeFsHandle::new(folder(&home, &record.name));
        Self { home, record, fs }
    }

    /// Its name.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// for volume in Volume::list().await? {
    ///     println!("{}", volume.name());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn name(&self) -> &str {
        self.record.name.as_str()
    }

    /// Its kind.
    ///
    /// ```no_run
    /// # use microsandbox::{VolumeHandle, VolumeKind};
    /// # fn example(volume: &VolumeHandle) {
    /// if volume.kind() == VolumeKind::Disk {
    ///     println!("only one sandbox may write to {} at a time", volume.name());
    /// }
    /// # }
    /// ```
    pub fn kind(&self) -> VolumeKind {
        self.record.kind
    }

    /// The folder that is the volume, or holds its disk image.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let cache = Volume::get("pip-cache").await?;
    /// assert!(cache.path().ends_with("pip-cache"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn path(&self) -> &Path {
        self.fs.folder()
    }

    /// The image of a disk volume.
    ///
    /// ```no_run
    /// # use microsandbox::VolumeHandle;
    /// # fn example(volume: &VolumeHandle) {
    /// if let Some(image) = volume.disk_path() {
    ///     println!("its disk is {}", image.display());
    /// }
    /// # }
    /// ```
    pub fn disk_path(&self) -> Option<PathBuf> {
        self.of_disk(self.path().join(DISK_IMAGE))
    }

    /// Capacity of a disk volume in bytes.
    ///
    /// ```no_run
    /// # use microsandbox::VolumeHandle;
    /// # fn example(volume: &VolumeHandle) {
    /// if let Some(bytes) = volume.capacity_bytes() {
    ///     println!("a disk of {} MiB", bytes >> 20);
    /// }
    /// # }
    /// ```
    pub fn capacity_bytes(&self) -> Option<u64> {
        self.record.capacity_bytes
    }

    /// Image format of a disk volume: `raw`.
    ///
    /// ```no_run
    /// # use microsandbox::VolumeHandle;
    /// # fn example(volume: &VolumeHandle) {
    /// println!("{}", volume.disk_format().unwrap_or("no disk"));
    /// # }
    /// ```
    pub fn disk_format(&self) -> Option<&str> {
        self.of_disk("raw")
    }

    /// File system of a disk volume: `ext4`.
    ///
    /// ```no_run
    /// # use microsandbox::VolumeHandle;
    /// # fn example(volume: &VolumeHandle) {
    /// println!("{}", volume.disk_fstype().unwrap_or("no disk"));
    /// # }
    /// ```
    pub fn disk_fstype(&self) -> Option<&str> {
        self.of_disk("ext4")
    }

    /// Quota of a directory volume.
    ///
    /// ```no_run
    /// # use microsandbox::VolumeHandle;
    /// # fn example(volume: &VolumeHandle) {
    /// match volume.quota_mib() {
    ///     Some(mib) => println!("at most {mib} MiB"),
    ///     None => println!("as much as the host has"),
    /// }
    /// # }
    /// ```
    pub fn quota_mib(&self) -> Option<u32> {
        self.record.quota_mib.map(|quota| quota.0)
    }

    /// Its labels.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let volumes = Volume::list().await?;
    /// let ours = volumes.iter().filter(|v| v.labels().get("team").is_some_and(|t| t == "build"));
    /// println!("{} volumes of ours", ours.count());
    /// # Ok(())
    /// # }
    /// ```
    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.record.labels
    }

    /// When it was made.
    ///
    /// ```no_run
    /// # use microsandbox::VolumeHandle;
    /// # fn example(volume: &VolumeHandle) {
    /// if let Ok(age) = volume.created_at().elapsed() {
    ///     println!("{} is {} s old", volume.name(), age.as_secs());
    /// }
    /// # }
    /// ```
    pub fn created_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.record.created_at_ms)
    }

    /// Its files, from the host.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let fs = Volume::get("pip-cache").await?.fs();
    /// println!("{} entries", fs.list("/").await?.len());
    /// # Ok(())
    /// # }
    /// ```
    pub fn fs(&self) -> VolumeFsHandle {
        self.fs.clone()
    }

    /// Bytes that it really takes on this host: what a sparse disk leaves out does not count.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeHandle};
    /// # async fn example(volume: &VolumeHandle) -> MicrosandboxResult<()> {
    /// println!("{} takes {} MiB", volume.name(), volume.used_bytes().await? >> 20);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when the measuring is interrupted.
    pub async fn used_bytes(&self) -> MicrosandboxResult<u64> {
        let folder = self.path().to_owned();
        blocking(move || Ok(tree::measure(&folder).allocated)).await
    }

    /// The sandboxes that mount it, running or not.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeHandle};
    /// # async fn example(volume: &VolumeHandle) -> MicrosandboxResult<()> {
    /// for user in volume.used_by().await?.iter().filter(|user| user.running) {
    ///     println!("{} mounts it", user.sandbox.as_str());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when the sandboxes cannot be listed.
    pub async fn used_by(&self) -> MicrosandboxResult<Vec<VolumeUse>> {
        let this = self.clone();
        blocking(move || sandboxes_using(&this.home, &this.record.name)).await
    }

    /// Removes it with everything in it.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeHandle};
    /// # async fn example(volume: &VolumeHandle) -> MicrosandboxResult<()> {
    /// if volume.used_by().await?.is_empty() {
    ///     volume.remove().await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InUse`] while a running sandbox mounts it, [`ErrorKind::VolumeNotFound`].
    pub async fn remove(&self) -> MicrosandboxResult<()> {
        let this = self.clone();
        blocking(move || store::remove(&this.home, &this.record.name)).await
    }

    fn of_disk<T>(&self, value: T) -> Option<T> {
        (self.kind() == VolumeKind::Disk).then_some(value)
    }
}

impl VolumeBuilder {
    /// Makes it a directory. This is the default.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let cache = Volume::builder("pip-cache").directory().create().await?;
    /// assert_eq!(cache.disk_path(), None);
    /// # Ok(())
    /// # }
    /// ```
    pub fn directory(mut self) -> Self {
        self.kind = VolumeKind::Directory;
        self
    }

    /// Makes it a raw disk image with an ext4 file system; [`size`](Self::size) is then needed.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SizeExt, Volume, VolumeKind};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let data = Volume::builder("docker-data").disk().size(20.gib()).create().await?;
    /// assert_eq!(data.kind(), VolumeKind::Disk);
    /// # Ok(())
    /// # }
    /// ```
    pub fn disk(mut self) -> Self {
        self.kind = VolumeKind::Disk;
        self
    }

    /// Capacity of a disk: a number of MiB, or `20.gib()`.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SizeExt, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// Volume::builder("docker-data").disk().size(20.gib()).create().await?;
    /// Volume::builder("seed").disk().size(512).create().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn size(mut self, size: impl Into<Mebibytes>) -> Self {
        self.size = Some(size.into());
        self
    }

    /// Quota of a directory in MiB.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// Volume::builder("pip-cache").quota(1024).create().await?;
    /// assert_eq!(Volume::get("pip-cache").await?.quota_mib(), Some(1024));
    /// # Ok(())
    /// # }
    /// ```
    pub fn quota(mut self, mib: u64) -> Self {
        self.quota = Some(mib);
        self
    }

    /// Adds a label.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Volume};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// Volume::builder("pip-cache").label("team", "build").create().await?;
    /// assert_eq!(Volume::get("pip-cache").await?.labels()["team"], "build");
    /// # Ok(())
    /// # }
    /// ```
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// Makes the volume.
    ///
    /// ```no_run
    /// # use microsandbox::{ErrorKind, Volume};
    /// # async fn example() {
    /// match Volume::builder("pip-cache").create().await {
    ///     Ok(volume) => println!("made {}", volume.path().display()),
    ///     Err(error) => assert_eq!(error.kind(), ErrorKind::VolumeAlreadyExists),
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::VolumeAlreadyExists`] when there is one of that name,
    /// [`ErrorKind::InvalidConfig`] when the name, size or quota is not possible.
    pub async fn create(self) -> MicrosandboxResult<Volume> {
        Volume::create(self.build()?).await
    }

    /// Checks it, and makes nothing yet.
    ///
    /// ```
    /// # use microsandbox::{ErrorKind, SizeExt, Volume};
    /// assert!(Volume::builder("docker-data").disk().size(20.gib()).build().is_ok());
    /// let error = Volume::builder("docker-data").disk().build().unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfig`] when the name, size or quota is not possible.
    pub fn build(self) -> MicrosandboxResult<VolumeConfig> {
        let quota = self.quota.map(|mib| {
            u32::try_from(mib).map(Mebibytes).map_err(|_| {
                Error::new(
                    ErrorKind::InvalidConfig,
                    format!("a quota of {mib} MiB is too large"),
                )
                .with_value(mib.to_string())
            })
        });
        let name = VolumeName::try_from(self.name)?;
        let request = VolumeRequest {
            kind: Some(self.kind),
            size: self.size,
            quota: quota.transpose()?,
            labels: self.labels,
        };
        request.check()?;
        fit(NamedVolumeMode::Create, &request, None)
            .map_err(|problem| problem.into_error(&name))?;
        Ok(VolumeConfig { name, request })
    }
}
