//! `msb ls`, `ps` and `inspect`: what sandboxes there are and what they are.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use microsandbox::evidence::{self, Evidence};
use microsandbox::plan::Plan;
use microsandbox::rundir::{Home, SandboxDir, SandboxState, Status};
use microsandbox::spec::{Access, ImageSource, MountSource, MountSpec, SandboxName, SandboxSpec};
use microsandbox::{Error, ErrorKind, mend};
use serde::Serialize;

use crate::args::{Inspect, OutputFormat, Processes, SandboxFilter, Sandboxes, passes};
use crate::output::{self, Table};

/// One sandbox in `msb ls --format json`.
#[derive(Serialize)]
struct Row {
    name: String,
    status: Status,
    image: String,
    created_at: String,
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
        let filtered = fits(&dir, &spec, state.status, &args.filters);
        if (args.running && !runs) || (args.stopped && runs) || !labelled || !filtered {
            continue;
        }
        rows.push(Row {
            name: dir.name().to_string(),
            status: state.status,
            image: image(&spec.image),
            created_at: output::timestamp(moment(dir.created_at_ms())),
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
            let age = output::age(moment(row.created_at_ms));
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
        let filtered = fits(&dir, &spec, state.status, &args.filters);
        if (!args.all && !is_up(state.status)) || !filtered {
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
    if args.evidence {
        return show_evidence(&dir, args.format.format);
    }
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

/// `msb inspect --evidence`.
fn show_evidence(dir: &SandboxDir, format: OutputFormat) -> Result<ExitCode, Error> {
    let pid = dir.state()?.pid.ok_or_else(|| {
        let message = format!(
            "sandbox `{}` does not run, so it has no processes",
            dir.name()
        );
        Error::new(ErrorKind::SandboxNotRunning, message).with_value(dir.name().as_str())
    })?;
    let own = evidence::read(std::process::id())
        .map_err(|error| Error::io("cannot look at this process in /proc", error))?;
    let family = evidence::family(pid);
    if format == OutputFormat::Json {
        output::json(&family)?;
    } else {
        let blocks: Vec<String> = family.iter().map(|seen| process(seen, &own)).collect();
        output::print(&blocks.join("\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Stands for what the process hides from other users.
const HIDDEN: &str = "hidden (the process is not dumpable; root sees it)";

fn process(seen: &Evidence, own: &Evidence) -> String {
    let set = |name: &str| seen.capabilities.get(name).map_or(u64::MAX, |set| set.0);
    let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
    let sets = sets.map(|name| format!("{name} {:x}", set(name)));
    let supplementary = ids(&seen.supplementary);
    let odd = seen.odd_threads.len();
    let facts = [
        ("users", ids(&seen.users)),
        (
            "groups",
            format!("{}; supplementary {supplementary}", ids(&seen.groups)),
        ),
        ("capabilities", sets.join(", ")),
        ("no_new_privs", u8::from(seen.no_new_privs).to_string()),
        (
            "seccomp",
            format!("mode {}, {} filters", seen.seccomp, seen.filters),
        ),
        (
            "threads",
            format!("{}, {odd} unlike the first", seen.threads),
        ),
        ("pids", format!("{} (ours first)", ids(&seen.pids))),
        ("uid map", seen.uid_map.clone()),
        ("namespaces", own_namespaces(seen, own)),
        ("root", root(seen)),
        ("descriptors", descriptors(seen)),
        ("environment", environment(seen)),
        ("core limit", seen.core_limit.clone()),
        ("cgroups", seen.cgroups.join(" ")),
    ];
    let mut lines = vec![format!("{} (pid {})", seen.name, seen.pid)];
    lines.extend(facts.map(|(name, fact)| format!("  {name:<13}{fact}")));
    lines.join("\n") + "\n"
}

fn ids(ids: &[u32]) -> String {
    let words: Vec<String> = ids.iter().map(u32::to_string).collect();
    if words.is_empty() {
        "none".to_owned()
    } else {
        words.join(" ")
    }
}

/// The kinds of namespaces that it does not share with this process.
fn own_namespaces(seen: &Evidence, own: &Evidence) -> String {
    let Some(theirs) = &seen.namespaces else {
        return HIDDEN.to_owned();
    };
    let ours = |kind: &String| own.namespaces.as_ref().and_then(|ours| ours.get(kind));
    let other = theirs
        .iter()
        .filter(|(kind, number)| ours(kind) != Some(number));
    let names: Vec<&str> = other.map(|(kind, _)| kind.as_str()).collect();
    if names.is_empty() {
        "none of its own".to_owned()
    } else {
        format!("of its own: {}", names.join(" "))
    }
}

fn root(seen: &Evidence) -> String {
    let entries = seen
        .root_entries
        .map_or(String::new(), |count| format!(", {count} entries"));
    seen.root_mount.as_ref().map_or(HIDDEN.to_owned(), |mount| {
        let options = mount.options.join(",");
        format!(
            "{} of {} ({options}), {} mounts{entries}",
            mount.folder, mount.kind, mount.mounts
        )
    })
}

fn descriptors(seen: &Evidence) -> String {
    seen.descriptors.as_ref().map_or(HIDDEN.to_owned(), |open| {
        let words = open
            .iter()
            .map(|descriptor| format!("{} {}", descriptor.number, descriptor.target));
        words.collect::<Vec<_>>().join(", ")
    })
}

fn environment(seen: &Evidence) -> String {
    match seen.environment {
        None => HIDDEN.to_owned(),
        Some(0) => "empty".to_owned(),
        Some(bytes) => format!("{bytes} bytes"),
    }
}

fn describe(whole: &Whole) -> String {
    let spec = &whole.config;
    let mut lines = vec![
        format!("Name:      {}", whole.name),
        format!("Image:     {}", image(&spec.image)),
        format!("Status:    {}", word(whole.state.status)),
        format!("Created:   {}", output::age(moment(whole.created_at_ms))),
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
pub(crate) fn mount_line(mount: &MountSpec) -> String {
    let (source, share) = match &mount.source {
        MountSource::Bind { path, share, .. } => (path.display().to_string(), Some(share)),
        MountSource::Named { name, share, .. } => (format!("volume:{name}"), Some(share)),
        MountSource::Owned { request, share } => (
            match request.size {
                Some(size) => format!("owned disk ({size})"),
                None => "owned".to_owned(),
            },
            Some(share),
        ),
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
    mend(&home);
    let mut found = Vec::new();
    for dir in home.list_sandboxes()? {
        // One that is removed meanwhile is not listed.
        if let (Ok(spec), Ok(state)) = (dir.spec(), dir.state()) {
            found.push((dir, spec, state));
        }
    }
    Ok(found)
}

/// Whether a sandbox is one of those that were asked for.
fn fits(dir: &SandboxDir, spec: &SandboxSpec, status: Status, filters: &[SandboxFilter]) -> bool {
    let is_label = |filter: &SandboxFilter| matches!(filter, SandboxFilter::Label(_));
    passes(filters, is_label, |filter| {
        match filter {
        SandboxFilter::Name(part) => dir.name().as_str().contains(part),
        SandboxFilter::Label(label) => label.fits(&spec.labels),
        SandboxFilter::Status(wanted) => *wanted == status,
        SandboxFilter::Image(wanted) => image(&spec.image) == *wanted,
        SandboxFilter::Volume(wanted) => spec.mounts.iter().any(|mount| {
            matches!(&mount.source, MountSource::Named { name, .. } if name.as_str() == wanted)
        }),
    }
    })
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

fn moment(ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(ms)
}
