//! `--filter KEY=VALUE`: which of the things listed are wanted.

use std::collections::BTreeMap;
use std::mem::discriminant;

use microsandbox::VolumeKind;
use microsandbox::rundir::Status;

/// What a volume must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum VolumeFilter {
    /// Its name has this in it.
    Name(String),
    Label(LabelFilter),
    Kind(VolumeKind),
    /// Whether no sandbox mounts it, running or not.
    Dangling(bool),
}

/// What a sandbox must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SandboxFilter {
    /// Its name has this in it.
    Name(String),
    Label(LabelFilter),
    Status(Status),
    Image(String),
    /// It mounts this named volume.
    Volume(String),
}

/// A label that must be there, with any value if none is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LabelFilter {
    pub(crate) name: String,
    pub(crate) value: Option<String>,
}

impl LabelFilter {
    fn parse(text: &str) -> Self {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text, None),
        };
        Self {
            name: name.to_owned(),
            value,
        }
    }

    /// Whether it is among `labels`.
    pub(crate) fn fits(&self, labels: &BTreeMap<String, String>) -> bool {
        let found = labels.get(&self.name);
        found.is_some_and(|found| self.value.as_ref().is_none_or(|value| value == found))
    }
}

/// Whether something passes: it must have every label, and of each other key one value.
pub(crate) fn passes<F>(
    filters: &[F],
    is_label: fn(&F) -> bool,
    fits: impl Fn(&F) -> bool,
) -> bool {
    filters.iter().all(|filter| {
        let mut same = filters
            .iter()
            .filter(|other| discriminant(*other) == discriminant(filter));
        if is_label(filter) {
            fits(filter)
        } else {
            same.any(&fits)
        }
    })
}

fn pair(text: &str, keys: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !value.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("write it as KEY=VALUE; keys are {keys}")),
    }
}

const VOLUME_KEYS: &str = "name, label, kind and dangling";
const SANDBOX_KEYS: &str = "name, label, status, image and volume";

/// Reads a filter of volumes.
pub(crate) fn volume(text: &str) -> Result<VolumeFilter, String> {
    let (key, value) = pair(text, VOLUME_KEYS)?;
    Ok(match (key.as_str(), value.as_str()) {
        ("name", _) => VolumeFilter::Name(value),
        ("label", _) => VolumeFilter::Label(LabelFilter::parse(&value)),
        ("kind", "dir" | "directory") => VolumeFilter::Kind(VolumeKind::Directory),
        ("kind", "disk") => VolumeFilter::Kind(VolumeKind::Disk),
        ("kind", _) => return Err("a kind is dir or disk".to_owned()),
        ("dangling", "true" | "1") => VolumeFilter::Dangling(true),
        ("dangling", "false" | "0") => VolumeFilter::Dangling(false),
        ("dangling", _) => return Err("dangling is true or false".to_owned()),
        _ => return Err(format!("there is no key `{key}`; keys are {VOLUME_KEYS}")),
    })
}

/// Reads a filter of sandboxes.
pub(crate) fn sandbox(text: &str) -> Result<SandboxFilter, String> {
    let (key, value) = pair(text, SANDBOX_KEYS)?;
    Ok(match key.as_str() {
        "name" => SandboxFilter::Name(value),
        "label" => SandboxFilter::Label(LabelFilter::parse(&value)),
        "status" => SandboxFilter::Status(status(&value)?),
        "image" => SandboxFilter::Image(value),
        "volume" => SandboxFilter::Volume(value),
        _ => return Err(format!("there is no key `{key}`; keys are {SANDBOX_KEYS}")),
    })
}

fn status(word: &str) -> Result<Status, String> {
    Ok(match word {
        "created" => Status::Created,
        "starting" => Status::Starting,
        "running" => Status::Running,
        "stopping" => Status::Stopping,
        "stopped" => Status::Stopped,
        "failed" => Status::Failed,
        _ => {
            return Err(
                "a status is created, starting, running, stopping, stopped or failed".to_owned(),
            );
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_add_up_and_other_keys_are_alternatives() {
        let filters = |texts: &[&str]| -> Vec<VolumeFilter> {
            texts.iter().map(|text| volume(text).unwrap()).collect()
        };
        let is_label = |filter: &VolumeFilter| matches!(filter, VolumeFilter::Label(_));
        let labels = [("a", "1"), ("b", "2")].map(|(name, value)| (name.into(), value.into()));
        let labels = BTreeMap::from(labels);
        let fits = |filter: &VolumeFilter| match filter {
            VolumeFilter::Kind(kind) => *kind == VolumeKind::Directory,
            VolumeFilter::Label(label) => label.fits(&labels),
            _ => false,
        };
        for (texts, expected) in [
            (&[][..], true),
            (&["kind=disk"], false),
            (&["kind=disk", "kind=dir"], true),
            (&["label=a"], true),
            (&["label=a=1", "label=b=2"], true),
            (&["label=a=1", "label=b=1"], false),
            (&["kind=dir", "label=c"], false),
        ] {
            assert_eq!(
                passes(&filters(texts), is_label, fits),
                expected,
                "{texts:?}"
            );
        }
    }

    #[test]
    fn what_is_no_filter_is_refused() {
        for text in ["", "kind", "kind=", "kind=iso", "dangling=x", "size=1"] {
            assert!(volume(text).is_err(), "{text}");
        }
        for text in ["status=up", "kind=dir", "name="] {
            assert!(sandbox(text).is_err(), "{text}");
        }
    }
}
