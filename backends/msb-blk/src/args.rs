//! The command line: what was typed, and what follows from it.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{ArgGroup, Parser, ValueEnum};
use msb_vhost::jail::SandboxMode;
use tracing::level_filters::LevelFilter;

use crate::device::DeviceConfig;
use crate::file::Caching;
use crate::image::{Format, OpenOptions};
use crate::request::ID_LEN;

/// Serves a disk image to a virtual machine over vhost-user-blk.
#[derive(Debug, Parser)]
#[command(name = "msb-blk", version, about)]
#[command(group = ArgGroup::new("endpoint").args(["socket_path", "fd", "print_capabilities"]).required(true))]
#[command(
    after_help = "Exit status: 0 ended by the front end or a signal, 2 wrong flags, \
    3 image refused or not usable, 4 image in use, 5 sandbox failed, 6 socket or protocol failed."
)]
pub struct Args {
    /// Listen on this Unix socket.
    #[arg(short, long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Use this inherited socket, listening or connected.
    #[arg(short, long, value_name = "N")]
    pub fd: Option<RawFd>,

    /// The image file or block device.
    #[arg(
        short = 'b',
        long,
        value_name = "PATH",
        required_unless_present = "print_capabilities"
    )]
    pub blk_file: Option<PathBuf>,

    /// Format of the image; by default what its extension says, otherwise raw. Never guessed from
    /// the content, which the guest can write.
    #[arg(long, value_enum)]
    pub format: Option<FormatArg>,

    /// Refuse every change; the image is opened for reading only.
    #[arg(short, long)]
    pub read_only: bool,

    /// Serial number of the disk, at most 20 bytes.
    #[arg(long, value_name = "S", default_value = "", value_parser = serial)]
    pub serial: String,

    /// Number of queues.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub num_queues: u16,

    /// Largest size of a queue, a power of two.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = queue_size)]
    pub queue_size: u16,

    /// Host cache: writeback uses the page cache, none goes past it (O_DIRECT), unsafe ignores
    /// flushes.
    #[arg(long, value_enum, default_value_t = CacheArg::Writeback)]
    pub cache: CacheArg,

    /// Let the image refer to other files: backing files, data files, parents and foreign extents,
    /// each a plain name in the image's own folder.
    #[arg(long)]
    pub allow_references: bool,

    /// Take commands on this Unix socket, which only the owner may connect to: `resize BYTES`.
    #[arg(long, value_name = "PATH")]
    pub control_path: Option<PathBuf>,

    /// Do not lock the image against other users.
    #[arg(long)]
    pub no_lock: bool,

    /// End when the parent process ends; with a PID, also when the parent is not that process
    /// any more.
    #[arg(long, value_name = "PID", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub exit_with_parent: Option<u32>,

    /// Accept another front end after one has gone.
    #[arg(long)]
    pub reconnect: bool,

    /// How long a queue whose requests come in quick succession looks for the next one before it
    /// sleeps, in microseconds; 0 never does, and an idle disk sleeps in any case.
    #[arg(long, value_name = "US", default_value_t = 10, value_parser = clap::value_parser!(u64).range(..=1000))]
    pub poll_max_us: u64,

    /// How the process locks itself in before it serves: strict (every layer, or it does not
    /// start), best-effort (what the host allows), audit (strict, but system calls that are not
    /// expected are only logged by the kernel) or none.
    #[arg(long, value_name = "MODE", default_value = "best-effort")]
    pub sandbox: SandboxMode,

    /// error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: LevelFilter,

    /// Print what this program can do as JSON, and end; all other flags are ignored.
    #[arg(short = 'c', long)]
    pub print_capabilities: bool,
}

/// A format as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// The file is the disk.
    Raw,
    /// QEMU's format.
    Qcow2,
    /// VMware's format.
    Vmdk,
}

/// A cache mode as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheArg {
    /// Page cache, flushes reach the disk.
    Writeback,
    /// No page cache.
    None,
    /// Page cache, flushes ignored.
    Unsafe,
}

/// Whether a command line asks for the capabilities, whatever else it says.
pub fn asks_for_capabilities(mut args: impl Iterator<Item = OsString>) -> bool {
    args.any(|arg| arg == "--print-capabilities" || arg == "-c")
}

/// What [`asks_for_capabilities`] asks for.
pub const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

impl Args {
    /// How the image is to be opened.
    pub fn open_options(&self) -> OpenOptions {
        let by_name = self
            .blk_file
            .as_deref()
            .map_or(Format::Raw, Format::of_path);
        OpenOptions {
            format: match self.format {
                None => by_name,
                Some(FormatArg::Raw) => Format::Raw,
                Some(FormatArg::Qcow2) => Format::Qcow2,
                Some(FormatArg::Vmdk) => Format::Vmdk,
            },
            read_only: self.read_only,
            caching: match self.cache {
                CacheArg::Writeback => Caching::Writeback,
                CacheArg::None => Caching::None,
                CacheArg::Unsafe => Caching::Unsafe,
            },
            allow_references: self.allow_references,
            lock: !self.no_lock,
        }
    }

    /// What the device shows to the driver.
    pub fn device_config(&self) -> DeviceConfig {
        DeviceConfig {
            serial: self.serial.clone(),
            queues: self.num_queues,
            queue_size: self.queue_size,
            read_only: self.read_only,
        }
    }
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() > ID_LEN || text.contains('\0') {
        return Err(format!("a serial number has at most {ID_LEN} bytes"));
    }
    Ok(text.to_owned())
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && (2..=1024).contains(&size) => Ok(size),
        _ => Err("a queue size is a power of two from 2 to 1024".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, ok: bool) {
        let parsed = Args::try_parse_from(line.split_whitespace());
        assert_eq!(parsed.is_ok(), ok, "{line}: {parsed:?}");
    }

    #[test]
    fn command_lines() {
        check("msb-blk --print-capabilities", true);
        check("msb-blk --socket-path s --blk-file d", true);
        check("msb-blk --fd 0 -b d -r", true);
        check("msb-blk -s s -b d -r", true);
        check("msb-blk -f 0 -b d", true);
        check("msb-blk -c", true);
        check("msb-blk --fd 0 --socket-path s --blk-file d", false);
        check("msb-blk --fd 0", false);
        check("msb-blk --blk-file d", false);
        check("msb-blk --fd 0 -b d --log-level loud", false);
        check("msb-blk --fd 0 --blk-file d --format qcow", false);
        check(
            "msb-blk --fd 0 --blk-file d --serial 12345678901234567890",
            true,
        );
        check(
            "msb-blk --fd 0 --blk-file d --serial 123456789012345678901",
            false,
        );
        check("msb-blk --fd 0 --blk-file d --num-queues 0", false);
        check("msb-blk --fd 0 --blk-file d --num-queues 65", false);
        check("msb-blk --fd 0 --blk-file d --queue-size 1024", true);
        check("msb-blk --fd 0 --blk-file d --queue-size 1000", false);
        check("msb-blk --fd 0 --blk-file d --queue-size 2048", false);
        check("msb-blk --fd 0 --blk-file d --cache directsync", false);
    }

    #[test]
    fn the_format_comes_from_the_flag_or_the_name() {
        let format = |line: &str| {
            Args::try_parse_from(line.split_whitespace())
                .unwrap()
                .open_options()
                .format
        };
        assert_eq!(format("msb-blk --fd 0 --blk-file a.qcow2"), Format::Qcow2);
        assert_eq!(format("msb-blk --fd 0 --blk-file a.VMDK"), Format::Vmdk);
        assert_eq!(format("msb-blk --fd 0 --blk-file a.img"), Format::Raw);
        assert_eq!(
            format("msb-blk --fd 0 --blk-file a.qcow2 --format raw"),
            Format::Raw
        );
    }
}
