//! What a block server takes while its disk is not used: memory and wake-ups.

use std::time::Duration;

use anyhow::Result;

use super::image::{Folders, Image};
use super::peers::{Wish, contenders};
use crate::harness::cli::Options;
use crate::harness::compare::Measure;
use crate::harness::device::{Device, Shape};
use crate::harness::server::{Contender, Role};
use crate::harness::table::{Against, Goal, Line};

/// Name and number of the rows on the command line.
pub const NAME: &str = "idle";
/// See [`NAME`].
pub const ID: &str = "B18";

/// Serves a qcow2 image, and looks at the server after a few requests and two quiet seconds.
///
/// # Errors
///
/// When a server does not start.
pub fn lines(options: &Options, folders: &Folders) -> Result<Vec<Line>> {
    let wish = Wish::PLAIN;
    let shape = Shape {
        queues: 1,
        size: 128,
        depth: 1,
        data_bytes: 4096,
        spin: false,
    };
    let image = folders.image(Image::Qcow2)?;
    let mut contenders = contenders(options, wish, Image::Qcow2, &folders.disk)?;
    let (mut memory, mut wakes) = (Vec::new(), Vec::new());
    for contender in &contenders {
        let server = contender.start(&folders.disk, &image, false)?;
        let _device = Device::connect(server.socket(), shape, 0)?;
        std::thread::sleep(Duration::from_millis(300));
        let before = server.switches()?;
        std::thread::sleep(Duration::from_secs(2));
        wakes.push((server.switches()? - before) as f64 / 2.0);
        memory.push(server.resident()? as f64 / 1048576.0);
    }
    contenders.push(Contender {
        label: "limit".to_owned(),
        role: Role::Native,
        program: "none".into(),
        flags: Vec::new(),
    });
    memory.push(10.0);
    wakes.push(0.5);
    let goal = |what, unit| Goal {
        id: ID,
        what,
        measure: Measure::Plain(unit),
        target: 1.0,
        against: Against::Native,
    };
    Ok(vec![
        Line::of(
            goal("idle disk, qcow2: memory", "MiB"),
            &contenders,
            &memory,
        ),
        Line::of(
            goal("idle disk, qcow2: wake-ups", "/s"),
            &contenders,
            &wakes,
        ),
    ])
}
