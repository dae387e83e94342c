//! A sandbox, described by calls.

use std::collections::BTreeMap;
use std::env;

use super::MountBuilder;
use crate::error::{Error, ErrorKind, MicrosandboxResult};
use crate::rundir::Home;
use crate::sandbox::{Launch, Sandbox};
use crate::spec::{
    Accel, ImageSource, Mebibytes, ProcessSpec, SandboxName, SandboxSpec, SecurityProfile, VmmKind,
};

/// Describes a sandbox that is to be made.
///
/// ```no_run
/// use microsandbox::{MicrosandboxResult, Sandbox, SizeExt};
///
/// # async fn example() -> MicrosandboxResult<()> {
/// let sb = Sandbox::builder("dev")
///     .image("python")
///     .memory(1.gib())
///     .volume("/app/src", |v| v.bind("./src").readonly().noexec())
///     .volume("/app/data", |v| v.bind("./data"))
///     .create()
///     .await?;
/// # let _ = sb;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `create` is called"]
pub struct SandboxBuilder {
    name: String,
    image: Option<String>,
    mounts: Vec<MountBuilder>,
    cpus: u8,
    memory: Mebibytes,
    root_disk: Mebibytes,
    security: SecurityProfile,
    process: ProcessSpec,
    labels: BTreeMap<String, String>,
    vmm: Option<VmmKind>,
    accel: Option<Accel>,
}

impl Sandbox {
    /// Begins a new sandbox: one virtual CPU, 512 MiB of memory, a root disk of 4 GiB.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, SizeExt};
    /// let spec = Sandbox::builder("worker").image("alpine").build()?;
    /// assert_eq!((spec.name.as_str(), spec.cpus, spec.memory), ("worker", 1, 512.mib()));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn builder(name: impl Into<String>) -> SandboxBuilder {
        SandboxBuilder {
            name: name.into(),
            image: None,
            mounts: Vec::new(),
            cpus: 1,
            memory: Mebibytes(512),
            root_disk: Mebibytes(4096),
            security: SecurityProfile::Default,
            process: ProcessSpec::default(),
            labels: BTreeMap::new(),
            vmm: None,
            accel: None,
        }
    }
}

impl SandboxBuilder {
    /// Where its root file system comes from: a name in the local store, or a host path (beginning
    /// with `/`, `./` or `../`) of a directory or a disk image.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, spec::ImageSource};
    /// let stored = Sandbox::builder("worker").image("alpine:3.20").build()?;
    /// assert!(matches!(stored.image, ImageSource::Stored { .. }));
    /// let own = Sandbox::builder("worker").image("./rootfs").build()?;
    /// assert!(matches!(own.image, ImageSource::Directory { .. }));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn image(mut self, image: impl Into<String>) -> Self {
        self.image = Some(image.into());
        self
    }

    /// Mounts a volume at a guest path.
    ///
    /// ```
    /// use microsandbox::Sandbox;
    ///
    /// let spec = Sandbox::builder("worker")
    ///     .image("alpine")
    ///     .volume("/tmp/scratch", |v| v.tmpfs().size(100).noexec())
    ///     .build()?;
    /// assert_eq!(spec.mounts[0].target.as_str(), "/tmp/scratch");
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn volume(
        mut self,
        path: impl Into<String>,
        f: impl FnOnce(MountBuilder) -> MountBuilder,
    ) -> Self {
        self.mounts.push(f(MountBuilder::new(path)));
        self
    }

    /// Number of virtual CPUs.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let spec = Sandbox::builder("worker").image("alpine").cpus(4).build()?;
    /// assert_eq!(spec.cpus, 4);
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.cpus = cpus;
        self
    }

    /// Memory: a number of MiB, or `2.gib()`.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, SizeExt};
    /// let spec = Sandbox::builder("worker").image("alpine").memory(2.gib()).build()?;
    /// assert_eq!(spec.memory, 2048.mib());
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn memory(mut self, size: impl Into<Mebibytes>) -> Self {
        self.memory = size.into();
        self
    }

    /// Size of the disk that takes what the sandbox writes to its root file system.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, SizeExt};
    /// let spec = Sandbox::builder("worker").image("alpine").root_disk(20.gib()).build()?;
    /// assert_eq!(spec.root_disk, 20.gib());
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn root_disk(mut self, size: impl Into<Mebibytes>) -> Self {
        self.root_disk = size.into();
        self
    }

    /// What commands in it may do.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, SecurityProfile};
    /// let sb = Sandbox::builder("ci").image("python").security(SecurityProfile::Restricted);
    /// assert_eq!(sb.build()?.security, SecurityProfile::Restricted);
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn security(mut self, profile: SecurityProfile) -> Self {
        self.security = profile;
        self
    }

    /// Adds an environment variable.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let spec = Sandbox::builder("worker").image("alpine").env("LANG", "C.UTF-8").build()?;
    /// assert_eq!(spec.process.env, [("LANG".to_owned(), "C.UTF-8".to_owned())]);
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.process.env.push((name.into(), value.into()));
        self
    }

    /// Working directory of commands.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let spec = Sandbox::builder("worker").image("alpine").workdir("/app").build()?;
    /// assert_eq!(spec.process.workdir.as_deref(), Some("/app"));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn workdir(mut self, dir: impl Into<String>) -> Self {
        self.process.workdir = Some(dir.into());
        self
    }

    /// User that commands run as: `name`, `uid`, `name:group` or `uid:gid`.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let spec = Sandbox::builder("worker").image("alpine").user("1000:1000").build()?;
    /// assert_eq!(spec.process.user.as_deref(), Some("1000:1000"));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.process.user = Some(user.into());
        self
    }

    /// Host name of the guest; the sandbox's name when this is not called.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let spec = Sandbox::builder("worker").image("alpine").hostname("build").build()?;
    /// assert_eq!(spec.process.hostname.as_deref(), Some("build"));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.process.hostname = Some(name.into());
        self
    }

    /// Program and leading arguments in place of the image's entrypoint.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let sb = Sandbox::builder("worker").image("python").entrypoint(["python3", "-u"]);
    /// assert_eq!(sb.build()?.process.entrypoint.unwrap(), ["python3", "-u"]);
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn entrypoint<T: Into<String>>(mut self, argv: impl IntoIterator<Item = T>) -> Self {
        self.process.entrypoint = Some(argv.into_iter().map(Into::into).collect());
        self
    }

    /// Adds a label.
    ///
    /// ```
    /// # use microsandbox::Sandbox;
    /// let spec = Sandbox::builder("worker").image("alpine").label("team", "ml").build()?;
    /// assert_eq!(spec.labels["team"], "ml");
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// Program that runs the VM; the best one found when this is not called.
    ///
    /// ```
    /// # use microsandbox::{Sandbox, VmmKind};
    /// let sb = Sandbox::builder("worker").image("alpine").vmm(VmmKind::CloudHypervisor);
    /// assert_eq!(sb.build()?.vmm, Some(VmmKind::CloudHypervisor));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn vmm(mut self, vmm: VmmKind) -> Self {
        self.vmm = Some(vmm);
        self
    }

    /// How the VM's processor is made; by hardware where that works when this is not called.
    ///
    /// ```
    /// # use microsandbox::{Accel, Sandbox, VmmKind};
    /// let sb = Sandbox::builder("ci").image("alpine").vmm(VmmKind::Qemu).accel(Accel::Tcg);
    /// assert_eq!(sb.build()?.accel, Some(Accel::Tcg));
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = Some(accel);
        self
    }

    /// What was described, checked as far as that is possible without looking at the host.
    ///
    /// ```
    /// use microsandbox::Sandbox;
    ///
    /// let error = Sandbox::builder("-bad").image("alpine").cpus(0).build().unwrap_err();
    /// assert_eq!(error.value(), Some("-bad"));
    /// assert_eq!(error.also()[0].to_string(), "a sandbox needs a CPU");
    /// ```
    ///
    /// # Errors
    ///
    /// Everything that is wrong: the first as the error, the rest in [`Error::also`].
    pub fn build(self) -> MicrosandboxResult<SandboxSpec> {
        let cwd = env::current_dir()
            .map_err(|error| Error::io("cannot find the current directory", error))?;
        let mut errors = Vec::new();
        let mut keep = |error: Error| errors.push(error);
        let name = SandboxName::try_from(self.name)
            .map_err(|error| keep(error.into()))
            .ok();
        let no_image =
            || Error::new(ErrorKind::InvalidConfig, "no image set").with_hint("call image()");
        let image = self
            .image
            .ok_or_else(no_image)
            .and_then(|image| ImageSource::parse(&image, &cwd));
        let image = image.map_err(&mut keep).ok();
        if self.cpus == 0 {
            keep(Error::new(ErrorKind::InvalidConfig, "a sandbox needs a CPU").with_value("0"));
        }
        let mounts: Vec<_> = self
            .mounts
            .into_iter()
            .filter_map(|mount| mount.build_in(&cwd).map_err(&mut keep).ok())
            .collect();
        if let Some(error) = Error::all(errors) {
            return Err(error);
        }
        let (Some(name), Some(image)) = (name, image) else {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                "name and image are needed",
            ));
        };
        Ok(SandboxSpec {
            name,
            image,
            mounts,
            cpus: self.cpus,
            memory: self.memory,
            root_disk: self.root_disk,
            security: self.security,
            process: self.process,
            labels: self.labels,
            ephemeral: false,
            vmm: self.vmm,
            accel: self.accel,
        })
    }

    /// Makes the sandbox and starts it. When it does not start, nothing of it is left.
    ///
    /// ```no_run
    /// # async fn example() -> microsandbox::MicrosandboxResult<()> {
    /// # use microsandbox::Sandbox;
    /// let sb = Sandbox::builder("worker").image("alpine").create().await?;
    /// println!("{}", sb.shell("uname -a").await?.stdout());
    /// sb.stop().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfig`] and its like before anything is made,
    /// [`ErrorKind::BootStart`] after.
    pub async fn create(self) -> MicrosandboxResult<Sandbox> {
        let spec = self.build()?;
        Sandbox::launch(&Home::from_env()?, spec, Launch::detached()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_wrong_is_reported_at_once() {
        let error = Sandbox::builder("-bad")
            .cpus(0)
            .volume("relative", |v| v.tmpfs())
            .volume("/x", |v| v)
            .build()
            .unwrap_err();
        assert_eq!(error.value(), Some("-bad"));
        let also: Vec<_> = error.also().iter().map(ToString::to_string).collect();
        assert_eq!(also.len(), 4, "{also:?}");
    }
}
