//! Reads the host once, before anything is decided: paths, volumes, programs, kernel, KVM.

mod checkup;
mod kernel;
mod path;
mod program;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::de::DeserializeOwned;

pub use checkup::{Finding, Verdict, examine};
pub use kernel::{KernelFacts, KvmFacts};
pub use path::{Link, PathFacts, PathKind};
pub use program::Programs;
pub(crate) use program::in_path;

use crate::image::ImageStore;
use crate::rundir::Home;
use crate::spec::{Accel, ImageSource, MountSource, SandboxSpec, VmmKind, VolumeName};
use crate::volume::{self, VolumeFacts};
use crate::{Error, ErrorKind, MicrosandboxResult};

/// What a plan needs to know about the host.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// The folder that holds everything of ours.
    pub home: PathBuf,
    /// Root file system of the stored image that is asked for, if there is such an image.
    pub stored_image: Option<PathBuf>,
    /// Every host path of the request.
    pub paths: BTreeMap<PathBuf, PathFacts>,
    /// Those named volumes of the request that exist.
    pub volumes: BTreeMap<VolumeName, VolumeFacts>,
    /// The programs and libraries that may be needed.
    pub programs: Programs,
    /// The guest kernel, or why there is none.
    pub kernel: Result<KernelFacts, String>,
    /// What can be said about hardware virtualisation.
    pub kvm: KvmFacts,
    /// What the environment asks for.
    pub preference: Preference,
}

/// The VMM and the kind of processor that the environment asks for; a request goes before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Preference {
    /// `MSB_VMM`.
    pub vmm: Option<VmmKind>,
    /// `MSB_ACCEL`.
    pub accel: Option<Accel>,
}

impl Preference {
    /// Reads the environment.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::InvalidConfig`] when a variable has a value that means nothing.
    pub fn from_env() -> MicrosandboxResult<Self> {
        Ok(Self {
            vmm: chosen("MSB_VMM", "libkrun, cloud-hypervisor or qemu")?,
            accel: chosen("MSB_ACCEL", "kvm or tcg")?,
        })
    }
}

fn chosen<T: DeserializeOwned>(variable: &str, choices: &str) -> MicrosandboxResult<Option<T>> {
    let word = std::env::var(variable).unwrap_or_default();
    if word.is_empty() {
        return Ok(None);
    }
    serde_json::from_value(word.as_str().into())
        .map(Some)
        .map_err(|_| {
            Error::new(ErrorKind::InvalidConfig, format!("{variable} is `{word}`"))
                .with_value(word)
                .with_hint(format!("set it to {choices}"))
        })
}

impl HostFacts {
    /// Reads what a plan for `spec` needs to know. Nothing is changed.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Io`] when our own state cannot be read; what is missing on the host is a
    /// fact, not an error.
    pub fn read(spec: &SandboxSpec, home: &Home) -> MicrosandboxResult<Self> {
        let mut facts = Self {
            home: home.path().to_owned(),
            stored_image: None,
            paths: BTreeMap::new(),
            volumes: BTreeMap::new(),
            programs: Programs::find(),
            kernel: KernelFacts::find(home),
            kvm: KvmFacts::read(),
            preference: Preference::from_env()?,
        };
        match &spec.image {
            ImageSource::Stored { reference } => {
                facts.stored_image = match ImageStore::of(home).find(reference) {
                    Ok(image) => Some(image.rootfs()),
                    Err(error) if error.kind() == ErrorKind::ImageNotFound => None,
                    Err(error) => return Err(error),
                }
            }
            ImageSource::Directory { path } | ImageSource::Disk { path, .. } => {
                facts.paths.insert(path.clone(), PathFacts::read(path));
            }
        }
        for mount in &spec.mounts {
            match &mount.source {
                MountSource::Bind { path, .. } | MountSource::Disk { path, .. } => {
                    facts.paths.insert(path.clone(), PathFacts::read(path));
                }
                MountSource::Named { name, .. } => {
                    if let Some(volume) = volume::facts(home, name)? {
                        facts.volumes.insert(name.clone(), volume);
                    }
                }
                MountSource::Owned { .. } | MountSource::Tmpfs { .. } => {}
            }
        }
        Ok(facts)
    }
}
