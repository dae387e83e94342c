//! `msb volume`: named volumes.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::process::ExitCode;

use microsandbox::rundir::Home;
use microsandbox::{Error, ErrorKind, Volume, VolumeHandle, VolumeKind, VolumeUse, volume};
use serde::Serialize;

use crate::args::{
    OutputFormat, VolumeCommand, VolumeCreate, VolumeFilter, VolumeInspect, VolumeList,
    VolumePrune, passes,
};
use crate::output::{self, Table};
use crate::progress::Progress;

/// A volume as programs read it.
#[derive(Serialize)]
struct Row {
    name: String,
    kind: VolumeKind,
    path: String,
    quota_mib: Option<u32>,
    used_bytes: u64,
    capacity_bytes: Option<u64>,
    disk_format: Option<String>,
    disk_fstype: Option<String>,
    labels: BTreeMap<String, String>,
    created_at: String,
    used_by: Vec<VolumeUse>,
}

/// Carries out one of the verbs of `msb volume`.
pub(crate) async fn volume(command: VolumeCommand) -> Result<ExitCode, Error> {
    match command {
        VolumeCommand::Create(flags) => create(flags).await?,
        VolumeCommand::Ls(flags) => list(&flags).await?,
        VolumeCommand::Inspect(flags) => inspect(&flags).await?,
        VolumeCommand::Rm(flags) => return remove(&flags.names, flags.quiet).await,
        VolumeCommand::Prune(flags) => return prune(&flags).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(flags: VolumeCreate) -> Result<(), Error> {
    let kind = VolumeKind::from(flags.kind);
    let mut builder = Volume::builder(flags.name.or(flags.named).unwrap_or_default());
    if kind == VolumeKind::Disk {
        builder = builder.disk();
        if flags.size.is_none() {
            return Err(
                Error::new(ErrorKind::InvalidConfig, "a disk volume needs a size")
                    .with_hint("add --size, for example --size 20G"),
            );
        }
    }
    if let Some(size) = flags.size {
        if kind == VolumeKind::Directory {
            return Err(
                Error::new(ErrorKind::InvalidConfig, "--size is for disk volumes")
                    .with_hint("add --kind disk, or limit a directory with --quota"),
            );
        }
        builder = builder.size(size);
    }
    if let Some(quota) = flags.quota {
        builder = builder.quota(quota.0.into());
    }
    for (key, value) in flags.labels {
        builder = builder.label(key, value);
    }
    let progress = Progress::new(flags.quiet);
    progress.step("making the volume");
    let volume = builder.create().await?;
    drop(progress);
    if flags.quiet {
        Ok(())
    } else {
        output::print(&format!("{}\n", volume.name()))
    }
}

/// Sandboxes by the volumes that they mount.
type Uses = BTreeMap<String, Vec<VolumeUse>>;

/// The volumes that were asked for.
async fn select(filters: &[VolumeFilter]) -> Result<(Vec<VolumeHandle>, Uses), Error> {
    let mut volumes = Volume::list().await?;
    let uses: Uses = volume::uses(&Home::from_env()?)?
        .into_iter()
        .map(|(name, users)| (name.to_string(), users))
        .collect();
    let is_label = |filter: &VolumeFilter| matches!(filter, VolumeFilter::Label(_));
    volumes.retain(|volume| {
        passes(filters, is_label, |filter| match filter {
            VolumeFilter::Name(part) => volume.name().contains(part),
            VolumeFilter::Label(label) => label.fits(volume.labels()),
            VolumeFilter::Kind(kind) => volume.kind() == *kind,
            VolumeFilter::Dangling(wanted) => is_dangling(volume, &uses) == *wanted,
        })
    });
    Ok((volumes, uses))
}

fn is_dangling(volume: &VolumeHandle, uses: &Uses) -> bool {
    uses.get(volume.name()).is_none_or(Vec::is_empty)
}

async fn list(flags: &VolumeList) -> Result<(), Error> {
    let (volumes, uses) = select(&flags.filters).await?;
    if flags.quiet {
        let names: String = volumes
            .iter()
            .map(|volume| format!("{}\n", volume.name()))
            .collect();
        return output::print(&names);
    }
    if flags.format.format == OutputFormat::Json {
        let mut rows = Vec::new();
        for volume in &volumes {
            let users = uses.get(volume.name()).cloned().unwrap_or_default();
            rows.push(row(volume, users).await?);
        }
        return output::json(&rows);
    }
    if volumes.is_empty() {
        output::say("No volumes found.");
        return Ok(());
    }
    let mut table = Table::new(&["NAME", "KIND", "SIZE", "CREATED", "IN USE BY"]);
    for volume in &volumes {
        let users = uses.get(volume.name()).into_iter().flatten();
        let running: Vec<&str> = users
            .filter(|user| user.running)
            .map(|user| user.sandbox.as_str())
            .collect();
        table.row([
            volume.name().to_owned(),
            volume.kind().to_string(),
            size(volume),
            output::age(volume.created_at()),
            if running.is_empty() {
                "-".to_owned()
            } else {
                running.join(", ")
            },
        ]);
    }
    table.print()
}

async fn inspect(flags: &VolumeInspect) -> Result<(), Error> {
    let volume = Volume::get(&flags.name).await?;
    let row = row(&volume, volume.used_by().await?).await?;
    if flags.format.format == OutputFormat::Json {
        return output::json(&row);
    }
    let mut lines = vec![("Name", row.name), ("Kind", row.kind.to_string())];
    if let (Some(format), Some(fstype)) = (row.disk_format, row.disk_fstype) {
        lines.extend([
            ("Format", format),
            ("Filesystem", fstype),
            ("Capacity", size(&volume)),
        ]);
    } else {
        lines.push(("Quota", size(&volume)));
    }
    lines.extend([
        ("Used", output::bytes(row.used_bytes)),
        ("Path", row.path),
        ("Created", row.created_at),
    ]);
    let labels: Vec<String> = row
        .labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    lines.push((
        "Labels",
        if labels.is_empty() {
            "-".to_owned()
        } else {
            labels.join(", ")
        },
    ));
    let users: Vec<String> = row.used_by.iter().map(user).collect();
    lines.push((
        "Used by",
        if users.is_empty() {
            "-".to_owned()
        } else {
            users.join(", ")
        },
    ));
    let text: String = lines
        .into_iter()
        .map(|(name, value)| format!("{:<12}{value}\n", format!("{name}:")))
        .collect();
    output::print(&text)
}

async fn prune(flags: &VolumePrune) -> Result<ExitCode, Error> {
    let (mut volumes, uses) = select(&flags.filters).await?;
    volumes.retain(|volume| is_dangling(volume, &uses));
    if volumes.is_empty() {
        if !flags.quiet {
            output::say("There is nothing to remove.");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let names: Vec<String> = volumes
        .iter()
        .map(|volume| volume.name().to_owned())
        .collect();
    if !flags.force && !agreed(&names)? {
        return Ok(ExitCode::FAILURE);
    }
    let mut freed = 0_u64;
    for volume in &volumes {
        freed = freed.saturating_add(volume.used_bytes().await.unwrap_or(0));
    }
    let code = remove(&names, flags.quiet).await?;
    if !flags.quiet && code == ExitCode::SUCCESS {
        output::say(&format!("{} are free again.", output::bytes(freed)));
    }
    Ok(code)
}

/// Asks whether what these volumes hold may be lost.
fn agreed(names: &[String]) -> Result<bool, Error> {
    if !std::io::stdin().is_terminal() {
        let message = format!("these volumes would be removed: {}", names.join(" "));
        return Err(Error::new(ErrorKind::InvalidConfig, message)
            .with_hint("add --force to remove them without being asked"));
    }
    output::say(&format!("These volumes are removed: {}", names.join(" ")));
    output::say("Everything in them will be lost. Go on? [y/N]");
    let mut answer = String::new();
    std::io::stdin()
        .read_line(&mut answer)
        .map_err(|error| Error::io("cannot read the answer", error))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

async fn remove(names: &[String], quiet: bool) -> Result<ExitCode, Error> {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match Volume::remove(name).await {
            Ok(()) if quiet => {}
            Ok(()) => output::done(&format!("Removed {name}")),
            Err(error) => {
                output::error(&error);
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

async fn row(volume: &VolumeHandle, used_by: Vec<VolumeUse>) -> Result<Row, Error> {
    Ok(Row {
        name: volume.name().to_owned(),
        kind: volume.kind(),
        path: volume.path().display().to_string(),
        quota_mib: volume.quota_mib(),
        used_bytes: volume.used_bytes().await?,
        capacity_bytes: volume.capacity_bytes(),
        disk_format: volume.disk_format().map(str::to_owned),
        disk_fstype: volume.disk_fstype().map(str::to_owned),
        labels: volume.labels().clone(),
        created_at: output::timestamp(volume.created_at()),
        used_by,
    })
}

/// Capacity of a disk, or quota of a directory.
fn size(volume: &VolumeHandle) -> String {
    let quota = volume.quota_mib().map(|mib| u64::from(mib) << 20);
    volume
        .capacity_bytes()
        .or(quota)
        .map_or("-".to_owned(), output::bytes)
}

fn user(user: &VolumeUse) -> String {
    let access = if user.read_only { "ro" } else { "rw" };
    let state = if user.running { "running" } else { "stopped" };
    format!("{} ({access}, {state})", user.sandbox)
}
