//! What each driver asks of its program for the same machine.

use expect_test::{Expect, expect};

use super::*;
use crate::plan::{BlkPlan, FsPlan, ShareSource, VmPlan};
use crate::spec::{Accel, DiskImageFormat, HostPermissions, StatVirtualization};

fn backends() -> [BackendPlan; 2] {
    let share = FsPlan {
        source: ShareSource::Directory("/srv".into()),
        read_only: true,
        stat_virtualization: StatVirtualization::Strict,
        host_permissions: HostPermissions::Private,
        default_owner: (0, 0),
        owner: None,
        cache: None,
        exclusive: false,
        quota: None,
        queues: 2,
    };
    let disk = BlkPlan {
        image: "/srv/disk.raw".into(),
        format: DiskImageFormat::Raw,
        read_only: false,
        queues: 1,
    };
    [
        BackendPlan {
            id: "root_1".into(),
            purpose: "root image".into(),
            device: DevicePlan::Fs(share),
        },
        BackendPlan {
            id: "disk_2".into(),
            purpose: "root disk".into(),
            device: DevicePlan::Blk(disk),
        },
    ]
}

/// A share and a disk that are mounts.
pub(super) fn mounts() -> [BackendPlan; 2] {
    let [mut share, mut disk] = backends();
    share.id = "share_1".into();
    share.purpose = "/share".into();
    disk.purpose = "/disk".into();
    [share, disk]
}

fn check(vmm: VmmKind, accel: Accel, expected: &Expect) {
    let vm = VmPlan {
        vmm,
        accel,
        reason: String::new(),
        cpus: 2,
        memory_bytes: 512 << 20,
        kernel: None,
        modules: None,
        module_names: Vec::new(),
    };
    let backends: Vec<_> = backends().into_iter().chain(mounts()).collect();
    let machine = Machine {
        name: "demo",
        vm: &vm,
        kernel: Some("/cache/vmlinux".into()),
        initramfs: Some(Path::new("/cache/initramfs")),
        sockets: Path::new("/run/s"),
        devices: backends
            .iter()
            .zip(["d0", "d1", "d2", "d3"].map(|name| Path::new("/run/s").join(name)))
            .collect(),
        agent: PathBuf::from("/run/s").join(agent_socket(vmm)),
        console: "/home/a,b/console.log".into(),
    };
    let programs = Programs {
        libkrun: Some("/lib/libkrun.so.1".into()),
        agent: Some("/libexec/msb-agent".into()),
        ..Programs::default()
    };
    let argv = driver(vmm).argv(&machine, &programs).unwrap();
    let mut text = String::new();
    for word in &argv {
        let word = word.to_string_lossy();
        let starts = text.is_empty() || word.starts_with('-');
        text.push_str(if starts { "\n" } else { " " });
        text.push_str(&word);
    }
    expected.assert_eq(text.trim_start());
}

#[test]
fn qemu() {
    check(
        VmmKind::Qemu,
        Accel::Tcg,
        &expect![[r#"
            -name guest=demo
            -nodefaults
            -no-user-config
            -no-reboot
            -display none
            -monitor none
            -parallel none
            -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny
            -accel tcg,thread=multi
            -cpu max
            -machine q35,usb=off,vmport=off,smbus=off,sata=off,hpet=off,i8042=off,memory-backend=memory
            -smp 2
            -m 536870912B
            -object memory-backend-memfd,id=memory,size=536870912,share=on
            -kernel /cache/vmlinux
            -initrd /cache/initramfs
            -append console=ttyS0 quiet panic=-1 cryptomgr.notests random.trust_cpu=on initcall_blacklist=jent_mod_init no_timer_check
            -chardev file,id=console,path=/home/a,,b/console.log
            -serial chardev:console
            -chardev socket,id=agent,path=/run/s/agent
            -device virtio-serial-pci,max_ports=2
            -device virtserialport,chardev=agent,name=dev.microsandbox.agent
            -chardev socket,id=monitor,path=/run/s/monitor
            -mon chardev=monitor,mode=control
            -device pci-bridge,id=plug,chassis_nr=1
            -chardev socket,id=device0,path=/run/s/d0
            -device vhost-user-fs-pci,chardev=device0,tag=root_1,queue-size=1024,num-request-queues=2
            -chardev socket,id=device1,path=/run/s/d1,reconnect=1
            -device vhost-user-blk-pci,chardev=device1,queue-size=256,num-queues=1
            -chardev socket,id=c-share_1,path=/run/s/d2
            -device vhost-user-fs-pci,chardev=c-share_1,tag=share_1,queue-size=1024,num-request-queues=2,bus=plug,id=m-share_1
            -chardev socket,id=c-disk_2,path=/run/s/d3,reconnect=1
            -device vhost-user-blk-pci,chardev=c-disk_2,queue-size=256,num-queues=1,bus=plug,id=m-disk_2"#]],
    );
    check(
        VmmKind::Qemu,
        Accel::Kvm,
        &expect![[r#"
            -name guest=demo
            -nodefaults
            -no-user-config
            -no-reboot
            -display none
            -monitor none
            -parallel none
            -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny
            -accel kvm
            -cpu host
            -machine q35,usb=off,vmport=off,smbus=off,sata=off,hpet=off,i8042=off,memory-backend=memory
            -smp 2
            -m 536870912B
            -object memory-backend-memfd,id=memory,size=536870912,share=on
            -kernel /cache/vmlinux
            -initrd /cache/initramfs
            -append console=ttyS0 quiet panic=-1 cryptomgr.notests random.trust_cpu=on initcall_blacklist=jent_mod_init
            -chardev file,id=console,path=/home/a,,b/console.log
            -serial chardev:console
            -chardev socket,id=agent,path=/run/s/agent
            -device virtio-serial-pci,max_ports=2
            -device virtserialport,chardev=agent,name=dev.microsandbox.agent
            -chardev socket,id=monitor,path=/run/s/monitor
            -mon chardev=monitor,mode=control
            -device pci-bridge,id=plug,chassis_nr=1
            -chardev socket,id=device0,path=/run/s/d0
            -device vhost-user-fs-pci,chardev=device0,tag=root_1,queue-size=1024,num-request-queues=2
            -chardev socket,id=device1,path=/run/s/d1,reconnect=1
            -device vhost-user-blk-pci,chardev=device1,queue-size=256,num-queues=1
            -chardev socket,id=c-share_1,path=/run/s/d2
            -device vhost-user-fs-pci,chardev=c-share_1,tag=share_1,queue-size=1024,num-request-queues=2,bus=plug,id=m-share_1
            -chardev socket,id=c-disk_2,path=/run/s/d3,reconnect=1
            -device vhost-user-blk-pci,chardev=c-disk_2,queue-size=256,num-queues=1,bus=plug,id=m-disk_2"#]],
    );
}

#[test]
fn cloud_hypervisor() {
    check(
        VmmKind::CloudHypervisor,
        Accel::Kvm,
        &expect![[r#"
            --kernel /cache/vmlinux
            --initramfs /cache/initramfs
            --cmdline console=ttyS0 quiet panic=-1 cryptomgr.notests random.trust_cpu=on initcall_blacklist=jent_mod_init msb.agent=vsock
            --cpus boot=2
            --memory size=536870912,shared=on
            --serial file="/home/a,b/console.log"
            --console off
            --vsock cid=3,socket=/run/s/vsock
            --api-socket path=/run/s/api
            --seccomp true
            --landlock
            --landlock-rules path=/run/s,access=rw
            --fs tag=root_1,socket=/run/s/d0,num_queues=2,queue_size=1024 tag=share_1,socket=/run/s/d2,num_queues=2,queue_size=1024,id=m-share_1
            --disk vhost_user=on,socket=/run/s/d1,num_queues=1,queue_size=256 vhost_user=on,socket=/run/s/d3,num_queues=1,queue_size=256,id=m-disk_2"#]],
    );
}

#[test]
fn libkrun() {
    check(
        VmmKind::Libkrun,
        Accel::Kvm,
        &expect![[r#"
            krun {"library":"/lib/libkrun.so.1","cpus":2,"memory_mib":512,"init":"/libexec/msb-agent","agent":"/run/s/agent","devices":[{"kind":26,"name":"root_1","socket":"/run/s/d0","queue_sizes":[1024,1024,1024]},{"kind":2,"name":"disk_2","socket":"/run/s/d1","queue_sizes":[256]},{"kind":26,"name":"share_1","socket":"/run/s/d2","queue_sizes":[1024,1024,1024]},{"kind":2,"name":"disk_2","socket":"/run/s/d3","queue_sizes":[256]}]}"#]],
    );
}

#[test]
fn what_a_vmm_may_reach_is_said_to_the_process_that_becomes_it() {
    let reach = Reach {
        read: vec!["/cache/vmlinux".into()],
        write: vec!["/run/s".into(), "/log".into()],
    };
    assert_eq!(
        reach.flags(),
        [
            "--read",
            "/cache/vmlinux",
            "--write",
            "/run/s",
            "--write",
            "/log"
        ]
    );
}
