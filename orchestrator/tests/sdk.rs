//! The SDK as the documents show it, against a home of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::process::Command;

use microsandbox::{ErrorKind, FsEntryKind, MicrosandboxResult, SizeExt, Volume, VolumeKind};

/// Runs one of the functions below in a process of its own, whose home is a scratch folder: the
/// home comes from the environment, which a process cannot change while it has threads.
fn in_a_home_of_its_own(name: &str, test: impl AsyncFnOnce() -> MicrosandboxResult<()>) {
    if std::env::var_os("MSB_TEST_INSIDE").is_some() {
        let events = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        events.block_on(test()).unwrap();
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("MSB_TEST_INSIDE", "1")
        .env("MSB_HOME", home.path())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn volumes_are_made_listed_and_removed() {
    in_a_home_of_its_own("volumes_are_made_listed_and_removed", async || {
        let cache = Volume::builder("pip-cache").create().await?;
        assert_eq!(
            (cache.name(), cache.kind()),
            ("pip-cache", VolumeKind::Directory)
        );
        let config = Volume::builder("docker-data")
            .disk()
            .size(64.mib())
            .build()?;
        assert_eq!(Volume::list().await?.len(), 1);
        let data = Volume::create(config).await?;
        assert_eq!(data.capacity_bytes(), Some(64 << 20));
        assert_eq!(
            (data.disk_format(), data.disk_fstype()),
            (Some("raw"), Some("ext4"))
        );
        assert_eq!(
            std::fs::metadata(data.disk_path().unwrap()).unwrap().len(),
            64 << 20
        );

        let again = Volume::builder("pip-cache").create().await.unwrap_err();
        assert_eq!(again.kind(), ErrorKind::VolumeAlreadyExists);
        let names: Vec<_> = Volume::list()
            .await?
            .iter()
            .map(|v| v.name().to_owned())
            .collect();
        assert_eq!(names.len(), 2);

        let handle = Volume::get("docker-data").await?;
        assert_eq!(handle.kind(), VolumeKind::Disk);
        assert!(handle.used_bytes().await? < 32 << 20);
        assert!(handle.used_by().await?.is_empty());
        handle.remove().await?;
        Volume::remove("pip-cache").await?;
        let gone = Volume::get("pip-cache").await.unwrap_err();
        assert_eq!(
            (gone.kind(), gone.value()),
            (ErrorKind::VolumeNotFound, Some("pip-cache"))
        );
        assert!(Volume::list().await?.is_empty());
        Ok(())
    });
}

#[test]
fn what_cannot_be_a_volume_is_refused() {
    in_a_home_of_its_own("what_cannot_be_a_volume_is_refused", async || {
        for builder in [
            Volume::builder("../x"),
            Volume::builder("x").disk(),
            Volume::builder("x").disk().size(0),
            Volume::builder("x").size(5),
            Volume::builder("x").quota(1 << 40),
            Volume::builder("x").disk().size(5).quota(5),
        ] {
            assert_eq!(
                builder.create().await.unwrap_err().kind(),
                ErrorKind::InvalidConfig
            );
        }
        assert!(Volume::list().await?.is_empty());
        Ok(())
    });
}

#[test]
fn files_of_a_volume_are_reached_from_the_host() {
    in_a_home_of_its_own("files_of_a_volume_are_reached_from_the_host", async || {
        let volume = Volume::builder("v")
            .quota(9)
            .label("a", "b")
            .create()
            .await?;
        let fs = volume.fs();
        fs.write("a/b/file", "text").await?;
        assert_eq!(fs.read("/a/b/file").await?, b"text");
        assert_eq!(
            std::fs::read(volume.path().join("a/b/file")).unwrap(),
            b"text"
        );

        let mut out = fs.write_stream("big").await?;
        for piece in 0..3_u8 {
            out.write(vec![piece; 50_000]).await?;
        }
        out.close().await?;
        let mut stream = fs.read_stream("big").await?;
        assert_eq!(
            stream.recv().await?.map(|chunk| chunk.len()),
            Some(64 << 10)
        );
        assert_eq!(stream.collect().await?.len(), 150_000 - (64 << 10));

        fs.mkdir("empty/deep").await?;
        fs.copy("a/b/file", "copies/file").await?;
        fs.rename("copies/file", "copies/moved").await?;
        assert_eq!(fs.read_to_string("copies/moved").await?, "text");
        let names: Vec<_> = fs
            .list("/")
            .await?
            .into_iter()
            .map(|entry| entry.name)
            .collect();
        assert_eq!(names, ["a", "big", "copies", "empty"]);
        assert_eq!(fs.stat("a").await?.kind, FsEntryKind::Directory);
        assert_eq!(fs.stat("big").await?.len, 150_000);

        fs.remove("big").await?;
        assert!(!fs.exists("big").await?);
        assert_eq!(fs.remove("a").await.unwrap_err().kind(), ErrorKind::Io);
        fs.remove_dir("a").await?;
        assert_eq!(
            fs.remove_dir("/").await.unwrap_err().kind(),
            ErrorKind::InvalidConfig
        );
        assert_eq!(
            fs.read("../../x").await.unwrap_err().kind(),
            ErrorKind::PathEscape
        );
        fs.write("binary", [0xff]).await?;
        assert_eq!(
            fs.read_to_string("binary").await.unwrap_err().kind(),
            ErrorKind::Io
        );

        let handle = Volume::get("v").await?;
        assert_eq!(
            (handle.quota_mib(), handle.labels()["a"].as_str()),
            (Some(9), "b")
        );
        Ok(())
    });
}
