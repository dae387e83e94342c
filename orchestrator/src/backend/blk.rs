//! The part of `msb-blk`'s command line that says which image is served, and how.

use super::{Arguments, DISK_QUEUE_SIZE};
use crate::plan::BlkPlan;
use crate::spec::DiskImageFormat;

pub(super) fn describe(argv: &mut Arguments, serial: &str, disk: &BlkPlan) {
    argv.pair("--blk-file", &disk.image);
    let format = match disk.format {
        DiskImageFormat::Raw => "raw",
        DiskImageFormat::Qcow2 => "qcow2",
        DiskImageFormat::Vmdk => "vmdk",
    };
    argv.pair("--format", format);
    if disk.read_only {
        argv.flag("--read-only");
    }
    argv.pair("--serial", serial);
    argv.pair("--num-queues", disk.queues.to_string());
    argv.pair("--queue-size", DISK_QUEUE_SIZE.to_string());
}
