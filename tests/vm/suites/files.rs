//! What people do with shares in guests: overlays on them, and one volume for two guests at once.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{host, said};
use msb_testkit::suites::number;

use super::{Guest, end};

/// Does to an overlay below `$1` what container engines do, and prints what is to be seen of it.
/// Times and inode numbers are not printed: everything else must be what a local file system has.
const STORY: &str = r#"
module overlay
cat >/tmp/story <<'END'
export LC_ALL=C
see() {
    for name; do
        if [ -d "$name" ]; then size=; else size=%s; fi
        stat -c "%n %A %u:%g %t:%T $size" "$name"
    done
}
# After this, the guest has forgotten what it was told of names.
pause() { sleep 1.3; }
story() {
    cd "$1"
    mkdir lower upper work merged
    (
        cd lower
        umask 022
        for name in appended changed given moved removed replaced cut linked kept timed marked; do
            echo "lower $name" >$name
        done
        cp /usr/bin/id able; cp /usr/bin/id root-program; cp /usr/bin/id user-program; cp /usr/bin/id group-program
        chown user:daemon user-program; chown root:daemon group-program
        chmod 4755 root-program; chmod 6755 user-program; chmod 2755 group-program
        setcap cap_net_raw,cap_chown+ep able
        setfattr -n user.note -v lower marked
        mkdir -m 2775 team; chgrp daemon team; echo x >team/member
        mkdir -p tree/deep opaque gone; echo x >tree/deep/leaf; echo x >opaque/old; echo x >gone/inner
        ln -s appended link; mkfifo pipe; mknod device c 1 7
        touch -d @1000000000 timed
    )
    mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
    cd merged
    echo "-- content"
    echo more >>appended; cat appended
    chmod 640 changed; chown user:daemon given; truncate -s 3 cut; mv moved renamed; rm removed
    ln linked second; echo new >fresh; setfattr -n user.note -v upper marked; touch -d @1100000000 timed
    see appended changed given cut renamed linked second fresh marked timed; cat changed given cut renamed second
    stat -c '%n %Y' timed; getfattr --only-values -n user.note marked; echo
    [ ! -e removed ] && [ ! -e moved ] && echo "both gone"
    echo "-- again, when names must be asked for"
    pause
    echo more >>appended; cat appended; see appended changed given cut renamed second; cat given cut renamed
    echo x >>given; cat given
    (set -o noclobber; echo x >changed) 2>/dev/null || echo "it exists"
    mkdir changed 2>/dev/null || echo "it exists"
    ln fresh given 2>/dev/null || echo "it exists"
    echo over >replacement; mv replacement replaced; cat replaced; pause; cat replaced
    mv fresh cut; cat cut; mv cut changed; cat changed; pause; see changed; cat changed
    echo "-- privileges"
    for name in able root-program user-program group-program; do touch $name; done
    see able root-program user-program group-program; getcap able
    pause
    for name in root-program user-program group-program; do /bin/su -m user -c ./$name | cut -d' ' -f1-4; done
    chmod 711 able; getcap able
    # What takes them away must still do so.
    chown root:root root-program; chown user able; echo x >>group-program; /bin/su -m user -c 'echo x >>user-program'
    see root-program user-program group-program able; getcap able
    echo "-- directories"
    touch team/member; echo x >team/new; mkdir team/inner; see team team/member team/new team/inner
    echo y >tree/deep/leaf; mv tree/deep/leaf tree/leaf; see tree tree/deep tree/leaf
    rm -r gone; mkdir gone; see gone; ls gone
    rm -r opaque; mkdir opaque; echo new >opaque/new; ls opaque; pause; ls opaque
    mkdir made; mv made/ made2; rmdir made2; rm -r tree; [ ! -e tree ] && echo "no tree"
    readlink link; rm link; ln -s changed link; readlink link; see link
    chmod 600 pipe device; chown user pipe; see pipe device
    ls -A; cd ..
    echo "-- mounted again"
    umount merged; mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
    see $(find merged | sort); cat merged/appended merged/changed merged/opaque/new; getcap merged/*
    umount merged
    echo "-- upper"
    see $(find upper | sort); getfattr -d -m trusted.overlay.opaque upper/gone upper/opaque
    find work -mindepth 2
    echo "-- metacopy and redirects"
    rm -r upper work; mkdir upper work
    mount -t overlay overlay -o metacopy=on,redirect_dir=on,lowerdir=lower,upperdir=upper,workdir=work merged
    chown user merged/root-program merged/appended; chmod 4711 merged/user-program; mv merged/tree merged/forest; pause
    see merged/root-program merged/appended merged/user-program; cat merged/appended merged/forest/deep/leaf
    getfattr -d -m 'trusted.overlay.(redirect|metacopy)' upper/forest upper/appended
    echo z >>merged/appended; pause; cat merged/appended; cmp merged/able lower/able && echo same
    umount merged
}
story /story
END
# All live at the same path, for names are printed. It is no busybox that tells them, which would
# take its own programs for those of the host.
mkdir /story /memory; mount -t tmpfs none /memory
for place in memory strict relaxed; do
    unshare -m sh -c "mount --bind /$place /story; bash /tmp/story" >/tmp/$place 2>&1 || true &
done
wait
for place in memory strict relaxed; do echo "== $place"; cat /tmp/$place; done
"#;

/// Tells the story on the guest's memory and on two shares at once, and compares.
fn overlay(ordinary: bool) -> Result<()> {
    let guest = Guest::new(ordinary)?;
    let mut flags = Vec::new();
    for mode in ["strict", "relaxed"] {
        guest.dir(mode)?;
        flags.push(format!("./{mode}:/{mode}:stat-virt={mode}"));
    }
    let text = guest.must(&["-v", &flags[0], "-v", &flags[1]], STORY)?;
    let told = |place: &str| -> Result<Vec<&str>> {
        let (_, rest) = text
            .split_once(&format!("== {place}\n"))
            .context("not told")?;
        let story = rest.split("== ").next().unwrap_or_default();
        Ok(story.lines().collect())
    };
    let memory = told("memory")?;
    ensure!(
        memory.len() > 150 && memory.last() == Some(&"same"),
        "a short story:\n{}",
        memory.join("\n")
    );
    for mode in ["strict", "relaxed"] {
        let share = told(mode)?;
        let differing: Vec<_> = (0..memory.len().max(share.len()))
            .map(|at| (memory.get(at), share.get(at)))
            .filter(|(memory, share)| memory != share)
            .map(|(memory, share)| format!("memory {memory:?}, share {share:?}"))
            .collect();
        ensure!(differing.is_empty(), "{mode}:\n{}", differing.join("\n"));
    }
    Ok(())
}

#[test]
fn an_overlay_keeps_its_changes_on_shares_by_root() -> Result<()> {
    overlay(false)
}

#[test]
fn an_overlay_keeps_its_changes_on_shares_by_an_ordinary_user() -> Result<()> {
    overlay(true)
}

/// Many links of one file below an overlay, which the guest reads while its kernel is told to forget
/// them; a server that found them again by handle or by descriptor once lost some.
const LINKS: &str = r#"
module overlay
mkdir -p /x/lower/dir /memory
cd /x/lower
seq 1000 >first
for n in $(seq 970); do ln first dir/$n; done
mount -t tmpfs none /memory
mkdir /memory/upper /memory/work /memory/merged
mount -t overlay overlay -o lowerdir=/x/lower,upperdir=/memory/upper,workdir=/memory/work /memory/merged
cd /memory/merged
(while [ ! -e /tmp/over ]; do echo 3 >/proc/sys/vm/drop_caches; sleep 0.2; done) &
cat dir/* | wc -l
find . -links 971 | wc -l
echo more >>dir/7
touch /tmp/over
wait
wc -l dir/7
stat -c %h dir/8
"#;

#[test]
fn many_links_below_an_overlay_are_never_stale() -> Result<()> {
    let guest = Guest::new(true)?;
    guest.dir("share")?;
    let text = guest.must(&["-v", "./share:/x"], LINKS)?;
    ensure!(text == "970000\n971\n1001 dir/7\n971\n", "{text}");
    Ok(())
}

/// One of two guests: unpacks, compares and removes a tree in a folder of its own, and appends,
/// renames and makes names in one that both have. `$me` and `$other` are above it.
const WRITER: &str = r#"
export me other rounds
cat >/tmp/writer <<'END'
cd /x
mkdir $me
until mkdir -p common && [ -d common ]; do sleep 0.1; done
# Both begin together.
touch common/ready.$me
until [ -e common/ready.$other ]; do sleep 0.1; done
for round in $(seq $rounds); do
    tar -xf /suites/tree.tar -C $me
    tar -df /suites/tree.tar -C $me
    for line in $(seq 25); do echo "$me of round $round, line $line" >>common/log; done
    echo "all that $me has to say in round $round" >common/from.$me
    mv common/from.$me common/current
    grep -qx "all that [ab] has to say in round [0-9]*" common/current
    # Of two who make a name one is the first.
    if mkdir common/first.$round 2>/dev/null; then echo $me >>common/winners.$me; fi
    mkdir common/first.$round 2>/dev/null && exit 1
    mv $me/tree common/tree.$me
    rm -rf common/tree.$me
done
ls $me
echo done
END
bash -e /tmp/writer
"#;

#[test]
fn two_guests_write_one_volume() -> Result<()> {
    let guest = Guest::new(false)?;
    let rounds = 3 * number("MSB_LOAD_ROUNDS", 1);
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../backends");
    let tree = guest.msb.dir("suites/tree")?;
    let backends = sources.canonicalize()?.display().to_string();
    let pack = format!(
        "tar -C {backends} --exclude target -cf - . | tar -C {0} -xf -; ln -s nowhere {0}/link; \
         mkfifo {0}/pipe; ln {0}/msb-fs/Cargo.toml {0}/hard; tar -C {0}/.. -cf {0}.tar tree",
        tree.display()
    );
    host("sh", ["-ec", &pack])?;
    let start = |me: &str, other: &str| {
        let script = format!("me={me} other={other} rounds={rounds}\n{WRITER}");
        guest.start(&["-v", "./suites:/suites:ro", "-v", "shared:/x"], &script)
    };
    let writers = [("a", start("a", "b")?), ("b", start("b", "a")?)];
    for (me, writer) in writers {
        let said = said(&writer.wait_with_output()?)?;
        ensure!(
            said.code == 0 && said.out == "done\n",
            "{me} ended with {}: {}{}",
            said.code,
            end(&said.out),
            end(&said.err)
        );
    }
    let common = guest.msb.home().join("volumes/shared/common");
    let mut lines: Vec<_> = fs::read_to_string(common.join("log"))?
        .lines()
        .map(str::to_owned)
        .collect();
    lines.sort();
    let mut wanted: Vec<_> = (1..=rounds)
        .flat_map(|round| (1..=25).map(move |line| (round, line)))
        .flat_map(|(round, line)| {
            ["a", "b"].map(|me| format!("{me} of round {round}, line {line}"))
        })
        .collect();
    wanted.sort();
    ensure!(lines == wanted, "{} lines of {}", lines.len(), wanted.len());
    let winners: usize = ["a", "b"]
        .map(|me| fs::read_to_string(common.join(format!("winners.{me}"))).unwrap_or_default())
        .iter()
        .map(|text| text.lines().count())
        .sum();
    ensure!(
        winners as u64 == rounds,
        "{winners} first makers in {rounds} rounds"
    );
    Ok(())
}
