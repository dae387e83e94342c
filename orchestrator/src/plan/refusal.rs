//! Why there is no plan: everything that is wrong with a request on this host.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind};
use crate::spec::{GuestPath, RuleError, VmmKind, VolumeName};
use crate::volume::{Misfit, VolumeProblem};

/// One reason why a request cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Two mounts have the same guest path.
    #[error("two volumes cannot be mounted at the same guest path `{0}`")]
    SameTarget(GuestPath),
    /// A mount lies below a file mount.
    #[error("`{mount}` lies below `{file}`, where a file is mounted")]
    BelowFile {
        /// The file's guest path.
        file: GuestPath,
        /// The other's.
        mount: GuestPath,
    },
    /// A host path cannot be what it is meant to be.
    #[error("`{}`: {problem}", path.display())]
    Source {
        /// The host path.
        path: PathBuf,
        /// What is wrong.
        problem: SourceProblem,
    },
    /// One disk would be attached twice.
    #[error("`{first}` and `{second}` are the same disk, which can be attached only once")]
    SameDisk {
        /// The one by its guest path or host path.
        first: String,
        /// The other.
        second: String,
    },
    /// A named volume does not fit.
    #[error("volume `{name}` {problem}")]
    Volume {
        /// Its name.
        name: VolumeName,
        /// What is wrong.
        problem: VolumeProblem,
    },
    /// A mount contradicts itself.
    #[error("mount at `{target}`: {rule}")]
    Rule {
        /// Its guest path.
        target: GuestPath,
        /// What is wrong.
        rule: RuleError,
    },
    /// The VMM gives a running guest no devices.
    #[error("{0} cannot be given a volume while the sandbox runs")]
    NoPlug(VmmKind),
    /// Every place for a device is taken.
    #[error("the sandbox has {0} volumes already, and no place for another device")]
    NoPlace(usize),
    /// The guest was not given what mounts such a file system.
    #[error("`{target}`: the running guest has no kernel module for {fstype}")]
    NoModule {
        /// Where it was to be mounted.
        target: GuestPath,
        /// The file system.
        fstype: String,
    },
    /// There is no such image in the store.
    #[error("there is no image `{0}` in the local store")]
    NoImage(String),
    /// Memory or root disk is too small.
    #[error("{what} of {given} is too small: at least {least} needed")]
    TooSmall {
        /// What.
        what: &'static str,
        /// What was asked for.
        given: String,
        /// The least that works.
        least: String,
    },
    /// The host lacks something.
    #[error(transparent)]
    Host(#[from] HostGap),
}

/// What can be wrong with a host path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceProblem {
    /// It cannot be found.
    #[error("{0}")]
    Missing(String),
    /// It is no directory.
    #[error("is not a directory")]
    NotADirectory,
    /// It is no regular file.
    #[error("is not a regular file")]
    NotAFile,
    /// It is neither.
    #[error("is {0}: only directories and regular files can be mounted")]
    Neither(&'static str),
    /// It is a symbolic link, or leads through one.
    #[error("{}; the directory is `{}`", through(at, *last), resolved.display())]
    Link {
        /// Where the link is.
        at: PathBuf,
        /// Whether it is the path itself.
        last: bool,
        /// Where it leads.
        resolved: PathBuf,
    },
    /// It cannot be a root file system.
    #[error(transparent)]
    Rule(#[from] RuleError),
    /// A single file has no quota.
    #[error("is a file: a quota limits what is in a directory")]
    QuotaOfFile,
    /// Its name cannot be told to the guest.
    #[error("has a name that is not UTF-8")]
    NotUtf8,
}

/// What a host can lack.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostGap {
    /// A program was not found.
    #[error("the program `{0}` was not found")]
    Program(&'static str),
    /// The VMM that was asked for was not found.
    #[error("{0} was not found")]
    Vmm(VmmKind),
    /// The libkrun that was found lacks something; this says which, and what.
    #[error("{0}")]
    UnfitLibkrun(String),
    /// The VMM works with hardware virtualisation only.
    #[error("{0} needs hardware virtualisation, which this machine does not offer")]
    NeedsKvm(VmmKind),
    /// Hardware virtualisation was asked for.
    #[error("/dev/kvm cannot be opened")]
    NoKvm,
    /// The guest kernel.
    #[error("{0}")]
    Kernel(String),
    /// libkrun has one interrupt line per device.
    #[error("libkrun takes at most {most} volumes and root disks, this sandbox has {devices}")]
    TooManyDevices {
        /// What there is.
        devices: usize,
        /// What it takes.
        most: usize,
    },
}

impl Refusal {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Volume {
                problem: VolumeProblem::Missing,
                ..
            } => ErrorKind::VolumeNotFound,
            Self::Volume {
                problem: VolumeProblem::Exists | VolumeProblem::Misfit(_),
                ..
            } => ErrorKind::VolumeAlreadyExists,
            Self::NoImage(_) => ErrorKind::ImageNotFound,
            Self::Host(_) | Self::NoPlug(_) | Self::NoPlace(_) | Self::NoModule { .. } => {
                ErrorKind::Unsupported
            }
            _ => ErrorKind::InvalidConfig,
        }
    }

    fn hint(&self) -> Option<String> {
        let text = match self {
            Self::SameTarget(_) => "give one of them another place",
            Self::BelowFile { .. } => "mount the directory that holds the file instead",
            Self::Source { path, problem } => return problem.hint(path),
            Self::SameDisk { .. } => "mount it once and share it inside the guest",
            Self::Volume { name, problem } => return problem.hint(name),
            Self::Rule { rule, .. } => return rule.hint().map(str::to_owned),
            Self::NoImage(_) => {
                "load one with `msb image load FILE`, or name a root file system directory from `./`"
            }
            Self::NoPlug(_) | Self::NoPlace(_) | Self::NoModule { .. } => {
                "make the sandbox anew with the volume among its flags; --vmm qemu takes volumes at any time"
            }
            Self::TooSmall { .. } => return None,
            Self::Host(gap) => return Some(gap.hint()),
        };
        Some(text.to_owned())
    }

    fn value(&self) -> Option<String> {
        Some(match self {
            Self::SameTarget(target) | Self::Rule { target, .. } => target.to_string(),
            Self::BelowFile { mount, .. } => mount.to_string(),
            Self::Source { path, .. } => path.display().to_string(),
            Self::SameDisk { second, .. } => second.clone(),
            Self::Volume { name, .. } => name.to_string(),
            Self::NoImage(image) => image.clone(),
            Self::TooSmall { given, .. } => given.clone(),
            Self::NoModule { target, .. } => target.to_string(),
            Self::Host(_) | Self::NoPlug(_) | Self::NoPlace(_) => return None,
        })
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let mut error = Self::new(refusal.kind(), refusal.to_string());
        if let Some(value) = refusal.value() {
            error = error.with_value(value);
        }
        if let Some(hint) = refusal.hint() {
            error = error.with_hint(hint);
        }
        error
    }
}

impl SourceProblem {
    fn hint(&self, path: &Path) -> Option<String> {
        match self {
            Self::Link { resolved, .. } => Some(format!(
                "use `{}`, or add follow-root-symlinks if you trust whoever can change the link",
                resolved.display()
            )),
            Self::Missing(_) if path.to_str().is_some_and(|path| path.contains("/~")) => {
                Some("`~` is expanded by the shell, and only outside quotes".to_owned())
            }
            Self::NotADirectory => {
                Some("use --mount-file for a file, --mount-disk for a disk image".to_owned())
            }
            Self::QuotaOfFile => Some("leave `quota` out, or mount the directory".to_owned()),
            Self::NotAFile => Some("use --mount-dir for a directory".to_owned()),
            Self::NotUtf8 => Some("mount the directory that holds it".to_owned()),
            Self::Rule(rule) => rule.hint().map(str::to_owned),
            Self::Missing(_) | Self::Neither(_) => None,
        }
    }
}

impl HostGap {
    fn hint(&self) -> String {
        let text = match self {
            Self::Program("mkfs.ext4") => "install e2fsprogs",
            Self::Program("qemu") => {
                "install qemu-system-x86 (Debian, Ubuntu) or qemu-system-x86-core"
            }
            Self::Program(_) => "put it beside `msb`, or name its folder in MSB_BIN_DIR",
            Self::Vmm(VmmKind::Qemu) => "install qemu-system-x86",
            Self::Vmm(VmmKind::CloudHypervisor) => {
                "name it in MSB_CLOUD_HYPERVISOR, or choose --vmm qemu"
            }
            Self::Vmm(VmmKind::Libkrun) => "name the library in MSB_LIBKRUN, or choose --vmm qemu",
            Self::UnfitLibkrun(_) => {
                "build its main branch with `make BLK=1 VHOST_USER=1` and name it in MSB_LIBKRUN, or choose --vmm qemu"
            }
            Self::NeedsKvm(_) => "choose --vmm qemu, which can do without",
            Self::NoKvm => "choose --accel tcg, or see `msb doctor`",
            Self::Kernel(_) => {
                "set MSB_KERNEL to a folder that holds `vmlinuz` and `modules/`; see `msb doctor`"
            }
            Self::TooManyDevices { .. } => "mount fewer volumes, or choose --vmm qemu",
        };
        text.to_owned()
    }
}

impl From<(VolumeName, Misfit)> for Refusal {
    fn from((name, misfit): (VolumeName, Misfit)) -> Self {
        Self::Volume {
            name,
            problem: VolumeProblem::Misfit(misfit),
        }
    }
}

fn through(at: &Path, last: bool) -> String {
    if last {
        "is a symbolic link".to_owned()
    } else {
        format!("leads through the symbolic link `{}`", at.display())
    }
}
