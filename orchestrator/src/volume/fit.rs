//! Whether a volume that exists is what is asked for (spec mounts 1.9).

use std::collections::BTreeMap;

use crate::error::{Error, ErrorKind};
use crate::spec::{Mebibytes, NamedVolumeMode, VolumeKind, VolumeName, VolumeRequest};

/// What is known about a volume that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeFacts {
    /// Its kind.
    pub kind: VolumeKind,
    /// Capacity of a disk in bytes.
    pub capacity_bytes: Option<u64>,
    /// Quota of a directory.
    pub quota: Option<Mebibytes>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Why a volume cannot be used as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeProblem {
    /// It must exist and does not.
    #[error("does not exist")]
    Missing,
    /// It must not exist and does.
    #[error("exists already")]
    Exists,
    /// It exists, but is another than was asked for.
    #[error("{0}")]
    Misfit(#[from] Misfit),
    /// A disk is to be made without saying how large.
    #[error("does not exist, and a disk volume cannot be made without a size")]
    NoSize,
    /// An option of directories was given for what turned out to be a disk.
    #[error("is a disk volume, which takes no `{0}`")]
    NotForDisk(&'static str),
    /// Two mounts ask for different volumes under one name.
    #[error("is asked for twice, in different ways")]
    Disagreement,
}

/// The first difference between a volume and what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// Its kind.
    #[error("exists already as {0}, but {1} is asked for")]
    Kind(VolumeKind, VolumeKind),
    /// Its quota.
    #[error("exists already with {0}, but a quota of {1} is asked for")]
    Quota(String, Mebibytes),
    /// Its capacity in bytes.
    #[error("exists already with a capacity of {0} bytes, but {1} bytes are asked for")]
    Capacity(u64, u64),
    /// The value of one of its labels.
    #[error("exists already with the label {key}={is}, but {key}={asked} is asked for")]
    Label {
        /// The label.
        key: String,
        /// Its value.
        is: String,
        /// The value asked for.
        asked: String,
    },
    /// A label that it lacks.
    #[error("exists already without the label {0}")]
    NoLabel(String),
}

impl VolumeProblem {
    /// What the user can do about it.
    pub(crate) fn hint(&self, name: &VolumeName) -> Option<String> {
        Some(match self {
            Self::Missing => format!("create it with `msb volume create {name}`"),
            Self::Exists => "choose another name, or use it as it is".to_owned(),
            Self::Misfit(_) => format!("`msb volume inspect {name}` shows what it is"),
            Self::NoSize => "add size=, for example kind=disk,size=20G".to_owned(),
            Self::NotForDisk(option) => format!("leave {option} out"),
            Self::Disagreement => "give both mounts the same kind, size and quota".to_owned(),
        })
    }

    pub(crate) fn into_error(self, name: &VolumeName) -> Error {
        let kind = match self {
            Self::Missing => ErrorKind::VolumeNotFound,
            Self::Exists | Self::Misfit(_) => ErrorKind::VolumeAlreadyExists,
            _ => ErrorKind::InvalidConfig,
        };
        let error = Error::new(kind, format!("volume `{name}` {self}")).with_value(name.as_str());
        match self.hint(name) {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }
}

/// The kind that the volume has or will be made as.
///
/// # Errors
///
/// Why it can neither be used nor made.
pub(crate) fn fit(
    mode: NamedVolumeMode,
    request: &VolumeRequest,
    existing: Option<&VolumeFacts>,
) -> Result<VolumeKind, VolumeProblem> {
    match (mode, existing) {
        (NamedVolumeMode::Existing, None) => Err(VolumeProblem::Missing),
        (NamedVolumeMode::Create, Some(_)) => Err(VolumeProblem::Exists),
        (NamedVolumeMode::Existing | NamedVolumeMode::EnsureExists, Some(volume)) => {
            match misfit(request, volume) {
                Some(misfit) => Err(misfit.into()),
                None => Ok(volume.kind),
            }
        }
        (NamedVolumeMode::Create | NamedVolumeMode::EnsureExists, None) => {
            let kind = request.kind.unwrap_or(VolumeKind::Directory);
            if kind == VolumeKind::Disk && request.size.is_none() {
                return Err(VolumeProblem::NoSize);
            }
            Ok(kind)
        }
    }
}

fn misfit(request: &VolumeRequest, volume: &VolumeFacts) -> Option<Misfit> {
    if let Some(kind) = request.kind.filter(|kind| *kind != volume.kind) {
        return Some(Misfit::Kind(volume.kind, kind));
    }
    if let Some(quota) = request.quota.filter(|_| request.quota != volume.quota) {
        let is = volume
            .quota
            .map_or("no quota".to_owned(), |is| format!("a quota of {is}"));
        return Some(Misfit::Quota(is, quota));
    }
    let asked = request.size.map(Mebibytes::bytes);
    if let Some(asked) = asked.filter(|_| asked != volume.capacity_bytes) {
        return Some(Misfit::Capacity(volume.capacity_bytes.unwrap_or(0), asked));
    }
    request
        .labels
        .iter()
        .find_map(|(key, asked)| match volume.labels.get(key) {
            None => Some(Misfit::NoLabel(key.clone())),
            Some(is) if is != asked => Some(Misfit::Label {
                key: key.clone(),
                is: is.clone(),
                asked: asked.clone(),
            }),
            Some(_) => None,
        })
}

#[cfg(test)]
mod tests {
    use NamedVolumeMode::{Create, EnsureExists, Existing};

    use super::*;

    fn disk(mib: u32) -> VolumeFacts {
        VolumeFacts {
            kind: VolumeKind::Disk,
            capacity_bytes: Some(Mebibytes(mib).bytes()),
            quota: None,
            labels: BTreeMap::from([("team".to_owned(), "a".to_owned())]),
        }
    }

    fn directory(quota: Option<u32>) -> VolumeFacts {
        VolumeFacts {
            kind: VolumeKind::Directory,
            capacity_bytes: None,
            quota: quota.map(Mebibytes),
            labels: BTreeMap::new(),
        }
    }

    #[test]
    fn nothing_asked_fits_anything() {
        let any = VolumeRequest::default();
        for mode in [Existing, EnsureExists] {
            assert_eq!(fit(mode, &any, Some(&disk(5))), Ok(VolumeKind::Disk));
            assert_eq!(
                fit(mode, &any, Some(&directory(Some(7)))),
                Ok(VolumeKind::Directory)
            );
        }
    }

    #[test]
    fn modes_decide_about_existence() {
        let any = VolumeRequest::default();
        assert_eq!(fit(Existing, &any, None), Err(VolumeProblem::Missing));
        assert_eq!(
            fit(Create, &any, Some(&disk(5))),
            Err(VolumeProblem::Exists)
        );
        assert_eq!(fit(Create, &any, None), Ok(VolumeKind::Directory));
        assert_eq!(fit(EnsureExists, &any, None), Ok(VolumeKind::Directory));
        let sizeless = VolumeRequest {
            kind: Some(VolumeKind::Disk),
            ..any
        };
        assert_eq!(
            fit(EnsureExists, &sizeless, None),
            Err(VolumeProblem::NoSize)
        );
        assert_eq!(
            fit(EnsureExists, &sizeless, Some(&disk(5))),
            Ok(VolumeKind::Disk)
        );
    }

    #[test]
    fn every_difference_is_named() {
        let base = VolumeRequest::default;
        let label = |value: &str| BTreeMap::from([("team".to_owned(), value.to_owned())]);
        for (request, volume, wanted) in [
            (
                VolumeRequest {
                    kind: Some(VolumeKind::Directory),
                    ..base()
                },
                disk(5),
                "exists already as disk, but dir is asked for",
            ),
            (
                VolumeRequest {
                    quota: Some(Mebibytes(1024)),
                    ..base()
                },
                directory(None),
                "exists already with no quota, but a quota of 1 GiB is asked for",
            ),
            (
                VolumeRequest {
                    quota: Some(Mebibytes(2)),
                    ..base()
                },
                directory(Some(1)),
                "exists already with a quota of 1 MiB, but a quota of 2 MiB is asked for",
            ),
            (
                VolumeRequest {
                    size: Some(Mebibytes(2)),
                    ..base()
                },
                disk(1),
                "exists already with a capacity of 1048576 bytes, but 2097152 bytes are asked for",
            ),
            (
                VolumeRequest {
                    labels: label("b"),
                    ..base()
                },
                disk(1),
                "exists already with the label team=a, but team=b is asked for",
            ),
            (
                VolumeRequest {
                    labels: label("b"),
                    ..base()
                },
                directory(None),
                "exists already without the label team",
            ),
        ] {
            let problem = fit(EnsureExists, &request, Some(&volume)).unwrap_err();
            assert_eq!(problem.to_string(), wanted);
        }
        let same = VolumeRequest {
            labels: label("a"),
            size: Some(Mebibytes(1)),
            ..base()
        };
        assert_eq!(
            fit(EnsureExists, &same, Some(&disk(1))),
            Ok(VolumeKind::Disk)
        );
    }
}
