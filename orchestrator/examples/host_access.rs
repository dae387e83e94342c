//! Fills a volume from the host, without a sandbox, and looks at what volumes there are.
//!
//! Run it with `cargo run --example host_access`; it needs nothing but a writable `$MSB_HOME`.

use microsandbox::{ErrorKind, MicrosandboxResult, Volume, VolumeKind};

#[tokio::main]
async fn main() -> MicrosandboxResult<()> {
    let cache = Volume::builder("example-cache")
        .quota(1024)
        .label("from", "example")
        .create()
        .await?;
    let fs = cache.fs();
    fs.write("wheels/README", "filled by the host\n").await?;
    fs.copy("wheels/README", "wheels/README.bak").await?;
    fs.rename("wheels/README.bak", "README").await?;
    for entry in fs.list("/").await? {
        println!(
            "{:<10} {:>6} bytes",
            entry.name.display(),
            entry.metadata.len
        );
    }
    print!("{}", fs.read_to_string("README").await?);

    // No path leads out of a volume.
    let outside = fs.read("../../../etc/passwd").await;
    assert_eq!(
        outside.map_err(|error| error.kind()),
        Err(ErrorKind::PathEscape)
    );

    for volume in Volume::list().await? {
        let kind = match volume.kind() {
            VolumeKind::Directory => "directory",
            VolumeKind::Disk => "disk",
        };
        println!(
            "{} is a {kind} of {} bytes",
            volume.name(),
            volume.used_bytes().await?
        );
    }
    Volume::get("example-cache").await?.remove().await
}
