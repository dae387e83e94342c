//! The guest kernel, and whether this host's processor can run guests.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use crate::rundir::Home;

/// A guest kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFacts {
    /// The kernel image.
    pub image: PathBuf,
    /// Folder of its modules, with `modules.dep` in it.
    pub modules: Option<PathBuf>,
}

/// What can be said about hardware virtualisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmFacts {
    /// `/dev/kvm` can be opened.
    pub opens: bool,
    /// The processor says that it can: without this, machines exist where `/dev/kvm` opens and no
    /// ordinary kernel boots.
    pub processor: bool,
}

impl KvmFacts {
    /// Asks the kernel.
    pub fn read() -> Self {
        let opens = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        let processor = if cfg!(target_arch = "x86_64") {
            let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let flags = text.lines().find(|line| line.starts_with("flags"));
            flags.is_some_and(|line| line.split(' ').any(|flag| matches!(flag, "vmx" | "svm")))
        } else {
            opens
        };
        Self { opens, processor }
    }

    /// Whether a guest can be expected to boot with it.
    pub fn usable(self) -> bool {
        self.opens && self.processor
    }
}

impl KernelFacts {
    /// The kernel that `MSB_KERNEL` names (a folder that holds `vmlinuz` and `modules/`, or an
    /// image), else the one in our home, else an installed one, else the host's own.
    ///
    /// # Errors
    ///
    /// What is missing, in words.
    pub fn find(home: &Home) -> Result<Self, String> {
        if let Some(named) = env::var_os("MSB_KERNEL").filter(|path| !path.is_empty()) {
            let named = PathBuf::from(named);
            return at(&named).ok_or_else(|| {
                format!("MSB_KERNEL names `{}`, which is no kernel", named.display())
            });
        }
        let prefix = env::current_exe().ok().and_then(|exe| {
            exe.parent()
                .map(|bin| bin.join("../lib/microsandbox/kernel"))
        });
        [home.kernel()]
            .into_iter()
            .chain(prefix)
            .chain(
                [
                    "/usr/local/lib/microsandbox/kernel",
                    "/usr/lib/microsandbox/kernel",
                ]
                .map(PathBuf::from),
            )
            .find_map(|folder| at(&folder))
            .or_else(of_the_host)
            .ok_or_else(|| "there is no guest kernel".to_owned())
    }
}

fn at(path: &Path) -> Option<KernelFacts> {
    let (image, folder) = if path.is_dir() {
        (path.join("vmlinuz"), path)
    } else {
        (path.to_owned(), path.parent()?)
    };
    let image = readable(&image)?;
    let modules = folder.join("modules");
    let modules = modules.join("modules.dep").is_file().then_some(modules);
    Some(KernelFacts {
        image,
        modules: modules.and_then(|path| fs::canonicalize(path).ok()),
    })
}

/// The kernel that this machine runs.
fn of_the_host() -> Option<KernelFacts> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let release = release.trim();
    let modules = Path::new("/lib/modules").join(release);
    [
        format!("/boot/vmlinuz-{release}"),
        format!("/lib/modules/{release}/vmlinuz"),
    ]
    .iter()
    .find_map(|image| readable(Path::new(image)))
    .map(|image| KernelFacts {
        image,
        modules: modules.join("modules.dep").is_file().then_some(modules),
    })
}

/// The path without symbolic links, when it is a file that can be opened.
fn readable(path: &Path) -> Option<PathBuf> {
    let path = fs::canonicalize(path).ok()?;
    (path.is_file() && File::open(&path).is_ok()).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_a_folder_or_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        assert_eq!(at(&root), None);
        fs::write(root.join("vmlinuz"), "").unwrap();
        let bare = KernelFacts {
            image: root.join("vmlinuz"),
            modules: None,
        };
        assert_eq!(at(&root), Some(bare.clone()));
        assert_eq!(at(&root.join("vmlinuz")), Some(bare));
        fs::create_dir(root.join("modules")).unwrap();
        fs::write(root.join("modules/modules.dep"), "").unwrap();
        assert_eq!(at(&root).unwrap().modules, Some(root.join("modules")));
    }
}
