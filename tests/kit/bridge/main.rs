//! Mounts a vhost-user-fs server by hand: `fs-bridge SOCKET MOUNTPOINT [QUEUES]`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use msb_testkit::bridge::{Bridge, Options};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (socket, point, queues) = match args.as_slice() {
        [socket, point] => (socket, point, 1),
        [socket, point, queues] => (socket, point, queues.parse().context("QUEUES")?),
        _ => bail!("usage: fs-bridge SOCKET MOUNTPOINT [QUEUES]; it ends when unmounted"),
    };
    let options = Options {
        queues,
        ..Options::default()
    };
    let bridge = Bridge::mount(Path::new(socket), Path::new(point), options)?;
    println!(
        "mounted on {point}; umount it to end; {:?}",
        bridge.agreed()
    );
    while !bridge.is_over() {
        std::thread::sleep(Duration::from_millis(100));
    }
    for (name, count) in bridge.counts() {
        println!("{count:>9} {name}");
    }
    bridge.finish()
}
