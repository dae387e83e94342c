//! The block servers that are compared.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use msb_testkit::msb::bin_dir;

use super::image::Image;
use crate::harness::cli::Options;
use crate::harness::server::{Contender, Role};

/// What a row wants of the servers.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// Number of queues, of all servers.
    pub queues: u16,
    /// Past the page cache.
    pub direct: bool,
    /// Compare with fio on the same file as well.
    pub native: bool,
    /// Compare our server with itself on an ordinary image as well.
    pub itself: bool,
}

/// All that take part in a row over an image.
///
/// # Errors
///
/// When a program is missing.
pub fn contenders(options: &Options, wish: Wish, image: Image) -> Result<Vec<Contender>> {
    let own = |label, role, folder: &Path, image| ours(label, role, folder, options, wish, image);
    let mut all = vec![own("msb-blk", Role::Judged, &bin_dir(), image)];
    if let Some(other) = std::env::var_os("MSB_BIN_DIR_B") {
        all.push(own("msb-blk B", Role::Ours, &PathBuf::from(other), image));
    }
    if wish.itself {
        all.push(own(SMALL, Role::Itself, &bin_dir(), Image::Qcow2));
    }
    all.push(storage_daemon("QSD", Role::Peer, wish, image, false));
    all.push(storage_daemon(
        "QSD iothread",
        Role::TunedPeer,
        wish,
        image,
        true,
    ));
    if wish.native {
        all.push(Contender {
            label: "fio".to_owned(),
            role: Role::Native,
            program: "/usr/bin/fio".into(),
            flags: Vec::new(),
        });
    }
    all.retain(|contender| options.takes(&contender.label));
    for contender in &all {
        ensure!(
            contender.program.exists(),
            "no {}: run `make bench`, which gets it, or name the folder of ours in MSB_BIN_DIR",
            contender.program.display()
        );
    }
    Ok(all)
}

/// Our server on an ordinary image.
const SMALL: &str = "msb-blk, small image";

fn ours(
    label: &str,
    role: Role,
    folder: &Path,
    options: &Options,
    wish: Wish,
    image: Image,
) -> Contender {
    let flags = [
        "--socket-path={socket}",
        "--blk-file={subject}",
        "--log-level=error",
        &format!("--format={}", image.format()),
        &format!("--num-queues={}", wish.queues),
        &format!("--cache={}", if wish.direct { "none" } else { "writeback" }),
    ];
    let mut flags: Vec<String> = flags.map(str::to_owned).into();
    flags.extend(options.extra());
    Contender {
        label: label.to_owned(),
        role,
        program: folder.join("msb-blk"),
        flags,
    }
}

/// qemu-storage-daemon in its main loop, or in a thread that polls.
fn storage_daemon(label: &str, role: Role, wish: Wish, image: Image, thread: bool) -> Contender {
    let cache = if wish.direct { "on" } else { "off" };
    let mut file = format!(
        "driver=file,node-name=file,filename={{subject}},aio=io_uring,cache.direct={cache},discard=unmap"
    );
    let mut flags = Vec::new();
    let mut export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={{socket}},\
         writable=on,num-queues={}",
        wish.queues
    );
    if thread {
        flags.extend(["--object", "iothread,id=thread"].map(str::to_owned));
        export.push_str(",iothread=thread");
    }
    if image.format() == "raw" {
        file = file.replace("node-name=file", "node-name=disk");
    }
    flags.extend(["--blockdev".to_owned(), file]);
    if image.format() != "raw" {
        let format = image.format();
        let disk = format!("driver={format},node-name=disk,file=file,discard=unmap");
        flags.extend(["--blockdev".to_owned(), disk]);
    }
    flags.extend(["--export".to_owned(), export]);
    Contender {
        label: label.to_owned(),
        role,
        program: "/usr/bin/qemu-storage-daemon".into(),
        flags,
    }
}
