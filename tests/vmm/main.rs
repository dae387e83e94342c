//! Drivers of VMMs against stand-ins: what is asked of a VMM, on machines that have none.

mod choice;
mod libkrun;
mod nested;

use std::path::{Path, PathBuf};

use anyhow::Result;
use msb_testkit::msb::host;

/// Folder of the stand-ins.
fn stand_in(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vmm").join(name)
}

/// Compiles the stand-in for libkrun, and a kernel bundle beside it, which is empty.
fn libkrun(folder: &Path, defines: &[&str]) -> Result<PathBuf> {
    let library = folder.join("libkrun.so.1");
    let kernel = folder.join("libkrunfw.so.5");
    let source = stand_in("krun.c");
    let shared = ["-shared", "-fPIC", "-o"];
    let text = |path: &Path| path.display().to_string();
    let mut arguments: Vec<String> = shared.map(str::to_owned).to_vec();
    arguments.extend([text(&library), text(&source)]);
    arguments.extend(defines.iter().map(|define| format!("-D{define}")));
    host("cc", &arguments)?;
    let soname = "-Wl,-soname,libkrunfw.so.5".to_owned();
    let mut arguments: Vec<String> = shared.map(str::to_owned).to_vec();
    arguments.extend([
        text(&kernel),
        soname,
        "-x".into(),
        "c".into(),
        "/dev/null".into(),
    ]);
    host("cc", &arguments)?;
    Ok(library)
}
