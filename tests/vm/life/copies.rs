//! Copies into a sandbox and out of it, also when the guest is hostile.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use anyhow::{Result, ensure};
use msb_testkit::msb::{Msb, host};

pub(super) fn copies(msb: &Msb) -> Result<()> {
    // A tree with everything that a copy has to keep, judged by diff and stat.
    for number in 0..60 {
        msb.write(
            &format!("tree/d{}/f{number}", number % 7),
            format!("{number}\n").repeat(number),
        )?;
    }
    msb.write("tree/big", vec![7; 5 << 20])?;
    msb.write("tree/with space and ü", "x")?;
    msb.write(&format!("tree/{}/deep", "long".repeat(50)), "x")?;
    symlink("d1/f1", msb.path("tree/link"))?;
    symlink("/nowhere", msb.path("tree/dangling"))?;
    fs::create_dir(msb.path("tree/empty"))?;
    let script = msb.write("tree/script", "#!/bin/sh\n")?;
    fs::set_permissions(script, fs::Permissions::from_mode(0o751))?;
    for (from, to) in [
        ("./tree", "life:/srv"),          // made
        ("./tree", "life:/srv"),          // into it: /srv/tree
        ("./tree/.", "life:/cache"),      // its content
        ("./tree/big", "life:/data/big"), // a file
        ("./tree/big", "life:/data/"),    // into a directory
        ("life:/srv", "./back"),
        ("life:/srv/tree/.", "./back2"),
        ("life:/srv/script", "./script"),
        ("life:/data/big", "./"),
    ] {
        let said = msb.msb(["cp", from, to])?;
        ensure!(
            said.code == 0 && said.out.is_empty() && said.err.is_empty(),
            "{from} {to}: {said:?}"
        );
    }
    let tree = msb.path("tree").display().to_string();
    let back = msb.path("back2").display().to_string();
    host("diff", ["-r", "--no-dereference", &tree, &back])?;
    // The volume keeps links as files on the host, as strict has it.
    let volume = msb.home().join("volumes/cache").display().to_string();
    let others = ["--exclude=link", "--exclude=dangling"];
    host("diff", ["-r", others[0], others[1], &tree, &volume])?;
    let links = msb.exec("life", "cd /cache; readlink link; readlink dangling")?;
    ensure!(links.out == "d1/f1\n/nowhere\n", "{links:?}");
    ensure!(
        msb.path("back/tree/link").is_symlink(),
        "not put into the directory"
    );
    let mode = |name: &str| anyhow::Ok(fs::metadata(msb.path(name))?.permissions().mode() & 0o777);
    ensure!(
        (mode("script")?, mode("back/script")?) == (0o751, 0o751),
        "modes are lost"
    );
    ensure!(
        fs::read(msb.path("big"))? == vec![7; 5 << 20],
        "the large file differs"
    );
    for (from, to, wanted) in [
        ("./none", "life:/x", "./none"),
        ("life:/none", "./x", "/none"),
        ("./tree", "life:/srv/script", "not a directory"),
        ("./tree/big", "life:/none/x", "/none/x"),
        ("life:/srv", "./script", "is a file"),
        ("./a", "./b", "neither side"),
        ("life:/a", "life:/b", "both sides"),
        ("./tree", "other:/b", "other"),
    ] {
        let said = msb.msb(["cp", from, to])?;
        ensure!(
            said.code == 1 && said.err.contains(wanted),
            "{from} {to}: {said:?}"
        );
    }
    ensure!(!msb.path("x").exists(), "a refused copy left something");
    Ok(())
}

/// What the guest chooses for its files leads nowhere on the host.
pub(super) fn hostile_copies(msb: &Msb) -> Result<()> {
    let outside = msb.dir("outside")?;
    let script = format!(
        "mkdir /h; cd /h; ln -s {outside} up; ln -s ../../outside rel; mkfifo pipe; cp /bin/busybox suid; chmod 6755 suid",
        outside = outside.display()
    );
    msb.exec("life", &script)?;
    let said = msb.msb(["cp", "life:/h", "./h"])?;
    ensure!(said.code == 0 && said.err.contains("pipe"), "{said:?}");
    ensure!(
        msb.path("h/up").is_symlink() && !msb.path("h/pipe").exists(),
        "{said:?}"
    );
    let mode = fs::metadata(msb.path("h/suid"))?.permissions().mode();
    ensure!(mode & 0o7777 == 0o755, "{mode:o}");
    // The second copy finds the links of the first, and does not write through them.
    msb.exec(
        "life",
        "cd /h; rm up rel; mkdir up rel; echo x >up/x; echo x >rel/x",
    )?;
    let said = msb.msb(["cp", "life:/h/.", "./h"])?;
    ensure!(said.code == 1, "{said:?}");
    ensure!(fs::read_dir(&outside)?.count() == 0, "written outside");
    Ok(())
}
