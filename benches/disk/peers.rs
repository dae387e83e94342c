//! The block servers that are compared.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use msb_testkit::msb::bin_dir;

use super::image::Image;
use crate::harness::cli::Options;
use crate::harness::server::{Contender, Role};
use crate::share::peers::peers_dir;

/// Bytes of the disk that SPDK has in memory, and of the part of ours that is read beside it.
pub const SPDK_BYTES: u64 = 128 << 20;

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
    /// Whom to compare with.
    pub peer: Peer,
}

/// A server of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// qemu-storage-daemon.
    StorageDaemon,
    /// cloud-hypervisor's `vhost_user_block`, which is in no registry: whoever has built it puts it
    /// into the folder of peers.
    CloudHypervisor,
    /// SPDK's `vhost` with a disk in its own memory, from the folder of peers as well.
    Spdk,
    /// The crate imago in this process, without a server.
    Imago,
}

impl Wish {
    /// One queue, through the page cache, against qemu-storage-daemon alone.
    pub const PLAIN: Self = Self {
        queues: 1,
        direct: false,
        native: false,
        itself: false,
        peer: Peer::StorageDaemon,
    };

    /// Why the row cannot be measured here.
    pub fn lacks(self) -> Option<String> {
        match self.peer {
            Peer::CloudHypervisor if !vhost_user_block().exists() => Some(format!(
                "there is no {}: build `vhost_user_block` of cloud-hypervisor and name its folder in MSB_PEERS",
                vhost_user_block().display()
            )),
            Peer::Spdk if !spdk().exists() => Some(format!(
                "there is no {}: build SPDK's vhost and name its folder in MSB_PEERS",
                spdk().display()
            )),
            Peer::Imago if cfg!(not(feature = "imago")) => {
                Some("the harness was built without `--features imago`".to_owned())
            }
            _ => None,
        }
    }
}

fn spdk() -> PathBuf {
    peers_dir().join("spdk_vhost")
}

fn vhost_user_block() -> PathBuf {
    peers_dir().join("vhost_user_block")
}

/// All that take part in a row over an image.
///
/// # Errors
///
/// When a program is missing.
pub fn contenders(
    options: &Options,
    wish: Wish,
    image: Image,
    scratch: &Path,
) -> Result<Vec<Contender>> {
    let own = |label, role, folder: &Path, image| ours(label, role, folder, options, wish, image);
    let mut all = vec![own("msb-blk", Role::Judged, &bin_dir(), image)];
    if let Some(other) = std::env::var_os("MSB_BIN_DIR_B") {
        all.push(own("msb-blk B", Role::Ours, &PathBuf::from(other), image));
    }
    if wish.itself {
        all.push(own(SMALL, Role::Itself, &bin_dir(), Image::Qcow2));
    }
    match wish.peer {
        Peer::StorageDaemon => {
            all.push(storage_daemon("QSD", Role::Peer, wish, image, false));
            let label = "QSD iothread";
            all.push(storage_daemon(label, Role::TunedPeer, wish, image, true));
        }
        Peer::CloudHypervisor => {
            all.push(cloud_hypervisor("CH", Role::Peer, wish, true));
            let label = "CH without polling";
            all.push(cloud_hypervisor(label, Role::TunedPeer, wish, false));
        }
        Peer::Spdk => all.push(spdk_vhost(scratch)?),
        Peer::Imago => all.push(native("imago", "/proc/self/exe")),
    }
    if wish.native {
        all.push(native("fio", "/usr/bin/fio"));
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

fn native(label: &str, program: &str) -> Contender {
    Contender {
        label: label.to_owned(),
        role: Role::Native,
        program: program.into(),
        flags: Vec::new(),
    }
}

/// SPDK on the second CPU, which its reactor never leaves, with 512 MiB of huge pages. It listens in
/// `scratch`, as all servers do.
fn spdk_vhost(scratch: &Path) -> Result<Contender> {
    let disk = format!(
        r#"{{"method":"bdev_malloc_create","params":{{"name":"m","num_blocks":{},"block_size":512}}}}"#,
        SPDK_BYTES / 512
    );
    let device = r#"{"method":"vhost_create_blk_controller","params":{"ctrlr":"bench.sock","dev_name":"m"}}"#;
    let text = format!(
        r#"{{"subsystems":[{{"subsystem":"bdev","config":[{disk}]}},{{"subsystem":"vhost_blk","config":[{device}]}}]}}"#
    );
    let config = scratch.join("spdk.json");
    fs::write(&config, text)?;
    let (config, scratch) = (config.display(), scratch.display());
    let flags =
        format!("--no-pci -m 0x2 -s 512 -S {scratch} --json {config} -r {scratch}/spdk.rpc");
    Ok(Contender {
        label: "SPDK".to_owned(),
        role: Role::Peer,
        program: spdk(),
        flags: flags.split(' ').map(str::to_owned).collect(),
    })
}

/// cloud-hypervisor's server, which polls for a while after each request as it comes.
fn cloud_hypervisor(label: &str, role: Role, wish: Wish, polls: bool) -> Contender {
    let backend = format!(
        "path={{subject}},socket={{socket}},num_queues={},queue_size=128,direct={},poll_queue={polls}",
        wish.queues, wish.direct
    );
    Contender {
        label: label.to_owned(),
        role,
        program: vhost_user_block(),
        flags: vec!["--block-backend".to_owned(), backend],
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
