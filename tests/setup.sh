#!/usr/bin/env bash
# Installs what a run needs and is missing: QEMU, the file system tools, and a guest kernel.
#
# Usage: tests/setup.sh FOLDER      (leaves FOLDER/kernel and FOLDER/busybox)
#
# The kernel is Debian's cloud kernel, unpacked and not installed. Where the machine already holds
# packages of its release's backports, QEMU and the kernel come from there too, by the address that
# apt is configured with.
set -euo pipefail

folder=${1:?usage: tests/setup.sh FOLDER}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

say() { printf '  %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo)
fi

missing=()
need() { # PROGRAM PACKAGE
    command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ] || missing+=("$2")
}
need qemu-system-x86_64 qemu-system-x86
need qemu-img qemu-utils
need qemu-io qemu-utils
need mkfs.ext4 e2fsprogs
need mkfs.xfs xfsprogs
need depmod kmod
need cc gcc
need make make
need git git
need strace strace
# What judges the volumes from inside a guest, which sees this machine's /usr.
need fio fio
need setcap libcap2-bin
need stress-ng stress-ng
need setfattr attr
need cryptsetup cryptsetup-bin
have_kernel() { [ -f "$folder/kernel/vmlinuz" ] && [ -f "$folder/kernel/modules/modules.dep" ]; }

if [ "${#missing[@]}" -eq 0 ] && have_kernel && [ -x "$folder/busybox" ]; then
    exit 0
fi
command -v apt-get >/dev/null 2>&1 ||
    die "missing ${missing[*]:-a guest kernel}, and this machine has no apt-get: install them by hand, and put a kernel at $folder/kernel/{vmlinuz,modules/}"

log=$folder/setup.log
: >"$log"
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q "${options[@]}" "$@" >>"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    die "apt-get $1 failed; the whole log is $log"
}; }

# A source list of our own beside the machine's, so that nothing in /etc changes.
. /etc/os-release
codename=${VERSION_CODENAME:-}
options=()
suite=()
sources=$folder/apt
uri=$(cat /etc/apt/sources.list.d/*.sources 2>/dev/null | awk '$1 == "URIs:" && $2 ~ /\/debian\/?$/ {print $2; exit}')
if [ -z "$uri" ]; then
    uri=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
        awk '$1 == "deb" {for (i = 2; i <= NF; i++) if ($i ~ /^http/ && $i ~ /\/debian\/?$/) {print $i; exit}}')
fi
use_backports() {
    [ -n "$uri" ] && [ -n "$codename" ] || return 1
    mkdir -p "$sources"
    cp /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list "$sources" 2>/dev/null || true
    local key
    key=$(awk '$1 == "Signed-By:" {print $2; exit}' "$sources"/debian.sources 2>/dev/null || true)
    printf 'deb [%s] %s %s-backports main\n' "${key:+signed-by=$key}" "$uri" "$codename" |
        sed 's/ \[\] / /' >"$sources/msb-backports.list"
    options=(-o "Dir::Etc::sourceparts=$sources")
    suite=(-t "$codename-backports")
}

say "installing what is missing: ${missing[*]:-guest kernel} (a minute or two)"
if [ "$codename" = bookworm ] && use_backports; then
    if ! "${as_root[@]}" apt-get -q "${options[@]}" update >>"$log" 2>&1; then
        options=() suite=()
        apt update
    fi
else
    apt update
fi

if [ "${#missing[@]}" -gt 0 ]; then
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
    # QEMU's two packages must be of one version.
    from=()
    case "$(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null || true)" in
        *bpo*) from=("${suite[@]}") ;;
    esac
    apt install -y --no-install-recommends "${from[@]}" "${missing[@]}"
fi

fetch() { # PACKAGE FOLDER: downloads a package without installing it and unpacks it.
    local work
    work=$(mktemp -d "$folder/fetch.XXXXXX")
    (cd "$work" && apt-get -q "${options[@]}" "${@:3}" download "$1" >>"$log" 2>&1) ||
        { tail -n 5 "$log" >&2; rm -rf "$work"; die "cannot download the package $1; the whole log is $log"; }
    dpkg-deb -x "$work"/*.deb "$2"
    rm -rf "$work"
}

if ! have_kernel; then
    package=$(apt-cache "${options[@]}" "${suite[@]}" depends linux-image-cloud-amd64 |
        awk '/Depends: linux-image-/ {print $2; exit}')
    [ -n "$package" ] || die "apt offers no linux-image-cloud-amd64: put a kernel at $folder/kernel/{vmlinuz,modules/}"
    say "unpacking the guest kernel $package"
    rm -rf "$folder/kernel" "$folder/unpacked"
    fetch "$package" "$folder/unpacked" "${suite[@]}"
    modules=$(find "$folder/unpacked" -type d -path '*/modules/*' -name '*cloud*' -prune | head -n 1)
    release=$(basename "$modules")
    base=$(dirname "$(dirname "$(dirname "$modules")")")
    PATH=$PATH:/usr/sbin:/sbin depmod -b "$base" "$release"
    mkdir -p "$folder/kernel"
    mv "$modules" "$folder/kernel/modules"
    mv "$folder"/unpacked/boot/vmlinuz-* "$folder/kernel/vmlinuz"
    rm -rf "$folder/unpacked"
fi

if [ ! -x "$folder/busybox" ]; then
    say "unpacking busybox for the demo's image"
    rm -rf "$folder/unpacked"
    fetch busybox-static "$folder/unpacked"
    find "$folder/unpacked" -name busybox -type f -exec mv {} "$folder/busybox" \;
    rm -rf "$folder/unpacked"
fi
