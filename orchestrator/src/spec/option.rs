//! The option block of a mount flag: a list of flags and `key=value`, separated by commas.

use std::collections::BTreeMap;

use super::mount::MountFlag;
use super::{
    CachePolicy, DiskImageFormat, HostPermissions, Mebibytes, ShareOptions, SizeError,
    StatVirtualization, VolumeKind,
};

/// What can be wrong with an option.
///
/// ```
/// use microsandbox::spec::{MountFlag, MountProblem, OptionProblem, parse_mount};
/// use std::path::Path;
///
/// let error = parse_mount(MountFlag::Dir, "./src:/app:ro,rw", Path::new("/")).unwrap_err();
/// assert_eq!(error.problem, MountProblem::Option(OptionProblem::Repeated("ro`/`rw".to_owned())));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionProblem {
    /// It, or its opposite, was given before.
    #[error("mount option `{0}` is given more than once")]
    Repeated(String),
    /// The positive form of a flag.
    #[error("there is no mount option `{0}`: it is what a mount does without options")]
    Positive(String),
    /// Neither a flag nor `key=value`.
    #[error("`{0}` is neither a mount flag nor `key=value`")]
    NotAFlag(String),
    /// A key that does not exist.
    #[error("unknown mount option `{0}`")]
    Unknown(String),
    /// A key or flag of another kind of mount.
    #[error("mount option `{0}` is not valid here")]
    NotHere(&'static str),
    /// A value that its key does not take.
    #[error("`{key}={value}`: expected {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// The values that there are.
        expected: &'static str,
    },
    /// A value that is no size.
    #[error("`{0}=`: {1}")]
    Size(&'static str, SizeError),
    /// One of `uid` and `gid` without the other.
    #[error("`uid` and `gid` are given together or not at all")]
    HalfAnOwner,
}

/// Options that a kind of mount accepts besides `ro`, `rw`, `noexec`, `nosuid` and `nodev`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Accepted(&'static [&'static str]);

impl Accepted {
    pub(super) const BIND: Self = Self(&[
        "stat-virt",
        "host-perms",
        "uid",
        "gid",
        "cache",
        "quota",
        "follow-root-symlinks",
    ]);
    /// A volume mounted with `-v`.
    pub(super) const NAME: Self =
        Self(&["stat-virt", "host-perms", "uid", "gid", "cache", "quota"]);
    /// A volume that may be made as what its options say.
    pub(super) const MADE: Self = Self(&[
        "stat-virt",
        "host-perms",
        "uid",
        "gid",
        "cache",
        "quota",
        "kind",
        "size",
    ]);
    pub(super) const DISK: Self = Self(&["format", "fstype"]);
    pub(super) const TMPFS: Self = Self(&["size"]);
}

const FLAGS: [&str; 5] = ["ro", "rw", "noexec", "nosuid", "nodev"];
const POSITIVE: [&str; 3] = ["exec", "suid", "dev"];
const FOLLOW: &str = "follow-root-symlinks";
const KEYS: [&str; 10] = [
    "stat-virt",
    "host-perms",
    "uid",
    "gid",
    "cache",
    "quota",
    "kind",
    "size",
    "format",
    "fstype",
];

/// Whether a text is an option rather than a size or a part of a path.
pub(super) fn is_option(text: &str) -> bool {
    let key = text.split_once('=').map_or(text, |(key, _)| key).trim();
    FLAGS.contains(&key) || POSITIVE.contains(&key) || KEYS.contains(&key) || key == FOLLOW
}

impl OptionProblem {
    /// What the user can do about it.
    pub(super) fn hint(&self, flag: MountFlag) -> Option<String> {
        match self {
            Self::NotAFlag(text) | Self::Unknown(text) => {
                let lower = text.to_ascii_lowercase();
                if lower != *text && is_option(&lower) {
                    return Some(format!("options are lower-case: write {lower}"));
                }
                Some(format!(
                    "flags are {}; keys are {}",
                    FLAGS.join(", "),
                    KEYS.join(", ")
                ))
            }
            Self::NotHere("kind" | "size") if flag == MountFlag::Volume => {
                Some("use --mount-named, which takes kind= and size=".to_owned())
            }
            Self::NotHere("kind") if flag == MountFlag::Tmpfs => {
                Some("use --mount-owned, which takes kind=".to_owned())
            }
            Self::NotHere("format" | "fstype") => {
                Some("use --mount-disk for a disk image".to_owned())
            }
            Self::NotHere("size") => {
                Some("a directory is limited with quota=; size= is for disks and tmpfs".to_owned())
            }
            Self::Positive(_) => Some("leave it out".to_owned()),
            _ => None,
        }
    }
}

/// The options that were given.
pub(super) struct Options<'a> {
    given: BTreeMap<&'static str, &'a str>,
}

impl<'a> Options<'a> {
    /// Reads a block. Spaces around items and empty items do not matter.
    pub(super) fn read(block: &'a str, accepted: Accepted) -> Result<Self, OptionProblem> {
        let mut given = BTreeMap::new();
        for item in block
            .split(',')
            .map(str::trim)
            .filter(|item| !item.is_empty())
        {
            let (key, value) = item
                .split_once('=')
                .map_or((item, None), |(k, v)| (k, Some(v)));
            let known = |list: &[&'static str]| list.iter().find(|known| **known == key).copied();
            let (key, value) = match (known(&FLAGS).or(known(&[FOLLOW])), known(&KEYS), value) {
                (Some(flag), _, None) => (flag, ""),
                (_, Some(key), Some(value)) => (key, value),
                (None, _, None) if POSITIVE.contains(&key) => {
                    return Err(OptionProblem::Positive(key.to_owned()));
                }
                (_, _, None) => return Err(OptionProblem::NotAFlag(item.to_owned())),
                (_, _, Some(_)) => return Err(OptionProblem::Unknown(key.to_owned())),
            };
            if !FLAGS.contains(&key) && !accepted.0.contains(&key) {
                return Err(OptionProblem::NotHere(key));
            }
            let opposite = match key {
                "ro" => given.contains_key("rw"),
                "rw" => given.contains_key("ro"),
                _ => false,
            };
            if opposite {
                return Err(OptionProblem::Repeated("ro`/`rw".to_owned()));
            }
            if given.insert(key, value).is_some() {
                return Err(OptionProblem::Repeated(key.to_owned()));
            }
        }
        Ok(Self { given })
    }

    pub(super) fn has(&self, flag: &str) -> bool {
        self.given.contains_key(flag)
    }

    pub(super) fn take(&mut self, key: &str) -> Option<&'a str> {
        self.given.remove(key)
    }

    pub(super) fn follow_root_symlinks(&self) -> bool {
        self.has(FOLLOW)
    }

    pub(super) fn size(&mut self, key: &'static str) -> Result<Option<Mebibytes>, OptionProblem> {
        let size = self.take(key).map(str::parse);
        size.transpose()
            .map_err(|error| OptionProblem::Size(key, error))
    }

    pub(super) fn kind(&mut self) -> Result<Option<VolumeKind>, OptionProblem> {
        self.one_of("kind", "dir|disk", |value| match value {
            "dir" | "directory" => Some(VolumeKind::Directory),
            "disk" => Some(VolumeKind::Disk),
            _ => None,
        })
    }

    pub(super) fn format(&mut self) -> Result<Option<DiskImageFormat>, OptionProblem> {
        self.one_of("format", "raw|qcow2|vmdk", |value| match value {
            "raw" => Some(DiskImageFormat::Raw),
            "qcow2" => Some(DiskImageFormat::Qcow2),
            "vmdk" => Some(DiskImageFormat::Vmdk),
            _ => None,
        })
    }

    /// How a share's files appear; the quota, which bind mounts and volumes keep apart, is left.
    pub(super) fn share(&mut self) -> Result<ShareOptions, OptionProblem> {
        Ok(ShareOptions {
            stat_virtualization: self.one_of(
                "stat-virt",
                "strict|relaxed|off",
                |value| match value {
                    "strict" => Some(StatVirtualization::Strict),
                    "relaxed" => Some(StatVirtualization::Relaxed),
                    "off" => Some(StatVirtualization::Off),
                    _ => None,
                },
            )?,
            host_permissions: self.one_of("host-perms", "private|mirror", |value| match value {
                "private" => Some(HostPermissions::Private),
                "mirror" => Some(HostPermissions::Mirror),
                _ => None,
            })?,
            owner: match (self.id("uid")?, self.id("gid")?) {
                (None, None) => None,
                (Some(uid), Some(gid)) => Some((uid, gid)),
                _ => return Err(OptionProblem::HalfAnOwner),
            },
            quota: None,
            cache: self.one_of("cache", "none|auto|metadata|always", |value| match value {
                "none" => Some(CachePolicy::None),
                "auto" => Some(CachePolicy::Auto),
                "metadata" => Some(CachePolicy::Metadata),
                "always" => Some(CachePolicy::Always),
                _ => None,
            })?,
        })
    }

    /// A user or group id; the largest value means "none" to the kernel.
    fn id(&mut self, key: &'static str) -> Result<Option<u32>, OptionProblem> {
        self.one_of(key, "a number below 4294967295", |value| {
            value.parse().ok().filter(|id| *id != u32::MAX)
        })
    }

    fn one_of<T>(
        &mut self,
        key: &'static str,
        expected: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, OptionProblem> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        let wrong = || OptionProblem::Value {
            key,
            value: value.to_owned(),
            expected,
        };
        read(value).map(Some).ok_or_else(wrong)
    }
}
