//! The flags of the verbs that make sandboxes and work on them.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use microsandbox::spec::{self, ImageSource, MountFlag, MountSpec};
use microsandbox::spec::{ProcessSpec, SandboxName, SandboxSpec};
use microsandbox::{Accel, Error, ErrorKind, Mebibytes, SecurityProfile, VmmKind};

use super::conf::{Conf, Size, read_mounts};
use super::{Format, SandboxFilter};

/// What describes a sandbox: shared by `run`, `create` and `plan`.
#[derive(Debug, Args)]
pub(crate) struct SandboxFlags {
    /// Image: a name in the local store, a root file system directory (./rootfs) or a disk image
    /// (./disk.qcow2)
    #[arg(value_name = "IMAGE", required_unless_present = "conf")]
    pub(crate) image: Option<String>,
    /// File that describes the sandbox (YAML); flags go before what it says
    #[arg(long, value_name = "FILE")]
    pub(crate) conf: Option<PathBuf>,
    /// File that describes volumes (YAML)
    #[arg(long, value_name = "FILE")]
    pub(crate) fs_conf: Option<PathBuf>,
    /// Name of the sandbox
    #[arg(short, long)]
    pub(crate) name: Option<String>,
    /// Number of virtual CPUs [default: 1]
    #[arg(short, long, value_parser = clap::value_parser!(u8).range(1..))]
    pub(crate) cpus: Option<u8>,
    /// Memory, in MiB or as `2G` [default: 512]
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) memory: Option<Mebibytes>,
    /// Size of the disk that takes what the sandbox writes to its root file system [default: 4G]
    #[arg(long, value_name = "SIZE")]
    pub(crate) root_disk: Option<Mebibytes>,
    #[command(flatten)]
    pub(crate) mounts: MountFlags,
    /// What commands in the sandbox may do [default: default]
    #[arg(long, value_enum)]
    pub(crate) security: Option<SecurityFlag>,
    #[command(flatten)]
    pub(crate) process: ProcessFlags,
    /// Program to run in place of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// Host name in the sandbox; its name when absent
    #[arg(long)]
    pub(crate) hostname: Option<String>,
    /// A label, as NAME=VALUE
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = pair)]
    pub(crate) labels: Vec<(String, String)>,
    /// Program that runs the VM; the best one found when absent
    #[arg(long, value_enum)]
    pub(crate) vmm: Option<VmmFlag>,
    /// How the VM's processor is made; by hardware where that works when absent
    #[arg(long, value_enum)]
    pub(crate) accel: Option<AccelFlag>,
}

/// Volumes. All of these may be repeated.
#[derive(Debug, Args)]
#[command(next_help_heading = "Volumes (SOURCE:DEST[:OPTIONS], may be repeated)")]
pub(crate) struct MountFlags {
    /// Host directory or file (./path) or named volume (name), made when missing
    #[arg(short = 'v', long = "volume", value_name = "SOURCE:DEST[:OPTIONS]")]
    pub(crate) volume: Vec<String>,
    /// Host directory
    #[arg(long, value_name = "DIR:DEST[:OPTIONS]")]
    pub(crate) mount_dir: Vec<String>,
    /// One host file
    #[arg(long, value_name = "FILE:DEST[:OPTIONS]")]
    pub(crate) mount_file: Vec<String>,
    /// Named volume, made when missing; kind=disk,size=SIZE makes it a disk
    #[arg(long, value_name = "NAME:DEST[:OPTIONS]")]
    pub(crate) mount_named: Vec<String>,
    /// Volume of the sandbox's own, removed with it; kind=disk,size=SIZE makes it a disk
    #[arg(long, value_name = "DEST[:OPTIONS]")]
    pub(crate) mount_owned: Vec<String>,
    /// Disk image: format=raw|qcow2|vmdk, fstype=TYPE
    #[arg(long, value_name = "IMAGE:DEST[:OPTIONS]")]
    pub(crate) mount_disk: Vec<String>,
    /// Memory of the sandbox, gone when it stops
    #[arg(long, value_name = "DEST[:SIZE][:OPTIONS]")]
    pub(crate) tmpfs: Vec<String>,
}

/// What a command gets.
#[derive(Debug, Args)]
#[command(next_help_heading = "Command")]
pub(crate) struct ProcessFlags {
    /// Environment variable, as NAME=VALUE, or NAME to pass the caller's on
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User, as NAME, UID, NAME:GROUP or UID:GID
    #[arg(short, long)]
    pub(crate) user: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum SecurityFlag {
    /// Ordinary Linux behaviour
    Default,
    /// No new privileges, no mount administration, nosuid and nodev on every volume
    Restricted,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum VmmFlag {
    Libkrun,
    CloudHypervisor,
    Qemu,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum AccelFlag {
    Kvm,
    Tcg,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) sandbox: SandboxFlags,
    /// Return once it runs, and leave it running
    #[arg(short, long)]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) replace: ReplaceFlags,
    /// Give the command a terminal even when standard input is none
    #[arg(short, long, overrides_with = "no_tty")]
    pub(crate) tty: bool,
    /// Give the command no terminal
    #[arg(long)]
    pub(crate) no_tty: bool,
    /// Print nothing but what the command prints
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Command to run; the image's own when absent
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// What becomes of a sandbox that has the name already.
#[derive(Debug, Args)]
pub(crate) struct ReplaceFlags {
    /// Remove a sandbox of the same name first
    #[arg(long)]
    replace: bool,
    /// The same, and end it by force after so many seconds [default: 10]
    #[arg(long, value_name = "SECONDS")]
    replace_with_timeout: Option<u64>,
}

impl ReplaceFlags {
    /// How long it has to stop, if it is to be replaced.
    pub(crate) fn limit(&self) -> Option<Duration> {
        let seconds = self.replace_with_timeout.or(self.replace.then_some(10));
        seconds.map(Duration::from_secs)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    #[command(flatten)]
    pub(crate) sandbox: SandboxFlags,
    #[command(flatten)]
    pub(crate) replace: ReplaceFlags,
    /// Print nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// The sandboxes that a verb works on.
#[derive(Debug, Args)]
pub(crate) struct Selection {
    /// Names of the sandboxes
    #[arg(value_name = "NAME", required_unless_present = "labels")]
    pub(crate) names: Vec<String>,
    /// Every sandbox with this label
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = pair)]
    pub(crate) labels: Vec<(String, String)>,
    /// Print nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Start {
    #[command(flatten)]
    pub(crate) which: Selection,
}

#[derive(Debug, Args)]
pub(crate) struct Stop {
    #[command(flatten)]
    pub(crate) which: Selection,
    /// End it at once, without letting its commands finish
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Seconds until it is ended by force
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Restart {
    #[command(flatten)]
    pub(crate) which: Selection,
    /// Seconds until it is ended by force
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Remove {
    #[command(flatten)]
    pub(crate) which: Selection,
    /// Stop running ones first
    #[arg(short, long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Name of the sandbox
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) process: ProcessFlags,
    /// Return once it runs
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Give the command a terminal even when standard input is none
    #[arg(short, long, overrides_with = "no_tty")]
    pub(crate) tty: bool,
    /// Give the command no terminal
    #[arg(long)]
    pub(crate) no_tty: bool,
    /// Give the command no standard input
    #[arg(long)]
    pub(crate) no_stdin: bool,
    /// Seconds until the command is killed
    #[arg(long, value_name = "SECONDS", conflicts_with = "detach")]
    pub(crate) timeout: Option<u64>,
    /// How much of something it may use, as `ulimit` has it, such as nofile=1024:4096; may be
    /// repeated
    #[arg(long = "rlimit", value_name = "RESOURCE=SOFT[:HARD]", value_parser = super::limit::limit)]
    pub(crate) limits: Vec<super::limit::Limit>,
    /// Print nothing but what the command prints
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Command to run
    #[arg(last = true, value_name = "CMD", required = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Sandboxes {
    /// Running ones only
    #[arg(long, conflicts_with = "stopped")]
    pub(crate) running: bool,
    /// Stopped ones only
    #[arg(long)]
    pub(crate) stopped: bool,
    /// Those with this label
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = pair)]
    pub(crate) labels: Vec<(String, String)>,
    /// Only those with this: name=PART, label=NAME[=VALUE], status=STATUS, image=IMAGE,
    /// volume=NAME; may be repeated
    #[arg(long = "filter", value_name = "KEY=VALUE", value_parser = super::filter::sandbox)]
    pub(crate) filters: Vec<SandboxFilter>,
    /// Print names only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Processes {
    /// Stopped ones as well
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Only those with this: name=PART, label=NAME[=VALUE], status=STATUS, image=IMAGE,
    /// volume=NAME; may be repeated
    #[arg(long = "filter", value_name = "KEY=VALUE", value_parser = super::filter::sandbox)]
    pub(crate) filters: Vec<SandboxFilter>,
    /// Print names only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Name of the sandbox
    pub(crate) name: String,
    /// Show what /proc says of each of its processes: user, capabilities, seccomp, namespaces,
    /// root, descriptors, environment
    #[arg(long)]
    pub(crate) evidence: bool,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Unpack an archive (docker save, OCI layout or root file system tar) into the local store
    Load {
        /// The archive
        file: PathBuf,
        /// Name to give the image; from the archive when absent
        #[arg(short, long)]
        name: Option<String>,
        /// Print nothing
        #[arg(short, long)]
        quiet: bool,
    },
    /// List images
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        format: Format,
        /// Print names only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Remove images
    #[command(visible_alias = "remove")]
    Rm {
        /// Names of the images
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
        /// Print nothing
        #[arg(short, long)]
        quiet: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Supervise {
    /// Folder of the sandbox
    pub(crate) folder: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Tied {
    /// Process id of the parent
    pub(crate) parent: u32,
    /// Reach no file but those of the system and those named here, and no network
    #[arg(long)]
    pub(crate) confined: bool,
    /// A file or folder that is read
    #[arg(long, requires = "confined", value_name = "PATH")]
    pub(crate) read: Vec<PathBuf>,
    /// A file or folder that is written
    #[arg(long, requires = "confined", value_name = "PATH")]
    pub(crate) write: Vec<PathBuf>,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    pub(crate) argv: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct Krun {
    /// Only say whether this library can be used
    #[arg(long, value_name = "LIBRARY", conflicts_with = "machine")]
    pub(crate) probe: Option<PathBuf>,
    /// The machine, as JSON
    #[arg(required_unless_present = "probe")]
    pub(crate) machine: Option<String>,
}

impl SandboxFlags {
    /// The sandbox that these flags ask for; relative host paths are taken from `cwd`. One without
    /// a name gets one, and is ephemeral.
    ///
    /// Everything that is wrong with the mounts is reported at once.
    pub(crate) fn spec(&self, cwd: &Path) -> Result<SandboxSpec, Error> {
        let (conf, mut mounts) = match &self.conf {
            Some(path) => Conf::read(path)?,
            None => (Conf::default(), Vec::new()),
        };
        if let Some(path) = &self.fs_conf {
            mounts.extend(read_mounts(path)?);
        }
        mounts.extend(self.mounts.specs(cwd)?);
        let name = self.name.clone().or(conf.name);
        let image = match (&self.image, conf.image) {
            (Some(image), _) => ImageSource::parse(image, cwd)?,
            (None, Some(image)) => ImageSource::parse(&image, &conf.folder)?,
            (None, None) => {
                return Err(Error::new(ErrorKind::InvalidConfig, "there is no image")
                    .with_hint("name one, or set `image` in the file of --conf"));
            }
        };
        let security = self.security.map(|security| match security {
            SecurityFlag::Default => SecurityProfile::Default,
            SecurityFlag::Restricted => SecurityProfile::Restricted,
        });
        let process = self.process.spec()?;
        let entrypoint = self.entrypoint.clone().map(|program| vec![program]);
        let mut labels = conf.labels;
        labels.extend(self.labels.iter().cloned());
        Ok(SandboxSpec {
            ephemeral: name.is_none(),
            name: name.map_or_else(|| Ok(SandboxName::random()), SandboxName::try_from)?,
            image,
            mounts,
            cpus: self.cpus.or(conf.cpus).unwrap_or(1),
            memory: self.memory.or(size(conf.memory)).unwrap_or(Mebibytes(512)),
            root_disk: self
                .root_disk
                .or(size(conf.root_disk))
                .unwrap_or(Mebibytes(4096)),
            security: security.or(conf.security).unwrap_or_default(),
            process: ProcessSpec {
                entrypoint: entrypoint.or(conf.entrypoint),
                env: conf.env.into_iter().chain(process.env).collect(),
                workdir: process.workdir.or(conf.workdir),
                user: process.user.or(conf.user),
                hostname: self.hostname.clone().or(conf.hostname),
            },
            labels,
            vmm: self.vmm.map(|vmm| match vmm {
                VmmFlag::Libkrun => VmmKind::Libkrun,
                VmmFlag::CloudHypervisor => VmmKind::CloudHypervisor,
                VmmFlag::Qemu => VmmKind::Qemu,
            }),
            accel: self.accel.map(|accel| match accel {
                AccelFlag::Kvm => Accel::Kvm,
                AccelFlag::Tcg => Accel::Tcg,
            }),
        })
    }
}

fn size(size: Option<Size>) -> Option<Mebibytes> {
    size.map(|Size(size)| size)
}

impl MountFlags {
    pub(crate) fn specs(&self, cwd: &Path) -> Result<Vec<MountSpec>, Error> {
        let flags = [
            (MountFlag::Volume, &self.volume),
            (MountFlag::Dir, &self.mount_dir),
            (MountFlag::File, &self.mount_file),
            (MountFlag::Named, &self.mount_named),
            (MountFlag::Owned, &self.mount_owned),
            (MountFlag::Disk, &self.mount_disk),
            (MountFlag::Tmpfs, &self.tmpfs),
        ];
        let mut mounts = Vec::new();
        let mut errors = Vec::new();
        for (flag, texts) in flags {
            for text in texts {
                match spec::parse_mount(flag, text, cwd) {
                    Ok(mount) => mounts.push(mount),
                    Err(error) => errors.push(Error::from(error)),
                }
            }
        }
        Error::all(errors).map_or(Ok(mounts), Err)
    }
}

impl ProcessFlags {
    /// What the command gets, with values of the caller's environment filled in.
    pub(crate) fn spec(&self) -> Result<ProcessSpec, Error> {
        let mut variables = Vec::new();
        for given in &self.env {
            match given.split_once('=') {
                Some((name, value)) if !name.is_empty() => {
                    variables.push((name.to_owned(), value.to_owned()));
                }
                Some(_) => {
                    let message = format!("`--env {given}` has no name before `=`");
                    return Err(Error::new(ErrorKind::InvalidConfig, message).with_value(given));
                }
                None => {
                    if let Ok(value) = env::var(given) {
                        variables.push((given.clone(), value));
                    }
                }
            }
        }
        Ok(ProcessSpec {
            env: variables,
            workdir: self.workdir.clone(),
            user: self.user.clone(),
            ..ProcessSpec::default()
        })
    }
}

/// Reads `NAME=VALUE`.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write it as NAME=VALUE".to_owned()),
    }
}
