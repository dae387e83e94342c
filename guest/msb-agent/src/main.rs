//! Is PID 1 in the VM: mounts what it is told and runs what it is asked.
//!
//! It is the `/init` of the initramfs and never leaves it: its working directory stays there for
//! good, while its root becomes the sandbox's. A relative path therefore names the agent's own
//! files, an absolute one the sandbox's, and no user command can reach the former.

#![deny(unsafe_code)]

mod boot;
mod events;
mod exec;
mod modules;
mod mounts;
mod port;
mod serve;
mod shutdown;
#[allow(unsafe_code)]
mod sys;

use std::process::ExitCode;

fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        eprintln!("msb-agent is the init process of a sandbox; it does nothing elsewhere");
        return ExitCode::FAILURE;
    }
    std::panic::set_hook(Box::new(|panic| shutdown::give_up(&panic.to_string())));
    match boot::run() {
        Ok(()) => shutdown::power_off(),
        Err(error) => shutdown::give_up(&describe(&error)),
    }
    ExitCode::FAILURE
}

/// An error with all its causes, in one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
