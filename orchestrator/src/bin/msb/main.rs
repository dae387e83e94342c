//! Command line of microsandbox: flags in, text out.

mod args;
mod commands;
mod machine;
mod output;

fn main() -> std::process::ExitCode {
    commands::run(<args::Cli as clap::Parser>::parse())
}
