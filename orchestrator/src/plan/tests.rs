//! Plans of whole requests, and every reason why there is none.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use expect_test::expect;
use serde_json::Value;

use super::*;
use crate::host::{KernelFacts, KvmFacts, Link, PathFacts, PathKind, Preference, Programs};
use crate::spec::{
    ImageSource, MountFlag, MountSource, MountSpec, ProcessSpec, SecurityProfile, VolumeKind,
    parse_mount,
};
use crate::volume::VolumeFacts;

/// A host where everything is there, with a few files below `/h`.
pub(super) fn host() -> HostFacts {
    let program = |name: &str| Some(PathBuf::from("/bin").join(name));
    let mut facts = HostFacts {
        home: PathBuf::from("/home/me/.microsandbox"),
        stored_image: Some(PathBuf::from("/home/me/.microsandbox/images/alpine/rootfs")),
        paths: BTreeMap::new(),
        volumes: BTreeMap::new(),
        programs: Programs {
            fs: program("msb-fs"),
            blk: program("msb-blk"),
            agent: program("msb-agent"),
            qemu: program("qemu-system-x86_64"),
            mkfs: program("mkfs.ext4"),
            ..Programs::default()
        },
        kernel: Ok(KernelFacts {
            image: PathBuf::from("/kernel/vmlinuz"),
            modules: Some(PathBuf::from("/kernel/modules")),
        }),
        kvm: KvmFacts {
            opens: true,
            processor: false,
        },
        preference: Preference::default(),
    };
    let kinds = [
        ("/h/dir", PathKind::Directory),
        ("/h/other", PathKind::Directory),
        ("/h/file", PathKind::File),
        ("/h/disk.raw", PathKind::File),
        ("/h/disk.qcow2", PathKind::File),
        ("/h/disk.vmdk", PathKind::File),
        ("/h/fifo", PathKind::Other("a FIFO")),
        (
            "/h/none",
            PathKind::Missing("No such file or directory".to_owned()),
        ),
    ];
    for (inode, (path, kind)) in (1..).zip(kinds) {
        let identity = (!matches!(kind, PathKind::Missing(_))).then_some((1, inode));
        let resolved = PathBuf::from(path);
        let found = PathFacts {
            kind,
            resolved: resolved.clone(),
            link: None,
            identity,
        };
        facts.paths.insert(resolved, found);
    }
    let alias = |facts: &mut HostFacts, path: &str, to: &str| {
        let link = Some(Link {
            at: PathBuf::from(path),
            last: true,
        });
        let found = PathFacts {
            link,
            ..facts.paths[Path::new(to)].clone()
        };
        facts.paths.insert(PathBuf::from(path), found);
    };
    alias(&mut facts, "/h/dirlink", "/h/dir");
    alias(&mut facts, "/h/disklink", "/h/disk.raw");
    let volume = |kind, capacity_bytes, quota| VolumeFacts {
        kind,
        capacity_bytes,
        quota,
        labels: BTreeMap::new(),
    };
    let mut add = |name: &str, facts_of_it| {
        facts
            .volumes
            .insert(VolumeName::try_from(name.to_owned()).unwrap(), facts_of_it);
    };
    add("disk", volume(VolumeKind::Disk, Some(5 << 20), None));
    add(
        "dir",
        volume(VolumeKind::Directory, None, Some(Mebibytes(9))),
    );
    facts
}

pub(super) fn mount(text: &str) -> MountSpec {
    let (flag, value) = text.split_once(' ').unwrap();
    let flag = match flag {
        "-v" => MountFlag::Volume,
        "--mount-dir" => MountFlag::Dir,
        "--mount-file" => MountFlag::File,
        "--mount-named" => MountFlag::Named,
        "--mount-disk" => MountFlag::Disk,
        "--mount-owned" => MountFlag::Owned,
        _ => MountFlag::Tmpfs,
    };
    parse_mount(flag, value, Path::new("/h")).unwrap()
}

pub(super) fn spec(mounts: &[&str]) -> SandboxSpec {
    SandboxSpec {
        name: SandboxName::try_from("box".to_owned()).unwrap(),
        image: ImageSource::Stored {
            reference: "alpine".to_owned(),
        },
        mounts: mounts.iter().map(|text| mount(text)).collect(),
        cpus: 2,
        memory: Mebibytes(512),
        root_disk: Mebibytes(4096),
        security: SecurityProfile::Default,
        process: ProcessSpec::default(),
        labels: BTreeMap::new(),
        ephemeral: false,
        vmm: None,
        accel: None,
    }
}

pub(super) fn planned(mounts: &[&str]) -> Plan {
    Plan::new(&spec(mounts), &host()).unwrap()
}

fn refused(mounts: &[&str]) -> Vec<String> {
    let refusals = Plan::new(&spec(mounts), &host()).unwrap_err();
    refusals.iter().map(ToString::to_string).collect()
}

/// The guest paths, in the order in which they are mounted.
fn targets(plan: &Plan) -> Vec<&str> {
    plan.guest
        .mounts
        .iter()
        .map(|mount| mount.target.as_str())
        .collect()
}

/// A value with one line for each part of it.
fn lines(value: &impl Serialize) -> String {
    let mut text = String::new();
    let mut add = |name: &str, value: &Value| text.push_str(&format!("{name} {value}\n"));
    let value = serde_json::to_value(value).unwrap();
    for (name, part) in value.as_object().into_iter().flatten() {
        match part {
            Value::Array(entries) => entries.iter().for_each(|entry| add(name, entry)),
            other => add(name, other),
        }
    }
    text
}

#[test]
fn a_sandbox_without_volumes() {
    expect![[r#"
        backends {"device":{"cache":null,"default_owner":[0,0],"exclusive":true,"host_permissions":"private","kind":"fs","owner":null,"queues":2,"quota":null,"read_only":true,"source":{"kind":"directory","path":"/home/me/.microsandbox/images/alpine/rootfs"},"stat_virtualization":"strict"},"id":"root_image","purpose":"root image"}
        backends {"device":{"format":"raw","image":"/home/me/.microsandbox/sandboxes/box/root.raw","kind":"blk","queues":2,"read_only":false},"id":"root_disk","purpose":"root disk"}
        disks {"label":"msb-root","path":"/home/me/.microsandbox/sandboxes/box/root.raw","size_bytes":4294967296}
        guest {"hostname":"box","mounts":[{"flags":{"nodev":false,"noexec":false,"nosuid":false,"read_only":false},"source":{"kind":"tmpfs","mode":1023,"size_bytes":134217728},"target":"/tmp"}],"root":{"kind":"overlay","lower":{"kind":"share","tag":"root_image"},"upper":{"fstype":"ext4","kind":"disk","serial":"root_disk"}},"security":"default","time_ns":0}
        name "box"
        vm {"accel":"tcg","cpus":2,"kernel":"/kernel/vmlinuz","memory_bytes":536870912,"module_names":["virtio_pci","virtio_mmio","virtio_console","virtio_blk","virtiofs","ext4","overlay"],"modules":"/kernel/modules","reason":"/dev/kvm opens, but the processor has neither vmx nor svm","vmm":"qemu"}
    "#]].assert_eq(&lines(&planned(&[])));
}

#[test]
fn each_kind_of_volume_has_its_backend_and_its_mount() {
    let mut plan = planned(&[
        "--mount-dir ./dir:/app/src:ro,noexec",
        "--mount-file ./file:/etc/app.toml",
        "--mount-named cache:/cache:quota=1G",
        "--mount-named data:/data:kind=disk,size=64M",
        "--mount-disk ./disk.qcow2:/seed:fstype=ext4",
        "--tmpfs /tmp:64M:noexec",
    ]);
    plan.backends.drain(..2);
    expect![[r#"
        backends {"device":{"cache":null,"default_owner":[0,0],"exclusive":false,"host_permissions":"private","kind":"fs","owner":null,"queues":2,"quota":{"account":"/home/me/.microsandbox/state/quota/cache","bytes":1073741824},"read_only":false,"source":{"kind":"directory","path":"/home/me/.microsandbox/volumes/cache"},"stat_virtualization":"strict"},"id":"cache_4f7cfe6f","purpose":"/cache"}
        backends {"device":{"format":"raw","image":"/home/me/.microsandbox/volumes/data/disk.raw","kind":"blk","queues":2,"read_only":false},"id":"data_bd47413b","purpose":"/data"}
        backends {"device":{"format":"qcow2","image":"/h/disk.qcow2","kind":"blk","queues":2,"read_only":false},"id":"seed_388b7041","purpose":"/seed"}
        backends {"device":{"cache":null,"default_owner":[0,0],"exclusive":false,"host_permissions":"private","kind":"fs","owner":null,"queues":2,"quota":null,"read_only":true,"source":{"kind":"directory","path":"/h/dir"},"stat_virtualization":"strict"},"id":"app_src_18f688b2","purpose":"/app/src"}
        backends {"device":{"cache":null,"default_owner":[0,0],"exclusive":false,"host_permissions":"private","kind":"fs","owner":null,"queues":2,"quota":null,"read_only":false,"source":{"kind":"file","path":"/h/file"},"stat_virtualization":"strict"},"id":"etc_app_tom_0fd6d6ce","purpose":"/etc/app.toml"}
        disks {"label":"msb-root","path":"/home/me/.microsandbox/sandboxes/box/root.raw","size_bytes":4294967296}
        guest {"hostname":"box","mounts":[{"flags":{"nodev":false,"noexec":false,"nosuid":false,"read_only":false},"source":{"kind":"share","tag":"cache_4f7cfe6f"},"target":"/cache"},{"flags":{"nodev":false,"noexec":false,"nosuid":false,"read_only":false},"source":{"fstype":"ext4","kind":"disk","serial":"data_bd47413b"},"target":"/data"},{"flags":{"nodev":false,"noexec":false,"nosuid":false,"read_only":false},"source":{"fstype":"ext4","kind":"disk","serial":"seed_388b7041"},"target":"/seed"},{"flags":{"nodev":false,"noexec":true,"nosuid":false,"read_only":false},"source":{"kind":"tmpfs","mode":1023,"size_bytes":67108864},"target":"/tmp"},{"flags":{"nodev":false,"noexec":true,"nosuid":false,"read_only":true},"source":{"kind":"share","tag":"app_src_18f688b2"},"target":"/app/src"},{"flags":{"nodev":false,"noexec":false,"nosuid":false,"read_only":false},"source":{"kind":"shared-file","name":"file","tag":"etc_app_tom_0fd6d6ce"},"target":"/etc/app.toml"}],"root":{"kind":"overlay","lower":{"kind":"share","tag":"root_image"},"upper":{"fstype":"ext4","kind":"disk","serial":"root_disk"}},"security":"default","time_ns":0}
        name "box"
        vm {"accel":"tcg","cpus":2,"kernel":"/kernel/vmlinuz","memory_bytes":536870912,"module_names":["virtio_pci","virtio_mmio","virtio_console","virtio_blk","virtiofs","ext4","overlay"],"modules":"/kernel/modules","reason":"/dev/kvm opens, but the processor has neither vmx nor svm","vmm":"qemu"}
        volumes {"exists":false,"mode":"ensure-exists","name":"cache","request":{"kind":null,"labels":{},"quota":1024,"size":null}}
        volumes {"exists":false,"mode":"ensure-exists","name":"data","request":{"kind":"disk","labels":{},"quota":null,"size":64}}
    "#]].assert_eq(&lines(&plan));
}

#[test]
fn what_is_the_sandboxs_own_lies_in_its_folder() {
    let mut plan = planned(&[
        "--mount-owned /own:quota=1M",
        "--mount-owned /db:kind=disk,size=8M",
        "--tmpfs /tmp",
    ]);
    plan.backends.drain(..2);
    plan.disks.clear();
    let lines = lines(&plan);
    let own = |line: &&str| !line.trim_start().starts_with(['g', 'v', 'n']);
    let lines: Vec<_> = lines.lines().filter(own).collect();
    expect![[r#"
        backends {"device":{"format":"raw","image":"/home/me/.microsandbox/sandboxes/box/volume-db_b084f664.raw","kind":"blk","queues":2,"read_only":false},"id":"db_b084f664","purpose":"/db"}
        backends {"device":{"cache":null,"default_owner":[0,0],"exclusive":true,"host_permissions":"private","kind":"fs","owner":null,"queues":2,"quota":{"account":"/home/me/.microsandbox/sandboxes/box/volume-own_4840ee37.quota","bytes":1048576},"read_only":false,"source":{"kind":"directory","path":"/home/me/.microsandbox/sandboxes/box/volume-own_4840ee37"},"stat_virtualization":"strict"},"id":"own_4840ee37","purpose":"/own"}
        owned {"capacity_bytes":8388608,"path":"/home/me/.microsandbox/sandboxes/box/volume-db_b084f664.raw","target":"/db"}
        owned {"capacity_bytes":null,"path":"/home/me/.microsandbox/sandboxes/box/volume-own_4840ee37","target":"/own"}"#]].assert_eq(&lines.join("\n"));
}

#[test]
fn mounts_are_made_by_depth_then_by_name() {
    let plan = planned(&[
        "--tmpfs /b/c",
        "-v dir:/z",
        "--mount-dir ./dir:/b",
        "--tmpfs /a/b/c",
    ]);
    assert_eq!(targets(&plan), ["/b", "/tmp", "/z", "/b/c", "/a/b/c"]);
}

#[test]
fn a_stored_image_gets_a_tmp_in_memory_unless_it_has_one() {
    let tmpfs = |plan: &Plan| {
        plan.guest
            .mounts
            .iter()
            .find(|mount| mount.target == "/tmp")
            .map(|m| m.source.clone())
    };
    let automatic = msb_protocol::GuestSource::Tmpfs {
        size_bytes: Some(128 << 20),
        mode: 0o1777,
    };
    assert_eq!(tmpfs(&planned(&[])), Some(automatic));
    let own = msb_protocol::GuestSource::Tmpfs {
        size_bytes: Some(5 << 20),
        mode: 0o1777,
    };
    assert_eq!(tmpfs(&planned(&["--tmpfs /tmp:5"])), Some(own));
    let mut from_directory = spec(&[]);
    from_directory.image = ImageSource::Directory {
        path: PathBuf::from("/h/dir"),
    };
    assert_eq!(tmpfs(&Plan::new(&from_directory, &host()).unwrap()), None);
}

#[test]
fn the_restricted_profile_takes_set_id_and_devices_from_every_mount() {
    let mut restricted = spec(&["-v ./dir:/a", "--tmpfs /b", "--mount-disk disk.raw:/c"]);
    restricted.security = SecurityProfile::Restricted;
    let plan = Plan::new(&restricted, &host()).unwrap();
    assert_eq!(plan.guest.mounts.len(), 4);
    assert!(
        plan.guest
            .mounts
            .iter()
            .all(|mount| mount.flags.nosuid && mount.flags.nodev)
    );
}

#[test]
fn an_existing_volume_is_taken_as_it_is() {
    let plan = planned(&["-v disk:/d", "-v dir:/e:quota=9"]);
    assert!(matches!(plan.backends[2].device, DevicePlan::Blk(_)));
    let DevicePlan::Fs(share) = &plan.backends[3].device else {
        panic!("a directory is shared")
    };
    assert_eq!(share.quota.as_ref().map(|quota| quota.bytes), Some(9 << 20));
    assert!(planned(&["--mount-named disk:/d:kind=disk"]).volumes[0].exists);
}

#[test]
fn a_disk_image_can_be_the_root() {
    let mut request = spec(&[]);
    let path = PathBuf::from("/h/disk.qcow2");
    request.image = ImageSource::Disk {
        path,
        format: DiskImageFormat::Qcow2,
    };
    let plan = Plan::new(&request, &host()).unwrap();
    assert_eq!(plan.backends.len(), 1);
    assert!(plan.disks.is_empty());
    assert!(plan.vm.module_names.iter().any(|name| name == "xfs"));
    request.mounts.push(mount("--mount-disk disk.qcow2:/x:ro"));
    assert!(matches!(
        Plan::new(&request, &host()).unwrap_err()[..],
        [Refusal::SameDisk { .. }]
    ));
}

#[test]
fn requests_that_contradict_themselves_or_the_host_are_refused() {
    for (mounts, wanted) in [
        (
            &["-v dir:/a", "--tmpfs /a"][..],
            "two volumes cannot be mounted at the same guest path `/a`",
        ),
        (
            &["--mount-file file:/a", "--tmpfs /a/b"],
            "`/a/b` lies below `/a`, where a file is mounted",
        ),
        (&["-v ./none:/a"], "`/h/none`: No such file or directory"),
        (&["--mount-dir file:/a"], "`/h/file`: is not a directory"),
        (&["--mount-file dir:/a"], "`/h/dir`: is not a regular file"),
        (
            &["--mount-file fifo:/a"],
            "`/h/fifo`: is not a regular file",
        ),
        (
            &["-v ./fifo:/a"],
            "`/h/fifo`: is a FIFO: only directories and regular files can be mounted",
        ),
        (
            &["-v ./dirlink:/a"],
            "`/h/dirlink`: is a symbolic link; the directory is `/h/dir`",
        ),
        (
            &["--mount-disk none:/a"],
            "`/h/none`: No such file or directory",
        ),
        (&["--mount-disk dir:/a"], "`/h/dir`: is not a regular file"),
        (
            &["--mount-disk disk.raw:/a:ro", "--mount-disk disklink:/b:ro"],
            "`/a` and `/b` are the same disk, which can be attached only once",
        ),
        (
            &["-v disk:/a:ro", "-v disk:/b:ro"],
            "`/a` and `/b` are the same disk, which can be attached only once",
        ),
        (
            &["--mount-named disk:/a:kind=dir"],
            "volume `disk` exists already as disk, but dir is asked for",
        ),
        (
            &["--mount-named disk:/a:kind=disk,size=6"],
            "volume `disk` exists already with a capacity of 5242880 bytes, but 6291456 bytes are asked for",
        ),
        (
            &["-v dir:/a:quota=1"],
            "volume `dir` exists already with a quota of 9 MiB, but a quota of 1 MiB is asked for",
        ),
        (
            &["-v disk:/a:stat-virt=relaxed"],
            "volume `disk` is a disk volume, which takes no `stat-virt`",
        ),
        (
            &["--mount-named new:/a:kind=disk"],
            "volume `new` does not exist, and a disk volume cannot be made without a size",
        ),
        (
            &[
                "--mount-named new:/a:quota=1",
                "--mount-named new:/b:quota=2",
            ],
            "volume `new` is asked for twice, in different ways",
        ),
    ] {
        assert_eq!(refused(mounts), [wanted], "{mounts:?}");
    }
}

#[test]
fn a_symbolic_link_is_followed_when_asked_and_always_to_a_file() {
    let plan = planned(&[
        "-v ./dirlink:/a:follow-root-symlinks",
        "--mount-file disklink:/b",
    ]);
    let source = |index: usize| match &plan.backends[index].device {
        DevicePlan::Fs(share) => share.source.clone(),
        DevicePlan::Blk(disk) => panic!("{disk:?}"),
    };
    assert_eq!(source(2), ShareSource::Directory(PathBuf::from("/h/dir")));
    assert_eq!(source(3), ShareSource::File(PathBuf::from("/h/disk.raw")));
}

#[test]
fn one_directory_volume_may_be_mounted_twice() {
    let plan = planned(&["-v dir:/a", "-v dir:/b:ro"]);
    assert_eq!((plan.volumes.len(), plan.backends.len()), (1, 4));
}

#[test]
fn everything_wrong_is_reported_at_once() {
    assert_eq!(
        refused(&["-v ./none:/a", "--mount-dir file:/b", "--tmpfs /b"]).len(),
        3
    );
}

#[test]
fn a_volume_of_the_sdk_must_exist_unless_it_says_otherwise() {
    let mut request = spec(&["-v new:/a"]);
    if let MountSource::Named { mode, .. } = &mut request.mounts[0].source {
        *mode = NamedVolumeMode::Existing;
    }
    let error = Plan::decide(&request, &host()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::VolumeNotFound);
    assert_eq!(error.value(), Some("new"));
}

#[test]
fn the_vmm_is_chosen_by_what_the_host_has() {
    let choice = |change: &dyn Fn(&mut SandboxSpec, &mut HostFacts)| {
        let (mut spec, mut facts) = (spec(&[]), host());
        change(&mut spec, &mut facts);
        match Plan::new(&spec, &facts) {
            Ok(plan) => format!("{} {:?}: {}", plan.vm.vmm, plan.vm.accel, plan.vm.reason),
            Err(refusals) => refusals
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join("; "),
        }
    };
    let library = || Some(PathBuf::from("/lib/libkrun.so"));
    let usable = KvmFacts {
        opens: true,
        processor: true,
    };
    let cases = [
        choice(&|_, _| ()),
        choice(&|_, facts| facts.kvm.opens = false),
        choice(&|_, facts| facts.kvm = usable),
        choice(&|_, facts| (facts.kvm, facts.programs.libkrun) = (usable, library())),
        choice(&|_, facts| (facts.kvm, facts.programs.cloud_hypervisor) = (usable, library())),
        choice(&|_, facts| facts.programs.libkrun = library()),
        choice(&|spec, _| spec.accel = Some(Accel::Kvm)),
        choice(&|spec, facts| {
            spec.accel = Some(Accel::Tcg);
            facts.kvm = usable;
        }),
        choice(&|spec, facts| {
            spec.accel = Some(Accel::Kvm);
            facts.kvm.opens = false;
        }),
        choice(&|spec, _| spec.vmm = Some(VmmKind::Libkrun)),
        choice(&|spec, facts| {
            spec.vmm = Some(VmmKind::Libkrun);
            facts.programs.unfit_libkrun = Some("`/lib/libkrun.so` is too old".to_owned());
        }),
        choice(&|spec, facts| {
            spec.vmm = Some(VmmKind::Libkrun);
            facts.programs.libkrun = library();
        }),
        choice(&|_, facts| facts.preference.vmm = Some(VmmKind::CloudHypervisor)),
        choice(&|_, facts| facts.preference.accel = Some(Accel::Tcg)),
        choice(&|spec, facts| {
            spec.vmm = Some(VmmKind::Qemu);
            facts.preference.vmm = Some(VmmKind::Libkrun);
        }),
        choice(&|_, facts| facts.programs.qemu = None),
        choice(&|_, facts| facts.kernel = Err("there is no guest kernel".to_owned())),
        choice(&|_, facts| (facts.programs.fs, facts.programs.agent) = (None, None)),
    ];
    expect![[r#"
        QEMU Tcg: /dev/kvm opens, but the processor has neither vmx nor svm
        QEMU Tcg: /dev/kvm cannot be opened
        QEMU Kvm: hardware virtualisation is usable, and QEMU was found
        libkrun Kvm: hardware virtualisation is usable and libkrun was found
        cloud-hypervisor Kvm: hardware virtualisation is usable and cloud-hypervisor was found
        QEMU Tcg: /dev/kvm opens, but the processor has neither vmx nor svm
        QEMU Kvm: hardware virtualisation is usable, and QEMU was found
        QEMU Tcg: emulation was asked for
        /dev/kvm cannot be opened
        libkrun was not found
        `/lib/libkrun.so` is too old
        libkrun needs hardware virtualisation, which this machine does not offer
        cloud-hypervisor was not found
        QEMU Tcg: emulation was asked for
        QEMU Tcg: asked for
        the program `qemu` was not found
        there is no guest kernel
        the program `msb-fs` was not found; the program `msb-agent` was not found"#]]
    .assert_eq(&cases.join("\n"));
}

#[test]
fn libkrun_is_not_given_more_devices_than_it_has_interrupts() {
    let mounts: Vec<String> = (0..7).map(|number| format!("-v dir:/m{number}")).collect();
    let mut request = spec(&mounts.iter().map(String::as_str).collect::<Vec<_>>());
    let mut facts = host();
    facts.kvm.processor = true;
    facts.programs.libkrun = Some(PathBuf::from("/lib/libkrun.so"));
    assert_eq!(Plan::new(&request, &facts).unwrap().vm.vmm, VmmKind::Qemu);
    request.vmm = Some(VmmKind::Libkrun);
    assert!(matches!(
        Plan::new(&request, &facts).unwrap_err()[..],
        [Refusal::Host(HostGap::TooManyDevices {
            devices: 9,
            most: 7
        })]
    ));
}

#[test]
fn sizes_that_cannot_work_are_refused() {
    let mut request = spec(&[]);
    (request.cpus, request.memory, request.root_disk) = (0, Mebibytes(1), Mebibytes(0));
    let refusals = Plan::new(&request, &host()).unwrap_err();
    let said: Vec<String> = refusals.iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "number of CPUs of 0 is too small: at least 1 needed",
            "memory of 1 MiB is too small: at least 96 MiB needed",
            "root disk of 0 MiB is too small: at least 1 MiB needed",
        ]
    );
}
