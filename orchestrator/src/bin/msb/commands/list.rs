//! `msb ls`, `ps` and `inspect`: what sandboxes there are and what they are.

use std::process::ExitCode;

use microsandbox::Error;
use microsandbox::plan::Plan;
use microsandbox::rundir::{Home, SandboxDir, SandboxState, Status};
use microsandbox::spec::{Access, ImageSource, MountSource, MountSpec, SandboxName, SandboxSpec};
use serde::Serialize;

use crate::args::{Inspect, OutputFormat, Processes, Sandboxes};
use crate::output::{self, Table};

/// One sandbox in `msb ls --format json`.
#[derive(Serialize)]
struct Row {
    name: String,
    status: Status,
    image: String,
    created_at_ms: u64,
}

/// One sandbox in `msb ps --format json`.
#[derive(Serialize)]
struct ProcessRow {
    name: String,
    image: String,
    status: Status,
    cpus: u8,
    memory_mib: u32,
    supervisor_pid: Option<u32>,
    vmm: Option<String>,
    boot_ms: Option<u64>,
}

/// `msb inspect --format json`.
#[derive(Serialize)]
struct Whole {
    name: String,
    created_at_ms: u64,
    state: SandboxState,
    config: SandboxSpec,
    plan: Option<Plan>,
}

/// `msb ls`.
pub(super) fn ls(args: &Sandboxes) -> Result<ExitCode, Error> {
    let mut rows = Vec::new();
    for (dir, spec, state) in all()? {
        let runs = is_up(state.status);
        let labelled = args
            .labels
            .iter()
            .all(|(key, value)| spec.labels.get(key) == Some(value));
        if (args.running && !runs) || (args.stopped && runs) || !labelled {
            continue;
        }
        rows.push(Row {
            name: dir.name().to_string(),
            status: state.status,
            image: image(&spec.image),
            created_at_ms: dir.created_at_ms(),
        });
    }
    if args.quiet {
        for row in &rows {
            output::print(&format!("{}\n", row.name))?;
        }
    } else if args.format.format == OutputFormat::Json {
        output::json(&rows)?;
    } else {
        let mut table = Table::new(&["NAME", "IMAGE", "STATUS", "CREATED"]);
        for row in rows {
            let age = age(row.created_at_ms);
            table.row([row.name, row.image, word(row.status).to_owned(), age]);
        }
        table.print()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `msb ps`.
pub(super) fn ps(args: &Processes) -> Result<ExitCode, Error> {
    let mut rows = Vec::new();
    for (dir, spec, state) in all()? {
        if !args.all && !is_up(state.status) {
            continue;
        }
        let vmm = dir
            .plan()
            .ok()
            .map(|plan| format!("{:?}", plan.vm.vmm).to_lowercase());
        rows.push(ProcessRow {
            name: dir.name().to_string(),
            image: image(&spec.image),
            status: state.status,
            cpus: spec.cpus,
            memory_mib: spec.memory.0,
            supervisor_pid: state.pid,
            vmm,
            boot_ms: state.boot_ms,
        });
    }
    if args.quiet {
        for row in &rows {
            output::print(&format!("{}\n", row.name))?;
        }
    } else if args.format.format == OutputFormat::Json {
        output::json(&rows)?;
    } else {
        let mut table = Table::new(&[
            "NAME", "IMAGE", "STATUS", "CPUS", "MEM", "VMM", "PID", "BOOT",
        ]);
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        for row in rows {
            table.row([
                row.name,
                row.image,
                word(row.status).to_owned(),
                row.cpus.to_string(),
                format!("{} MiB", row.memory_mib),
                or_dash(row.vmm),
                or_dash(row.supervisor_pid.map(|pid| pid.to_string())),
                or_dash(row.boot_ms.map(|ms| format!("{ms} ms"))),
            ]);
        }
        table.print()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `msb inspect`.
pub(super) fn inspect(args: &Inspect) -> Result<ExitCode, Error> {
    let home = Home::from_env()?;
    let dir = home.find_sandbox(&SandboxName::try_from(args.name.clone())?)?;
    let whole = Whole {
        name: dir.name().to_string(),
        created_at_ms: dir.created_at_ms(),
        state: dir.state()?,
        config: dir.spec()?,
        plan: dir.plan().ok(),
    };
    if args.format.format == OutputFormat::Json {
        output::json(&whole)?;
    } else {
        output::print(&describe(&whole))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(whole: &Whole) -> String {
    let spec = &whole.config;
    let mut lines = vec![
        format!("Name:      {}", whole.name),
        format!("Image:     {}", image(&spec.image)),
        format!("Status:    {}", word(whole.state.status)),
        format!("Created:   {}", age(whole.created_at_ms)),
    ];
    if let Some(failure) = &whole.state.failure {
        lines.push(format!("Failure:   {failure}"));
    }
    lines.push(format!("CPUs:      {}", spec.cpus));
    lines.push(format!("Memory:    {}", spec.memory));
    lines.push(format!("Root disk: {}", spec.root_disk));
    if let Some(plan) = &whole.plan {
        let vm = &plan.vm;
        lines.push(format!(
            "VMM:       {:?}, {:?} ({})",
            vm.vmm, vm.accel, vm.reason
        ));
    }
    for (key, value) in &spec.labels {
        lines.push(format!("Label:     {key}={value}"));
    }
    if !spec.mounts.is_empty() {
        lines.push("Mounts:".to_owned());
        lines.extend(
            spec.mounts
                .iter()
                .map(|mount| format!("  {}", mount_line(mount))),
        );
    }
    lines.join("\n") + "\n"
}

/// `/x → volume:data (ro,nodev) [stat-virt=relaxed]`.
fn mount_line(mount: &MountSpec) -> String {
    let (source, share) = match &mount.source {
        MountSource::Bind { path, share, .. } => (path.display().to_string(), Some(share)),
        MountSource::Named { name, share, .. } => (format!("volume:{name}"), Some(share)),
        MountSource::Disk { path, .. } => (format!("disk:{}", path.display()), None),
        MountSource::Tmpfs { size: Some(size) } => (format!("tmpfs ({size})"), None),
        MountSource::Tmpfs { size: None } => ("tmpfs".to_owned(), None),
    };
    let mut flags = vec![if mount.access == Access::ReadOnly {
        "ro"
    } else {
        "rw"
    }];
    flags.extend(mount.noexec.then_some("noexec"));
    flags.extend(mount.nosuid.then_some("nosuid"));
    flags.extend(mount.nodev.then_some("nodev"));
    let mut line = format!("{} → {source} ({})", mount.target, flags.join(","));
    if let Some(mode) = share.and_then(|share| share.stat_virtualization) {
        line.push_str(&format!(
            " [stat-virt={}]",
            format!("{mode:?}").to_lowercase()
        ));
    }
    line
}

fn all() -> Result<Vec<(SandboxDir, SandboxSpec, SandboxState)>, Error> {
    let home = Home::from_env()?;
    home.sweep();
    let mut found = Vec::new();
    for dir in home.list_sandboxes()? {
        // One that is removed meanwhile is not listed.
        if let (Ok(spec), Ok(state)) = (dir.spec(), dir.state()) {
            found.push((dir, spec, state));
        }
    }
    Ok(found)
}

fn is_up(status: Status) -> bool {
    matches!(
        status,
        Status::Starting | Status::Running | Status::Stopping
    )
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Created => "created",
        Status::Starting => "starting",
        Status::Running => "running",
        Status::Stopping => "stopping",
        Status::Stopped => "stopped",
        Status::Failed => "failed",
    }
}

fn image(source: &ImageSource) -> String {
    match source {
        ImageSource::Stored { reference } => reference.clone(),
        ImageSource::Directory { path } | ImageSource::Disk { path, .. } => {
            path.display().to_string()
        }
    }
}

fn age(since_ms: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
    let seconds = now.saturating_sub(since_ms) / 1000;
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86400),
    }
}
