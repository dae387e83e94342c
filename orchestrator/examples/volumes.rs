//! Every kind of volume in one sandbox, as the documents show them.
//!
//! Needs an image named `python` in the local store and the files that it mounts; run it with
//! `cargo run --example volumes`.

use microsandbox::{
    DiskImageFormat, MicrosandboxResult, Sandbox, SizeExt, StatVirtualization, Volume,
};

#[tokio::main]
async fn main() -> MicrosandboxResult<()> {
    let cache = Volume::builder("pip-cache").create().await?;
    let docker_data = Volume::builder("docker-data")
        .disk()
        .size(20.gib())
        .create()
        .await?;
    println!("made {} and {}", cache.name(), docker_data.name());

    let sb = Sandbox::builder("full")
        .image("python")
        .volume("/app/src", |v| v.bind("./src").readonly().noexec())
        .volume("/app/data", |v| v.bind("./data"))
        .volume("/app/pyproject.toml", |v| {
            v.bind("./pyproject.toml").readonly()
        })
        .volume("/root/.cache/pip", |v| {
            v.named(cache.name())
                .stat_virtualization(StatVirtualization::Relaxed)
        })
        .volume("/dataset", |v| {
            v.disk("./dataset.qcow2")
                .format(DiskImageFormat::Qcow2)
                .fstype("ext4")
                .readonly()
        })
        .volume("/seed", |v| v.disk("./seed.raw").readonly().noexec())
        .volume("/tmp", |v| v.tmpfs().size(1024).noexec().nosuid().nodev())
        .create()
        .await?;
    println!("{} runs", sb.name());

    let worker = Sandbox::builder("worker")
        .image("python")
        .volume("/cache", |v| {
            v.named_with("shared-cache", |n| n.ensure_exists())
        })
        .volume("/var/lib/docker", |v| {
            v.named_with("docker-data", |n| n.ensure_exists().disk().size(20.gib()))
        })
        .volume("/tmp/scratch", |v| v.tmpfs().size(100).noexec())
        .create()
        .await?;
    println!("{} runs", worker.name());
    Ok(())
}
