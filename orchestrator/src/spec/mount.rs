//! The grammar of mount flags, `SOURCE:DEST[:OPTIONS]` (spec mounts 1.2 to 1.7).

use std::fmt;
use std::path::{Path, PathBuf};

use super::option::{Accepted, OptionProblem, Options, is_option};
use super::source::{absolute, is_host_path};
use super::{
    Access, BindKind, GuestPath, Mebibytes, MountSource, MountSpec, NameError, NamedVolumeMode,
    RuleError, SizeError, VolumeName, VolumeRequest,
};
use crate::error::{Error, ErrorKind};

/// The flags of the command line that mount something.
///
/// ```
/// use microsandbox::spec::{MountFlag, parse_mount};
/// use std::path::Path;
///
/// let mount = parse_mount(MountFlag::Tmpfs, "/scratch:64M:noexec", Path::new("/"))?;
/// assert!(mount.noexec);
/// assert_eq!(MountFlag::Tmpfs.to_string(), "--tmpfs");
/// # Ok::<(), microsandbox::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountFlag {
    /// `-v`: a host path or a volume name.
    Volume,
    /// `--mount-dir`.
    Dir,
    /// `--mount-file`.
    File,
    /// `--mount-named`.
    Named,
    /// `--mount-disk`.
    Disk,
    /// `--mount-owned`, whose form is `DEST[:OPTIONS]`.
    Owned,
    /// `--tmpfs`, whose form is `DEST[:SIZE][:OPTIONS]`.
    Tmpfs,
}

/// A mount flag that says nothing that could be done.
///
/// ```
/// use microsandbox::spec::{MountFlag, parse_mount};
/// use std::path::Path;
///
/// let error = parse_mount(MountFlag::Dir, "./src:/app:ro:noexec", Path::new("/")).unwrap_err();
/// assert_eq!(error.text, "./src:/app:ro:noexec");
/// assert_eq!(error.hint().as_deref(), Some("separate options with `,`"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{flag} {text}`: {problem}")]
pub struct MountError {
    /// The flag.
    pub flag: MountFlag,
    /// Its value, as given.
    pub text: String,
    /// What is wrong with it.
    pub problem: MountProblem,
}

/// What can be wrong with the value of a mount flag.
///
/// ```
/// use microsandbox::spec::{MountFlag, MountProblem, parse_mount};
/// use std::path::Path;
///
/// let error = parse_mount(MountFlag::Named, "./cache:/cache", Path::new("/")).unwrap_err();
/// assert_eq!(error.problem, MountProblem::PathAsName("./cache".to_owned()));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MountProblem {
    /// It has another form than its flag takes.
    #[error("not in the form {0}")]
    Form(&'static str),
    /// There is nothing before the `:`.
    #[error("the source before `:/` is empty")]
    EmptySource,
    /// Options were put behind a comma.
    #[error("options follow a `:`, not a `,`")]
    CommaBeforeOptions(String),
    /// There is more than one block of options.
    #[error("there is more than one block of options")]
    SecondBlock,
    /// The guest path breaks its rule.
    #[error(transparent)]
    Target(NameError),
    /// The volume name breaks its rule.
    #[error(transparent)]
    Name(NameError),
    /// A path where a name must be.
    #[error("`{0}` looks like a path, not like the name of a volume")]
    PathAsName(String),
    /// The size of a tmpfs is none.
    #[error(transparent)]
    Size(SizeError),
    /// An option is wrong.
    #[error(transparent)]
    Option(#[from] OptionProblem),
    /// The options do not go together.
    #[error(transparent)]
    Rule(#[from] RuleError),
}

impl MountFlag {
    fn form(self) -> &'static str {
        match self {
            Self::Tmpfs => "DEST[:SIZE][:OPTIONS]",
            Self::Owned => "DEST[:OPTIONS]",
            _ => "SOURCE:DEST[:OPTIONS]",
        }
    }
}

impl fmt::Display for MountFlag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Volume => "-v",
            Self::Dir => "--mount-dir",
            Self::File => "--mount-file",
            Self::Named => "--mount-named",
            Self::Disk => "--mount-disk",
            Self::Owned => "--mount-owned",
            Self::Tmpfs => "--tmpfs",
        })
    }
}

impl MountError {
    /// What the user can do about it.
    ///
    /// ```
    /// # use microsandbox::spec::{MountFlag, parse_mount};
    /// # use std::path::Path;
    /// let error = parse_mount(MountFlag::Dir, "./src:/app,ro", Path::new("/")).unwrap_err();
    /// assert_eq!(error.hint().as_deref(), Some("write --mount-dir ./src:/app:ro"));
    /// ```
    pub fn hint(&self) -> Option<String> {
        match &self.problem {
            MountProblem::Form(_) if self.flag == MountFlag::Tmpfs => {
                Some("for example --tmpfs /scratch:64M:noexec".to_owned())
            }
            MountProblem::Form(_) if self.flag == MountFlag::Owned => {
                Some("for example --mount-owned /data:kind=disk,size=1G".to_owned())
            }
            MountProblem::Form(_) | MountProblem::EmptySource => Some(format!(
                "for example {} {}:/data:ro; the guest path begins with `/`",
                self.flag,
                if self.flag == MountFlag::Named { "cache" } else { "./data" },
            )),
            MountProblem::CommaBeforeOptions(better) => Some(format!("write {} {better}", self.flag)),
            MountProblem::SecondBlock => Some("separate options with `,`".to_owned()),
            MountProblem::Name(_) if self.flag == MountFlag::Volume => Some(
                "a host path begins with `/`, `./` or `../`; `~` is expanded by the shell, and only outside quotes"
                    .to_owned(),
            ),
            MountProblem::PathAsName(path) => {
                Some(format!("to share a host directory use --mount-dir {path}:…"))
            }
            MountProblem::Option(problem) => problem.hint(self.flag),
            MountProblem::Rule(rule) => rule.hint().map(str::to_owned),
            MountProblem::Target(_) | MountProblem::Name(_) | MountProblem::Size(_) => None,
        }
    }
}

impl From<MountError> for Error {
    fn from(error: MountError) -> Self {
        let hint = error.hint();
        let shown = Self::new(ErrorKind::InvalidConfig, error.to_string()).with_value(error.text);
        match hint {
            Some(hint) => shown.with_hint(hint),
            None => shown,
        }
    }
}

/// Reads the value of a mount flag. Relative host paths are taken from `cwd`.
///
/// ```
/// use microsandbox::spec::{Access, MountFlag, parse_mount};
/// use std::path::Path;
///
/// let mount = parse_mount(MountFlag::Dir, "./src:/app/src:ro,noexec", Path::new("/home/me"))?;
/// assert_eq!(mount.target.as_str(), "/app/src");
/// assert_eq!(mount.access, Access::ReadOnly);
/// # Ok::<(), microsandbox::spec::MountError>(())
/// ```
///
/// # Errors
///
/// A [`MountError`] that names the flag, the offending part and a way out.
pub fn parse_mount(flag: MountFlag, text: &str, cwd: &Path) -> Result<MountSpec, MountError> {
    let parsed = match flag {
        MountFlag::Tmpfs => parse_tmpfs(text),
        MountFlag::Owned => parse_owned(text),
        _ => parse_with_source(flag, text, cwd),
    };
    parsed
        .and_then(|mount| {
            mount.check()?;
            Ok(mount)
        })
        .map_err(|problem| MountError {
            flag,
            text: text.to_owned(),
            problem,
        })
}

fn parse_with_source(flag: MountFlag, text: &str, cwd: &Path) -> Result<MountSpec, MountProblem> {
    let at = text.find(":/").ok_or(MountProblem::Form(flag.form()))?;
    let (source, rest) = (&text[..at], &text[at + 1..]);
    if source.is_empty() {
        return Err(MountProblem::EmptySource);
    }
    let (dest, block) = rest.split_once(':').unwrap_or((rest, ""));
    if block.contains(':') {
        return Err(MountProblem::SecondBlock);
    }
    let target = target(dest, |path, options| format!("{source}:{path}:{options}"))?;
    let path = || absolute(Path::new(source), cwd);
    match flag {
        MountFlag::Volume if is_host_path(source) => bind(target, path(), None, block),
        MountFlag::Volume => named(target, source, Accepted::NAME, block),
        MountFlag::Dir => bind(target, path(), Some(BindKind::Directory), block),
        MountFlag::File => bind(target, path(), Some(BindKind::File), block),
        MountFlag::Named => {
            if is_host_path(source) || source.starts_with('~') || source.contains('/') {
                return Err(MountProblem::PathAsName(source.to_owned()));
            }
            named(target, source, Accepted::MADE, block)
        }
        MountFlag::Disk | MountFlag::Owned | MountFlag::Tmpfs => {
            let mut options = Options::read(block, Accepted::DISK)?;
            let source = MountSource::Disk {
                path: path(),
                format: options.format()?,
                fstype: options.take("fstype").map(str::to_owned),
            };
            Ok(options.mount(target, source))
        }
    }
}

fn bind(
    target: GuestPath,
    path: PathBuf,
    expect: Option<BindKind>,
    block: &str,
) -> Result<MountSpec, MountProblem> {
    let mut options = Options::read(block, Accepted::BIND)?;
    let mut share = options.share()?;
    share.quota = options.size("quota")?;
    let source = MountSource::Bind {
        path,
        expect,
        follow_root_symlinks: options.follow_root_symlinks(),
        share,
    };
    Ok(options.mount(target, source))
}

fn named(
    target: GuestPath,
    name: &str,
    accepted: Accepted,
    block: &str,
) -> Result<MountSpec, MountProblem> {
    let name = VolumeName::try_from(name.to_owned()).map_err(MountProblem::Name)?;
    let mut options = Options::read(block, accepted)?;
    let request = request(&mut options)?;
    let share = options.share()?;
    let source = MountSource::Named {
        name,
        mode: NamedVolumeMode::EnsureExists,
        request,
        share,
    };
    Ok(options.mount(target, source))
}

fn request(options: &mut Options<'_>) -> Result<VolumeRequest, OptionProblem> {
    Ok(VolumeRequest {
        kind: options.kind()?,
        size: options.size("size")?,
        quota: options.size("quota")?,
        ..VolumeRequest::default()
    })
}

fn parse_owned(text: &str) -> Result<MountSpec, MountProblem> {
    let (dest, block) = text.split_once(':').unwrap_or((text, ""));
    if block.starts_with('/') {
        return Err(MountProblem::Form(MountFlag::Owned.form()));
    }
    if block.contains(':') {
        return Err(MountProblem::SecondBlock);
    }
    let target = target(dest, |path, options| format!("{path}:{options}"))?;
    let mut options = Options::read(block, Accepted::MADE)?;
    let source = MountSource::Owned {
        request: request(&mut options)?,
        share: options.share()?,
    };
    Ok(options.mount(target, source))
}

fn parse_tmpfs(text: &str) -> Result<MountSpec, MountProblem> {
    let form = || MountProblem::Form(MountFlag::Tmpfs.form());
    let (dest, rest) = match text.split_once(':') {
        Some((_, "")) => return Err(form()),
        Some((dest, rest)) => (dest, Some(rest)),
        None => (text, None),
    };
    let target = target(dest, |path, options| format!("{path}:{options}"))?;
    let (size, block) = match rest {
        None => (None, ""),
        Some(rest) => {
            let (first, block) = rest
                .split_once(':')
                .map_or((rest, None), |(a, b)| (a, Some(b)));
            if first.is_empty() {
                return Err(form());
            }
            if first.contains([',', '=']) || is_option(first) {
                if block.is_some() {
                    return Err(MountProblem::SecondBlock);
                }
                (None, first)
            } else {
                let size = first.parse::<Mebibytes>().map_err(MountProblem::Size)?;
                (Some(size), block.unwrap_or(""))
            }
        }
    };
    if block.contains(':') {
        return Err(MountProblem::SecondBlock);
    }
    let mut options = Options::read(block, Accepted::TMPFS)?;
    let option = options.size("size")?;
    if size.is_some() && option.is_some() {
        return Err(OptionProblem::Repeated("size".to_owned()).into());
    }
    Ok(options.mount(
        target,
        MountSource::Tmpfs {
            size: size.or(option),
        },
    ))
}

/// The guest path, or the mistake of writing options behind a comma, with `better` as its cure.
fn target(
    dest: &str,
    better: impl FnOnce(&str, &str) -> String,
) -> Result<GuestPath, MountProblem> {
    GuestPath::try_from(dest.to_owned()).map_err(|error| match dest.split_once(',') {
        Some((path, options)) if options.split(',').all(is_option) => {
            MountProblem::CommaBeforeOptions(better(path, options))
        }
        _ => MountProblem::Target(error),
    })
}

impl Options<'_> {
    fn mount(&self, target: GuestPath, source: MountSource) -> MountSpec {
        MountSpec {
            target,
            source,
            access: if self.has("ro") {
                Access::ReadOnly
            } else {
                Access::ReadWrite
            },
            noexec: self.has("noexec"),
            nosuid: self.has("nosuid"),
            nodev: self.has("nodev"),
        }
    }
}

#[cfg(test)]
mod tests;
