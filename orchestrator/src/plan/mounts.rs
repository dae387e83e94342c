//! Mounts: every check between them, and what each becomes on the host and in the guest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use msb_protocol::{GuestMount, GuestSource, MountFlags, SecurityProfile};
use sha2::{Digest, Sha256};

use super::refusal::{Refusal, SourceProblem};
use super::{
    BackendPlan, BlkPlan, DevicePlan, FsPlan, OwnedPlan, QuotaPlan, ShareSource, VolumePlan,
};
use crate::host::{HostFacts, PathFacts, PathKind};
use crate::spec::{
    Access, BindKind, DiskImageFormat, GuestPath, ImageSource, Mebibytes, MountSource, MountSpec,
    NamedVolumeMode, SandboxSpec, ShareOptions, VolumeKind, VolumeName, VolumeRequest,
};
use crate::volume::{DISK_IMAGE, QUOTA_ACCOUNTS, VolumeProblem, fit};

/// Most queues that a device gets; each is a thread of its backend.
pub(super) const MOST_QUEUES: u8 = 4;

/// What the mounts become, in the order in which they are mounted.
#[derive(Default)]
pub(super) struct Mounted {
    pub(super) backends: Vec<BackendPlan>,
    pub(super) guest: Vec<GuestMount>,
    pub(super) volumes: Vec<VolumePlan>,
    pub(super) owned: Vec<OwnedPlan>,
    /// A disk whose file system the guest has to find out, or one that was named.
    pub(super) disks: Vec<Option<String>>,
    /// Guest paths of file mounts.
    files: Vec<GuestPath>,
    /// The disks attached so far, and where.
    attached: Vec<(DiskIdentity, String)>,
}

/// What makes two disks the same: the file, or the volume when it has yet to be made.
#[derive(PartialEq, Eq)]
pub(super) enum DiskIdentity {
    File(u64, u64),
    Path(PathBuf),
}

/// Plans every mount of the request.
pub(super) fn plan(spec: &SandboxSpec, facts: &HostFacts, refusals: &mut Vec<Refusal>) -> Mounted {
    let mounts = ordered(spec);
    for pair in mounts.windows(2) {
        if let [first, second] = pair
            && first.target == second.target
        {
            refusals.push(Refusal::SameTarget(first.target.clone()));
        }
    }
    let mut mounted = Mounted::default();
    if let ImageSource::Disk { path, .. } = &spec.image
        && let Some(found) = facts.paths.get(path)
    {
        mounted
            .attached
            .push((identity(found), path.display().to_string()));
    }
    check_volumes(&mounts, facts, refusals);
    for mount in &mounts {
        if let Err(refusal) = mounted.add(mount, spec, facts) {
            refusals.push(refusal);
        }
    }
    for file in &mounted.files {
        for mount in mounts.iter().filter(|mount| file.contains(&mount.target)) {
            let (file, mount) = (file.clone(), mount.target.clone());
            refusals.push(Refusal::BelowFile { file, mount });
        }
    }
    mounted.volumes.sort_by(|a, b| a.name.cmp(&b.name));
    mounted.volumes.dedup_by(|a, b| a.name == b.name);
    mounted
}

/// The mounts by depth, then by name, with a `/tmp` in memory when an image has none of its own.
fn ordered(spec: &SandboxSpec) -> Vec<MountSpec> {
    let mut mounts = spec.mounts.clone();
    let tmp = GuestPath::try_from("/tmp".to_owned()).ok();
    if let (ImageSource::Stored { .. }, Some(target)) = (&spec.image, tmp)
        && !mounts.iter().any(|mount| mount.target == target)
    {
        let size = Mebibytes((spec.memory.0 / 4).clamp(1, 512));
        mounts.push(MountSpec {
            target,
            source: MountSource::Tmpfs { size: Some(size) },
            access: Access::ReadWrite,
            noexec: false,
            nosuid: false,
            nodev: false,
        });
    }
    mounts.sort_by(|a, b| {
        let key = |mount: &MountSpec| (mount.target.depth(), mount.target.clone());
        key(a).cmp(&key(b))
    });
    mounts
}

/// Checks each volume once over all its mounts.
fn check_volumes(mounts: &[MountSpec], facts: &HostFacts, refusals: &mut Vec<Refusal>) {
    let mut seen: BTreeMap<&VolumeName, (NamedVolumeMode, &VolumeRequest)> = BTreeMap::new();
    for mount in mounts {
        let MountSource::Named {
            name,
            mode,
            request,
            ..
        } = &mount.source
        else {
            continue;
        };
        let refuse = |problem| Refusal::Volume {
            name: name.clone(),
            problem,
        };
        let kind = fit(*mode, request, facts.volumes.get(name));
        match seen.insert(name, (*mode, request)) {
            Some(first) if first != (*mode, request) => {
                refusals.push(refuse(VolumeProblem::Disagreement));
            }
            Some(_) => {}
            None => refusals.extend(kind.err().map(refuse)),
        }
    }
}

impl Mounted {
    fn add(
        &mut self,
        mount: &MountSpec,
        spec: &SandboxSpec,
        facts: &HostFacts,
    ) -> Result<(), Refusal> {
        mount.check().map_err(|rule| Refusal::Rule {
            target: mount.target.clone(),
            rule,
        })?;
        let source = match &mount.source {
            MountSource::Bind {
                path,
                expect,
                follow_root_symlinks,
                share,
            } => {
                let found = lookup(facts, path);
                let source = bound(path, &found, *expect, *follow_root_symlinks)?;
                if share.quota.is_some() && matches!(source, ShareSource::File(_)) {
                    let (path, problem) = (path.clone(), SourceProblem::QuotaOfFile);
                    return Err(Refusal::Source { path, problem });
                }
                // No volume has such a name.
                let place = found.resolved.as_os_str().as_encoded_bytes();
                let name = format!(".bind-{}", digest(place, 12));
                let quota = share.quota.map(|quota| account(facts, &name, quota));
                self.share(mount, source, share, quota, spec)?
            }
            MountSource::Named {
                name,
                mode,
                request,
                share,
            } => self.volume(mount, name, *mode, request, share, spec, facts)?,
            MountSource::Owned { request, share } => {
                self.owned(mount, request, share, spec, facts)?
            }
            MountSource::Disk {
                path,
                format,
                fstype,
            } => {
                let found = disk_file(path, lookup(facts, path))?;
                let format = format.unwrap_or_else(|| DiskImageFormat::from_path(path));
                self.disk(
                    mount,
                    identity(&found),
                    found.resolved,
                    format,
                    fstype.clone(),
                    spec,
                )?
            }
            MountSource::Tmpfs { size } => GuestSource::Tmpfs {
                size_bytes: size.map(Mebibytes::bytes),
                mode: match mount.target.as_str() {
                    "/tmp" | "/var/tmp" => 0o1777,
                    _ => 0o755,
                },
            },
        };
        let restricted = spec.security == SecurityProfile::Restricted;
        self.guest.push(GuestMount {
            target: mount.target.to_string(),
            source,
            flags: MountFlags {
                read_only: mount.access == Access::ReadOnly,
                noexec: mount.noexec,
                nosuid: mount.nosuid || restricted,
                nodev: mount.nodev || restricted,
            },
        });
        Ok(())
    }

    fn share(
        &mut self,
        mount: &MountSpec,
        source: ShareSource,
        share: &ShareOptions,
        quota: Option<QuotaPlan>,
        spec: &SandboxSpec,
    ) -> Result<GuestSource, Refusal> {
        let tag = device_id(&mount.target);
        let guest = match &source {
            ShareSource::Directory(_) => GuestSource::Share { tag: tag.clone() },
            ShareSource::File(path) => {
                let name = path.file_name().and_then(|name| name.to_str());
                let unfit = || Refusal::Source {
                    path: path.clone(),
                    problem: SourceProblem::NotUtf8,
                };
                self.files.push(mount.target.clone());
                GuestSource::SharedFile {
                    tag: tag.clone(),
                    name: name.ok_or_else(unfit)?.to_owned(),
                }
            }
        };
        self.backends.push(BackendPlan {
            id: tag,
            purpose: mount.target.to_string(),
            device: DevicePlan::Fs(FsPlan {
                source,
                read_only: mount.access == Access::ReadOnly,
                stat_virtualization: share.stat_virtualization.unwrap_or_default(),
                host_permissions: share.host_permissions.unwrap_or_default(),
                default_owner: default_owner(spec),
                owner: share.owner,
                cache: share.cache,
                exclusive: false,
                quota,
                queues: queues(spec),
            }),
        });
        Ok(guest)
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one mount, taken apart by the caller"
    )]
    fn volume(
        &mut self,
        mount: &MountSpec,
        name: &VolumeName,
        mode: NamedVolumeMode,
        request: &VolumeRequest,
        share: &ShareOptions,
        spec: &SandboxSpec,
        facts: &HostFacts,
    ) -> Result<GuestSource, Refusal> {
        let existing = facts.volumes.get(name);
        // What does not fit has been refused before; the rest of the mount is checked all the same.
        let kind = fit(mode, request, existing).unwrap_or(VolumeKind::Directory);
        self.volumes.push(VolumePlan {
            name: name.clone(),
            mode,
            request: request.clone(),
            exists: existing.is_some(),
        });
        let folder = facts.home.join("volumes").join(name.as_str());
        if kind == VolumeKind::Directory {
            let quota = existing.map_or(request.quota, |volume| volume.quota);
            let quota = quota.map(|quota| account(facts, name.as_str(), quota));
            return self.share(mount, ShareSource::Directory(folder), share, quota, spec);
        }
        let refuse = |problem| Refusal::Volume {
            name: name.clone(),
            problem,
        };
        if let Err(crate::spec::RuleError::NotForDisk(option)) = share.check_disk() {
            return Err(refuse(VolumeProblem::NotForDisk(option)));
        }
        let image = folder.join(DISK_IMAGE);
        let identity = facts
            .paths
            .values()
            .find(|found| found.resolved == image)
            .map(identity);
        let identity = identity.unwrap_or(DiskIdentity::Path(image.clone()));
        self.disk(
            mount,
            identity,
            image,
            DiskImageFormat::Raw,
            Some("ext4".to_owned()),
            spec,
        )
    }

    /// A volume that lies in the sandbox's folder, and so goes with it.
    fn owned(
        &mut self,
        mount: &MountSpec,
        request: &VolumeRequest,
        share: &ShareOptions,
        spec: &SandboxSpec,
        facts: &HostFacts,
    ) -> Result<GuestSource, Refusal> {
        let place = facts.home.join("sandboxes").join(spec.name.as_str());
        let place = place.join(format!("volume-{}", device_id(&mount.target)));
        // A disk without a size has been refused before.
        let capacity_bytes = request.size.map(Mebibytes::bytes);
        let path = match capacity_bytes {
            Some(_) => place.with_extension("raw"),
            None => place.clone(),
        };
        self.owned.push(OwnedPlan {
            target: mount.target.clone(),
            path: path.clone(),
            capacity_bytes,
        });
        if capacity_bytes.is_none() {
            let quota = request.quota.map(|quota| QuotaPlan {
                bytes: quota.bytes(),
                account: place.with_extension("quota"),
            });
            let guest = self.share(mount, ShareSource::Directory(path), share, quota, spec)?;
            if let Some(BackendPlan {
                device: DevicePlan::Fs(own),
                ..
            }) = self.backends.last_mut()
            {
                // Nobody else has it.
                own.exclusive = share.cache.is_none();
            }
            return Ok(guest);
        }
        let (identity, fstype) = (DiskIdentity::Path(path.clone()), Some("ext4".to_owned()));
        self.disk(mount, identity, path, DiskImageFormat::Raw, fstype, spec)
    }

    fn disk(
        &mut self,
        mount: &MountSpec,
        identity: DiskIdentity,
        image: PathBuf,
        format: DiskImageFormat,
        fstype: Option<String>,
        spec: &SandboxSpec,
    ) -> Result<GuestSource, Refusal> {
        let second = mount.target.to_string();
        if let Some((_, first)) = self.attached.iter().find(|(disk, _)| *disk == identity) {
            return Err(Refusal::SameDisk {
                first: first.clone(),
                second,
            });
        }
        self.attached.push((identity, second));
        let serial = device_id(&mount.target);
        self.backends.push(BackendPlan {
            id: serial.clone(),
            purpose: mount.target.to_string(),
            device: DevicePlan::Blk(BlkPlan {
                image,
                format,
                read_only: mount.access == Access::ReadOnly,
                queues: queues(spec),
            }),
        });
        self.disks.push(fstype.clone());
        Ok(GuestSource::Disk { serial, fstype })
    }
}

/// A quota and the account that every server of the same directory keeps it by.
fn account(facts: &HostFacts, name: &str, quota: Mebibytes) -> QuotaPlan {
    QuotaPlan {
        bytes: quota.bytes(),
        account: facts.home.join(QUOTA_ACCOUNTS).join(name),
    }
}

/// Tag and serial number of a mount's device: at most 20 bytes, the same for the same guest path.
fn device_id(target: &GuestPath) -> String {
    let path = target.as_str();
    let slug: String = path
        .trim_start_matches('/')
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .take(11)
        .collect();
    format!("{slug}_{}", digest(path.as_bytes(), 4))
}

/// So many bytes of a SHA-256, in hexadecimal.
fn digest(bytes: &[u8], count: usize) -> String {
    let digest = Sha256::digest(bytes);
    let first = digest.iter().take(count);
    first.map(|byte| format!("{byte:02x}")).collect()
}

/// Number of queues of a device.
pub(super) fn queues(spec: &SandboxSpec) -> u16 {
    u16::from(spec.cpus.clamp(1, MOST_QUEUES))
}

/// The user as which the host user's own files appear: whoever commands run as, when that is known
/// by number.
pub(super) fn default_owner(spec: &SandboxSpec) -> (u32, u32) {
    let user = spec.process.user.as_deref().unwrap_or("");
    let (uid, gid) = user.split_once(':').unwrap_or((user, "0"));
    match (uid.parse(), gid.parse()) {
        (Ok(uid), Ok(gid)) => (uid, gid),
        _ => (0, 0),
    }
}

/// What the host said about a path; a path that was not looked at counts as missing.
pub(super) fn lookup(facts: &HostFacts, path: &Path) -> PathFacts {
    facts.paths.get(path).cloned().unwrap_or_else(|| PathFacts {
        kind: PathKind::Missing("was not looked at".to_owned()),
        resolved: path.to_owned(),
        link: None,
        identity: None,
    })
}

/// A regular file that is to be a disk.
pub(super) fn disk_file(path: &Path, found: PathFacts) -> Result<PathFacts, Refusal> {
    let refuse = |problem| Refusal::Source {
        path: path.to_owned(),
        problem,
    };
    match found.kind {
        PathKind::File => Ok(found),
        PathKind::Missing(why) => Err(refuse(SourceProblem::Missing(why))),
        PathKind::Directory | PathKind::Other(_) => Err(refuse(SourceProblem::NotAFile)),
    }
}

fn identity(found: &PathFacts) -> DiskIdentity {
    match found.identity {
        Some((device, inode)) => DiskIdentity::File(device, inode),
        None => DiskIdentity::Path(found.resolved.clone()),
    }
}

/// What a bind mount shares. A directory must be reached without symbolic links: somebody who can
/// change one could make a later start share another place.
fn bound(
    path: &Path,
    found: &PathFacts,
    expect: Option<BindKind>,
    follow: bool,
) -> Result<ShareSource, Refusal> {
    let refuse = |problem| {
        Err(Refusal::Source {
            path: path.to_owned(),
            problem,
        })
    };
    match (&found.kind, expect) {
        (PathKind::Missing(why), _) => refuse(SourceProblem::Missing(why.clone())),
        (PathKind::Directory, Some(BindKind::File)) => refuse(SourceProblem::NotAFile),
        (PathKind::Directory, _) => match &found.link {
            Some(link) if !follow => refuse(SourceProblem::Link {
                at: link.at.clone(),
                last: link.last,
                resolved: found.resolved.clone(),
            }),
            _ => Ok(ShareSource::Directory(found.resolved.clone())),
        },
        (PathKind::File, Some(BindKind::Directory)) => refuse(SourceProblem::NotADirectory),
        (PathKind::File, _) => Ok(ShareSource::File(found.resolved.clone())),
        (PathKind::Other(_), Some(BindKind::Directory)) => refuse(SourceProblem::NotADirectory),
        (PathKind::Other(_), Some(BindKind::File)) => refuse(SourceProblem::NotAFile),
        (PathKind::Other(what), None) => refuse(SourceProblem::Neither(what)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_ids_are_those_of_microsandbox() {
        let id = |path: &str| device_id(&GuestPath::try_from(path.to_owned()).unwrap());
        // Seen as mount sources in guests of microsandbox 0.7.11 (spec observed).
        assert_eq!(id("/usr/share"), "usr_share_10b20799");
        assert!(id("/a/very/long/path/indeed").len() <= 20);
        assert_ne!(id("/a/b"), id("/a_b"));
    }
}
