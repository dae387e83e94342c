//! Rules between the parts of one mount, the same for the command line and for the SDK.

use super::{
    HostPermissions, MountSource, MountSpec, ShareOptions, StatVirtualization, VolumeKind,
    VolumeRequest,
};

/// Parts of a mount that do not go together.
///
/// ```
/// use microsandbox::{SizeExt, VolumeKind};
/// use microsandbox::spec::{RuleError, VolumeRequest};
///
/// let kind = Some(VolumeKind::Directory);
/// let request = VolumeRequest { kind, size: Some(1.gib()), ..VolumeRequest::default() };
/// assert_eq!(request.check(), Err(RuleError::SizeNeedsDisk));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// A size for what is no disk.
    #[error("a size needs `kind=disk`: a directory volume is limited with a quota")]
    SizeNeedsDisk,
    /// A disk volume was given an option of directories.
    #[error("`{0}` is for directory volumes, this one is a disk")]
    NotForDisk(&'static str),
    /// A disk that is made, and nobody says how large.
    #[error("a disk volume of a sandbox's own needs a size")]
    DiskNeedsSize,
    /// A disk of no size.
    #[error("a disk volume cannot have size 0")]
    EmptyDisk,
    /// The host's modes cannot be shown and mirrored at once.
    #[error(
        "`stat-virt=off` and `host-perms=mirror` exclude each other: without virtual modes there is nothing to mirror"
    )]
    OffWithMirror,
    /// Without virtual owners there is nobody to map.
    #[error("`uid` and `gid` need virtual owners, which `stat-virt=off` turns off")]
    OffWithOwner,
    /// Not the name of a file system type.
    #[error(
        "`{0}` is not a file system type: use letters, digits, `.`, `_` and `-`, as in /proc/filesystems"
    )]
    FileSystemType(String),
}

impl RuleError {
    /// What the user can do about it.
    ///
    /// ```
    /// use microsandbox::spec::RuleError;
    ///
    /// assert_eq!(RuleError::OffWithMirror.hint(), Some("drop one of the two"));
    /// ```
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::SizeNeedsDisk => Some("add kind=disk, or replace size= by quota="),
            Self::DiskNeedsSize => Some("add a size, for example kind=disk,size=20G"),
            Self::OffWithMirror => Some("drop one of the two"),
            _ => None,
        }
    }
}

impl MountSpec {
    /// Checks the rules that need nothing but the mount itself.
    ///
    /// ```
    /// use microsandbox::spec::{MountFlag, RuleError, parse_mount};
    /// use std::path::Path;
    ///
    /// let mut mount = parse_mount(MountFlag::Tmpfs, "/tmp:64M", Path::new("/"))?;
    /// mount.noexec = true;
    /// assert_eq!(mount.check(), Ok(()));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The first [`RuleError`] that applies.
    pub fn check(&self) -> Result<(), RuleError> {
        match &self.source {
            MountSource::Bind { share, .. } => share.check(),
            MountSource::Named { request, share, .. } => {
                request.check()?;
                if request.kind == Some(VolumeKind::Disk) {
                    share.check_disk()?;
                }
                share.check()
            }
            MountSource::Owned { request, share } => {
                request.check()?;
                if request.kind == Some(VolumeKind::Disk) {
                    share.check_disk()?;
                    request.size.ok_or(RuleError::DiskNeedsSize)?;
                }
                share.check()
            }
            MountSource::Disk { fstype, .. } => fstype.as_deref().map_or(Ok(()), check_fstype),
            MountSource::Tmpfs { .. } => Ok(()),
        }
    }
}

impl VolumeRequest {
    /// Checks what is asked of a volume.
    ///
    /// ```
    /// use microsandbox::spec::{RuleError, VolumeRequest};
    /// use microsandbox::{SizeExt, VolumeKind};
    ///
    /// let kind = Some(VolumeKind::Disk);
    /// let request = VolumeRequest { kind, quota: Some(1.gib()), ..VolumeRequest::default() };
    /// assert_eq!(request.check(), Err(RuleError::NotForDisk("quota")));
    /// ```
    ///
    /// # Errors
    ///
    /// The first [`RuleError`] that applies.
    pub fn check(&self) -> Result<(), RuleError> {
        let disk = self.kind == Some(VolumeKind::Disk);
        match self.size {
            Some(_) if !disk => Err(RuleError::SizeNeedsDisk),
            Some(size) if size.0 == 0 => Err(RuleError::EmptyDisk),
            _ if disk && self.quota.is_some() => Err(RuleError::NotForDisk("quota")),
            _ => Ok(()),
        }
    }
}

impl ShareOptions {
    /// Checks that nothing is asked for that only a share can do.
    ///
    /// ```
    /// use microsandbox::spec::{RuleError, ShareOptions};
    ///
    /// assert_eq!(ShareOptions::default().check_disk(), Ok(()));
    /// let owned = ShareOptions { owner: Some((1000, 1000)), ..ShareOptions::default() };
    /// assert_eq!(owned.check_disk(), Err(RuleError::NotForDisk("uid")));
    /// ```
    ///
    /// # Errors
    ///
    /// [`RuleError::NotForDisk`] with the first option that is there.
    pub fn check_disk(&self) -> Result<(), RuleError> {
        let given = [
            (self.stat_virtualization.is_some(), "stat-virt"),
            (self.host_permissions.is_some(), "host-perms"),
            (self.owner.is_some(), "uid"),
            (self.quota.is_some(), "quota"),
            (self.cache.is_some(), "cache"),
        ];
        match given.iter().find(|(given, _)| *given) {
            Some((_, name)) => Err(RuleError::NotForDisk(name)),
            None => Ok(()),
        }
    }

    fn check(&self) -> Result<(), RuleError> {
        if self.stat_virtualization != Some(StatVirtualization::Off) {
            return Ok(());
        }
        if self.host_permissions == Some(HostPermissions::Mirror) {
            return Err(RuleError::OffWithMirror);
        }
        if self.owner.is_some() {
            return Err(RuleError::OffWithOwner);
        }
        Ok(())
    }
}

fn check_fstype(fstype: &str) -> Result<(), RuleError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if fstype.is_empty() || !fstype.chars().all(fits) {
        return Err(RuleError::FileSystemType(fstype.to_owned()));
    }
    Ok(())
}
