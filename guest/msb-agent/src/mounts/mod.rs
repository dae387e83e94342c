//! Turns the host's plan into mounts: first into steps, which are data, then one by one.

mod apply;
mod disk;
mod furnish;
mod superblock;
mod system;
mod target;

use msb_protocol::{GuestMount, GuestPlan, GuestRoot, GuestSource, MountFlags, SecurityProfile};

pub(crate) use apply::{Guest, MountError};
pub(crate) use system::mount_own;

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Mounts a part of the root file system inside the initramfs.
    Layer {
        /// Which part.
        layer: Layer,
        /// Where it comes from.
        source: GuestSource,
        /// How.
        flags: MountFlags,
    },
    /// Joins the lower and the upper layer to the root.
    Join {
        /// How the result is mounted.
        flags: MountFlags,
    },
    /// Makes the root layer the agent's root directory.
    SwitchRoot,
    /// Mounts a file system of the kernel.
    System(System),
    /// Makes a part of a mounted file system read-only; not an error if it does not exist.
    Protect(&'static str),
    /// Allows no user namespace, in which a command would have every capability again.
    ForbidUserNamespaces,
    /// Puts the files into the root that programs expect, before any volume covers it.
    Furnish {
        /// Name of the guest.
        hostname: String,
    },
    /// Mounts a volume, making its mount point if it does not exist.
    Volume(GuestMount),
}

/// A part of the root file system; its name is its folder in the initramfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layer {
    /// What is only read.
    Lower,
    /// What is written.
    Upper,
    /// The whole.
    Root,
}

/// A file system that every Linux program expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum System {
    /// `/proc`.
    Proc,
    /// `/sys`.
    Sys,
    /// `/sys/fs/cgroup`, where the kernel has it.
    Cgroup,
    /// `/dev` with every device.
    Dev,
    /// `/dev` with only those that reach no disk, port or memory.
    SafeDev,
    /// `/dev/pts`.
    Pts,
    /// `/dev/shm`.
    Shm,
    /// `/run`, unless the image has something there.
    Run,
}

/// Kernel settings that a root user without capabilities could still use to run a program with all.
const PROTECTED: [&str; 4] = ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"];

/// What must be done for `plan`, in order.
pub(crate) fn steps(plan: &GuestPlan) -> Vec<Step> {
    let restricted = plan.security == SecurityProfile::Restricted;
    let mut steps = root_steps(&plan.root, restricted);
    steps.push(Step::SwitchRoot);
    let dev = if restricted {
        System::SafeDev
    } else {
        System::Dev
    };
    let systems = [
        System::Proc,
        System::Sys,
        System::Cgroup,
        dev,
        System::Pts,
        System::Shm,
    ];
    steps.extend(systems.map(Step::System));
    steps.push(Step::System(System::Run));
    if restricted {
        steps.extend(PROTECTED.map(Step::Protect));
        steps.push(Step::Protect("/sys"));
        steps.push(Step::ForbidUserNamespaces);
    }
    steps.push(Step::Furnish {
        hostname: plan.hostname.clone(),
    });
    steps.extend(
        plan.mounts
            .iter()
            .map(|mount| volume_step(mount, plan.security)),
    );
    steps
}

/// What must be done to mount one volume.
pub(crate) fn volume_step(mount: &GuestMount, security: SecurityProfile) -> Step {
    let mut mount = mount.clone();
    if security == SecurityProfile::Restricted {
        mount.flags.nosuid = true;
        mount.flags.nodev = true;
    }
    Step::Volume(mount)
}

fn root_steps(root: &GuestRoot, restricted: bool) -> Vec<Step> {
    let flags = |read_only| MountFlags {
        read_only,
        nodev: restricted,
        ..MountFlags::default()
    };
    let layer = |layer, source: &GuestSource, read_only| Step::Layer {
        layer,
        source: source.clone(),
        flags: flags(read_only),
    };
    match root {
        GuestRoot::Overlay { lower, upper } => vec![
            layer(Layer::Lower, lower, true),
            layer(Layer::Upper, upper, false),
            Step::Join {
                flags: flags(false),
            },
        ],
        GuestRoot::Plain { source, read_only } => vec![layer(Layer::Root, source, *read_only)],
    }
}

impl Step {
    /// What is done, for the host's messages.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Layer { layer, .. } => format!("mount the {} layer of the root", layer.folder()),
            Self::Join { .. } => "join the layers of the root".into(),
            Self::SwitchRoot => "switch to the root".into(),
            Self::System(system) => format!("mount {}", system.target()),
            Self::Protect(path) => format!("protect {path}"),
            Self::ForbidUserNamespaces => "forbid user namespaces".into(),
            Self::Furnish { .. } => "furnish the root".into(),
            Self::Volume(mount) => format!("mount {}", mount.target),
        }
    }

    /// Guest path of the volume that is mounted, if one is.
    pub(crate) fn target(&self) -> Option<String> {
        match self {
            Self::Volume(mount) => Some(mount.target.clone()),
            Self::Layer { .. } | Self::Join { .. } => Some("/".into()),
            Self::SwitchRoot
            | Self::System(_)
            | Self::Protect(_)
            | Self::ForbidUserNamespaces
            | Self::Furnish { .. } => None,
        }
    }
}

impl Layer {
    fn folder(self) -> &'static str {
        match self {
            Self::Lower => "lower",
            Self::Upper => "upper",
            Self::Root => "root",
        }
    }
}

impl System {
    fn target(self) -> &'static str {
        match self {
            Self::Proc => "/proc",
            Self::Sys => "/sys",
            Self::Cgroup => "/sys/fs/cgroup",
            Self::Dev | Self::SafeDev => "/dev",
            Self::Pts => "/dev/pts",
            Self::Shm => "/dev/shm",
            Self::Run => "/run",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(serial: &str) -> GuestSource {
        GuestSource::Disk {
            serial: serial.into(),
            fstype: None,
        }
    }

    fn plan(security: SecurityProfile) -> GuestPlan {
        let mount = |target: &str, source, flags| GuestMount {
            target: target.into(),
            source,
            flags,
        };
        GuestPlan {
            hostname: "box".into(),
            root: GuestRoot::Overlay {
                lower: GuestSource::Share {
                    tag: "image".into(),
                },
                upper: disk("upper"),
            },
            mounts: vec![
                mount(
                    "/a",
                    disk("a"),
                    MountFlags {
                        read_only: true,
                        ..MountFlags::default()
                    },
                ),
                mount(
                    "/a/b",
                    GuestSource::Share { tag: "b".into() },
                    MountFlags::default(),
                ),
            ],
            security,
            time_ns: 0,
        }
    }

    #[test]
    fn the_root_stands_before_the_volumes_and_these_keep_their_order() {
        let steps = steps(&plan(SecurityProfile::Default));
        let described: Vec<_> = steps.iter().map(Step::describe).collect();
        assert_eq!(
            described,
            [
                "mount the lower layer of the root",
                "mount the upper layer of the root",
                "join the layers of the root",
                "switch to the root",
                "mount /proc",
                "mount /sys",
                "mount /sys/fs/cgroup",
                "mount /dev",
                "mount /dev/pts",
                "mount /dev/shm",
                "mount /run",
                "furnish the root",
                "mount /a",
                "mount /a/b",
            ]
        );
        assert!(matches!(&steps[0], Step::Layer { flags, .. } if flags.read_only && !flags.nodev));
        assert!(matches!(&steps[1], Step::Layer { flags, .. } if !flags.read_only));
        assert!(matches!(&steps[12], Step::Volume(m) if m.flags.read_only && !m.flags.nosuid));
        assert_eq!(steps[13].target().as_deref(), Some("/a/b"));
    }

    #[test]
    fn a_plain_root_is_one_layer_with_its_own_access() {
        let mut plan = plan(SecurityProfile::Default);
        plan.root = GuestRoot::Plain {
            source: disk("r"),
            read_only: true,
        };
        let steps = steps(&plan);
        let expected = MountFlags {
            read_only: true,
            ..MountFlags::default()
        };
        assert_eq!(
            steps[0],
            Step::Layer {
                layer: Layer::Root,
                source: disk("r"),
                flags: expected
            }
        );
        assert_eq!(steps[1], Step::SwitchRoot);
    }

    #[test]
    fn restricted_adds_nosuid_and_nodev_and_takes_the_devices_away() {
        let steps = steps(&plan(SecurityProfile::Restricted));
        for step in &steps {
            if let Step::Volume(mount) = step {
                assert!(mount.flags.nosuid && mount.flags.nodev && !mount.flags.noexec);
            }
        }
        assert!(steps.contains(&Step::System(System::SafeDev)));
        assert!(!steps.contains(&Step::System(System::Dev)));
        assert!(steps.contains(&Step::Protect("/proc/sys")));
        assert!(matches!(&steps[2], Step::Join { flags } if flags.nodev));
    }
}
