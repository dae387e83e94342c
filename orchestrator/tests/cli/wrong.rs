//! Wrong command lines: message, exit code, and nothing made.

use crate::scratch::Scratch;

/// Flags of `run` and `plan`, the exit code, and what is said.
const BAD: &[(&str, i32, &str)] = &[
    // Form.
    (
        "--mount-dir ./dir",
        1,
        "not in the form SOURCE:DEST[:OPTIONS]",
    ),
    (
        "--mount-dir ./dir:rel",
        1,
        "not in the form SOURCE:DEST[:OPTIONS]",
    ),
    ("-v cache", 1, "not in the form SOURCE:DEST[:OPTIONS]"),
    ("--mount-dir :/x", 1, "the source before `:/` is empty"),
    ("--mount-named :/x", 1, "the source before `:/` is empty"),
    (
        "--mount-dir ./dir:/x,ro",
        1,
        "options follow a `:`, not a `,`",
    ),
    (
        "--mount-dir ./dir:/x:ro:noexec",
        1,
        "more than one block of options",
    ),
    ("--tmpfs /x:", 1, "not in the form DEST[:SIZE][:OPTIONS]"),
    ("--tmpfs /x::ro", 1, "not in the form DEST[:SIZE][:OPTIONS]"),
    ("--tmpfs x", 1, "guest path `x` is not absolute"),
    // Guest paths.
    (
        "--mount-dir ./dir:/",
        1,
        "guest path `/` is the root directory",
    ),
    (
        "--mount-dir ./dir:/a/../b",
        1,
        "guest path `/a/../b` holds `..`",
    ),
    ("--mount-dir ./dir:/a;b", 1, "guest path `/a;b` holds `;`"),
    (
        "--mount-dir ./dir:/proc",
        1,
        "guest path `/proc` lies in /proc",
    ),
    ("--mount-dir ./dir:/dev/shm/x", 1, "lies in /dev"),
    ("--tmpfs /sys/fs", 1, "lies in /sys"),
    ("--tmpfs /.msb", 1, "lies in /.msb"),
    (
        "-v ./dir:/x --tmpfs //x/",
        1,
        "two volumes cannot be mounted at the same guest path `/x`",
    ),
    (
        "-v ./file:/x --tmpfs /x/y",
        1,
        "`/x/y` lies below `/x`, where a file is mounted",
    ),
    // Options.
    (
        "--mount-dir ./dir:/x:ro,rw",
        1,
        "mount option `ro`/`rw` is given more than once",
    ),
    (
        "--mount-dir ./dir:/x:noexec,noexec",
        1,
        "mount option `noexec` is given more than once",
    ),
    (
        "--mount-dir ./dir:/x:exec",
        1,
        "there is no mount option `exec`",
    ),
    (
        "--mount-dir ./dir:/x:RO",
        1,
        "`RO` is neither a mount flag nor `key=value`",
    ),
    (
        "--mount-dir ./dir:/x:foo=1",
        1,
        "unknown mount option `foo`",
    ),
    (
        "--mount-dir ./dir:/x:size=5",
        1,
        "mount option `size` is not valid here",
    ),
    (
        "--mount-named n:/x:fstype=ext4",
        1,
        "mount option `fstype` is not valid here",
    ),
    ("--mount-owned own:/x", 1, "not in the form DEST[:OPTIONS]"),
    (
        "--mount-owned /x:kind=disk",
        1,
        "a disk volume of a sandbox's own needs a size",
    ),
    (
        "--mount-owned /x:fstype=ext4",
        1,
        "mount option `fstype` is not valid here",
    ),
    (
        "--mount-owned /x --tmpfs /x",
        1,
        "two volumes cannot be mounted at the same guest path `/x`",
    ),
    (
        "--mount-disk disk.raw:/x:stat-virt=off",
        1,
        "mount option `stat-virt` is not valid here",
    ),
    (
        "-v n:/x:kind=disk",
        1,
        "mount option `kind` is not valid here",
    ),
    (
        "--tmpfs /x:quota=5",
        1,
        "mount option `quota` is not valid here",
    ),
    (
        "--mount-dir ./dir:/x:stat-virt=x",
        1,
        "expected strict|relaxed|off",
    ),
    (
        "--mount-dir ./dir:/x:host-perms=x",
        1,
        "expected private|mirror",
    ),
    ("--mount-named n:/x:kind=x", 1, "expected dir|disk"),
    (
        "--mount-disk disk.raw:/x:format=iso",
        1,
        "expected raw|qcow2|vmdk",
    ),
    (
        "--mount-disk disk.raw:/x:fstype=",
        1,
        "is not a file system type",
    ),
    (
        "--mount-dir ./dir:/x:uid=5",
        1,
        "`uid` and `gid` are given together",
    ),
    (
        "--mount-dir ./dir:/x:stat-virt=off,uid=5,gid=5",
        1,
        "`uid` and `gid` need virtual owners",
    ),
    (
        "--mount-dir ./dir:/x:stat-virt=off,host-perms=mirror",
        1,
        "exclude each other",
    ),
    ("--mount-dir ./dir:/x:quota=5K", 1, "`5K` is not a size"),
    (
        "--mount-file file:/x:quota=5",
        1,
        "a quota limits what is in a directory",
    ),
    ("--tmpfs /x:5MB", 1, "`5MB` is not a size"),
    (
        "--tmpfs /x:5:size=6",
        1,
        "mount option `size` is given more than once",
    ),
    // Host paths.
    ("-v ./none:/x", 1, "/none`: No such file or directory"),
    (
        "--mount-dir ~/src:/x",
        1,
        "~/src`: No such file or directory",
    ),
    ("--mount-dir file:/x", 1, "/file`: is not a directory"),
    ("--mount-file dir:/x", 1, "/dir`: is not a regular file"),
    (
        "--mount-file /dev/null:/x",
        1,
        "`/dev/null`: is not a regular file",
    ),
    ("--mount-file fifo:/x", 1, "/fifo`: is not a regular file"),
    (
        "-v ./fifo:/x",
        1,
        "is a FIFO: only directories and regular files can be mounted",
    ),
    (
        "-v ./link:/x",
        1,
        "/link`: is a symbolic link; the directory is `",
    ),
    ("-v ./link/sub:/x", 1, "leads through the symbolic link `"),
    (
        "--mount-disk none.raw:/x",
        1,
        "/none.raw`: No such file or directory",
    ),
    ("--mount-disk dir:/x", 1, "/dir`: is not a regular file"),
    (
        "--mount-disk disk.raw:/x:ro --mount-disk disk-link:/y:ro",
        1,
        "are the same disk",
    ),
    // Volumes.
    ("-v .hidden:/x", 1, "`.hidden` is not a volume name"),
    ("-v a/b:/x", 1, "`a/b` is not a volume name"),
    ("--mount-named ./dir:/x", 1, "`./dir` looks like a path"),
    ("--mount-named n:/x:size=5", 1, "a size needs `kind=disk`"),
    (
        "--mount-named n:/x:kind=disk",
        1,
        "a disk volume cannot be made without a size",
    ),
    (
        "--mount-named n:/x:kind=disk,size=0",
        1,
        "a disk volume cannot have size 0",
    ),
    (
        "--mount-named n:/x:kind=disk,size=5,quota=5",
        1,
        "`quota` is for directory volumes",
    ),
    (
        "--mount-named n:/x:kind=disk,size=5,stat-virt=strict",
        1,
        "`stat-virt` is for directory",
    ),
    (
        "--mount-named disk:/x:kind=dir",
        1,
        "volume `disk` exists already as disk, but dir is asked",
    ),
    (
        "--mount-named dir:/x:kind=disk,size=5",
        1,
        "volume `dir` exists already as dir, but disk",
    ),
    (
        "--mount-named disk:/x:kind=disk,size=6",
        1,
        "a capacity of 5242880 bytes, but 6291456 bytes",
    ),
    (
        "--mount-named dir:/x:quota=5",
        1,
        "volume `dir` exists already with no quota, but a quota",
    ),
    ("-v disk:/x --mount-named disk:/y", 1, "are the same disk"),
    (
        "-v disk:/x:stat-virt=off",
        1,
        "volume `disk` is a disk volume, which takes no `stat-virt`",
    ),
    (
        "-v n:/x:quota=5 -v n:/y:quota=6",
        1,
        "volume `n` is asked for twice, in different ways",
    ),
    // The rest of a sandbox.
    ("--name -x", 2, ""),
    ("--name a/b", 1, "`a/b` is not a sandbox name"),
    ("--memory 5K", 2, "`5K` is not a size"),
    ("--memory 5", 1, "memory of 5 MiB is too small"),
    ("--root-disk 0", 1, "root disk of 0 MiB is too small"),
    ("--cpus 0", 2, "0 is not in 1..=255"),
    ("--env =x", 1, "`--env =x` has no name before `=`"),
    ("--label x", 2, "write it as NAME=VALUE"),
    ("--security none", 2, "invalid value 'none'"),
    ("--vmm libkrun", 1, "libkrun"),
    ("--mount-named -n:/x", 2, ""),
    ("--mount-dir", 2, "a value is required"),
    ("--no-such-flag", 2, "unexpected argument '--no-such-flag'"),
];

/// Whole command lines.
const BAD_LINES: &[(&str, i32, &str)] = &[
    ("", 2, "Usage: msb"),
    ("nonsense", 2, "unrecognized subcommand 'nonsense'"),
    ("plan", 2, "<IMAGE>"),
    (
        "run none -- true",
        1,
        "there is no image `none` in the local store",
    ),
    ("run .hidden", 1, "`.hidden` is not an image"),
    ("run ./none", 1, "/none`: No such file or directory"),
    ("run ./file", 1, "/file`: is not a directory"),
    (
        "run ./none.qcow2",
        1,
        "/none.qcow2`: No such file or directory",
    ),
    ("plan --conf none.yaml", 1, "cannot read `none.yaml`"),
    ("plan --conf bad.yaml", 1, "unknown field `volumes`"),
    ("plan --conf empty.yaml", 1, "there is no image"),
    (
        "run ./rootfs --fs-conf bad.yaml",
        1,
        "unknown field `volumes`",
    ),
    ("volume", 2, "Usage: msb volume"),
    ("volume create", 2, "<NAME"),
    ("volume create .x", 1, "`.x` is not a volume name"),
    ("volume create dir", 1, "volume `dir` exists already"),
    (
        "volume create n --kind disk",
        1,
        "a disk volume needs a size",
    ),
    ("volume create n --size 5", 1, "--size is for disk volumes"),
    (
        "volume create n --kind disk --size 0",
        1,
        "a disk volume cannot have size 0",
    ),
    (
        "volume create n --kind disk --size 5 --quota 5",
        1,
        "`quota` is for directory volumes",
    ),
    ("volume create n --kind floppy", 2, "invalid value 'floppy'"),
    (
        "volume create n --kind disk --size 5T",
        2,
        "`5T` is not a size",
    ),
    ("volume inspect none", 1, "volume `none` does not exist"),
    ("volume rm none", 1, "volume `none` does not exist"),
    ("volume rm", 2, "<NAME>"),
    ("cp ./file ./dir", 1, "neither side is in a sandbox"),
    ("cp a:/x b:/y", 1, "both sides are in a sandbox"),
    ("cp ./file none:/x", 1, "there is no sandbox `none`"),
    ("df --format yaml", 2, "invalid value 'yaml'"),
    ("volume ls --format yaml", 2, "invalid value 'yaml'"),
    ("completion none", 2, "invalid value 'none'"),
];

fn check(scratch: &Scratch, args: &[&str], code: i32, wanted: &str) {
    let before = (scratch.contents("home"), scratch.contents("work"));
    let output = scratch.msb(args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "msb {args:?}: {said}");
    assert!(
        said.contains(wanted),
        "msb {args:?} said: {said}\nand not: {wanted}"
    );
    if code == 1 {
        assert!(said.starts_with("error: "), "msb {args:?}: {said}");
    }
    assert!(
        output.stdout.is_empty(),
        "msb {args:?}: {:?}",
        output.stdout
    );
    let after = (scratch.contents("home"), scratch.contents("work"));
    assert_eq!(before, after, "msb {args:?} changed something");
}

#[test]
fn wrong_flags_are_refused_before_anything_is_made() {
    let scratch = Scratch::new();
    scratch.must(&["volume", "create", "dir"]);
    scratch.must(&["volume", "create", "disk", "--kind", "disk", "--size", "5"]);
    for (flags, code, wanted) in BAD {
        for verb in ["plan", "run", "create"] {
            let mut args = vec![verb, "./rootfs"];
            args.extend(flags.split(' '));
            check(&scratch, &args, *code, wanted);
        }
    }
    for (line, code, wanted) in BAD_LINES {
        let args: Vec<&str> = line.split(' ').filter(|arg| !arg.is_empty()).collect();
        check(&scratch, &args, *code, wanted);
    }
    assert!(BAD.len() + BAD_LINES.len() >= 40);
}

#[test]
fn everything_wrong_is_said_at_once_each_with_a_way_out() {
    let scratch = Scratch::new();
    let output = scratch.msb(&[
        "run",
        "./rootfs",
        "-v",
        "./none:/a",
        "-v",
        "./link:/b",
        "--tmpfs",
        "/a",
        "--",
        "true",
    ]);
    let said = String::from_utf8_lossy(&output.stderr)
        .replace(&scratch.path("").display().to_string(), "/");
    expect_test::expect![[r#"
        error: two volumes cannot be mounted at the same guest path `/a`
          → give one of them another place
        error: `/work/none`: No such file or directory (os error 2)
        error: `/work/link`: is a symbolic link; the directory is `/work/dir`
          → use `/work/dir`, or add follow-root-symlinks if you trust whoever can change the link
    "#]]
    .assert_eq(&said);
}
