//! Entry point of the msb-blk backend.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use msb_blk::args::{Args, CAPABILITIES, asks_for_capabilities};
use msb_blk::control::Control;
use msb_blk::device::BlkDevice;
use msb_blk::image::{Image, OpenError, OpenOptions, open};
use msb_blk::sandbox;
use msb_vhost::jail::{self, JailError};
use msb_vhost::{Endpoint, Options, ServeError, chain};

/// How long to wait for a lock that somebody else has.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// Why the process ends with something else than success; see `--help` for the exit status.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot serve the image")]
    Open(#[from] OpenError),
    #[error("cannot serve the socket")]
    Serve(#[from] ServeError),
    #[error("cannot lock the process in")]
    Jail(#[from] JailError),
    #[error("cannot set the process up")]
    Setup(#[from] std::io::Error),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Open(OpenError::Locked { .. }) => 4,
            Self::Open(_) => 3,
            Self::Jail(_) | Self::Setup(_) => 5,
            Self::Serve(_) => 6,
        }
    }
}

fn main() -> ExitCode {
    if asks_for_capabilities(std::env::args_os().skip(1)) {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("msb-blk: {}", chain(&failure));
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(args: &Args) -> Result<(), Failure> {
    msb_vhost::start_log(args.log_level);
    if let Some(parent) = args.exit_with_parent {
        msb_vhost::exit_with_parent(parent)?;
    }
    let Some(path) = &args.blk_file else {
        return Ok(());
    };
    let image = Arc::new(open_patiently(path, &args.open_options())?);
    let endpoint = match (&args.socket_path, args.fd) {
        (Some(path), _) => Endpoint::bind(path)?,
        (None, fd) => Endpoint::from_fd(fd.unwrap_or(0))?,
    };
    let control = args
        .control_path
        .as_deref()
        .map(Control::bind)
        .transpose()?;
    let mut report = jail::enter(sandbox::jail(args.sandbox))?;
    let device = BlkDevice::new(Arc::clone(&image), args.device_config())?.with_control(control);
    let device = Arc::new(device);
    report.seal(&sandbox::calls(args.read_only))?;
    for missing in &report.missing {
        tracing::warn!("{}", chain(missing));
    }
    let options = Options {
        name: "msb-blk",
        reconnect: args.reconnect,
        poll_limit: Duration::from_micros(args.poll_max_us),
    };
    let served = msb_vhost::serve(&endpoint, &device, options);
    drop(device);
    if let Err(error) = image.close() {
        tracing::error!("cannot close the image: {}", chain(&error));
    }
    Ok(served?)
}

/// Opens the image. The lock of a predecessor that was killed outlives it for as long as the kernel
/// takes to end its transfers.
fn open_patiently(path: &Path, options: &OpenOptions) -> Result<Image, OpenError> {
    let start = Instant::now();
    loop {
        match open(path, options) {
            Err(OpenError::Locked { .. }) if start.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}
