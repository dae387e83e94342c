//! What is asked of a command in a sandbox, and what commands get when nothing is.

use std::time::Duration;

use msb_protocol::{Exec, Resource, ResourceLimit, WindowSize};

/// A command to run in a sandbox.
///
/// ```
/// use microsandbox::ExecOptions;
///
/// let options = ExecOptions::new("make").args(["-j2", "test"]).env("V", "1").cwd("/app");
/// assert_eq!(options.argv(), ["make", "-j2", "test"]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOptions {
    argv: Vec<String>,
    env: Vec<(String, String)>,
    cwd: Option<String>,
    user: Option<String>,
    terminal: Option<(u16, u16)>,
    limits: Vec<ResourceLimit>,
    timeout: Option<Duration>,
}

impl ExecOptions {
    /// A command that runs `program` without arguments.
    ///
    /// ```
    /// use microsandbox::ExecOptions;
    ///
    /// assert_eq!(ExecOptions::new("uptime").argv(), ["uptime"]);
    /// ```
    pub fn new(program: impl Into<String>) -> Self {
        Self {
            argv: vec![program.into()],
            env: Vec::new(),
            cwd: None,
            user: None,
            terminal: None,
            limits: Vec::new(),
            timeout: None,
        }
    }

    /// Adds arguments.
    ///
    /// ```
    /// use microsandbox::ExecOptions;
    ///
    /// let options = ExecOptions::new("pip").args(["install", "-r"]).args(["requirements.txt"]);
    /// assert_eq!(options.argv(), ["pip", "install", "-r", "requirements.txt"]);
    /// ```
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.argv.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of its environment, on top of the image's and the sandbox's.
    ///
    /// ```
    /// use microsandbox::ExecOptions;
    ///
    /// let options = ExecOptions::new("pytest").env("CI", "1").env("TZ", "UTC");
    /// assert_ne!(options, ExecOptions::new("pytest"));
    /// ```
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Sets its working directory.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecOptions, MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let output = sandbox.exec_with(ExecOptions::new("pwd").cwd("/app"))?.output().await?;
    /// assert_eq!(output.stdout(), "/app\n");
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn cwd(mut self, path: impl Into<String>) -> Self {
        self.cwd = Some(path.into());
        self
    }

    /// Sets its user, as `name`, `uid`, `name:group` or `uid:gid`.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecOptions, MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let output = sandbox.exec_with(ExecOptions::new("id").user("1000:1000"))?.output().await?;
    /// assert!(output.stdout().starts_with("uid=1000"));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// Runs it on a terminal of this size; standard error joins standard output then.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecOptions, MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let output = sandbox.exec_with(ExecOptions::new("tty").terminal(24, 80))?.output().await?;
    /// assert!(output.stdout().starts_with("/dev/pts/"));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn terminal(mut self, rows: u16, cols: u16) -> Self {
        self.terminal = Some((rows, cols));
        self
    }

    /// Limits what it may use, as setrlimit(2) does; `u64::MAX` is no limit.
    ///
    /// ```no_run
    /// # use microsandbox::{ExecOptions, MicrosandboxResult, Resource, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let limited = ExecOptions::new("sh").args(["-c", "ulimit -n"]);
    /// let limited = limited.rlimit(Resource::Nofile, 512, 1024);
    /// assert_eq!(sandbox.exec_with(limited)?.output().await?.stdout(), "512\n");
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn rlimit(mut self, resource: Resource, soft: u64, hard: u64) -> Self {
        self.limits.push(ResourceLimit {
            resource,
            soft,
            hard,
        });
        self
    }

    /// Kills it after so long; whoever waits for it then gets [`ErrorKind::ExecTimeout`].
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// # use microsandbox::{ErrorKind, ExecOptions, MicrosandboxResult, Sandbox};
    /// # async fn example(sandbox: &Sandbox) -> MicrosandboxResult<()> {
    /// let endless = ExecOptions::new("sleep").args(["inf"]).timeout(Duration::from_secs(1));
    /// let error = sandbox.exec_with(endless)?.output().await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::ExecTimeout);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// [`ErrorKind::ExecTimeout`]: crate::ErrorKind::ExecTimeout
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = Some(limit);
        self
    }

    /// After what time it is killed.
    pub(super) fn limit(&self) -> Option<Duration> {
        self.timeout
    }

    /// Program and arguments.
    ///
    /// ```
    /// use microsandbox::ExecOptions;
    ///
    /// let options = ExecOptions::new("ls").args(["-l", "/app"]);
    /// assert_eq!(options.argv().join(" "), "ls -l /app");
    /// ```
    pub fn argv(&self) -> &[String] {
        &self.argv
    }

    /// The message to the agent; what is not said here comes from `defaults`.
    pub(super) fn into_message(self, defaults: &Defaults) -> Exec {
        let mut env = defaults.env.clone();
        for (name, value) in self.env {
            set(&mut env, name, value);
        }
        Exec {
            argv: self.argv,
            env,
            cwd: self.cwd.or_else(|| defaults.workdir.clone()),
            user: self.user.or_else(|| defaults.user.clone()),
            terminal: self.terminal.map(|(rows, cols)| WindowSize { rows, cols }),
            limits: self.limits,
            builtin: None,
        }
    }
}

/// What commands of a sandbox get unless they say otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Defaults {
    pub(super) env: Vec<(String, String)>,
    pub(super) workdir: Option<String>,
    pub(super) user: Option<String>,
}

/// Sets a variable in place of one with the same name.
pub(super) fn set(env: &mut Vec<(String, String)>, name: String, value: String) {
    match env.iter_mut().find(|(known, _)| *known == name) {
        Some((_, old)) => *old = value,
        None => env.push((name, value)),
    }
}
