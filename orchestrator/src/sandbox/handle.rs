//! Sandboxes that exist, whether they run or not: found, listed, started, removed.

use crate::rundir::{Home, SandboxDir, SandboxState};
use crate::sandbox::{Launch, Sandbox};
use crate::spec::{SandboxName, SandboxSpec};
use crate::{Error, ErrorKind, MicrosandboxResult};

/// A handle on a sandbox that exists.
///
/// ```no_run
/// # use microsandbox::{MicrosandboxResult, Sandbox};
/// # async fn example() -> MicrosandboxResult<()> {
/// let handle = Sandbox::get("worker").await?;
/// let sandbox = if handle.is_running() { handle.connect().await? } else { handle.start().await? };
/// println!("{}", sandbox.exec("uname", ["-r"]).await?.stdout());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct SandboxHandle {
    home: Home,
    dir: SandboxDir,
}

impl Sandbox {
    /// Finds a sandbox.
    ///
    /// ```no_run
    /// # use microsandbox::{ErrorKind, Sandbox};
    /// # async fn example() {
    /// match Sandbox::get("worker").await {
    ///     Ok(handle) => println!("{} is there", handle.name()),
    ///     Err(error) => assert_eq!(error.kind(), ErrorKind::SandboxNotFound),
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxNotFound`] when there is none of that name.
    pub async fn get(name: &str) -> MicrosandboxResult<SandboxHandle> {
        let name = SandboxName::try_from(name.to_owned())?;
        blocking(move || {
            let home = Home::from_env()?;
            let dir = home.find_sandbox(&name)?;
            Ok(SandboxHandle { home, dir })
        })
        .await
    }

    /// All sandboxes, in the order of their names.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// for handle in Sandbox::list().await? {
    ///     let state = if handle.is_running() { "runs" } else { "is stopped" };
    ///     println!("{} {state}", handle.name());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when they cannot be listed.
    pub async fn list() -> MicrosandboxResult<Vec<SandboxHandle>> {
        blocking(|| {
            let home = Home::from_env()?;
            crate::mend::mend(&home);
            let dirs = home.list_sandboxes()?.into_iter();
            Ok(dirs
                .map(|dir| SandboxHandle {
                    home: home.clone(),
                    dir,
                })
                .collect())
        })
        .await
    }

    /// Removes a sandbox with what it wrote to its root file system. Named volumes stay.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// Sandbox::get("worker").await?.stop().await?;
    /// Sandbox::remove("worker").await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxStillRunning`] while it runs, [`ErrorKind::SandboxNotFound`].
    pub async fn remove(name: &str) -> MicrosandboxResult<()> {
        Self::get(name).await?.remove().await
    }
}

impl SandboxHandle {
    /// Its name.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let names: Vec<_> = Sandbox::list().await?.iter().map(|s| s.name().to_owned()).collect();
    /// println!("{}", names.join(" "));
    /// # Ok(())
    /// # }
    /// ```
    pub fn name(&self) -> &str {
        self.dir.name().as_str()
    }

    /// The request that it was made from.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SandboxHandle};
    /// # fn example(handle: &SandboxHandle) -> MicrosandboxResult<()> {
    /// for mount in handle.spec()?.mounts {
    ///     println!("{}", mount.target.as_str());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when its folder cannot be read.
    pub fn spec(&self) -> MicrosandboxResult<SandboxSpec> {
        self.dir.spec()
    }

    /// What it is doing.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SandboxHandle};
    /// # fn example(handle: &SandboxHandle) -> MicrosandboxResult<()> {
    /// if let Some(why) = handle.state()?.failure {
    ///     println!("{} broke down: {why}", handle.name());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when its folder cannot be read.
    pub fn state(&self) -> MicrosandboxResult<SandboxState> {
        self.dir.state()
    }

    /// Whether it runs.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SandboxHandle};
    /// # async fn example(handle: &SandboxHandle) -> MicrosandboxResult<()> {
    /// if handle.is_running() {
    ///     handle.stop().await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn is_running(&self) -> bool {
        self.dir.is_running()
    }

    /// Connects to it while it runs.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SandboxHandle};
    /// # async fn example(handle: &SandboxHandle) -> MicrosandboxResult<()> {
    /// let sb = handle.connect().await?;
    /// print!("{}", sb.exec("ps", ["-ef"]).await?.stdout());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxNotRunning`] when it does not run.
    pub async fn connect(&self) -> MicrosandboxResult<Sandbox> {
        Sandbox::connect(&self.home, self.dir.name()).await
    }

    /// Starts it again, with everything it wrote to its root file system and all its volumes. It
    /// goes on running when the value is dropped.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, SandboxHandle};
    /// # async fn example(handle: &SandboxHandle) -> MicrosandboxResult<()> {
    /// let sb = handle.start().await?;
    /// println!("{} was ready after {:?} ms", sb.name(), sb.boot_ms());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxStillRunning`] when it runs, [`ErrorKind::BootStart`] when it does not
    /// start.
    pub async fn start(&self) -> MicrosandboxResult<Sandbox> {
        Sandbox::start(&self.home, self.dir.name(), Launch::detached()).await
    }

    /// Ends it, as [`Sandbox::stop`].
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// for handle in Sandbox::list().await? {
    ///     if handle.is_running() {
    ///         handle.stop().await?;
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxNotRunning`] when it does not run.
    pub async fn stop(&self) -> MicrosandboxResult<()> {
        self.connect().await?.stop().await
    }

    /// Removes it, as [`Sandbox::remove`].
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// for handle in Sandbox::list().await? {
    ///     if !handle.is_running() {
    ///         handle.remove().await?;
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxStillRunning`] while it runs.
    pub async fn remove(&self) -> MicrosandboxResult<()> {
        let dir = self.dir.clone();
        blocking(move || dir.remove()).await
    }
}

/// Runs what may block where it holds nobody up.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> MicrosandboxResult<T> + Send + 'static,
) -> MicrosandboxResult<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        Error::new(ErrorKind::Io, "the work on a sandbox was interrupted").with_source(error)
    })?
}
