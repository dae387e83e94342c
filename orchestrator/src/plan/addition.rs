//! One more mount of a sandbox that runs: the same checks, and only what is new of the plan.

use serde::{Deserialize, Serialize};

use msb_protocol::GuestMount;

use super::refusal::Refusal;
use super::{BackendPlan, DevicePlan, OwnedPlan, Plan, VolumePlan, mounts, programs, vm};
use crate::host::HostFacts;
use crate::spec::{
    MountSource, MountSpec, NamedVolumeMode, SandboxSpec, VmmKind, VolumeName, VolumeRequest,
};
use crate::volume::fit;

/// What is done to add one mount to a sandbox that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addition {
    /// What was asked for.
    pub mount: MountSpec,
    /// The volume that is looked up or made first.
    pub volume: Option<VolumePlan>,
    /// Likewise, when it is one of the sandbox's own.
    pub owned: Option<OwnedPlan>,
    /// The process that serves it; memory of the guest needs none.
    pub backend: Option<BackendPlan>,
    /// What the guest is told.
    pub guest: GuestMount,
}

impl Plan {
    /// Decides what is done to add `mount` to the sandbox that this plan runs, whose request is
    /// `spec`. The facts are those of a request with both.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the mount, on this host, beside the others, or under this VMM.
    pub fn add(
        &self,
        spec: &SandboxSpec,
        mount: &MountSpec,
        facts: &HostFacts,
    ) -> Result<Addition, Vec<Refusal>> {
        let mut refusals = Vec::new();
        let taken = |target: &str| target == mount.target.as_str();
        if self.guest.mounts.iter().any(|other| taken(&other.target)) {
            return Err(vec![Refusal::SameTarget(mount.target.clone())]);
        }
        let mut whole = standing(spec.clone());
        // What has changed on the host below the mounts that stand is not this one's fault.
        let mut old = Vec::new();
        mounts::plan(&whole, facts, &mut old);
        let mut mount = mount.clone();
        let volume = agreed(&mut mount, &whole, facts).map_err(|refusal| vec![refusal])?;
        whole.mounts.push(mount.clone());
        let mounted = mounts::plan(&whole, facts, &mut refusals);
        refusals.retain(|refusal| !old.contains(refusal));
        let mut guests = mounted.guest.into_iter();
        let guest = guests.rfind(|guest| taken(&guest.target));
        let (Some(guest), true) = (guest, refusals.is_empty()) else {
            return Err(refusals);
        };
        let mut backends = mounted.backends.into_iter();
        let backend = backends.find(|backend| backend.purpose == mount.target.as_str());
        if let Some(backend) = &backend {
            self.has_room(backend, &guest, &mount)
                .map_err(|refusal| vec![refusal])?;
            let gaps = programs(facts, std::slice::from_ref(backend), &[]);
            if !gaps.is_empty() {
                return Err(gaps.into_iter().map(Refusal::Host).collect());
            }
        }
        let mut volumes = mounted.volumes.into_iter();
        let volume = volume.and_then(|name| volumes.rfind(|volume| volume.name == name));
        let mut owned = mounted.owned.into_iter();
        let owned = owned.find(|owned| owned.target == mount.target);
        Ok(Addition {
            mount,
            volume,
            owned,
            backend,
            guest,
        })
    }

    /// Whether the machine as it runs can take the device, and its guest mount it.
    fn has_room(
        &self,
        backend: &BackendPlan,
        guest: &GuestMount,
        mount: &MountSpec,
    ) -> Result<(), Refusal> {
        if self.vm.vmm == VmmKind::Libkrun {
            return Err(Refusal::NoPlug(self.vm.vmm));
        }
        let volumes = self
            .backends
            .iter()
            .filter(|other| other.is_mount())
            .count();
        if volumes >= vm::PLACES {
            return Err(Refusal::NoPlace(volumes));
        }
        // A file system that nobody named is found in the guest, which then says what it lacks.
        if let (DevicePlan::Blk(_), msb_protocol::GuestSource::Disk { fstype, .. }) =
            (&backend.device, &guest.source)
            && let (Some(fstype), true) = (fstype, self.vm.modules.is_some())
        {
            let needed = vm::modules(&[Some(fstype.clone())]);
            if !needed
                .iter()
                .all(|name| self.vm.module_names.contains(name))
            {
                return Err(Refusal::NoModule {
                    target: mount.target.clone(),
                    fstype: fstype.clone(),
                });
            }
        }
        Ok(())
    }
}

/// The request of a sandbox that has run: its volumes have been made, so that one that is missing
/// now is missed, and not made anew with nothing in it.
pub(crate) fn standing(mut spec: SandboxSpec) -> SandboxSpec {
    for mount in &mut spec.mounts {
        if let MountSource::Named { mode, request, .. } = &mut mount.source {
            *mode = NamedVolumeMode::Existing;
            *request = VolumeRequest::default();
        }
    }
    spec
}

/// Lets a mount of a volume that the sandbox has mounted elsewhere agree with that one, if what it
/// asks for fits; the name of the volume, when the mount is one.
fn agreed(
    mount: &mut MountSpec,
    spec: &SandboxSpec,
    facts: &HostFacts,
) -> Result<Option<VolumeName>, Refusal> {
    let MountSource::Named {
        name,
        mode,
        request,
        ..
    } = &mut mount.source
    else {
        return Ok(None);
    };
    let mounted = spec.mounts.iter().any(
        |other| matches!(&other.source, MountSource::Named { name: other, .. } if other == name),
    );
    if mounted {
        fit(*mode, request, facts.volumes.get(name)).map_err(|problem| Refusal::Volume {
            name: name.clone(),
            problem,
        })?;
        *mode = NamedVolumeMode::Existing;
        *request = VolumeRequest::default();
    }
    Ok(Some(name.clone()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{host, mount, planned, spec};
    use super::*;

    const STANDING: [&str; 2] = ["--mount-dir ./dir:/dir", "--mount-named dir:/vol"];

    fn add(change: impl FnOnce(&mut Plan), text: &str) -> Result<Addition, Vec<String>> {
        let mut plan = planned(&STANDING);
        change(&mut plan);
        let added = plan.add(&spec(&STANDING), &mount(text), &host());
        added.map_err(|refusals| refusals.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn what_is_added_is_what_a_start_with_it_would_have() {
        for text in [
            "--mount-dir ./other:/new:ro,noexec",
            "--mount-file ./file:/new",
            "--mount-named made:/new:kind=disk,size=8",
            "--mount-named dir:/new",
            "--mount-disk ./disk.qcow2:/new",
            "--tmpfs /new:16",
        ] {
            let added = add(|_| {}, text).unwrap();
            let whole = planned(&[STANDING[0], STANDING[1], text]);
            let mut backends = whole.backends.into_iter();
            assert_eq!(
                added.backend,
                backends.find(|backend| backend.purpose == "/new"),
                "{text}"
            );
            assert!(whole.guest.mounts.contains(&added.guest), "{text}");
            if let Some(volume) = added.volume {
                let mut volumes = whole.volumes.iter();
                assert!(volumes.any(|planned| planned.name == volume.name), "{text}");
            }
        }
    }

    #[test]
    fn what_cannot_be_added_is_refused_before_anything_is_started() {
        let refused = |text| add(|_| {}, text).unwrap_err().join("; ");
        let same = refused("--tmpfs /dir");
        assert!(same.contains("same guest path `/dir`"), "{same}");
        // Its image has one in memory.
        let tmp = refused("--mount-dir ./other:/tmp");
        assert!(tmp.contains("same guest path `/tmp`"), "{tmp}");
        let missing = refused("--mount-dir ./none:/new");
        assert!(missing.contains("No such file"), "{missing}");
        let module = refused("--mount-disk ./disk.raw:/new:fstype=xfs");
        assert!(module.contains("no kernel module for xfs"), "{module}");
        let kind = refused("--mount-named dir:/new:kind=disk,size=8");
        assert!(kind.contains("volume `dir`"), "{kind}");
    }

    #[test]
    fn only_what_needs_a_device_needs_a_vmm_that_takes_one() {
        let libkrun = |plan: &mut Plan| plan.vm.vmm = VmmKind::Libkrun;
        let refused = add(libkrun, "--mount-dir ./other:/new").unwrap_err();
        assert_eq!(
            refused,
            ["libkrun cannot be given a volume while the sandbox runs"]
        );
        add(libkrun, "--tmpfs /new").unwrap();

        let full = |plan: &mut Plan| {
            let last = plan.backends.last().cloned().into_iter();
            let many = last.cycle().take(vm::PLACES);
            plan.backends.extend(many);
        };
        let refused = add(full, "--mount-dir ./other:/new").unwrap_err();
        assert!(refused[0].contains("no place for another"), "{refused:?}");
        add(full, "--tmpfs /new").unwrap();
    }
}
