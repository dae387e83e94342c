//! What the documents mount in their examples, and what their largest one looks like from inside.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};

use crate::msb::{Msb, disk_image};

/// A folder with everything that the documents mount, and their images in the store.
///
/// # Errors
///
/// When one of them cannot be made.
pub fn documents() -> Result<Msb> {
    let msb = Msb::new()?;
    for image in ["python", "alpine", "docker:dind"] {
        msb.image(image)?;
    }
    msb.write("src/main.py", "print('from the host')\n")?;
    let tool = msb.write("src/tool", "#!/bin/sh\necho ran\n")?;
    fs::set_permissions(tool, fs::Permissions::from_mode(0o755))?;
    msb.write("data/in", "from the host\n")?;
    msb.write("config.toml", "level = 1\n")?;
    msb.write("pyproject.toml", "[project]\n")?;
    msb.write("inner/greeting", "from the image\n")?;
    let inner = msb.path("inner");
    let tool = msb.write("inner/tool", "#!/bin/sh\necho ran\n")?;
    fs::set_permissions(tool, fs::Permissions::from_mode(0o755))?;
    disk_image(&msb.path("seed.raw"), "raw", &inner, 16)?;
    disk_image(&msb.path("dataset.qcow2"), "qcow2", &inner, 16)?;
    Ok(msb)
}

/// `options PATH` prints how a guest path is mounted: type, then options.
pub const OPTIONS: &str =
    "options() { awk -v p=$1 '$2 == p {o = $3 \" \" $4} END {print o}' /proc/mounts; }\n";

/// Looks at every mount of the example that combines them.
pub fn everything() -> String {
    format!(
        "{OPTIONS} cat /app/src/main.py /app/pyproject.toml /dataset/greeting
         for path in /app/src /app/pyproject.toml /root/.cache/pip /dataset /tmp; do
             options $path | sed 's/,relatime.*//; s/,size=.*//'; done
         ln -s target /root/.cache/pip/link; df -m /tmp | awk 'NR == 2 {{print $2}}'"
    )
}

/// What [`everything`] prints.
pub const EVERYTHING: &str = "print('from the host')
[project]
from the image
virtiofs ro,noexec
virtiofs ro
virtiofs rw
ext4 ro
tmpfs rw,nosuid,nodev,noexec
1024
";

/// `stat-virt=relaxed` makes real symbolic links on the host.
///
/// # Errors
///
/// When there is none.
pub fn relaxed_link(msb: &Msb) -> Result<()> {
    let link = fs::read_link(msb.home().join("volumes/pip-cache/link"))?;
    ensure!(link.as_os_str() == "target", "{}", link.display());
    Ok(())
}
