//! A row of the block servers: how it is run.

use std::time::Duration;

use anyhow::Result;

use super::image::{Folders, Image};
use super::loads::{Disk, Kind, Order, Pattern};
use super::native;
use super::peers::{Peer, Wish};
use super::targets::READ;
use crate::harness::cli::Options;
use crate::harness::device::{Device, Shape};
use crate::harness::load::{Load, Sample, Until, measure};
use crate::harness::server::{Contender, Role, unpin};
use crate::harness::table::Goal;

/// VIRTIO_BLK_F_SEG_MAX, FLUSH, MQ, CONFIG_WCE, DISCARD and WRITE_ZEROES.
const FEATURES: u64 = 1 << 2 | 1 << 9 | 1 << 12 | 1 << 11 | 1 << 13 | 1 << 14;
/// Offset of max_discard_seg in the configuration space.
const MAX_DISCARD_SEG: u32 = 40;

/// One row.
pub struct Row {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What is judged.
    pub goals: &'static [Goal],
    /// What it wants of the servers.
    pub wish: Wish,
    /// What is served.
    pub image: Image,
    pub(super) pattern: Pattern,
    pub(super) depth: u16,
    /// The server may use every CPU, because what is measured is how its threads get along.
    pub(super) spread: bool,
}

impl Row {
    /// Whether the row was asked for.
    pub fn wanted(&self, options: &Options) -> bool {
        self.goals
            .iter()
            .any(|goal| options.wants(goal.id, self.name))
    }

    /// What else belongs beside the row in the report: how slow the disk is by itself.
    ///
    /// # Errors
    ///
    /// When fio does not report.
    pub fn note(&self, options: &Options, folders: &Folders) -> Result<Option<String>> {
        if self.wish.peer != Peer::CloudHypervisor {
            return Ok(None);
        }
        let alone = native::random_reads(&folders.image(self.image)?, 1, options.time())?;
        Ok(Some(format!(
            "{} ({}): with 1 in flight a read of that disk takes {:.0} µs (fio)",
            self.goals[0].id,
            self.name,
            alone.percentile(0.5)
        )))
    }

    /// Runs it once with one contender.
    ///
    /// # Errors
    ///
    /// When the server cannot be started or fails a request.
    pub fn run(
        &self,
        contender: &Contender,
        options: &Options,
        folders: &Folders,
    ) -> Result<Sample> {
        let (image, mut pattern) = match contender.role {
            Role::Itself => (Image::Qcow2, READ),
            _ => (self.image, self.pattern),
        };
        let path = folders.image(image)?;
        let depth = options.depth.unwrap_or(self.depth);
        if contender.role == Role::Native {
            return match self.wish.peer {
                #[cfg(feature = "imago")]
                Peer::Imago => super::library::random_reads(&path, options.time()),
                _ => native::random_reads(&path, depth, options.time()),
            };
        }
        let pinned = self.wish.queues == 1 && !self.spread && !options.unpinned;
        if !pinned {
            unpin()?;
        }
        let server = contender.start(&folders.disk, &path, pinned)?;
        let shape = Shape {
            queues: self.wish.queues,
            size: 128,
            depth,
            data_bytes: pattern.bytes,
            spin: options.spin,
        };
        let mut device = Device::connect(server.socket(), shape, FEATURES)?;
        if pattern.kind == Kind::Discard {
            // From the begin: qemu-storage-daemon ignores the offset.
            let config = device.config(0, MAX_DISCARD_SEG + 4)?;
            let most = config
                .last_chunk()
                .map_or(1, |most| u32::from_le_bytes(*most));
            pattern.segments = pattern.segments.min(most.max(1));
        }
        let lanes = usize::from(self.wish.queues);
        let mut loads: Vec<Box<dyn Load>> = (0..lanes)
            .map(|lane| Disk::in_queue(pattern, lane, lanes))
            .collect();
        let once = matches!(pattern.order, Order::OnceThrough | Order::OnceScattered);
        let (warm, until) = if once {
            (Duration::ZERO, Until::Done)
        } else {
            (Duration::from_millis(80), Until::Time(options.time()))
        };
        measure(&mut device, 0, &server, &mut loads, warm, until)
    }
}
