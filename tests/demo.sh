#!/usr/bin/env bash
# Runs one sandbox with every kind of volume and shows what it sees of each.
#
# Needs MSB_BIN_DIR (release binaries), MSB_KERNEL and MSB_BUSYBOX; `make demo` sets them.
set -euo pipefail

bin=${MSB_BIN_DIR:?run this through: make demo}
here=$(mktemp -d "${TMPDIR:-/tmp}/msb-demo.XXXXXX")
export MSB_HOME=$here/home
trap 'status=$?; rm -rf "$here"; exit $status' EXIT
PATH=$bin:$PATH:/usr/sbin:/sbin

bold=$'\e[1m' green=$'\e[32m' red=$'\e[31m' dim=$'\e[2m' off=$'\e[0m'
[ -t 1 ] || bold='' green='' red='' dim='' off=''
step() { printf '%s==>%s %s%s%s\n' "$green" "$off" "$bold" "$*" "$off"; }
note() { printf '    %s%s%s\n' "$dim" "$*" "$off"; }

step 'making a small image and what the sandbox will mount'
rootfs=$here/rootfs
mkdir -p "$rootfs"/{bin,etc,root,tmp,var,usr/bin}
cp "${MSB_BUSYBOX:?}" "$rootfs/bin/busybox"
"$MSB_BUSYBOX" --list | grep -vx busybox | while read -r applet; do ln -s busybox "$rootfs/bin/$applet"; done
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$rootfs/etc/passwd"
printf 'root:x:0:\n' >"$rootfs/etc/group"
tar -C "$rootfs" --owner=0 --group=0 -cf "$here/demo.tar" .
msb image load "$here/demo.tar" --name demo >/dev/null

mkdir "$here/src" "$here/readonly" "$here/seed"
echo 'hello from the host' >"$here/src/greeting"
printf '#!/bin/sh\necho ran\n' >"$here/readonly/script"
chmod 755 "$here/readonly/script"
echo 'level = "info"' >"$here/config.toml"
echo 'inside the disk image' >"$here/seed/greeting"
disk() { # FORMAT: an image of that format with a file system and one file in it
    truncate -s 32M "$here/disk.raw"
    mkfs.ext4 -q -F -d "$here/seed" "$here/disk.raw"
    qemu-img convert -f raw -O "$1" "$here/disk.raw" "$here/data.$1"
    rm "$here/disk.raw"
}
disk qcow2
disk vmdk

# What the guest does at each place: how it is mounted, one read, one write.
cat >"$here/src/look.sh" <<'GUEST'
look() { # NAME PATH FILE-TO-READ FILE-TO-WRITE
    mounted=$(awk -v path="$2" '$2 == path {line = $3 " " $4} END {print line}' /proc/mounts)
    read=$(head -n 1 "$3" 2>&1)
    if { echo "written by the guest" >>"$4"; } 2>/tmp/refused; then write=written
    else write=$(sed 's/.*: //' /tmp/refused); fi
    printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$mounted" "$read" "$write"
}
date >/cache/first-run 2>/dev/null
echo 'kept in the directory volume' >/cache/kept
echo 'kept in the disk volume' >/data/kept
echo 'in memory' >/scratch/kept
look 'directory' /app/src /app/src/greeting /app/src/from-guest
look 'directory ro,noexec' /app/readonly /app/readonly/script /app/readonly/from-guest
look 'file ro' /etc/app/config.toml /etc/app/config.toml /etc/app/config.toml
look 'directory volume' /cache /cache/kept /cache/from-guest
look 'disk volume (ext4)' /data /data/kept /data/from-guest
look 'qcow2 image' /seed /seed/greeting /seed/from-guest
look 'vmdk image ro' /vm /vm/greeting /vm/from-guest
look 'tmpfs 64 MiB' /scratch /scratch/kept /scratch/from-guest
/app/readonly/script >/dev/null 2>/tmp/refused || printf 'noexec\t%s\n' "$(sed 's/.*: //' /tmp/refused)"
printf 'tmpfs\t%s\n' "$(df -m /scratch | awk 'NR == 2 {print $2 " MiB"}')"
cut -d ' ' -f 1 /proc/uptime >/app/src/uptime
GUEST

step 'one sandbox, eight volumes, each from a process of its own'
mounts=(
    --mount-dir "$here/src:/app/src"
    --mount-dir "$here/readonly:/app/readonly:ro,noexec"
    --mount-file "$here/config.toml:/etc/app/config.toml:ro"
    --mount-named cache:/cache
    --mount-named data:/data:kind=disk,size=64M
    --mount-disk "$here/data.qcow2:/seed:fstype=ext4"
    --mount-disk "$here/data.vmdk:/vm:ro"
    --tmpfs /scratch:64M
)
printf '    msb run demo'
printf ' \\\n        %s %s' "${mounts[@]/$here/.}"
printf ' \\\n        -- sh /app/src/look.sh\n'
begin=$(date +%s.%N)
msb run demo "${mounts[@]}" -- sh /app/src/look.sh >"$here/seen"
whole=$(echo "$(date +%s.%N) $begin" | awk '{printf "%.1f", $1 - $2}')

step 'what the guest saw'
awk -F '\t' -v OFS='\t' 'BEGIN {print "VOLUME", "GUEST PATH", "MOUNTED AS", "READ", "WRITE"} NF == 5' "$here/seen" |
    column -t -s $'\t' | sed "1s/.*/$bold&$off/; s/^/    /"

failed=0
expect() { # WHAT ACTUAL EXPECTED
    if [ "$2" = "$3" ]; then
        printf '    %s✓%s %s: %s\n' "$green" "$off" "$1" "$2"
    else
        printf '    %s✗ %s: %s, but expected: %s%s\n' "$red" "$1" "$2" "$3" "$off"
        failed=1
    fi
}
cell() { awk -F '\t' -v path="$1" -v column="$2" '$2 == path && NF == 5 {print $column}' "$here/seen"; }
said() { awk -F '\t' -v what="$1" '$1 == what && NF == 2 {print $2}' "$here/seen"; }

step 'what was promised'
for path in /app/src /cache /data /seed /scratch; do expect "write to $path" "$(cell $path 5)" written; done
for path in /app/readonly /etc/app/config.toml /vm; do
    expect "write to $path" "$(cell $path 5)" 'Read-only file system'
done
expect 'read of the ro directory' "$(cell /app/readonly 4)" '#!/bin/sh'
expect 'read of the ro file' "$(cell /etc/app/config.toml 4)" 'level = "info"'
expect 'read inside the qcow2 image' "$(cell /seed 4)" 'inside the disk image'
expect 'read inside the vmdk image' "$(cell /vm 4)" 'inside the disk image'
expect 'running a program from the noexec mount' "$(said noexec)" 'Permission denied'
expect 'size of the tmpfs' "$(said tmpfs)" '64 MiB'
expect 'the guest'"'"'s write, read on the host' "$(cat "$here/src/from-guest")" 'written by the guest'
expect 'the ro file on the host' "$(cat "$here/config.toml")" 'level = "info"'

step 'a second sandbox with the same two volumes'
note 'msb run demo -v cache:/cache -v data:/data -- cat /cache/kept /data/kept'
kept=$(msb run demo -v cache:/cache -v data:/data -- cat /cache/kept /data/kept)
expect 'found again' "$(echo "$kept" | paste -sd '|')" 'kept in the directory volume|kept in the disk volume'
msb volume ls | sed 's/^/    /'

step 'time'
note "from start of the guest kernel to the end of the checks: $(cat "$here/src/uptime") s"
note "the whole command, from msb run to its end: $whole s"
[ "$failed" -eq 0 ] || { printf '%ssomething was not as promised%s\n' "$red" "$off"; exit 1; }
step 'all as promised'
