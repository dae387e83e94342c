//! A sandbox as the SDK sees it: created, started, used, stopped, removed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::host::HostFacts;
use crate::image::{ImageConfig, ImageStore};
use crate::mend::mend;
use crate::plan::{Plan, standing};
use crate::rundir::{Home, SandboxDir, SandboxState};
use crate::spec::{ImageSource, SandboxName, SandboxSpec};
use crate::supervisor::control::{FromSupervisor, SOCKET, ToSupervisor};
use crate::{Error, ErrorKind, MicrosandboxResult, supervisor};

mod client;
mod copy;
mod exec;
mod handle;
mod options;
mod plug;

use client::Client;
pub use copy::Copied;
pub use exec::{ExecControl, ExecEvent, ExecHandle, ExecOutput, ExecStdin};
pub use handle::SandboxHandle;
use options::Defaults;
pub use options::ExecOptions;

/// What a shell's users find programs in when the image does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long commands have after SIGTERM when nothing else is said.
const GRACE: Duration = Duration::from_secs(2);

/// How long a stop may take when nothing else is said.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// How long a supervisor that begins or ends is waited for.
const REACH_LIMIT: Duration = Duration::from_secs(10);

/// A running sandbox.
///
/// It goes on running when the value is dropped, unless it was made to end with its caller.
///
/// ```no_run
/// # use microsandbox::{MicrosandboxResult, Sandbox};
/// # async fn example() -> MicrosandboxResult<()> {
/// let sb = Sandbox::builder("worker").image("python").create().await?;
/// let output = sb.exec("python", ["-c", "print(6 * 7)"]).await?;
/// assert_eq!(output.stdout(), "42\n");
/// sb.stop().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Sandbox {
    dir: SandboxDir,
    spec: SandboxSpec,
    image: ImageConfig,
    client: Arc<Client>,
    boot_ms: Option<u64>,
}

/// How a sandbox is started.
///
/// ```no_run
/// use microsandbox::rundir::Home;
///
/// # use microsandbox::{Launch, MicrosandboxResult, Sandbox};
/// # async fn example() -> MicrosandboxResult<()> {
/// let launch = Launch { attached: true, progress: &|step| eprintln!("{step}") };
/// let spec = Sandbox::builder("worker").image("python").build()?;
/// let sb = Sandbox::launch(&Home::from_env()?, spec, launch).await?;
/// # let _ = sb;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy)]
pub struct Launch<'a> {
    /// It ends when this process does.
    pub attached: bool,
    /// Called with each step of the start.
    pub progress: &'a (dyn Fn(&str) + Sync),
}

impl Launch<'_> {
    /// A sandbox that outlives its caller, started without a word.
    ///
    /// ```
    /// use microsandbox::Launch;
    ///
    /// let launch = Launch { progress: &|step| eprintln!("{step}"), ..Launch::detached() };
    /// assert!(!launch.attached);
    /// ```
    pub fn detached() -> Self {
        Launch {
            attached: false,
            progress: &|_| {},
        }
    }
}

impl Sandbox {
    /// Makes a sandbox and starts it. When it does not start, nothing of it is left.
    ///
    /// ```no_run
    /// use microsandbox::rundir::Home;
    ///
    /// # use microsandbox::{Launch, MicrosandboxResult, Sandbox};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let spec = Sandbox::builder("worker").image("python").build()?;
    /// let sb = Sandbox::launch(&Home::from_env()?, spec, Launch::detached()).await?;
    /// println!("{} runs", sb.name());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Everything that can be known without starting anything comes before anything is made; after
    /// that, [`ErrorKind::BootStart`] says what did not start and why.
    pub async fn launch(
        home: &Home,
        spec: SandboxSpec,
        launch: Launch<'_>,
    ) -> MicrosandboxResult<Self> {
        mend(home);
        let plan = decide(home, &spec)?;
        let (dir, making) = home.create_sandbox(&spec)?;
        let started = start(home, dir, spec, plan, launch).await;
        drop(making);
        if started.is_err() {
            // The supervisor has removed everything, unless it was killed.
            mend(home);
        }
        started
    }

    /// Starts a sandbox that does not run.
    ///
    /// ```no_run
    /// use microsandbox::{rundir::Home, spec::SandboxName};
    ///
    /// # use microsandbox::{Launch, MicrosandboxResult, Sandbox};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let name = SandboxName::try_from("worker".to_owned())?;
    /// let sb = Sandbox::start(&Home::from_env()?, &name, Launch::detached()).await?;
    /// println!("{} runs again", sb.name());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxNotFound`], [`ErrorKind::SandboxStillRunning`] when it runs, and as
    /// [`Sandbox::launch`]; the sandbox stays as it was.
    pub async fn start(
        home: &Home,
        name: &SandboxName,
        launch: Launch<'_>,
    ) -> MicrosandboxResult<Self> {
        mend(home);
        let dir = home.find_sandbox(name)?;
        if reach(home, &dir).await?.is_some() || dir.is_running() {
            return Err(Error::new(
                ErrorKind::SandboxStillRunning,
                format!("sandbox `{name}` is running already"),
            )
            .with_value(name.as_str()));
        }
        let spec = standing(dir.spec()?);
        let plan = decide(home, &spec)?;
        start(home, dir, spec, plan, launch).await
    }

    /// Connects to a sandbox that runs.
    ///
    /// ```no_run
    /// use microsandbox::{rundir::Home, spec::SandboxName};
    ///
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let name = SandboxName::try_from("worker".to_owned())?;
    /// let sb = Sandbox::connect(&Home::from_env()?, &name).await?;
    /// println!("{}", sb.exec("date", ["-u"]).await?.stdout());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxNotFound`], or [`ErrorKind::SandboxNotRunning`] when it does not run.
    pub async fn connect(home: &Home, name: &SandboxName) -> MicrosandboxResult<Self> {
        let dir = home.find_sandbox(name)?;
        let not_running = || {
            Error::new(
                ErrorKind::SandboxNotRunning,
                format!("sandbox `{name}` is not running"),
            )
            .with_value(name.as_str())
            .with_hint(format!("start it with `msb start {name}`"))
        };
        let client = reach(home, &dir).await?.ok_or_else(not_running)?;
        let spec = dir.spec()?;
        let boot_ms = dir.state()?.boot_ms;
        Ok(Self {
            image: image_config(home, &spec),
            dir,
            spec,
            client,
            boot_ms,
        })
    }

    /// Its name.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let sb = Sandbox::builder("worker").image("python").create().await?;
    /// assert_eq!(sb.name(), "worker");
    /// # Ok(())
    /// # }
    /// ```
    pub fn name(&self) -> &str {
        self.dir.name().as_str()
    }

    /// The request that it was made from.
    ///
    /// ```no_run
    /// # use microsandbox::Sandbox;
    /// # fn example(sandbox: &Sandbox) {
    /// let spec = sandbox.spec();
    /// println!("{} CPUs, {} MiB, {} volumes", spec.cpus, spec.memory.0, spec.mounts.len());
    /// # }
    /// ```
    pub fn spec(&self) -> &SandboxSpec {
        &self.spec
    }

    /// Its folder, with its logs.
    ///
    /// ```no_run
    /// # use microsandbox::Sandbox;
    /// # fn example(sandbox: &Sandbox) {
    /// println!("what detached commands print: {}", sandbox.dir().output_log().display());
    /// println!("what the guest's kernel says: {}", sandbox.dir().console_log().display());
    /// # }
    /// ```
    pub fn dir(&self) -> &SandboxDir {
        &self.dir
    }

    /// What it is doing.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let state = sandbox.state()?;
    /// println!("{:?} since {:?}", state.status, state.started_at_ms);
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

    /// Milliseconds that its start took.
    ///
    /// ```no_run
    /// # use microsandbox::Sandbox;
    /// # fn example(sandbox: &Sandbox) {
    /// if let Some(ms) = sandbox.boot_ms() {
    ///     println!("ready after {ms} ms");
    /// }
    /// # }
    /// ```
    pub fn boot_ms(&self) -> Option<u64> {
        self.boot_ms
    }

    /// Program and arguments that run when a user gives `command`, which may be empty: the
    /// entrypoint comes first, the image's own arguments stand in for none.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecOptions, MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let argv = sandbox.main_command(&["--version".to_owned()]);
    /// let command = ExecOptions::new(&argv[0]).args(&argv[1..]);
    /// print!("{}", sandbox.exec_with(command)?.output().await?.stdout());
    /// # Ok(())
    /// # }
    /// ```
    pub fn main_command(&self, command: &[String]) -> Vec<String> {
        let entrypoint = self.spec.process.entrypoint.as_ref();
        let mut argv = entrypoint.unwrap_or(&self.image.entrypoint).clone();
        match (command, entrypoint) {
            ([], None) => argv.extend_from_slice(&self.image.cmd),
            (given, _) => argv.extend_from_slice(given),
        }
        if argv.is_empty() {
            argv.push("/bin/sh".to_owned());
        }
        argv
    }

    /// Runs a command and waits for its end. It reads nothing from its standard input.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let output = sandbox.exec("pip", ["install", "requests"]).await?;
    /// println!("{}: {}", output.code(), output.stdout());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ExecFailed`] when it could not be started.
    pub async fn exec(
        &self,
        program: impl Into<String>,
        args: impl IntoIterator<Item = impl Into<String>>,
    ) -> MicrosandboxResult<ExecOutput> {
        self.exec_with(ExecOptions::new(program).args(args))?
            .output()
            .await
    }

    /// Runs a line of the guest's shell and waits for its end.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let output = sandbox.shell("ls /app/data | wc -l").await?;
    /// println!("{} files", output.stdout().trim());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Sandbox::exec`].
    pub async fn shell(&self, line: impl Into<String>) -> MicrosandboxResult<ExecOutput> {
        self.exec("/bin/sh", ["-c".to_owned(), line.into()]).await
    }

    /// Starts a command and gives a handle to it.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecOptions, MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let tests = ExecOptions::new("pytest").args(["-q"]).cwd("/app/src").env("CI", "1");
    /// let output = sandbox.exec_with(tests)?.output().await?;
    /// assert!(output.success(), "{}", output.stdout());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxNotRunning`] when the sandbox has ended.
    pub fn exec_with(&self, options: ExecOptions) -> MicrosandboxResult<ExecHandle> {
        let limit = options.limit();
        let exec = options.into_message(&self.defaults());
        ExecHandle::start(&self.client, &exec, limit)
    }

    /// Ends it: commands are asked to end, file systems are synced and unmounted.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example() -> MicrosandboxResult<()> {
    /// let sb = Sandbox::get("worker").await?.connect().await?;
    /// sb.stop().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::BootStart`] when something broke meanwhile.
    pub async fn stop(&self) -> MicrosandboxResult<()> {
        self.stop_within(STOP_LIMIT).await
    }

    /// Ends it, by force when that takes longer than `limit`.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// sandbox.stop_within(Duration::from_secs(60)).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Sandbox::stop`].
    pub async fn stop_within(&self, limit: Duration) -> MicrosandboxResult<()> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.client.tell(&ToSupervisor::Stop {
            grace_ms: millis(GRACE.min(limit)),
            limit_ms: millis(limit),
        });
        self.wait().await
    }

    /// Ends it at once; what the guest has not written yet is lost.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// sandbox.kill().await?;
    /// Sandbox::remove(sandbox.name()).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Sandbox::stop`].
    pub async fn kill(&self) -> MicrosandboxResult<()> {
        self.client.tell(&ToSupervisor::Kill);
        self.wait().await
    }

    /// Waits until it has ended.
    ///
    /// ```no_run
    /// # use microsandbox::Sandbox;
    /// # async fn example(sandbox: &Sandbox) {
    /// match sandbox.wait().await {
    ///     Ok(()) => println!("{} was stopped", sandbox.name()),
    ///     Err(error) => println!("{} broke down: {error}", sandbox.name()),
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::BootStart`] when it broke down rather than being stopped.
    pub async fn wait(&self) -> MicrosandboxResult<()> {
        why_ended(&self.client).await.map_or(Ok(()), Err)
    }

    fn defaults(&self) -> Defaults {
        let mut env = vec![("PATH".to_owned(), PATH.to_owned())];
        for (name, value) in self.image.env.iter().chain(&self.spec.process.env) {
            options::set(&mut env, name.clone(), value.clone());
        }
        let process = &self.spec.process;
        Defaults {
            env,
            workdir: process
                .workdir
                .clone()
                .or_else(|| self.image.workdir.clone()),
            user: process.user.clone().or_else(|| self.image.user.clone()),
        }
    }
}

/// Connects to the supervisor of a sandbox. One that begins or ends at this moment is waited for.
async fn reach(home: &Home, dir: &SandboxDir) -> MicrosandboxResult<Option<Arc<Client>>> {
    let socket = home.socket_dir(dir.name()).socket(SOCKET)?;
    let deadline = Instant::now() + REACH_LIMIT;
    while dir.is_running() && Instant::now() < deadline {
        if let Ok(client) = Client::connect(&socket).await {
            return Ok(Some(client));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(None)
}

/// Waits for the supervisor's end; an error when it told of one, or said nothing at all.
async fn why_ended(client: &Client) -> Option<Error> {
    while let Some(message) = client.told().await {
        match message {
            FromSupervisor::Failed { failure } => {
                client.closed().await;
                return Some(failure.into_error());
            }
            FromSupervisor::Stopped => {
                client.closed().await;
                return None;
            }
            FromSupervisor::Progress { .. }
            | FromSupervisor::Ready { .. }
            | FromSupervisor::Changed { .. } => {}
        }
    }
    Some(Error::new(
        ErrorKind::BootStart,
        "the sandbox's supervisor was killed",
    ))
}

/// Decides what is done for `spec`, touching nothing.
fn decide(home: &Home, spec: &SandboxSpec) -> MicrosandboxResult<Plan> {
    let facts = HostFacts::read(spec, home)?;
    tracing::trace!("the host is {facts:?}");
    let plan = Plan::decide(spec, &facts)?;
    tracing::debug!("the plan is {plan:?}");
    Ok(plan)
}

async fn start(
    home: &Home,
    dir: SandboxDir,
    spec: SandboxSpec,
    plan: Plan,
    launch: Launch<'_>,
) -> MicrosandboxResult<Sandbox> {
    let lost = |error| Error::io("the connection to the supervisor failed", error);
    let client = Client::adopt(supervisor::spawn(&dir)?).map_err(lost)?;
    client.tell(&ToSupervisor::Start {
        plan: Box::new(plan),
        attached: launch.attached,
    });
    loop {
        match client.told().await {
            Some(FromSupervisor::Progress { step }) => {
                tracing::info!("{step}");
                (launch.progress)(&step);
            }
            Some(FromSupervisor::Changed { .. }) => {}
            Some(FromSupervisor::Ready { boot_ms }) => {
                let image = image_config(home, &spec);
                return Ok(Sandbox {
                    dir,
                    spec,
                    image,
                    client,
                    boot_ms: Some(boot_ms),
                });
            }
            Some(FromSupervisor::Failed { failure }) => {
                client.closed().await;
                return Err(failure.into_error());
            }
            Some(FromSupervisor::Stopped) | None => {
                let log = dir.supervisor_log();
                return Err(Error::new(
                    ErrorKind::BootStart,
                    "the supervisor ended without a word",
                )
                .with_hint(format!("its log is `{}`", log.display())));
            }
        }
    }
}

/// What the image says about commands; nothing when it is not one of the store.
fn image_config(home: &Home, spec: &SandboxSpec) -> ImageConfig {
    match &spec.image {
        ImageSource::Stored { reference } => ImageStore::of(home)
            .find(reference)
            .map(|image| image.record.config)
            .unwrap_or_default(),
        ImageSource::Directory { .. } | ImageSource::Disk { .. } => ImageConfig::default(),
    }
}
