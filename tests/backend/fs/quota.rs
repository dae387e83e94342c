//! A limit of space against everything that a guest may try, judged by what the host has allocated.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::fs::{FlockOperation, fcntl_lock};

use super::client::*;
use super::folder;

const ENOSPC: i32 = 28;
const SIZE: u32 = 8;
const BLOCK: u64 = 4096;
const LIMIT: u64 = 1 << 20;

/// What the files below and including `path` take: bytes and inodes, as du(1) counts them.
fn taken(path: &Path) -> Result<(u64, u64)> {
    fn add(path: &Path, seen: &mut HashSet<u64>, sum: &mut (u64, u64)) -> Result<()> {
        for entry in fs::read_dir(path)? {
            let path = entry?.path();
            // Others may remove what they made at the same time.
            let Ok(found) = fs::symlink_metadata(&path) else {
                continue;
            };
            if seen.insert(found.ino()) {
                sum.0 += found.blocks() * 512;
                sum.1 += 1;
                if found.is_dir() {
                    add(&path, seen, sum)?;
                }
            }
        }
        Ok(())
    }
    let mut sum = (fs::metadata(path)?.blocks() * 512, 0);
    add(path, &mut HashSet::new(), &mut sum)?;
    Ok(sum)
}

/// Size and free space in bytes, and free inodes.
fn state(server: &mut Server) -> Result<(u64, u64, u64)> {
    let reply = server.well(STATFS, 1, &[])?;
    let long = |at: usize| u64::from_le_bytes(reply[at..at + 8].try_into().expect("eight"));
    Ok((long(0) * BLOCK, long(8) * BLOCK, long(32)))
}

/// What df(1) shows is what du(1) leaves, to the block.
fn agrees(server: &mut Server, share: &Path, when: &str) -> Result<()> {
    let (size, free, inodes) = state(server)?;
    let (bytes, count) = taken(share)?;
    let left = LIMIT.saturating_sub(bytes) / BLOCK * BLOCK;
    ensure!(size == LIMIT, "{when}: a size of {size}");
    ensure!(
        free.abs_diff(left) <= BLOCK,
        "{when}: {free} free, not {left}"
    );
    ensure!(
        inodes == LIMIT / BLOCK - count,
        "{when}: {inodes} inodes, {count} used"
    );
    ensure!(bytes <= LIMIT + BLOCK, "{when}: {bytes} bytes");
    Ok(())
}

/// Writes until there is no room; returns how many bytes.
fn fill(server: &mut Server, file: (u64, u64), from: u64, step: usize) -> Result<u64> {
    let data = vec![7; step];
    let mut at = from;
    loop {
        match server.write(file, at, &data, 0)? {
            (0, count) => at += u64::from(count),
            (ENOSPC, _) => return Ok(at - from),
            (error, _) => anyhow::bail!("errno {error}"),
        }
        ensure!(at - from <= LIMIT, "more than the limit was written");
    }
}

/// Waits until no server uses the account: one that was killed is waited for by its parent only.
fn unused(account: &Path) -> Result<()> {
    let file = fs::File::options().read(true).write(true).open(account)?;
    let end = Instant::now() + Duration::from_secs(10);
    while fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        ensure!(Instant::now() < end, "a server does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(fcntl_lock(&file, FlockOperation::Unlock)?)
}

#[test]
fn what_the_guest_has_removed_is_free_at_once() -> Result<()> {
    let folder = folder()?;
    let share = folder.path().join("share");
    let mut server = Server::start(folder.path(), &["--quota", "1M"])?;
    for round in 0..40 {
        let mut nodes = Vec::new();
        for number in 0..8 {
            let file = server.create(1, &number.to_string(), 0o644)?;
            // The last one finds less room.
            server.write(file, 0, &[7; 120 << 10], 0)?;
            server.release(file.0, file.1)?;
            nodes.push(file.0);
        }
        for number in 0..8 {
            server.well(UNLINK, 1, &named(&[], &[&number.to_string()]))?;
        }
        server.forget(&nodes)?;
        if round % 2 == 0 {
            agrees(&mut server, &share, "removed")?;
            continue;
        }
        let file = server.create(1, "large", 0o644)?;
        let written = server.write(file, 0, &[7; 900 << 10], 0)?;
        ensure!(written == (0, 900 << 10), "{written:?} in round {round}");
        server.release(file.0, file.1)?;
        server.well(UNLINK, 1, &named(&[], &["large"]))?;
        server.forget(&[file.0])?;
    }
    Ok(())
}

#[test]
fn no_trick_takes_more_than_the_limit() -> Result<()> {
    let folder = folder()?;
    let share = folder.path().join("share");
    let mut server = Server::start(folder.path(), &["--quota", "1M"])?;
    agrees(&mut server, &share, "at first")?;
    let file = server.create(1, "file", 0o644)?;
    let written = fill(&mut server, file, 0, 70_001)?;
    ensure!(written > LIMIT / 2, "only {written} bytes fit");
    agrees(&mut server, &share, "full")?;
    // What is there can be written again, and holes cost nothing.
    ensure!(
        server.write(file, 0, &[9; 8192], 0)? == (0, 8192),
        "rewriting"
    );
    ensure!(
        server.setattr(file.0, SIZE, (1 << 30, 0, 0, 0))? == 0,
        "a hole"
    );
    ensure!(
        server.write(file, 1 << 29, &[9; 8192], 0)?.0 == ENOSPC,
        "into the hole"
    );
    ensure!(
        server.ask(MKDIR, 1, &named(&[0o755, 0], &["dir"]))?.0 == ENOSPC,
        "mkdir"
    );
    agrees(&mut server, &share, "with a hole")?;

    ensure!(
        server.setattr(file.0, SIZE, (BLOCK * 16, 0, 0, 0))? == 0,
        "cutting"
    );
    agrees(&mut server, &share, "cut")?;
    let allocate =
        |mode: u32, at: u64, len: u64| [longs(&[file.1, at, len]), words(&[mode, 0])].concat();
    let (error, _) = server.ask(FALLOCATE, file.0, &allocate(1, 0, 2 << 20))?;
    ensure!(error == ENOSPC, "fallocate beyond the limit: {error}");
    server.well(FALLOCATE, file.0, &allocate(1, 0, 1 << 19))?;
    agrees(&mut server, &share, "allocated")?;
    server.well(FALLOCATE, file.0, &allocate(3, 0, 1 << 19))?;
    agrees(&mut server, &share, "punched")?;

    // A second name keeps the space, the last one gives it back.
    fill(&mut server, file, 0, 1 << 16)?;
    server.well(UNLINK, 1, &named(&[], &["file"]))?;
    ensure!(
        state(&mut server)?.1 < BLOCK * 2,
        "an open file was given back"
    );
    server.release(file.0, file.1)?;
    server.tell(FORGET, file.0, &longs(&[1]))?;
    agrees(&mut server, &share, "closed")?;

    let source = server.create(1, "source", 0o644)?;
    ensure!(
        server.write(source, 0, &[3; 500_000], 0)? == (0, 500_000),
        "source"
    );
    let body = longs(&[source.0]);
    server.well(LINK, 1, &[body, b"second\0".to_vec()].concat())?;
    agrees(&mut server, &share, "linked")?;
    for number in 0..3 {
        let copy = server.create(1, &format!("copy{number}"), 0o644)?;
        let range = longs(&[source.1, 0, copy.0, copy.1, 0, 500_000, 0]);
        let (error, _) = server.ask(COPY_FILE_RANGE, source.0, &range)?;
        ensure!(
            error == 0 || (error == ENOSPC && number > 0),
            "copy: {error}"
        );
        agrees(&mut server, &share, "copied")?;
    }
    // What is replaced is given back with its last name.
    server.well(RENAME, 1, &named(&[1, 0], &["copy1", "source"]))?;
    agrees(&mut server, &share, "replaced one of two")?;
    server.release(source.0, source.1)?;
    server.tell(FORGET, source.0, &longs(&[2]))?;
    server.well(RENAME, 1, &named(&[1, 0], &["copy2", "second"]))?;
    agrees(&mut server, &share, "replaced the other")?;
    Ok(())
}

#[test]
fn empty_files_and_long_names_are_no_way_round() -> Result<()> {
    let folder = folder()?;
    let share = folder.path().join("share");
    let mut server = Server::start(folder.path(), &["--quota", "1M"])?;
    let mut count = 0;
    let error = loop {
        let name = format!("{count:0200}");
        let body = match count % 3 {
            0 => (MKNOD, named(&[0o100_644, 0, 0, 0], &[&name])),
            1 => (MKDIR, named(&[0o755, 0], &[&name])),
            _ => (SYMLINK, named(&[], &[&name, "target"])),
        };
        let (error, _) = server.ask(body.0, 1, &body.1)?;
        if error != 0 {
            break error;
        }
        count += 1;
        ensure!(count <= LIMIT / BLOCK, "too many inodes");
    };
    ensure!(error == ENOSPC && count > 64, "{error} after {count}");
    ensure!(taken(&share)?.0 <= LIMIT + BLOCK, "{:?}", taken(&share)?);
    let (file, _) = server.find_in(1, &format!("{:0200}", 0))?;
    ensure!(
        server.setxattr(file, "user.large", &[1; 60_000])? == ENOSPC,
        "an attribute"
    );
    for number in 0..count {
        let opcode = if number % 3 == 1 { RMDIR } else { UNLINK };
        server.well(opcode, 1, &named(&[], &[&format!("{number:0200}")]))?;
    }
    server.tell(FORGET, file, &longs(&[2]))?;
    server.init()?;
    agrees(&mut server, &share, "emptied")?;
    Ok(())
}

#[test]
fn servers_of_one_directory_share_its_account() -> Result<()> {
    let folder = folder()?;
    let share = folder.path().join("share");
    let account = folder.path().join("account");
    let path = account.to_str().expect("a plain path");
    let flags = ["--quota", "1M", "--quota-file", path];
    let mut one = Server::start(folder.path(), &flags)?;
    let mut two = Server::start(folder.path(), &flags)?;
    let first = one.create(1, "first", 0o644)?;
    ensure!(
        one.write(first, 0, &[1; 600_000], 0)? == (0, 600_000),
        "first"
    );
    agrees(&mut two, &share, "seen by the other")?;
    let second = two.create(1, "second", 0o644)?;
    let more = fill(&mut two, second, 0, 50_000)?;
    ensure!(more < LIMIT - 600_000, "{more} bytes more");
    ensure!(
        one.write(first, 147 * BLOCK, &[1; 50_000], 0)?.0 == ENOSPC,
        "beyond the limit"
    );
    // What the other still has open is no free space.
    one.well(UNLINK, 1, &named(&[], &["second"]))?;
    ensure!(state(&mut one)?.1 < 2 * BLOCK, "open elsewhere, and free");
    two.release(second.0, second.1)?;
    two.tell(FORGET, second.0, &longs(&[1]))?;
    agrees(&mut one, &share, "closed elsewhere")?;
    // One dies, the next that comes first counts anew, with what the host has done meanwhile.
    one.kill();
    agrees(&mut two, &share, "one is gone")?;
    drop((one, two));
    unused(&account)?;
    fs::write(share.join("third"), vec![1; 100_000])?;
    let mut three = Server::start(folder.path(), &flags)?;
    agrees(&mut three, &share, "counted anew")?;
    // The account is that of one directory.
    let other = self::folder()?;
    ensure!(
        Server::start(other.path(), &flags).is_err(),
        "another directory's account"
    );
    Ok(())
}

#[test]
fn many_servers_at_a_time_stay_within_the_limit() -> Result<()> {
    const SERVERS: u64 = 4;
    let folder = folder()?;
    let share = folder.path().join("share");
    let account = folder.path().join("account");
    let path = account.to_str().expect("a plain path");
    let flags = ["--quota", "1M", "--quota-file", path];
    let servers = (0..SERVERS).map(|_| Server::start(folder.path(), &flags));
    let servers: Vec<Server> = servers.collect::<Result<_>>()?;
    let end = Instant::now() + Duration::from_secs(3);
    let result: Result<Vec<()>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..SERVERS)
            .zip(servers)
            .map(|(seed, server)| scope.spawn(move || disturb(server, seed + 1, end)))
            .collect();
        let mut worst = 0;
        while Instant::now() < end {
            worst = worst.max(taken(&share)?.0);
        }
        ensure!(worst <= LIMIT + SERVERS * BLOCK, "{worst} bytes at a time");
        ensure!(worst > LIMIT / 2, "only {worst} bytes were tried");
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<()>>| {
            thread.join().expect("no panic")
        };
        threads.into_iter().map(join).collect()
    });
    result?;
    unused(&account)?;
    let mut last = Server::start(folder.path(), &flags)?;
    agrees(&mut last, &share, "in the end")?;
    Ok(())
}

/// Makes, writes, cuts, links, renames and removes the same few files as the others.
fn disturb(mut server: Server, mut seed: u64, end: Instant) -> Result<()> {
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 8) % below
    };
    while Instant::now() < end {
        let name = format!("f{}", random(12));
        let other = format!("f{}", random(12));
        let made = server.ask(CREATE, 1, &named(&[0o102, 0o644, 0, 0], &[&name]))?;
        if made.0 == 0 {
            let node = u64::from_le_bytes(made.1[..8].try_into()?);
            let fh = u64::from_le_bytes(made.1[128..136].try_into()?);
            for _ in 0..random(4) {
                let data = vec![1; usize::try_from(random(120_000))?];
                let (error, _) = server.write((node, fh), random(200_000), &data, 0)?;
                ensure!(error == 0 || error == ENOSPC, "write: {error}");
            }
            if random(3) == 0 {
                server.setattr(node, SIZE, (random(100_000), 0, 0, 0))?;
            }
            let removed = random(2) == 0;
            if removed {
                server.ask(UNLINK, 1, &named(&[], &[&name]))?;
            }
            server.release(node, fh)?;
            server.tell(FORGET, node, &longs(&[1]))?;
        }
        server.ask(RENAME, 1, &named(&[1, 0], &[&name, &other]))?;
        if random(4) == 0 {
            server.ask(UNLINK, 1, &named(&[], &[&other]))?;
        }
    }
    // It ends in order, so the account must be right without counting anew.
    ensure!(server.hang_up().wait()?.success(), "it failed");
    Ok(())
}
