//! Things a broken-out guest would try from inside a backend, one system call or two each.

use std::ffi::CStr;
use std::io;
use std::os::fd::RawFd;

/// What an attack aims at.
pub struct Scene<'a> {
    /// A directory that is open: the share, or whatever the backend has.
    pub dir: RawFd,
    /// The folder of the process's own descriptors, if the backend has it.
    pub descriptors: RawFd,
    /// A file outside the share that everybody may read.
    pub canary: &'a CStr,
    /// A listening Unix socket with a name in the file system, and one with an abstract name.
    pub sockets: [&'a CStr; 2],
    /// A process outside.
    pub outsider: i32,
}

/// One attack.
pub struct Attack {
    /// What it tries.
    pub name: &'static str,
    /// Whether other layers must stop it even without the system call filter.
    pub deep: bool,
    /// Tries it; success is a failure of the jail.
    pub run: fn(&Scene<'_>) -> io::Result<()>,
}

/// An attack that several layers stop.
const fn deep(name: &'static str, run: fn(&Scene<'_>) -> io::Result<()>) -> Attack {
    Attack {
        name,
        deep: true,
        run,
    }
}

/// An attack that gains nothing inside the namespaces, so that only the filter stops it.
const fn shallow(name: &'static str, run: fn(&Scene<'_>) -> io::Result<()>) -> Attack {
    Attack {
        name,
        deep: false,
        run,
    }
}

fn call(number: libc::c_long, arguments: &[usize]) -> io::Result<usize> {
    let mut all = [0; 6];
    for (place, argument) in all.iter_mut().zip(arguments) {
        *place = *argument;
    }
    let [a, b, c, d, e, f] = all;
    // SAFETY: every caller below passes what the call asks for, or nonsense on purpose that the
    // kernel refuses; pointers are to constants or to locals that outlive the call.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn ask(number: libc::c_long, arguments: &[usize]) -> io::Result<()> {
    call(number, arguments).map(drop)
}

fn text(text: &CStr) -> usize {
    text.as_ptr().expose_provenance()
}

fn bytes<T: ?Sized>(value: &mut T) -> usize {
    (&raw mut *value).cast::<u8>().expose_provenance()
}

fn number(value: impl Into<i64>) -> usize {
    usize::try_from(value.into().cast_unsigned()).unwrap_or(usize::MAX)
}

fn open(dir: RawFd, path: &CStr, flags: i32) -> io::Result<()> {
    ask(
        libc::SYS_openat,
        &[number(dir), text(path), number(flags), 0o600],
    )
}

fn socket(family: i32, kind: i32) -> io::Result<usize> {
    call(libc::SYS_socket, &[number(family), number(kind), 0])
}

fn connect(path: &CStr, hidden: bool) -> io::Result<()> {
    let fd = socket(libc::AF_UNIX, libc::SOCK_STREAM)?;
    let mut address = [0_u8; 110];
    address[..2].copy_from_slice(&(libc::AF_UNIX as u16).to_ne_bytes());
    let start = if hidden { 3 } else { 2 };
    let path = path.to_bytes();
    address[start..start + path.len()].copy_from_slice(path);
    ask(
        libc::SYS_connect,
        &[fd, bytes(&mut address), start + path.len()],
    )
}

/// A user namespace that is not ours: the first process's.
fn clone_with(flags: i32) -> io::Result<()> {
    match call(
        libc::SYS_clone,
        &[number(flags | libc::SIGCHLD), 0, 0, 0, 0],
    )? {
        // The child that should not be must not go on as a second attacker.
        0 => call(libc::SYS_exit_group, &[0]).map(drop),
        _ => Ok(()),
    }
}

const AT_CWD: RawFd = libc::AT_FDCWD;

/// All of them.
pub const ATTACKS: &[Attack] = &[
    // Files.
    deep("read a file outside", |s| {
        open(AT_CWD, s.canary, libc::O_RDONLY)
    }),
    deep("find a file outside", |s| {
        open(AT_CWD, s.canary, libc::O_PATH)
    }),
    deep("write a file outside", |s| {
        open(AT_CWD, s.canary, libc::O_WRONLY)
    }),
    deep("create a file outside", |_| {
        open(AT_CWD, c"/tmp/msb-jail", libc::O_CREAT | libc::O_RDWR)
    }),
    deep("climb out of the root", |s| {
        open(s.dir, c"../../../../../../etc/passwd", libc::O_RDONLY)
    }),
    deep("read /etc/passwd", |_| {
        open(AT_CWD, c"/etc/passwd", libc::O_RDONLY)
    }),
    deep("read /dev/mem", |_| {
        open(AT_CWD, c"/dev/mem", libc::O_RDONLY)
    }),
    deep("list /proc", |_| {
        open(AT_CWD, c"/proc/self/status", libc::O_RDONLY)
    }),
    deep("climb from the descriptors", |s| {
        open(s.descriptors, c"../status", libc::O_RDONLY)
    }),
    deep("read another process's memory", |s| {
        open(s.descriptors, c"../../1/mem", libc::O_RDONLY)
    }),
    deep("follow a symbolic link out", |s| {
        open(s.dir, c"link", libc::O_RDONLY)
    }),
    deep("open a device in the share", |s| {
        open(s.dir, c"null", libc::O_RDONLY)
    }),
    deep("make a character device", |s| {
        ask(
            libc::SYS_mknodat,
            &[number(s.dir), text(c"c"), 0o020_666, 0x103],
        )
    }),
    deep("make a block device", |s| {
        ask(
            libc::SYS_mknodat,
            &[number(s.dir), text(c"b"), 0o060_666, 0x700],
        )
    }),
    deep("open by file handle", |s| {
        // A handle of eight bytes, as ext4 makes them: inode 2 is the root of the file system.
        let mut handle = [8_u32, 1, 2, 0];
        ask(
            libc::SYS_open_by_handle_at,
            &[number(s.dir), bytes(&mut handle), 0],
        )
    }),
    // Mounts and roots.
    deep("change the root", |_| ask(libc::SYS_chroot, &[text(c"/")])),
    deep("pivot the root", |_| {
        ask(libc::SYS_pivot_root, &[text(c"."), text(c".")])
    }),
    deep("mount a tmpfs", |_| {
        ask(
            libc::SYS_mount,
            &[text(c"x"), text(c"/"), text(c"tmpfs"), 0, 0],
        )
    }),
    deep("remount the root", |_| {
        let flags = (libc::MS_REMOUNT | libc::MS_BIND) as usize;
        ask(libc::SYS_mount, &[0, text(c"/"), 0, flags, 0])
    }),
    deep("unmount the root", |_| {
        ask(libc::SYS_umount2, &[text(c"/"), 2])
    }),
    deep("open a file system", |_| {
        ask(libc::SYS_fsopen, &[text(c"tmpfs"), 0])
    }),
    deep("clone the mounts", |_| {
        ask(libc::SYS_open_tree, &[number(AT_CWD), text(c"/"), 1])
    }),
    deep("allow devices and links again", |_| {
        let mut attributes = [
            0_u64,
            libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSYMFOLLOW,
            0,
            0,
        ];
        let at = number(AT_CWD);
        ask(
            libc::SYS_mount_setattr,
            &[at, text(c"/"), 0, bytes(&mut attributes), 32],
        )
    }),
    // Namespaces and processes.
    deep("unshare the mounts", |_| {
        ask(libc::SYS_unshare, &[number(libc::CLONE_NEWNS)])
    }),
    deep("unshare the network", |_| {
        ask(libc::SYS_unshare, &[number(libc::CLONE_NEWNET)])
    }),
    shallow("unshare the user namespace", |_| {
        ask(libc::SYS_unshare, &[number(libc::CLONE_NEWUSER)])
    }),
    shallow("clone into a user namespace", |_| {
        clone_with(libc::CLONE_NEWUSER)
    }),
    deep("clone into a mount namespace", |_| {
        clone_with(libc::CLONE_NEWNS)
    }),
    shallow("fork", |_| clone_with(0)),
    shallow("vfork", |_| clone_with(libc::CLONE_VFORK | libc::CLONE_VM)),
    shallow("clone3", |_| {
        let mut arguments = [0_u64, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
        match call(libc::SYS_clone3, &[bytes(&mut arguments), 64])? {
            0 => ask(libc::SYS_exit_group, &[0]),
            _ => Ok(()),
        }
    }),
    deep("enter a namespace", |s| {
        ask(libc::SYS_setns, &[number(s.dir), 0])
    }),
    deep("execute a program", |_| {
        let arguments = [0_usize; 1];
        let none = arguments.as_ptr().expose_provenance();
        ask(libc::SYS_execve, &[text(c"/bin/sh"), none, none])
    }),
    deep("execute itself", |s| {
        let arguments = [0_usize; 1];
        let none = arguments.as_ptr().expose_provenance();
        ask(
            libc::SYS_execveat,
            &[number(s.dir), text(c"program"), none, none, 0],
        )
    }),
    deep("trace a process", |s| {
        ask(
            libc::SYS_ptrace,
            &[libc::PTRACE_SEIZE as usize, number(s.outsider), 0, 0],
        )
    }),
    deep("read a process's memory", |s| {
        let mut buffer = [0_u64; 1];
        let mut span = [bytes(&mut buffer), 8];
        let span = bytes(&mut span);
        ask(
            libc::SYS_process_vm_readv,
            &[number(s.outsider), span, 1, span, 1, 0],
        )
    }),
    deep("write a process's memory", |s| {
        let mut buffer = [0_u64; 1];
        let mut span = [bytes(&mut buffer), 8];
        let span = bytes(&mut span);
        ask(
            libc::SYS_process_vm_writev,
            &[number(s.outsider), span, 1, span, 1, 0],
        )
    }),
    deep("signal a process", |s| {
        ask(libc::SYS_kill, &[number(s.outsider), 0])
    }),
    deep("signal a thread", |s| {
        ask(
            libc::SYS_tgkill,
            &[number(s.outsider), number(s.outsider), 0],
        )
    }),
    deep("hold a process", |s| {
        ask(libc::SYS_pidfd_open, &[number(s.outsider), 0])
    }),
    deep("queue a signal", |s| {
        let mut info = [0_u32; 32];
        info[2] = (-1_i32).cast_unsigned();
        ask(
            libc::SYS_rt_sigqueueinfo,
            &[number(s.outsider), libc::SIGURG as usize, bytes(&mut info)],
        )
    }),
    deep("compare with a process", |s| {
        ask(libc::SYS_kcmp, &[1, number(s.outsider), 0, 0, 0])
    }),
    deep("change a process's limits", |s| {
        ask(libc::SYS_prlimit64, &[number(s.outsider), 7, 0, 0])
    }),
    // Sockets.
    shallow("make an IPv4 socket", |_| {
        socket(libc::AF_INET, libc::SOCK_STREAM).map(drop)
    }),
    shallow("make an IPv6 socket", |_| {
        socket(libc::AF_INET6, libc::SOCK_DGRAM).map(drop)
    }),
    shallow("make a Unix socket", |_| {
        socket(libc::AF_UNIX, libc::SOCK_STREAM).map(drop)
    }),
    shallow("make a netlink socket", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW).map(drop)
    }),
    shallow("make a vsock socket", |_| {
        socket(libc::AF_VSOCK, libc::SOCK_STREAM).map(drop)
    }),
    shallow("make a Bluetooth socket", |_| {
        socket(libc::AF_BLUETOOTH, libc::SOCK_RAW).map(drop)
    }),
    shallow("make a CAN socket", |_| {
        socket(libc::AF_CAN, libc::SOCK_RAW).map(drop)
    }),
    shallow("make a TIPC socket", |_| {
        socket(libc::AF_TIPC, libc::SOCK_SEQPACKET).map(drop)
    }),
    shallow("make an XDP socket", |_| {
        socket(libc::AF_XDP, libc::SOCK_RAW).map(drop)
    }),
    shallow("make an RDS socket", |_| {
        socket(libc::AF_RDS, libc::SOCK_SEQPACKET).map(drop)
    }),
    shallow("make a crypto socket", |_| {
        socket(libc::AF_ALG, libc::SOCK_SEQPACKET).map(drop)
    }),
    deep("make a packet socket", |_| {
        socket(libc::AF_PACKET, libc::SOCK_RAW).map(drop)
    }),
    deep("make a raw socket", |_| {
        ask(
            libc::SYS_socket,
            &[number(libc::AF_INET), number(libc::SOCK_RAW), 1],
        )
    }),
    shallow("make a pair of sockets", |_| {
        let mut pair = [0_i32; 2];
        ask(libc::SYS_socketpair, &[1, 1, 0, bytes(&mut pair)])
    }),
    deep("reach a named socket", |s| connect(s.sockets[0], false)),
    deep("reach an abstract socket", |s| connect(s.sockets[1], true)),
    // Identity.
    deep("become root", |_| {
        // Where uid 0 is itself, becoming it again would prove nothing.
        let id = if call(libc::SYS_geteuid, &[])? == 0 {
            12345
        } else {
            0
        };
        ask(libc::SYS_setresuid, &[id, id, id])
    }),
    deep("change the group", |_| {
        ask(libc::SYS_setresgid, &[12345, 12345, 12345])
    }),
    deep("join groups", |_| {
        let mut group = [0_u32; 1];
        ask(libc::SYS_setgroups, &[1, bytes(&mut group)])
    }),
    deep("raise capabilities", |_| {
        let mut header = [0x2008_0522_u32, 0];
        let mut sets = [u32::MAX; 6];
        ask(libc::SYS_capset, &[bytes(&mut header), bytes(&mut sets)])
    }),
    deep("unlock the secure bits", |_| {
        ask(
            libc::SYS_prctl,
            &[libc::PR_SET_SECUREBITS as usize, 0, 0, 0, 0],
        )
    }),
    shallow("become dumpable", |_| {
        ask(libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as usize, 1])
    }),
    deep("raise a limit", |_| {
        let mut limit = [u64::MAX; 2];
        ask(
            libc::SYS_prlimit64,
            &[0, libc::RLIMIT_CORE as usize, bytes(&mut limit), 0],
        )
    }),
    // The kernel.
    shallow("make code out of nothing", |_| {
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
        ask(
            libc::SYS_mmap,
            &[0, 4096, libc::PROT_EXEC as usize, flags, usize::MAX, 0],
        )
    }),
    deep("make code out of data", |_| {
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
        let data = libc::PROT_READ | libc::PROT_WRITE;
        let at = call(
            libc::SYS_mmap,
            &[0, 4096, number(data), flags, usize::MAX, 0],
        )?;
        ask(
            libc::SYS_mprotect,
            &[at, 4096, (libc::PROT_READ | libc::PROT_EXEC) as usize],
        )
    }),
    deep("load a BPF program", |_| {
        let mut map = [2_u32, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        ask(libc::SYS_bpf, &[0, bytes(&mut map), 48])
    }),
    shallow("join a keyring", |_| ask(libc::SYS_keyctl, &[1, 0])),
    shallow("use keys", |_| {
        let payload = c"x";
        ask(
            libc::SYS_add_key,
            &[
                text(c"user"),
                text(c"msb"),
                text(payload),
                1,
                usize::MAX - 1,
            ],
        )
    }),
    shallow("make an io_uring", |_| {
        let mut parameters = [0_u32; 30];
        ask(libc::SYS_io_uring_setup, &[1, bytes(&mut parameters)])
    }),
    shallow("make data executable by personality", |_| {
        ask(libc::SYS_personality, &[libc::READ_IMPLIES_EXEC as usize])
    }),
    deep("watch performance", |_| {
        let mut attributes = [0_u8; 128];
        attributes[4] = 128;
        ask(
            libc::SYS_perf_event_open,
            &[bytes(&mut attributes), usize::MAX, 0, usize::MAX, 0],
        )
    }),
    deep("handle page faults", |_| ask(libc::SYS_userfaultfd, &[0])),
    deep("load a module", |_| {
        ask(libc::SYS_init_module, &[text(c"x"), 1, text(c"")])
    }),
    deep("load a kernel", |_| {
        ask(libc::SYS_kexec_load, &[0, 0, 0, 0])
    }),
    // The numbers that would make it happen are left out.
    deep("reboot", |_| match ask(libc::SYS_reboot, &[1, 2, 3, 0]) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }),
    deep("swap", |_| ask(libc::SYS_swapoff, &[text(c"/nothing")])),
    deep("read the kernel log", |_| ask(libc::SYS_syslog, &[4, 0, 0])),
    deep("set the clock", |_| {
        let mut time = [1_i64, 0];
        ask(
            libc::SYS_clock_settime,
            &[libc::CLOCK_REALTIME as usize, bytes(&mut time)],
        )
    }),
    deep("name the host", |_| {
        ask(libc::SYS_sethostname, &[text(c"x"), 1])
    }),
    deep("account processes", |_| ask(libc::SYS_acct, &[0])),
    deep("watch the file system", |_| {
        ask(libc::SYS_fanotify_init, &[0, 0])
    }),
    shallow("share memory by key", |_| {
        ask(libc::SYS_shmget, &[0, 4096, 0o600])
    }),
    shallow("make a message queue", |_| {
        ask(libc::SYS_msgget, &[0, 0o600])
    }),
    shallow("load another filter", |_| {
        ask(
            libc::SYS_seccomp,
            &[
                libc::SECCOMP_GET_ACTION_AVAIL as usize,
                0,
                bytes(&mut [0_u32]),
            ],
        )
    }),
];
