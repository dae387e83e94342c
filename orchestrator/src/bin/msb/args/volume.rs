//! The flags of `msb volume`.

use clap::{Args, Subcommand, ValueEnum};
use microsandbox::{Mebibytes, VolumeKind};

use super::{Format, VolumeFilter};

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume
    Create(VolumeCreate),
    /// List volumes, newest first
    #[command(visible_alias = "list")]
    Ls(VolumeList),
    /// Show everything about a volume
    Inspect(VolumeInspect),
    /// Remove volumes and what they hold
    #[command(visible_alias = "remove")]
    Rm(VolumeRemove),
    /// Remove every volume that no sandbox mounts, running or not, and what they hold
    Prune(VolumePrune),
}

#[derive(Debug, Args)]
pub(crate) struct VolumeCreate {
    /// Name of the volume
    #[arg(value_name = "NAME", required_unless_present = "named")]
    pub(crate) name: Option<String>,
    /// Name of the volume
    #[arg(
        short = 'n',
        long = "name",
        value_name = "NAME",
        conflicts_with = "name"
    )]
    pub(crate) named: Option<String>,
    /// What the volume is: a directory of the host, or a disk with an ext4 file system
    #[arg(long, value_enum, default_value_t)]
    pub(crate) kind: KindFlag,
    /// Capacity of a disk volume, such as `512M` or `20G`
    #[arg(long)]
    pub(crate) size: Option<Mebibytes>,
    /// Quota of a directory volume
    #[arg(long, value_name = "SIZE")]
    pub(crate) quota: Option<Mebibytes>,
    /// A label, as NAME=VALUE
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = super::sandbox::pair)]
    pub(crate) labels: Vec<(String, String)>,
    /// Print nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum KindFlag {
    #[default]
    #[value(alias = "directory")]
    Dir,
    Disk,
}

impl From<KindFlag> for VolumeKind {
    fn from(kind: KindFlag) -> Self {
        match kind {
            KindFlag::Dir => Self::Directory,
            KindFlag::Disk => Self::Disk,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct VolumeList {
    /// Only those with this: name=PART, label=NAME[=VALUE], kind=dir|disk, dangling=true|false
    /// (mounted by no sandbox); may be repeated
    #[arg(long = "filter", value_name = "KEY=VALUE", value_parser = super::filter::volume)]
    pub(crate) filters: Vec<VolumeFilter>,
    #[command(flatten)]
    pub(crate) format: Format,
    /// Print names only
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VolumeInspect {
    /// Name of the volume
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct VolumePrune {
    /// Only those with this, as for `ls`
    #[arg(long = "filter", value_name = "KEY=VALUE", value_parser = super::filter::volume)]
    pub(crate) filters: Vec<VolumeFilter>,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Print nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VolumeRemove {
    /// Names of the volumes
    #[arg(value_name = "NAME", required = true)]
    pub(crate) names: Vec<String>,
    /// Print nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
}
