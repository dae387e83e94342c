//! The error that every public function returns: a kind, the offending value and a way out.

use std::error::Error as StdError;
use std::fmt;

use crate::spec::{NameError, RuleError, SizeError};

/// What the SDK's functions return.
///
/// ```
/// use microsandbox::{Error, ErrorKind, MicrosandboxResult};
///
/// fn find() -> MicrosandboxResult<()> {
///     Err(Error::new(ErrorKind::VolumeNotFound, "volume `data` does not exist"))
/// }
/// assert_eq!(find().unwrap_err().kind(), ErrorKind::VolumeNotFound);
/// ```
pub type MicrosandboxResult<T> = Result<T, Error>;

/// Stable classes of errors, for programs to act on.
///
/// ```
/// # use microsandbox::{Error, ErrorKind};
/// # fn classify(error: Error) -> bool {
/// match error.kind() {
///     ErrorKind::VolumeNotFound | ErrorKind::SandboxNotFound => true,
///     _ => false,
/// }
/// # }
/// # assert!(classify(Error::new(ErrorKind::SandboxNotFound, "")));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// What was asked for makes no sense or cannot be done with what the host has.
    InvalidConfig,
    /// There is no such volume.
    VolumeNotFound,
    /// There is such a volume already, or it differs from what was asked for.
    VolumeAlreadyExists,
    /// There is no such sandbox.
    SandboxNotFound,
    /// There is such a sandbox already.
    SandboxAlreadyExists,
    /// There is no such image.
    ImageNotFound,
    /// Something else uses it: a volume of a running sandbox, a locked disk image.
    InUse,
    /// The sandbox runs, and must not for this.
    SandboxStillRunning,
    /// The sandbox does not run, or has ended meanwhile.
    SandboxNotRunning,
    /// A path leads out of the volume.
    PathEscape,
    /// The sandbox did not start.
    BootStart,
    /// A command could not be run in the sandbox.
    ExecFailed,
    /// A command took longer than it was given.
    ExecTimeout,
    /// The host refused an operation.
    Io,
    /// This host or this build cannot do it.
    Unsupported,
}

/// An error of the SDK.
///
/// It displays as one sentence without its cause; [`std::error::Error::source`] has the cause.
///
/// ```
/// use microsandbox::{Error, ErrorKind};
///
/// let error = Error::new(ErrorKind::InvalidConfig, "`9Q` is not a size")
///     .with_value("9Q")
///     .with_hint("write `9G`");
/// assert_eq!(error.to_string(), "`9Q` is not a size");
/// assert_eq!(error.value(), Some("9Q"));
/// assert_eq!(error.hint(), Some("write `9G`"));
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    value: Option<String>,
    hint: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
    also: Vec<Error>,
}

impl Error {
    /// An error of `kind` that says `message`: lower case, no full stop, without its cause.
    ///
    /// ```
    /// # use microsandbox::{Error, ErrorKind};
    /// let error = Error::new(ErrorKind::InUse, "volume `data` is in use");
    /// assert_eq!(error.to_string(), "volume `data` is in use");
    /// ```
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            value: None,
            hint: None,
            source: None,
            also: Vec::new(),
        }))
    }

    /// An error of [`ErrorKind::Io`] with the operating system's reason as its source.
    ///
    /// ```
    /// use microsandbox::{Error, ErrorKind};
    ///
    /// let reason = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
    /// let error = Error::io("cannot read `/etc/shadow`", reason);
    /// assert_eq!(error.kind(), ErrorKind::Io);
    /// assert!(std::error::Error::source(&error).is_some());
    /// ```
    pub fn io(message: impl Into<String>, reason: impl Into<std::io::Error>) -> Self {
        Self::new(ErrorKind::Io, message).with_source(reason.into())
    }

    /// Several errors found at once, or nothing when there are none. The first gives the kind.
    ///
    /// ```
    /// use microsandbox::{Error, ErrorKind};
    ///
    /// let bad = |what| Error::new(ErrorKind::InvalidConfig, what);
    /// let error = Error::all([bad("first"), bad("second")]).unwrap();
    /// assert_eq!(error.to_string(), "first");
    /// assert_eq!(error.also()[0].to_string(), "second");
    /// assert!(Error::all([]).is_none());
    /// ```
    pub fn all(errors: impl IntoIterator<Item = Self>) -> Option<Self> {
        let mut errors = errors.into_iter();
        let mut first = errors.next()?;
        first.0.also.extend(errors);
        Some(first)
    }

    /// Names the value that is at fault.
    ///
    /// ```
    /// # use microsandbox::{Error, ErrorKind};
    /// let error = Error::new(ErrorKind::InvalidConfig, "`9Q` is not a size").with_value("9Q");
    /// assert_eq!(error.value(), Some("9Q"));
    /// ```
    #[must_use]
    pub fn with_value(mut self, value: impl Into<String>) -> Self {
        self.0.value = Some(value.into());
        self
    }

    /// Says what the user can do about it.
    ///
    /// ```
    /// # use microsandbox::{Error, ErrorKind};
    /// let error = Error::new(ErrorKind::InUse, "volume `data` is in use")
    ///     .with_hint("stop the sandbox `worker`");
    /// assert_eq!(error.hint(), Some("stop the sandbox `worker`"));
    /// ```
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Keeps the cause.
    ///
    /// ```
    /// # use microsandbox::{Error, ErrorKind};
    /// let cause = "12x".parse::<u32>().unwrap_err();
    /// let error = Error::new(ErrorKind::InvalidConfig, "`12x` is not a uid").with_source(cause);
    /// assert!(std::error::Error::source(&error).is_some());
    /// ```
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Its class.
    ///
    /// ```
    /// use microsandbox::{ErrorKind, Sandbox};
    ///
    /// let error = Sandbox::builder("worker").build().unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    /// ```
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The value that is at fault, when there is a single one.
    ///
    /// ```
    /// use microsandbox::Sandbox;
    ///
    /// let error = Sandbox::builder("my worker").image("alpine").build().unwrap_err();
    /// assert_eq!(error.value(), Some("my worker"));
    /// ```
    pub fn value(&self) -> Option<&str> {
        self.0.value.as_deref()
    }

    /// What the user can do about it.
    ///
    /// ```
    /// use microsandbox::Sandbox;
    ///
    /// let error = Sandbox::builder("worker").build().unwrap_err();
    /// assert_eq!(error.to_string(), "no image set");
    /// assert_eq!(error.hint(), Some("call image()"));
    /// ```
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// What else is wrong with the same request.
    ///
    /// ```
    /// use microsandbox::Sandbox;
    ///
    /// let error = Sandbox::builder("worker").cpus(0).volume("/x", |v| v).build().unwrap_err();
    /// let more: Vec<_> = error.also().iter().map(ToString::to_string).collect();
    /// assert_eq!(more, ["a sandbox needs a CPU", "volume at `/x`: no mount type set"]);
    /// ```
    pub fn also(&self) -> &[Self] {
        &self.0.also
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Error");
        shown.field("kind", &self.0.kind);
        shown.field("message", &self.0.message);
        if let Some(hint) = &self.0.hint {
            shown.field("hint", hint);
        }
        if let Some(source) = &self.0.source {
            shown.field("source", source);
        }
        if !self.0.also.is_empty() {
            shown.field("also", &self.0.also);
        }
        shown.finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        let source: &(dyn StdError + 'static) = self.0.source.as_deref()?;
        Some(source)
    }
}

impl From<NameError> for Error {
    fn from(error: NameError) -> Self {
        Self::new(ErrorKind::InvalidConfig, error.to_string()).with_value(error.value())
    }
}

impl From<SizeError> for Error {
    fn from(error: SizeError) -> Self {
        Self::new(ErrorKind::InvalidConfig, error.to_string()).with_value(error.0)
    }
}

impl From<RuleError> for Error {
    fn from(rule: RuleError) -> Self {
        let error = Self::new(ErrorKind::InvalidConfig, rule.to_string());
        match rule.hint() {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_small_and_can_cross_threads() {
        fn crosses<T: Send + Sync + 'static>() {}
        crosses::<Error>();
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }
}
