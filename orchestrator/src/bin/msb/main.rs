//! Command line of microsandbox: flags in, text out.

mod args;
mod attach;
mod commands;
mod machine;
mod mounts;
mod output;
mod progress;

fn main() -> std::process::ExitCode {
    commands::run(<args::Cli as clap::Parser>::parse())
}
