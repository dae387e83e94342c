//! Which VMM is chosen, what `doctor` and `plan` say of it, and what a VMM's process may reach.

use anyhow::{Result, ensure};
use msb_testkit::msb::{Msb, binary, said};
use serde_json::Value;

#[test]
fn the_library_that_the_environment_names_is_found_and_explained() -> Result<()> {
    let msb = Msb::new()?;
    let folder = msb.dir("krun")?;
    let library = crate::libkrun(&folder, &[])?;
    let plan = |vmm: &str, library: &std::path::Path| {
        let mut command = msb.command(["plan", "demo", "--vmm", vmm]);
        said(&command.env("MSB_LIBKRUN", library).output()?)
    };
    let planned = plan("libkrun", &library)?;
    if planned.code == 0 {
        let plan: Value = serde_json::from_str(&planned.out)?;
        assert_eq!(plan["vm"]["vmm"], "libkrun");
        assert_eq!(plan["vm"]["accel"], "kvm");
    } else {
        ensure!(
            planned.err.contains("hardware virtualisation"),
            "{planned:?}"
        );
    }
    let old = crate::libkrun(&msb.dir("old")?, &["NO_VHOST_USER"])?;
    let refused = plan("libkrun", &old)?;
    ensure!(
        refused.code != 0 && refused.err.contains("krun_add_vhost_user_device"),
        "{refused:?}"
    );
    // Not chosen, it is passed over.
    let mut command = msb.command(["plan", "demo"]);
    let other = said(&command.env("MSB_LIBKRUN", &old).output()?)?;
    ensure!(
        other.code == 0 && !other.out.contains("libkrun"),
        "{other:?}"
    );
    let mut command = msb.command(["doctor"]);
    let doctor = said(&command.env("MSB_LIBKRUN", &old).output()?)?;
    ensure!(doctor.out.contains("has no function"), "{doctor:?}");
    Ok(())
}

#[test]
fn a_vmm_reaches_nothing_but_what_it_was_given() -> Result<()> {
    let msb = Msb::new()?;
    let (given, secret) = (msb.write("given", "seen")?, msb.write("secret", "secret")?);
    let script = format!(
        "cat {given}; cat {secret}; echo x >{given}; ls {home}; \
         while read -r line; do case $line in NoNewPrivs*) echo \"$line\";; esac; done \
         </proc/$$/status; ls /sys/class/net",
        given = given.display(),
        secret = secret.display(),
        home = msb.home().display(),
    );
    let shell = "/bin/sh".to_owned();
    let parent = std::process::id().to_string();
    let read = given.display().to_string();
    let mut command = std::process::Command::new(binary("msb"));
    command.args([
        "tied",
        &parent,
        "--confined",
        "--read",
        &read,
        "--",
        &shell,
        "-c",
        &script,
    ]);
    let done = said(&command.output()?)?;
    if done.err.contains("no Landlock") {
        println!("skipped: this kernel has no Landlock");
        return Ok(());
    }
    ensure!(done.out.starts_with("seen"), "{done:?}");
    ensure!(!done.out.contains("secret"), "{done:?}");
    ensure!(done.out.contains("NoNewPrivs:\t1"), "{done:?}");
    assert_eq!(msb.read("given")?, "seen", "{done:?}");
    assert_eq!(done.err.matches("Permission denied").count(), 4, "{done:?}");
    Ok(())
}
