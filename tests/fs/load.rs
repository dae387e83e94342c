//! What people do with a tree: they unpack, build and commit it, from two guests at once.
//!
//! `MSB_LOAD_ROUNDS` repeats it.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use msb_testkit::share::{Setup, Share};

use crate::bridge::skipped;
use msb_testkit::suites::number;

fn run(folder: &Path, command: &str) -> Result<String> {
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", command])
        .current_dir(folder)
        .envs([("HOME", folder), ("GIT_CONFIG_NOSYSTEM", Path::new("1"))])
        .output()
        .context("bash")?;
    ensure!(
        output.status.success(),
        "{command}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A tree with everything that people keep: many small files, links, programs, long names.
fn tree(at: &Path) -> Result<()> {
    let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../backends");
    fs::create_dir(at)?;
    let copy = format!(
        "tar -C {} --exclude target -cf - . | tar xf -",
        sources.display()
    );
    run(at, &copy)?;
    for number in 0..20 {
        let function = format!("int part{number}(void) {{ return {number}; }}\n");
        fs::write(at.join(format!("part{number}.c")), function)?;
    }
    let calls: Vec<String> = (0..20).map(|number| format!("part{number}()")).collect();
    let names: Vec<String> = (0..20)
        .map(|number| format!("int part{number}(void);"))
        .collect();
    let main = format!(
        "{}\n#include <stdio.h>\nint main(void) {{ printf(\"%d\\n\", {}); return 0; }}\n",
        names.join("\n"),
        calls.join("+")
    );
    fs::write(at.join("main.c"), main)?;
    fs::write(
        at.join("Makefile"),
        "program: $(patsubst %.c,%.o,$(wildcard *.c))\n\t$(CC) -o $@ $^\n",
    )?;
    symlink("main.c", at.join("link"))?;
    symlink("nowhere", at.join("dangling"))?;
    fs::write(at.join("n".repeat(255)), "long")?;
    fs::hard_link(at.join("main.c"), at.join("hard"))?;
    Ok(())
}

/// Unpacks, builds, commits, moves through history and removes.
fn work(source: &Path, place: &Path) -> Result<()> {
    fs::create_dir(place)?;
    let archive = source.with_extension("tar");
    run(place, &format!("tar xf {}", archive.display()))?;
    run(
        place,
        &format!("diff -r --no-dereference {} .", source.display()),
    )?;
    ensure!(
        run(place, "make -s -j2 && ./program")?.trim() == "190",
        "the program"
    );
    run(place, "make -s && rm -f program *.o")?;
    let git = "git -c user.name=a -c user.email=a@b -c init.defaultBranch=main -c gc.auto=0";
    let steps = [
        "init -q",
        "add -A",
        "commit -q -m one",
        "mv part1.c moved.c",
        "rm -q part2.c",
        "commit -q -a -m two",
        "gc -q --prune=now",
        "checkout -q HEAD~1",
        "fsck --strict --no-progress",
    ];
    for step in steps {
        run(place, &format!("{git} {step}"))?;
    }
    ensure!(
        run(place, &format!("{git} status --porcelain"))?.is_empty(),
        "not clean"
    );
    run(place, "rm -rf .git")?;
    run(
        place,
        &format!("diff -r --no-dereference {} .", source.display()),
    )?;
    run(
        place,
        "cp -a . ../copy$$ && diff -r --no-dereference . ../copy$$ && rm -rf ../copy$$",
    )?;
    fs::remove_dir_all(place)?;
    ensure!(!place.exists(), "something is left");
    Ok(())
}

#[test]
fn a_tree_is_unpacked_built_committed_and_removed() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    for round in 0..number("MSB_LOAD_ROUNDS", 1) {
        for flags in [&[][..], &["--exclusive"], &["--stat-virt", "off"]] {
            let share = Share::new(Setup {
                flags,
                ..Setup::default()
            })?;
            let source = share.beside("source");
            tree(&source)?;
            run(&source, "tar cf ../source.tar .")?;
            work(&source, &share.guest("work"))
                .with_context(|| format!("round {round} with {flags:?}"))?;
            let left = fs::read_dir(share.host(""))?.count();
            ensure!(left == 0, "{left} entries are left on the host");
            share.finish()?;
        }
    }
    Ok(())
}

/// One of three who make, extend, rename and remove files of one directory. Returns for how many
/// names it was the first.
fn write(folder: &Path, who: u8, rounds: u32) -> Result<u32> {
    let mut first = 0;
    for round in 0..rounds {
        let contested = folder.join(format!("contested{round}"));
        match OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(contested)
        {
            Ok(mut file) => {
                first += 1;
                file.write_all(&[who; 100])?;
            }
            Err(error) => ensure!(error.kind() == ErrorKind::AlreadyExists, "{error}"),
        }
        let mine = folder.join(format!("of{who}"));
        let content = vec![who; 1 + 97 * round as usize % 20_000];
        fs::write(&mine, &content)?;
        let mut file = OpenOptions::new().append(true).open(&mine)?;
        file.write_all(b"end")?;
        drop(file);
        let moved = folder.join(format!("moved{who}"));
        fs::rename(&mine, &moved)?;
        let seen = fs::read(&moved)?;
        ensure!(
            seen.len() == content.len() + 3 && seen.ends_with(b"end"),
            "{who} sees {} bytes of {}",
            seen.len(),
            content.len() + 3
        );
        let dir = folder.join(format!("dir{who}"));
        fs::create_dir(&dir)?;
        fs::rename(&moved, dir.join("inner"))?;
        fs::remove_dir_all(&dir)?;
        // All append to one file, each time with an open of its own.
        let mut log = OpenOptions::new()
            .append(true)
            .create(true)
            .open(folder.join("log"))?;
        log.write_all(&[who; 16])?;
    }
    Ok(first)
}

#[test]
fn two_guests_and_the_host_write_one_directory() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = Share::new(Setup::default())?;
    let peer = share.peer("other", Setup::default())?;
    let rounds = 200 * u32::try_from(number("MSB_LOAD_ROUNDS", 1))?;
    let folders = [share.guest(""), peer.guest(""), share.host("")];
    let results: Vec<Result<u32>> = std::thread::scope(|scope| {
        let writers: Vec<_> = folders
            .iter()
            .zip(b'a'..)
            .map(|(folder, who)| scope.spawn(move || write(folder, who, rounds)))
            .collect();
        writers
            .into_iter()
            .map(|writer| writer.join().expect("a writer"))
            .collect()
    });
    let mut total = 0;
    for (who, result) in ["a guest", "the other guest", "the host"]
        .iter()
        .zip(results)
    {
        total += result.with_context(|| (*who).to_owned())?;
    }
    ensure!(total == rounds, "{total} first makers of {rounds} files");
    let log = fs::read(share.host("log"))?;
    ensure!(
        log.chunks(16)
            .all(|chunk| chunk.iter().all(|byte| *byte == chunk[0])),
        "appends are torn"
    );
    ensure!(log.len() == 16 * 3 * rounds as usize, "{} bytes", log.len());
    // All see the same in the end.
    std::thread::sleep(std::time::Duration::from_millis(1200));
    let names = |folder: &Path| -> Result<Vec<_>> {
        let mut all = fs::read_dir(folder)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<Result<Vec<_>>>()?;
        all.sort();
        Ok(all)
    };
    for folder in &folders[..2] {
        ensure!(names(folder)? == names(&folders[2])?, "another listing");
        let file = File::open(folder.join("contested0"))?;
        ensure!(file.metadata()?.len() == 100, "another size");
    }
    peer.finish()?;
    share.finish()
}

/// Those of stress-ng's file system class that have nothing to do with the share, act on the whole
/// machine, or wear out a processor with the kernel's own locks and handles.
const ELSEWHERE: &str = "binderfs,bind-mount,dup,eventfd,fanotify,flock,handle,io,ioprio,lease,locka,lockofd,\
                         procfs";
/// How much is made and removed: the rest of the time that is asked for, they work on it.
const AMOUNTS: [&str; 6] = [
    "--chdir-dirs=256",
    "--dir-dirs=256",
    "--dentries=256",
    "--fallocate-bytes=8m",
    "--hdd-bytes=8m",
    "--iomix-bytes=8m",
];

/// All of them at once, for some seconds; `MSB_STRESS_SECONDS` asks for more.
fn stress(flags: &[&str]) -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = Share::new(Setup {
        flags,
        ..Setup::default()
    })?;
    let output = Command::new("stress-ng")
        .args([
            "--class",
            "filesystem",
            "--all",
            "1",
            "--exclude",
            ELSEWHERE,
        ])
        .args(["--verify", "--timeout"])
        .arg(number("MSB_STRESS_SECONDS", 4).to_string())
        .args(AMOUNTS)
        .arg("--temp-path")
        .arg(share.guest(""))
        .output()
        .context("stress-ng: run `make setup`")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    ensure!(
        output.status.success()
            && said.contains("successful run completed")
            && !said.contains("fail:")
            && !said.contains("error:"),
        "{flags:?}: {}\n{said}",
        output.status
    );
    let left = fs::read_dir(share.host(""))?.count();
    ensure!(left == 0, "{left} entries are left on the host");
    share.finish()
}

#[test]
fn stress_ng_finds_no_fault_in_a_share() -> Result<()> {
    stress(&[])
}

#[test]
fn stress_ng_finds_no_fault_without_opening() -> Result<()> {
    stress(&["--exclusive", "--writeback"])
}
