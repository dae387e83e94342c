//! The bridge itself: what the other tests of this program stand on.

use std::fs;
use std::io::{Read, Seek, Write};
use std::time::Duration;

use anyhow::{Result, ensure};
use msb_testkit::bridge::Options;
use msb_testkit::share::{Setup, Share};

/// Whether nothing can be mounted here; says so, loudly.
pub(crate) fn skipped() -> bool {
    let obstacle = msb_testkit::bridge::obstacle();
    if let Some(reason) = &obstacle {
        eprintln!("SKIPPED: a file system cannot be mounted on this machine: {reason}");
    }
    obstacle.is_some()
}

#[test]
fn files_go_through_and_requests_are_counted() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    for queues in [1, 3] {
        let bridge = Options {
            queues,
            ..Options::default()
        };
        let share = Share::new(Setup {
            bridge,
            ..Setup::default()
        })?;
        let big: Vec<u8> = (0..5_000_000_u32)
            .map(|number| (number % 251) as u8)
            .collect();
        fs::write(share.guest("big"), &big)?;
        ensure!(
            fs::read(share.host("big"))? == big,
            "the host sees something else"
        );
        fs::write(share.host("small"), "from the host")?;
        ensure!(
            fs::read_to_string(share.guest("small"))? == "from the host",
            "the guest does"
        );
        let counts = share.bridge().counts();
        let count = |wanted| {
            counts
                .iter()
                .find(|(name, _)| *name == wanted)
                .map(|one| one.1)
        };
        ensure!(
            count("INIT") == Some(1) && count("CREATE") == Some(1),
            "{counts:?}"
        );
        share.bridge().reset_counts();
        std::thread::scope(|scope| {
            for number in 0..8 {
                let path = share.guest(&format!("thread{number}"));
                scope.spawn(move || {
                    for round in 0..50_u32 {
                        let content = vec![number; 1 + 500 * round as usize];
                        fs::write(&path, &content).unwrap();
                        assert_eq!(fs::read(&path).unwrap(), content);
                    }
                });
            }
        });
        share.finish()?;
    }
    Ok(())
}

#[test]
fn a_mount_in_use_and_a_killed_server_end_cleanly() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = Share::new(Setup::default())?;
    let (point, host) = (share.guest(""), share.host(""));
    let mut file = fs::File::create(share.guest("open"))?;
    file.write_all(b"x")?;
    drop(share);
    file.rewind()?;
    ensure!(
        file.read(&mut [0]).is_err(),
        "an open file outlives its mount"
    );
    ensure!(
        !point.exists() && !host.exists(),
        "something is left behind"
    );

    let share = Share::new(Setup::default())?;
    fs::write(share.guest("file"), "x")?;
    let process = i32::try_from(share.server())?;
    let process = rustix::process::Pid::from_raw(process).expect("a process");
    rustix::process::kill_process(process, rustix::process::Signal::KILL)?;
    for _ in 0..500 {
        if share.bridge().is_over() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    ensure!(share.bridge().is_over(), "the mount outlives its server");
    ensure!(share.finish().is_err(), "nobody noticed");
    Ok(())
}
