//! The files of `--conf` and `--fs-conf`: a sandbox, or its volumes alone, as YAML.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use microsandbox::spec::{MountFlag, MountSpec, parse_mount};
use microsandbox::{
    DiskImageFormat, Error, ErrorKind, HostPermissions, Mebibytes, MountBuilder, NamedVolumeMode,
    Sandbox, SecurityProfile, StatVirtualization, VolumeKind,
};
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};

/// A sandbox, as its file describes it. What the command line says goes before it.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Conf {
    pub(super) name: Option<String>,
    pub(super) image: Option<String>,
    pub(super) cpus: Option<u8>,
    pub(super) memory: Option<Size>,
    pub(super) root_disk: Option<Size>,
    pub(super) security: Option<SecurityProfile>,
    pub(super) workdir: Option<String>,
    pub(super) user: Option<String>,
    pub(super) hostname: Option<String>,
    pub(super) entrypoint: Option<Vec<String>>,
    #[serde(default)]
    pub(super) env: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) labels: BTreeMap<String, String>,
    #[serde(default)]
    mounts: Vec<Mount>,
    /// Where the file lies, from which its relative host paths are taken.
    #[serde(skip)]
    pub(super) folder: PathBuf,
}

/// A file of volumes alone.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FsConf {
    mounts: Vec<Mount>,
}

/// A size as the command line takes it: whole MiB, or a text such as `20G`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size(pub(super) Mebibytes);

/// One volume: `host:/guest[:options]`, or its parts by name.
#[derive(Debug)]
enum Mount {
    Short(String),
    Long(Box<Parts>),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parts {
    target: String,
    bind: Option<String>,
    named: Option<String>,
    disk: Option<String>,
    tmpfs: Option<Tmpfs>,
    owned: Option<Owned>,
    #[serde(default)]
    readonly: bool,
    #[serde(default)]
    noexec: bool,
    #[serde(default)]
    nosuid: bool,
    #[serde(default)]
    nodev: bool,
    #[serde(default)]
    follow_root_symlinks: bool,
    stat_virtualization: Option<StatVirtualization>,
    host_permissions: Option<HostPermissions>,
    create: Option<NamedVolumeMode>,
    kind: Option<VolumeKind>,
    size: Option<Size>,
    quota: Option<Size>,
    format: Option<DiskImageFormat>,
    fstype: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Owned {
    kind: Option<VolumeKind>,
    size: Option<Size>,
    quota: Option<Size>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tmpfs {
    size: Option<Size>,
}

impl Conf {
    /// Reads a file of `--conf`, with the volumes it describes.
    pub(super) fn read(path: &Path) -> Result<(Self, Vec<MountSpec>), Error> {
        let mut conf: Self = parse(path)?;
        conf.folder = folder(path)?;
        let mounts = resolve(std::mem::take(&mut conf.mounts), &conf.folder)?;
        Ok((conf, mounts))
    }
}

/// Reads a file of `--fs-conf`.
pub(super) fn read_mounts(path: &Path) -> Result<Vec<MountSpec>, Error> {
    let conf: FsConf = parse(path)?;
    resolve(conf.mounts, &folder(path)?)
}

fn parse<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, Error> {
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io(format!("cannot read `{shown}`"), error))?;
    yaml_serde::from_str(&text).map_err(|error| {
        Error::new(ErrorKind::InvalidConfig, format!("`{shown}`: {error}"))
            .with_value(shown.to_string())
    })
}

fn folder(file: &Path) -> Result<PathBuf, Error> {
    let file = std::path::absolute(file)
        .map_err(|error| Error::io(format!("cannot find `{}`", file.display()), error))?;
    Ok(file.parent().unwrap_or(Path::new("/")).to_owned())
}

/// The volumes; relative host paths are taken from `folder`.
fn resolve(mounts: Vec<Mount>, folder: &Path) -> Result<Vec<MountSpec>, Error> {
    let mut specs = Vec::new();
    let mut errors = Vec::new();
    for mount in mounts {
        match mount.resolve(folder) {
            Ok(spec) => specs.push(spec),
            Err(error) => errors.push(error),
        }
    }
    Error::all(errors).map_or(Ok(specs), Err)
}

impl Mount {
    fn resolve(self, folder: &Path) -> Result<MountSpec, Error> {
        match self {
            Self::Short(text) => {
                // The short form is for host paths alone, whatever they begin with.
                let text = if text.starts_with('/') {
                    text
                } else {
                    format!("./{text}")
                };
                Ok(parse_mount(MountFlag::Volume, &text, folder)?)
            }
            Self::Long(parts) => {
                let target = parts.target.clone();
                let built = Sandbox::builder("conf")
                    .image("conf")
                    .volume(target, |v| parts.describe(v, folder))
                    .build()?;
                built.mounts.into_iter().next().ok_or_else(|| {
                    Error::new(
                        ErrorKind::InvalidConfig,
                        "a volume was described as nothing",
                    )
                })
            }
        }
    }
}

impl Parts {
    fn describe(self, mut v: MountBuilder, folder: &Path) -> MountBuilder {
        if let Some(path) = &self.bind {
            v = v.bind(folder.join(path));
        }
        if let Some(path) = &self.disk {
            v = v.disk(folder.join(path));
        }
        if let Some(tmpfs) = &self.tmpfs {
            v = v.tmpfs();
            if let Some(Size(size)) = tmpfs.size {
                v = v.size(size);
            }
        }
        if let Some(owned) = &self.owned {
            v = v.owned_with(|mut o| {
                o = match owned.kind {
                    Some(VolumeKind::Disk) => o.disk(),
                    Some(VolumeKind::Directory) => o.directory(),
                    None => o,
                };
                if let Some(Size(size)) = owned.size {
                    o = o.size(size);
                }
                if let Some(Size(quota)) = owned.quota {
                    o = o.quota(quota);
                }
                o
            });
        }
        if let Some(name) = &self.named {
            v = v.named_with(name, |mut n| {
                n = match self.create.unwrap_or_default() {
                    NamedVolumeMode::Existing => n.existing(),
                    NamedVolumeMode::Create => n.create(),
                    NamedVolumeMode::EnsureExists => n.ensure_exists(),
                };
                n = match self.kind {
                    Some(VolumeKind::Directory) => n.directory(),
                    Some(VolumeKind::Disk) => n.disk(),
                    None => n,
                };
                if let Some(Size(size)) = self.size {
                    n = n.size(size);
                }
                if let Some(Size(quota)) = self.quota {
                    n = n.quota(quota);
                }
                n
            });
        } else {
            // What is for named volumes only is refused by the builder, as out of place.
            v = self.size.map_or(v.clone(), |Size(size)| v.size(size));
            v = self.quota.map_or(v.clone(), |Size(quota)| v.quota(quota));
        }
        self.flags(v)
    }

    fn flags(self, mut v: MountBuilder) -> MountBuilder {
        type Flag = fn(MountBuilder) -> MountBuilder;
        let flags: [(bool, Flag); 5] = [
            (self.readonly, MountBuilder::readonly),
            (self.noexec, MountBuilder::noexec),
            (self.nosuid, MountBuilder::nosuid),
            (self.nodev, MountBuilder::nodev),
            (
                self.follow_root_symlinks,
                MountBuilder::follow_root_symlinks,
            ),
        ];
        for (given, flag) in flags {
            v = if given { flag(v) } else { v };
        }
        if let Some(mode) = self.stat_virtualization {
            v = v.stat_virtualization(mode);
        }
        if let Some(mode) = self.host_permissions {
            v = v.host_permissions(mode);
        }
        if let Some(format) = self.format {
            v = v.format(format);
        }
        if let Some(fstype) = self.fstype {
            v = v.fstype(fstype);
        }
        v
    }
}

impl<'de> Deserialize<'de> for Mount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Mount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`host:/guest[:options]`, or a volume with its `target`")
            }

            fn visit_str<E>(self, text: &str) -> Result<Mount, E> {
                Ok(Mount::Short(text.to_owned()))
            }

            fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<Mount, M::Error> {
                Parts::deserialize(MapAccessDeserializer::new(map))
                    .map(|p| Mount::Long(Box::new(p)))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl Visitor<'_> for Either {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of MiB, or a size such as `20G`")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map(Size).map_err(E::custom)
            }

            fn visit_u64<E: serde::de::Error>(self, mib: u64) -> Result<Size, E> {
                self.visit_str(&mib.to_string())
            }
        }

        deserializer.deserialize_any(Either)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(text: &str) -> Result<Vec<MountSpec>, Error> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("conf.yaml");
        std::fs::write(&file, text).unwrap();
        let conf: FsConf = parse(&file)?;
        resolve(conf.mounts, Path::new("/conf"))
    }

    #[test]
    fn a_file_means_what_flags_mean() {
        let flag = |flag, text: &str| parse_mount(flag, text, Path::new("/conf")).unwrap();
        let described = mounts(
            "mounts:
  - src:/app/src:ro
  - { bind: ./data, target: /data, noexec: true, stat_virtualization: relaxed }
  - { named: cache, target: /cache, create: ensure-exists, kind: disk, size: 20G }
  - { tmpfs: { size: 64 }, target: /scratch, nodev: true }
  - { owned: {}, target: /own }
  - { owned: { kind: disk, size: 1G }, target: /own/disk }
  - { disk: d.img, target: /disk, format: qcow2, fstype: ext4, readonly: true }
",
        )
        .unwrap();
        assert_eq!(
            described,
            [
                flag(MountFlag::Volume, "./src:/app/src:ro"),
                flag(MountFlag::Volume, "./data:/data:noexec,stat-virt=relaxed"),
                flag(MountFlag::Named, "cache:/cache:kind=disk,size=20G"),
                flag(MountFlag::Tmpfs, "/scratch:64:nodev"),
                flag(MountFlag::Owned, "/own"),
                flag(MountFlag::Owned, "/own/disk:kind=disk,size=1G"),
                flag(MountFlag::Disk, "d.img:/disk:format=qcow2,fstype=ext4,ro"),
            ]
        );
    }

    #[test]
    fn mistakes_are_named() {
        for (text, wanted) in [
            (
                "mounts: [{ bind: a, target: /x, sync: true }]",
                "unknown field `sync`",
            ),
            ("mounts: [{ bind: a }]", "missing field `target`"),
            (
                "mounts: [{ bind: a, disk: b, target: /x }]",
                "two mount types set",
            ),
            ("mounts: [{ target: /x }]", "no mount type set"),
            (
                "mounts: [{ bind: a, target: /x, size: 5 }]",
                "size() without tmpfs()",
            ),
            (
                "mounts: [{ tmpfs: { size: 5K }, target: /x }]",
                "`5K` is not a size",
            ),
            ("mounts: [a]", "not in the form SOURCE:DEST[:OPTIONS]"),
            (
                "mounts: [{ bind: a, target: x }]",
                "guest path `x` is not absolute",
            ),
            (
                "mounts: [{ owned: { kind: disk }, target: /x }]",
                "needs a size",
            ),
            ("volumes: []", "unknown field `volumes`"),
            ("mounts: [5]", "`host:/guest[:options]`"),
        ] {
            let said = mounts(text).unwrap_err().to_string();
            assert!(said.contains(wanted), "{text}: {said}");
        }
    }
}
