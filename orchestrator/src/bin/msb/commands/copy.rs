//! `msb cp`: files and directories into a sandbox and out of it.

use std::process::ExitCode;

use microsandbox::rundir::Home;
use microsandbox::spec::SandboxName;
use microsandbox::{Error, ErrorKind, Sandbox};

use crate::args::Copy;
use crate::output;
use crate::progress::Progress;

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side<'a> {
    Host(&'a str),
    Guest(SandboxName, &'a str),
}

impl<'a> Side<'a> {
    /// `NAME:PATH` is in a sandbox. A path of the host that looks so begins with `./`.
    fn parse(text: &'a str) -> Self {
        let Some((name, path)) = text.split_once(':') else {
            return Self::Host(text);
        };
        match SandboxName::try_from(name.to_owned()) {
            Ok(name) => Self::Guest(name, path),
            Err(_) => Self::Host(text),
        }
    }
}

/// `msb cp`.
pub(super) async fn cp(args: &Copy) -> Result<ExitCode, Error> {
    let home = Home::from_env()?;
    let progress = Progress::new(args.quiet);
    let tell = |bytes: u64| progress.step(&format!("copying, {}", output::bytes(bytes)));
    let copied = match (Side::parse(&args.from), Side::parse(&args.to)) {
        (Side::Host(from), Side::Guest(name, to)) => {
            let sandbox = Sandbox::connect(&home, &name).await?;
            sandbox.copy_in(from, to, &tell).await?
        }
        (Side::Guest(name, from), Side::Host(to)) => {
            let sandbox = Sandbox::connect(&home, &name).await?;
            sandbox.copy_out(from, to, &tell).await?
        }
        (Side::Host(_), Side::Host(_)) => {
            return Err(refuse("neither side is in a sandbox"));
        }
        (Side::Guest(..), Side::Guest(..)) => {
            return Err(refuse("both sides are in a sandbox"));
        }
    };
    drop(progress);
    if !args.quiet {
        for line in &copied.left_out {
            output::say(line);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn refuse(what: &str) -> Error {
    Error::new(ErrorKind::InvalidConfig, what)
        .with_hint("write one of them as NAME:/path, for example msb cp ./file worker:/srv/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_name_before_a_colon_is_in_a_sandbox() {
        let guest =
            |name: &str, path| Side::Guest(SandboxName::try_from(name.to_owned()).unwrap(), path);
        for (text, side) in [
            ("box:/a", guest("box", "/a")),
            ("box:a:b", guest("box", "a:b")),
            ("a/b", Side::Host("a/b")),
            ("./box:/a", Side::Host("./box:/a")),
            ("/x:y", Side::Host("/x:y")),
            (":x", Side::Host(":x")),
        ] {
            assert_eq!(Side::parse(text), side, "{text}");
        }
    }
}
