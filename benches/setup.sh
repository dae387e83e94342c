#!/usr/bin/env bash
# Gets what our backends are compared with: virtiofsd by cargo, fio and the peers' libraries by apt.
#
# Usage: benches/setup.sh FOLDER      (leaves FOLDER/bin/virtiofsd)
set -euo pipefail

folder=${1:?usage: benches/setup.sh FOLDER}
version=1.14.0

say() { printf '  %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)

missing=()
command -v fio >/dev/null 2>&1 || missing+=(fio)
command -v qemu-storage-daemon >/dev/null 2>&1 || missing+=(qemu-utils)
have_virtiofsd() { "$folder/bin/virtiofsd" --version 2>/dev/null | grep -qF "$version"; }
if ! have_virtiofsd; then
    [ -e /usr/include/cap-ng.h ] || missing+=(libcap-ng-dev)
    [ -e /usr/include/seccomp.h ] || missing+=(libseccomp-dev)
fi
if [ "${#missing[@]}" -gt 0 ]; then
    command -v apt-get >/dev/null 2>&1 || die "missing ${missing[*]}, and this machine has no apt-get: install them by hand"
    say "installing ${missing[*]}"
    mkdir -p "$folder"
    {
        "${as_root[@]}" apt-get -q update
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "${missing[@]}"
    } >"$folder/setup.log" 2>&1 || { tail -n 20 "$folder/setup.log" >&2; die "apt-get failed; the whole log is $folder/setup.log"; }
fi
if ! have_virtiofsd; then
    say "building virtiofsd $version (some minutes, once)"
    # A folder of its own: our lock file and flags are not for it.
    CARGO_TARGET_DIR=$folder/build cargo install -q --locked virtiofsd --version "$version" --root "$folder"
    rm -rf "$folder/build"
fi
