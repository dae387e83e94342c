//! One volume of a sandbox, described by calls.

use std::mem;
use std::path::{Path, PathBuf};

use super::{NamedVolumeBuilder, OwnedVolumeBuilder};
use crate::error::{Error, ErrorKind, MicrosandboxResult};
use crate::spec::{
    Access, CachePolicy, DiskImageFormat, GuestPath, HostPermissions, Mebibytes, MountSource,
    MountSpec, RuleError, ShareOptions, StatVirtualization, absolute,
};

/// Describes one volume: what it is, and how it is mounted.
///
/// Used in [`SandboxBuilder::volume`](super::SandboxBuilder::volume).
///
/// ```
/// use microsandbox::{DiskImageFormat, Sandbox, StatVirtualization};
///
/// let spec = Sandbox::builder("full")
///     .image("python")
///     .volume("/app/src", |v| v.bind("./src").readonly().noexec())
///     .volume("/root/.cache/pip", |v| {
///         v.named("pip-cache").stat_virtualization(StatVirtualization::Relaxed)
///     })
///     .volume("/dataset", |v| {
///         v.disk("./dataset.qcow2").format(DiskImageFormat::Qcow2).fstype("ext4").readonly()
///     })
///     .volume("/tmp", |v| v.tmpfs().size(1024).noexec().nosuid().nodev())
///     .build()?;
/// assert_eq!(spec.mounts.len(), 4);
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "return it from the closure of `volume`"]
pub struct MountBuilder {
    target: String,
    sources: Vec<Source>,
    access: Access,
    noexec: bool,
    nosuid: bool,
    nodev: bool,
    format: Option<DiskImageFormat>,
    fstype: Option<String>,
    size: Option<Mebibytes>,
    follow_root_symlinks: bool,
    share: ShareOptions,
}

#[derive(Debug, Clone)]
enum Source {
    Bind(PathBuf),
    Named(NamedVolumeBuilder),
    Owned(OwnedVolumeBuilder),
    Disk(PathBuf),
    Tmpfs,
}

impl MountBuilder {
    /// Begins the description of what is mounted at `target`, an absolute path of the guest.
    ///
    /// ```
    /// # use microsandbox::MountBuilder;
    /// let mount = MountBuilder::new("/app").bind("./src").readonly().build()?;
    /// assert_eq!(mount.target.as_str(), "/app");
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn new(target: impl Into<String>) -> Self {
        Self {
            target: target.into(),
            sources: Vec::new(),
            access: Access::ReadWrite,
            noexec: false,
            nosuid: false,
            nodev: false,
            format: None,
            fstype: None,
            size: None,
            follow_root_symlinks: false,
            share: ShareOptions::default(),
        }
    }

    /// Mounts a directory, or a single file, of the host. What either side changes, the other sees.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, spec::MountSource};
    /// let sb = Sandbox::builder("dev").image("python");
    /// let spec = sb.volume("/app/src", |v| v.bind("./src").readonly()).build()?;
    /// assert!(matches!(spec.mounts[0].source, MountSource::Bind { .. }));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn bind(mut self, host_path: impl Into<PathBuf>) -> Self {
        self.sources.push(Source::Bind(host_path.into()));
        self
    }

    /// Mounts a named volume, which must exist.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, spec::MountSource};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let spec = sb.volume("/root/.cache/pip", |v| v.named("pip-cache")).build()?;
    /// assert!(matches!(spec.mounts[0].source, MountSource::Named { .. }));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn named(self, name: impl Into<String>) -> Self {
        self.named_with(name, |volume| volume)
    }

    /// Mounts a named volume, and says what to do when it exists or is missing.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let sb = Sandbox::builder("worker").image("python");
    /// let sb = sb.volume("/var/lib/docker", |v| {
    ///     v.named_with("docker-data", |n| n.ensure_exists().disk().size(20 * 1024))
    /// });
    /// assert!(sb.build().is_ok());
    /// ```
    pub fn named_with(
        mut self,
        name: impl Into<String>,
        f: impl FnOnce(NamedVolumeBuilder) -> NamedVolumeBuilder,
    ) -> Self {
        let volume = NamedVolumeBuilder::new(name.into());
        self.sources.push(Source::Named(f(volume)));
        self
    }

    /// Mounts a directory of the sandbox's own: made with it, kept over restarts, removed with it.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, spec::MountSource};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let spec = sb.volume("/var/lib/app", |v| v.owned()).build()?;
    /// assert!(matches!(spec.mounts[0].source, MountSource::Owned { .. }));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn owned(self) -> Self {
        self.owned_with(|volume| volume)
    }

    /// Mounts a volume of the sandbox's own, and says what it is.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, SizeExt};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let sb = sb.volume("/var/lib/docker", |v| v.owned_with(|o| o.disk().size(20.gib())));
    /// assert!(sb.build().is_ok());
    /// ```
    pub fn owned_with(mut self, f: impl FnOnce(OwnedVolumeBuilder) -> OwnedVolumeBuilder) -> Self {
        let volume = f(OwnedVolumeBuilder::default());
        self.sources.push(Source::Owned(volume));
        self
    }

    /// Mounts the file system of a disk image of the host.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, spec::MountSource};
    /// let sb = Sandbox::builder("seeded").image("alpine");
    /// let spec = sb.volume("/seed", |v| v.disk("./seed.raw").readonly().noexec()).build()?;
    /// assert!(matches!(spec.mounts[0].source, MountSource::Disk { .. }));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn disk(mut self, host_path: impl Into<PathBuf>) -> Self {
        self.sources.push(Source::Disk(host_path.into()));
        self
    }

    /// Mounts memory of the sandbox, which is gone when it stops.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, spec::MountSource};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let spec = sb.volume("/tmp/scratch", |v| v.tmpfs().noexec()).build()?;
    /// assert_eq!(spec.mounts[0].source, MountSource::Tmpfs { size: None });
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn tmpfs(mut self) -> Self {
        self.sources.push(Source::Tmpfs);
        self
    }

    /// Format of a [disk](Self::disk) image; when this is not called its extension says.
    ///
    /// ```
    /// # use microsandbox::{DiskImageFormat, Sandbox};
    /// let sb = Sandbox::builder("full").image("python");
    /// let sb = sb.volume("/dataset", |v| v.disk("./data.img").format(DiskImageFormat::Qcow2));
    /// assert!(sb.build().is_ok());
    /// ```
    pub fn format(mut self, format: DiskImageFormat) -> Self {
        self.format = Some(format);
        self
    }

    /// File system of a [disk](Self::disk) image; when this is not called the guest finds out.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let sb = Sandbox::builder("seeded").image("alpine");
    /// let sb = sb.volume("/seed", |v| v.disk("./seed.raw").fstype("ext4"));
    /// assert!(sb.build().is_ok());
    /// ```
    pub fn fstype(mut self, fstype: impl Into<String>) -> Self {
        self.fstype = Some(fstype.into());
        self
    }

    /// Size limit of a [tmpfs](Self::tmpfs): a number of MiB, or `2.gib()`.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, SizeExt, spec::MountSource};
    /// let sb = Sandbox::builder("worker").image("python");
    /// let spec = sb.volume("/tmp", |v| v.tmpfs().size(2.gib())).build()?;
    /// assert_eq!(spec.mounts[0].source, MountSource::Tmpfs { size: Some(2.gib()) });
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn size(mut self, mib: impl Into<Mebibytes>) -> Self {
        self.size = Some(mib.into());
        self
    }

    /// The guest cannot write, whatever it does.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, spec::Access};
    /// let sb = Sandbox::builder("dev").image("python");
    /// let spec = sb.volume("/app/src", |v| v.bind("./src").readonly()).build()?;
    /// assert_eq!(spec.mounts[0].access, Access::ReadOnly);
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn readonly(mut self) -> Self {
        self.access = Access::ReadOnly;
        self
    }

    /// Nothing can be executed from it. Interpreters still read scripts from it.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let sb = Sandbox::builder("dev").image("python");
    /// let spec = sb.volume("/app/src", |v| v.bind("./src").noexec()).build()?;
    /// assert!(spec.mounts[0].noexec);
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn noexec(mut self) -> Self {
        self.noexec = true;
        self
    }

    /// Set-id bits have no effect.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let sb = Sandbox::builder("worker").image("python");
    /// let spec = sb.volume("/tmp", |v| v.tmpfs().nosuid()).build()?;
    /// assert!(spec.mounts[0].nosuid);
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn nosuid(mut self) -> Self {
        self.nosuid = true;
        self
    }

    /// Device files open no devices.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let sb = Sandbox::builder("worker").image("python");
    /// let spec = sb.volume("/tmp", |v| v.tmpfs().nodev()).build()?;
    /// assert!(spec.mounts[0].nodev);
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn nodev(mut self) -> Self {
        self.nodev = true;
        self
    }

    /// Where owners, modes and special files of a shared directory are kept.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, StatVirtualization};
    /// let sb = Sandbox::builder("full").image("python").volume("/root/.cache/pip", |v| {
    ///     v.named("pip-cache").stat_virtualization(StatVirtualization::Relaxed)
    /// });
    /// assert!(sb.build().is_ok());
    /// ```
    pub fn stat_virtualization(mut self, mode: StatVirtualization) -> Self {
        self.share.stat_virtualization = Some(mode);
        self
    }

    /// What modes the files of a shared directory get on the host.
    ///
    /// ```
    /// # use microsandbox::{HostPermissions, Sandbox};
    /// let sb = Sandbox::builder("dev").image("python");
    /// let sb = sb.volume("/out", |v| v.bind("./out").host_permissions(HostPermissions::Mirror));
    /// assert!(sb.build().is_ok());
    /// ```
    pub fn host_permissions(mut self, mode: HostPermissions) -> Self {
        self.share.host_permissions = Some(mode);
        self
    }

    /// uid and gid of every file of a shared directory that has no recorded owner.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, spec::MountSource};
    /// let sb = Sandbox::builder("dev").image("python");
    /// let spec = sb.volume("/data", |v| v.bind("./data").owner(1000, 1000)).build()?;
    /// let MountSource::Bind { share, .. } = &spec.mounts[0].source else { panic!() };
    /// assert_eq!(share.owner, Some((1000, 1000)));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn owner(mut self, uid: u32, gid: u32) -> Self {
        self.share.owner = Some((uid, gid));
        self
    }

    /// Limit on what the guest may add to a [bound](Self::bind) directory. A named volume has its
    /// own: see [`NamedVolumeBuilder::quota`].
    ///
    /// ```
    /// # use microsandbox::{Sandbox, SizeExt, spec::MountSource};
    /// let sb = Sandbox::builder("dev").image("python");
    /// let spec = sb.volume("/out", |v| v.bind("./out").quota(1.gib())).build()?;
    /// let MountSource::Bind { share, .. } = &spec.mounts[0].source else { panic!() };
    /// assert_eq!(share.quota, Some(1.gib()));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn quota(mut self, size: impl Into<Mebibytes>) -> Self {
        self.share.quota = Some(size.into());
        self
    }

    /// How much of a shared directory the guest keeps in its caches.
    ///
    /// ```
    /// # use microsandbox::{CachePolicy, Sandbox};
    /// let sb = Sandbox::builder("dev").image("python");
    /// let sb = sb.volume("/models", |v| v.bind("./models").readonly().cache(CachePolicy::Always));
    /// assert!(sb.build().is_ok());
    /// ```
    pub fn cache(mut self, policy: CachePolicy) -> Self {
        self.share.cache = Some(policy);
        self
    }

    /// Lets the path of a [bound](Self::bind) directory lead through symbolic links. Whoever can
    /// change one of them chooses what a later start mounts.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let sb = Sandbox::builder("dev").image("python");
    /// let sb = sb.volume("/app", |v| v.bind("./current").follow_root_symlinks());
    /// assert!(sb.build().is_ok());
    /// ```
    pub fn follow_root_symlinks(mut self) -> Self {
        self.follow_root_symlinks = true;
        self
    }

    /// The mount, if it is possible. Relative host paths are taken from the current directory.
    ///
    /// ```
    /// # use microsandbox::{ErrorKind, MountBuilder};
    /// let error = MountBuilder::new("/data").tmpfs().fstype("ext4").build().unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfig`] when no kind of mount was chosen, or a call does not fit it.
    pub fn build(self) -> MicrosandboxResult<MountSpec> {
        let cwd = std::env::current_dir()
            .map_err(|error| Error::io("cannot find the current directory", error))?;
        self.build_in(&cwd)
    }

    /// The mount at `target`; relative host paths are taken from `cwd`.
    pub(super) fn build_in(mut self, cwd: &Path) -> MicrosandboxResult<MountSpec> {
        let target = GuestPath::try_from(mem::take(&mut self.target))?;
        let misused = |what: &str, right: &str| {
            let message = format!("volume at `{target}`: {what}");
            Error::new(ErrorKind::InvalidConfig, message)
                .with_value(target.as_str())
                .with_hint(right)
        };
        let mut sources = mem::take(&mut self.sources).into_iter();
        let source = match (sources.next(), sources.next()) {
            (Some(source), None) => source,
            (None, _) => {
                return Err(misused(
                    "no mount type set",
                    "call bind, named, owned, disk or tmpfs",
                ));
            }
            (Some(_), Some(_)) => {
                return Err(misused(
                    "two mount types set",
                    "call one of bind, named, owned, disk, tmpfs",
                ));
            }
        };
        if let Some((what, right)) = self.stray(&source) {
            let what = format!("{what} without {right}");
            return Err(misused(&what, &format!("valid with {right}")));
        }
        let source = match source {
            Source::Bind(path) => MountSource::Bind {
                path: absolute(&path, cwd),
                expect: None,
                follow_root_symlinks: self.follow_root_symlinks,
                share: self.share,
            },
            Source::Named(volume) => volume.build(self.share)?,
            Source::Owned(volume) => volume.build(self.share),
            Source::Disk(path) => MountSource::Disk {
                path: absolute(&path, cwd),
                format: self.format,
                fstype: self.fstype,
            },
            Source::Tmpfs => MountSource::Tmpfs { size: self.size },
        };
        let mount = MountSpec {
            target: target.clone(),
            source,
            access: self.access,
            noexec: self.noexec,
            nosuid: self.nosuid,
            nodev: self.nodev,
        };
        let wrong =
            |rule: RuleError| misused(&rule.to_string(), rule.hint().unwrap_or("change one"));
        mount.check().map_err(wrong)?;
        Ok(mount)
    }

    /// A call that does not fit the source, and what it would fit.
    fn stray(&self, source: &Source) -> Option<(&'static str, &'static str)> {
        let disk = matches!(source, Source::Disk(_));
        let bind = matches!(source, Source::Bind(_));
        let shared = bind || matches!(source, Source::Named(_) | Source::Owned(_));
        let options = ShareOptions {
            quota: None,
            ..self.share.clone()
        };
        let calls = [
            (
                self.size.is_some(),
                matches!(source, Source::Tmpfs),
                "size()",
                "tmpfs()",
            ),
            (self.format.is_some(), disk, "format()", "disk()"),
            (self.fstype.is_some(), disk, "fstype()", "disk()"),
            (self.share.quota.is_some(), bind, "quota()", "bind()"),
            (
                self.follow_root_symlinks,
                bind,
                "follow_root_symlinks()",
                "bind()",
            ),
            (
                options != ShareOptions::default(),
                shared,
                "options of shared directories",
                "bind(), named() and owned()",
            ),
        ];
        let stray = calls.into_iter().find(|(given, fits, ..)| *given && !fits);
        stray.map(|(_, _, what, right)| (what, right))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{BindKind, MountFlag, NamedVolumeMode, SizeExt, VolumeRequest, parse_mount};

    fn build(f: impl FnOnce(MountBuilder) -> MountBuilder) -> MicrosandboxResult<MountSpec> {
        f(MountBuilder::new("/x")).build_in(Path::new("/w"))
    }

    /// Checks that calls and a flag mean the same.
    fn check(f: impl FnOnce(MountBuilder) -> MountBuilder, flag: MountFlag, text: &str) {
        let mut parsed = parse_mount(flag, text, Path::new("/w")).unwrap();
        // The command line insists on a kind and makes volumes; calls say so explicitly.
        if let MountSource::Bind { expect, .. } = &mut parsed.source {
            *expect = None::<BindKind>;
        }
        assert_eq!(build(f).unwrap(), parsed, "{text}");
    }

    #[test]
    fn calls_mean_what_flags_mean() {
        check(
            |v| v.bind("./s").readonly().noexec(),
            MountFlag::Dir,
            "./s:/x:ro,noexec",
        );
        check(
            |v| v.bind("s").nosuid().nodev().quota(5),
            MountFlag::Dir,
            "s:/x:nosuid,nodev,quota=5",
        );
        check(
            |v| {
                v.bind("/s")
                    .stat_virtualization(StatVirtualization::Relaxed)
                    .host_permissions(HostPermissions::Mirror)
                    .owner(1, 2)
                    .follow_root_symlinks()
            },
            MountFlag::Dir,
            "/s:/x:stat-virt=relaxed,host-perms=mirror,uid=1,gid=2,follow-root-symlinks",
        );
        check(
            |v| v.tmpfs().size(100).noexec(),
            MountFlag::Tmpfs,
            "/x:100:noexec",
        );
        check(
            |v| {
                v.disk("d.img")
                    .format(DiskImageFormat::Qcow2)
                    .fstype("ext4")
                    .readonly()
            },
            MountFlag::Disk,
            "d.img:/x:ro,format=qcow2,fstype=ext4",
        );
        check(
            |v| v.named_with("n", |n| n.ensure_exists().disk().size(20.gib())),
            MountFlag::Named,
            "n:/x:kind=disk,size=20G",
        );
        check(
            |v| v.owned_with(|o| o.disk().size(20.gib())).readonly(),
            MountFlag::Owned,
            "/x:kind=disk,size=20G,ro",
        );
        check(
            |v| v.owned().stat_virtualization(StatVirtualization::Relaxed),
            MountFlag::Owned,
            "/x:stat-virt=relaxed",
        );
        check(
            |v| v.named_with("n", |n| n.ensure_exists().quota(20.gib())),
            MountFlag::Named,
            "n:/x:kind=dir,quota=20G",
        );
    }

    #[test]
    fn a_named_volume_must_exist_unless_said_otherwise() {
        let MountSource::Named { mode, request, .. } = build(|v| v.named("n")).unwrap().source
        else {
            panic!("a named volume");
        };
        assert_eq!(
            (mode, request),
            (NamedVolumeMode::Existing, VolumeRequest::default())
        );
    }

    #[test]
    fn a_change_of_kind_takes_back_what_only_the_other_had() {
        assert!(build(|v| v.named_with("n", |n| n.create().quota(1).disk().size(1))).is_ok());
        assert!(build(|v| v.named_with("n", |n| n.create().disk().size(1).directory())).is_ok());
    }

    #[test]
    fn misuse_is_reported_when_it_is_built() {
        for (built, wanted) in [
            (build(|v| v), "no mount type set"),
            (build(|v| v.tmpfs().bind("/a")), "two mount types set"),
            (build(|v| v.bind("/a").size(1)), "size() without tmpfs()"),
            (
                build(|v| v.bind("/a").fstype("ext4")),
                "fstype() without disk()",
            ),
            (
                build(|v| v.tmpfs().format(DiskImageFormat::Raw)),
                "format() without disk()",
            ),
            (build(|v| v.named("n").quota(1)), "quota() without bind()"),
            (
                build(|v| v.named("n").follow_root_symlinks()),
                "follow_root_symlinks() without bind()",
            ),
            (
                build(|v| v.disk("/a").owner(0, 0)),
                "options of shared directories without bind(), named() and owned()",
            ),
            (
                build(|v| v.disk("/a").fstype("")),
                "`` is not a file system type",
            ),
            (
                build(|v| v.named_with("n", |n| n.create().size(1))),
                "a size needs `kind=disk`",
            ),
        ] {
            let error = built.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
            let message = error.to_string();
            assert!(message.contains(wanted), "{message}: {wanted}");
            assert_eq!(error.value(), Some("/x"), "{message}");
        }
        let name = build(|v| v.named("./n")).unwrap_err();
        assert_eq!(name.value(), Some("./n"));
    }
}
