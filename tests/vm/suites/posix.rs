//! pjdfstest and fsx in a guest: the whole way through its kernel, virtiofs and the file server.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use msb_testkit::suites::{CONFIGURATION, Users, fsx_configuration, judge, number, outcomes, seed};

use super::Guest;

/// Both suites as root, then pjdfstest as an ordinary user of the guest.
const SCRIPT: &str = r#"
mkdir /tmp/other
for pattern in "" erofs; do
    echo "== root $pattern"
    /tools/pjdfstest -c /suites/pjdfstest.toml -s /tmp/other -p /x $pattern || true
done
mkdir /x/fsx
for shape in small large; do
    # The names of files that fsx keeps beside its own must not be in the share.
    /tools/fsx -N $(cat /suites/$shape.count) -S $(cat /suites/seed) -P /tmp -f /suites/$shape.toml /x/fsx/$shape
    echo "fsx $shape: ok"
done
mkdir /x/place
chown user:user /x/place
chmod 777 /tmp/other
for pattern in "" erofs; do
    echo "== user $pattern"
    /bin/su -m user -c "/tools/pjdfstest -c /suites/pjdfstest.toml -s /tmp/other -p /x/place $pattern" || true
done
"#;

/// Operations of fsx on a small file; `MSB_FSX_OPS` asks for more.
const OPERATIONS: u64 = 4000;

/// Runs both suites and compares what fails with what must.
fn suites(mode: &str, ordinary: bool) -> Result<()> {
    let guest = Guest::new(ordinary)?;
    guest.msb.write("suites/pjdfstest.toml", CONFIGURATION)?;
    guest.msb.write("suites/seed", seed().to_string())?;
    let operations = number("MSB_FSX_OPS", OPERATIONS);
    // The second file is larger than any one request.
    let shapes = [
        ("small", 256 << 10, 64 << 10, operations),
        ("large", 8 << 20, 3 << 20, operations / 40),
    ];
    for (name, length, largest, count) in shapes {
        let text = fsx_configuration(length, largest);
        guest.msb.write(&format!("suites/{name}.toml"), text)?;
        guest
            .msb
            .write(&format!("suites/{name}.count"), count.to_string())?;
    }
    guest.give("suites")?;
    guest.dir("share")?;
    let share = format!("./share:/x:stat-virt={mode}");
    let text = guest.must(&["-v", "./suites:/suites:ro", "-v", &share], SCRIPT)?;
    for (who, users) in [
        (
            "root",
            if ordinary {
                Users::OrdinaryServer
            } else {
                Users::Root
            },
        ),
        (
            "user",
            if ordinary {
                Users::Ordinary
            } else {
                Users::RootServer
            },
        ),
    ] {
        let mut seen = BTreeMap::new();
        // Those that mount again have a process of their own, as on the bridge.
        for pattern in ["", "erofs"] {
            let (_, text) = text
                .split_once(&format!("== {who} {pattern}\n"))
                .context("a suite did not run")?;
            let text = text.split("\n== ").next().unwrap_or_default();
            for (name, outcome) in outcomes(text)? {
                if name.contains("erofs") != pattern.is_empty() {
                    seen.insert(name, outcome);
                }
            }
        }
        judge(mode, users, &seen)?;
    }
    Ok(())
}

#[test]
fn strict_by_root() -> Result<()> {
    suites("strict", false)
}

#[test]
fn strict_by_an_ordinary_user() -> Result<()> {
    suites("strict", true)
}

#[test]
fn relaxed_by_root() -> Result<()> {
    suites("relaxed", false)
}

#[test]
fn relaxed_by_an_ordinary_user() -> Result<()> {
    suites("relaxed", true)
}

#[test]
fn off_by_root() -> Result<()> {
    suites("off", false)
}

#[test]
fn off_by_an_ordinary_user() -> Result<()> {
    suites("off", true)
}
