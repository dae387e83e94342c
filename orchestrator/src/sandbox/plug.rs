//! Mounts that come and go while the sandbox runs.

use super::Sandbox;
use super::client::Client;
use crate::host::HostFacts;
use crate::plan::{Addition, Refusal, standing};
use crate::rundir::Home;
use crate::spec::{GuestPath, MountSpec};
use crate::supervisor::control::{FromSupervisor, SOCKET, ToSupervisor};
use crate::{Error, ErrorKind, MicrosandboxResult, MountBuilder};

impl Sandbox {
    /// Mounts one more volume at `path`, described as for
    /// [`SandboxBuilder::volume`](crate::SandboxBuilder::volume). It is there after a restart.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// sandbox.mount("/app/data", |v| v.bind("./data").readonly()).await?;
    /// print!("{}", sandbox.exec("ls", ["/app/data"]).await?.stdout());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Everything that can be known before anything is started comes first, with
    /// [`ErrorKind::Unsupported`] where the VMM gives a running guest no devices. After that nothing
    /// is left of a mount that does not come to stand.
    pub async fn mount(
        &self,
        path: &str,
        f: impl FnOnce(MountBuilder) -> MountBuilder,
    ) -> MicrosandboxResult<()> {
        self.add_mount(f(MountBuilder::new(path)).build()?).await
    }

    /// Adds a mount, as [`Sandbox::mount`].
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox, other: &Sandbox) -> MicrosandboxResult<()> {
    /// for mount in other.mounts()? {
    ///     sandbox.add_mount(mount).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Sandbox::mount`].
    pub async fn add_mount(&self, mount: MountSpec) -> MicrosandboxResult<()> {
        let addition = Box::new(self.addition(&mount)?);
        self.change(&ToSupervisor::Mount { addition }).await
    }

    /// Removes the mount at `path`. With `force` also while something in the sandbox uses it, which
    /// then fails.
    ///
    /// ```no_run
    /// # use microsandbox::{ErrorKind, MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// if let Err(error) = sandbox.unmount("/app/data", false).await {
    ///     assert_eq!(error.kind(), ErrorKind::InUse);
    ///     sandbox.unmount("/app/data", true).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InUse`] while something uses it; the mount stays.
    pub async fn unmount(&self, path: &str, force: bool) -> MicrosandboxResult<()> {
        let target = GuestPath::try_from(path.to_owned())?;
        let mounts = self.mounts()?;
        if !mounts.iter().any(|mount| mount.target == target) {
            let message = format!(
                "no volume of sandbox `{}` is mounted at `{target}`",
                self.name()
            );
            return Err(Error::new(ErrorKind::InvalidConfig, message)
                .with_value(path)
                .with_hint(format!("`msb mount ls {}` lists them", self.name())));
        }
        self.change(&ToSupervisor::Unmount { target, force }).await
    }

    /// Its volumes as they are now.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// for mount in sandbox.mounts()? {
    ///     println!("{}", mount.target.as_str());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when its folder cannot be read.
    pub fn mounts(&self) -> MicrosandboxResult<Vec<MountSpec>> {
        Ok(self.dir.spec()?.mounts)
    }

    /// Decides what is done to add a mount, touching nothing.
    fn addition(&self, mount: &MountSpec) -> MicrosandboxResult<Addition> {
        let home = self.home()?;
        let spec = self.dir.spec()?;
        let mut both = standing(spec.clone());
        both.mounts.push(mount.clone());
        let facts = HostFacts::read(&both, &home)?;
        let added = self.dir.plan()?.add(&spec, mount, &facts);
        added.map_err(|refusals: Vec<Refusal>| {
            let none = || Error::new(ErrorKind::InvalidConfig, "the volume cannot be mounted");
            Error::all(refusals.into_iter().map(Error::from)).unwrap_or_else(none)
        })
    }

    /// Has the supervisor do something, over a connection of its own: answers must not mix.
    async fn change(&self, message: &ToSupervisor) -> MicrosandboxResult<()> {
        let ended = || {
            Error::new(
                ErrorKind::SandboxNotRunning,
                format!("sandbox `{}` has ended", self.name()),
            )
            .with_value(self.name())
        };
        let socket = self.home()?.socket_dir(self.dir.name()).socket(SOCKET)?;
        let client = Client::connect(&socket).await.map_err(|_| ended())?;
        client.tell(message);
        while let Some(told) = client.told().await {
            match told {
                FromSupervisor::Changed { failure: None } => return Ok(()),
                FromSupervisor::Changed {
                    failure: Some(failure),
                }
                | FromSupervisor::Failed { failure } => return Err(failure.into_error()),
                FromSupervisor::Progress { .. } | FromSupervisor::Ready { .. } => {}
                FromSupervisor::Stopped => return Err(ended()),
            }
        }
        Err(ended())
    }

    /// The state folder that it lies in.
    fn home(&self) -> MicrosandboxResult<Home> {
        let home = self.dir.path().parent().and_then(std::path::Path::parent);
        Home::at(home.unwrap_or(std::path::Path::new("/")))
    }
}
