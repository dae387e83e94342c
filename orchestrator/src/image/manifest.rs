//! Finds the layers of an image in the two layouts that hold images, and reads its configuration.
//!
//! `docker save` writes `manifest.json` with paths of a configuration and of layers; an OCI layout
//! writes `index.json` with digests of manifests (OCI image specification, image-layout). Newer
//! archives of docker hold both.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::ImageConfig;

/// An image in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// Path of its configuration.
    pub(super) config: String,
    /// Paths of its layers, the lowest first.
    pub(super) layers: Vec<String>,
    /// Names that the archive gives it.
    pub(super) names: Vec<String>,
}

/// The configuration of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Configuration {
    pub(super) config: ImageConfig,
    /// Digest of each uncompressed layer, as `sha256:…`; empty when it is not recorded.
    pub(super) diff_ids: Vec<String>,
}

/// What is wrong with the description of an image.
#[derive(Debug, thiserror::Error)]
pub(super) enum ManifestError {
    #[error("`{0}` of the archive is malformed")]
    Json(String, #[source] serde_json::Error),
    #[error("the archive holds no image")]
    Empty,
    #[error("the archive holds no image for {0}, only for {1}")]
    Platform(&'static str, String),
    #[error("`{0}` is not a sha256 digest")]
    Digest(String),
    #[error("the manifests of the archive lead in a circle")]
    Loop,
    #[error("the image is for {1}; this machine runs {0}")]
    Architecture(&'static str, String),
}

/// Annotations with which tools name an image in an OCI layout, the most telling first.
const NAMES: [&str; 2] = [
    "io.containerd.image.name",
    "org.opencontainers.image.ref.name",
];

/// The machine's architecture in the words of Go, which images use.
pub(super) const ARCHITECTURE: &str = match std::env::consts::ARCH.as_bytes() {
    b"x86_64" => "amd64",
    b"aarch64" => "arm64",
    _ => std::env::consts::ARCH,
};

#[derive(Deserialize)]
struct Saved {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags", default)]
    tags: Option<Vec<String>>,
    #[serde(rename = "Layers")]
    layers: Vec<String>,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    config: Option<RunConfig>,
    #[serde(default)]
    rootfs: Option<RootFs>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunConfig {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    labels: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// The first image of a `manifest.json`.
pub(super) fn of_docker(text: &[u8]) -> Result<Found, ManifestError> {
    let saved: Vec<Saved> = json("manifest.json", text)?;
    let first = saved.into_iter().next().ok_or(ManifestError::Empty)?;
    Ok(Found {
        config: first.config,
        layers: first.layers,
        names: first.tags.unwrap_or_default(),
    })
}

/// The image for this machine of an `index.json`; `read` reads a file of the archive.
pub(super) fn of_oci<E: From<ManifestError>>(
    text: &[u8],
    mut read: impl FnMut(&str) -> Result<Vec<u8>, E>,
) -> Result<Found, E> {
    let mut names = Vec::new();
    let mut index: Index = json("index.json", text)?;
    // An index may hold indexes: one per name, then one per platform.
    for _ in 0..4 {
        if let Some(config) = &index.config {
            let layers: Result<_, ManifestError> = index
                .layers
                .iter()
                .map(|layer| blob_path(&layer.digest))
                .collect();
            return Ok(Found {
                config: blob_path(&config.digest)?,
                layers: layers?,
                names,
            });
        }
        let chosen = choose(&index.manifests)?;
        names.extend(
            NAMES
                .iter()
                .find_map(|key| chosen.annotations.get(*key))
                .cloned(),
        );
        let path = blob_path(&chosen.digest)?;
        index = json(&path, &read(&path)?)?;
    }
    Err(ManifestError::Loop.into())
}

/// Reads an image's configuration.
pub(super) fn configuration(path: &str, text: &[u8]) -> Result<Configuration, ManifestError> {
    let file: ConfigFile = json(path, text)?;
    if let Some(other) = file
        .architecture
        .filter(|name| !name.is_empty() && name != ARCHITECTURE)
    {
        return Err(ManifestError::Architecture(ARCHITECTURE, other));
    }
    let run = file.config.unwrap_or_default();
    let some = |value: Option<String>| value.filter(|text| !text.is_empty());
    let pair = |variable: String| match variable.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => (variable, String::new()),
    };
    Ok(Configuration {
        config: ImageConfig {
            entrypoint: run.entrypoint.unwrap_or_default(),
            cmd: run.cmd.unwrap_or_default(),
            env: run.env.unwrap_or_default().into_iter().map(pair).collect(),
            workdir: some(run.working_dir),
            user: some(run.user),
            labels: run.labels.unwrap_or_default(),
        },
        diff_ids: file
            .rootfs
            .map(|rootfs| rootfs.diff_ids)
            .unwrap_or_default(),
    })
}

/// The manifest for this machine, or the only one.
fn choose(manifests: &[Descriptor]) -> Result<&Descriptor, ManifestError> {
    let fits = |descriptor: &&Descriptor| {
        descriptor
            .platform
            .as_ref()
            .is_some_and(|platform| platform.os == "linux" && platform.architecture == ARCHITECTURE)
    };
    if let Some(chosen) = manifests.iter().find(fits) {
        return Ok(chosen);
    }
    if let Some(chosen) = manifests
        .iter()
        .find(|descriptor| descriptor.platform.is_none())
    {
        return Ok(chosen);
    }
    let others: Vec<String> = manifests
        .iter()
        .filter_map(|descriptor| descriptor.platform.as_ref())
        .map(|platform| format!("{}/{}", platform.os, platform.architecture))
        .collect();
    if others.is_empty() {
        return Err(ManifestError::Empty);
    }
    Err(ManifestError::Platform(ARCHITECTURE, others.join(", ")))
}

/// `sha256:abc…` → `blobs/sha256/abc…`.
fn blob_path(digest: &str) -> Result<String, ManifestError> {
    match digest.strip_prefix("sha256:") {
        Some(hex) if hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            Ok(format!("blobs/sha256/{hex}"))
        }
        _ => Err(ManifestError::Digest(digest.to_owned())),
    }
}

fn json<T: DeserializeOwned>(path: &str, text: &[u8]) -> Result<T, ManifestError> {
    serde_json::from_slice(text).map_err(|error| ManifestError::Json(path.to_owned(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_of_indexes_leads_to_the_image_of_this_machine() {
        let digest = |c: char| format!("sha256:{}", c.to_string().repeat(64));
        let index = format!(
            r#"{{"manifests":[{{"digest":"{}","annotations":{{"org.opencontainers.image.ref.name":"a:1"}}}}]}}"#,
            digest('a')
        );
        let found = of_oci::<ManifestError>(index.as_bytes(), |path| {
            Ok(match path.chars().last() {
                Some('a') => format!(
                    r#"{{"manifests":[{{"digest":"{}","platform":{{"architecture":"s390x","os":"linux"}}}},
                        {{"digest":"{}","platform":{{"architecture":"{ARCHITECTURE}","os":"linux"}}}}]}}"#,
                    digest('c'),
                    digest('b')
                ),
                _ => format!(
                    r#"{{"config":{{"digest":"{}"}},"layers":[{{"digest":"{}"}}]}}"#,
                    digest('d'),
                    digest('e')
                ),
            }
            .into_bytes())
        })
        .unwrap();
        assert_eq!(found.names, ["a:1"]);
        assert!(found.config.ends_with("dd"));
        assert_eq!(found.layers.len(), 1);
    }

    #[test]
    fn digests_are_no_paths() {
        for bad in ["sha256:../../etc/passwd", "sha512:00", "sha256:", "x"] {
            assert!(
                matches!(blob_path(bad), Err(ManifestError::Digest(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_configuration_may_leave_everything_out() {
        let read = configuration("c", b"{}").unwrap();
        assert_eq!(read.config, ImageConfig::default());
        let text = br#"{"config":{"Env":["A=b=c","D"],"User":"","Cmd":["sh"],"Entrypoint":null}}"#;
        let read = configuration("c", text).unwrap().config;
        let env = [
            ("A".to_owned(), "b=c".to_owned()),
            ("D".to_owned(), String::new()),
        ];
        assert_eq!(read.env, env);
        assert_eq!((read.user, read.cmd), (None, vec!["sh".to_owned()]));
    }
}
