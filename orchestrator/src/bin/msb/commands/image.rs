//! `msb image`: load, list, remove.

use std::path::Path;
use std::process::ExitCode;

use microsandbox::Error;
use microsandbox::image::{Image, ImageStore};
use microsandbox::rundir::Home;
use serde::Serialize;

use crate::args::{ImageCommand, OutputFormat};
use crate::output::{self, Table};
use crate::progress::Progress;

/// `msb image …`.
pub(super) fn image(command: &ImageCommand) -> Result<ExitCode, Error> {
    let store = ImageStore::of(&Home::from_env()?);
    match command {
        ImageCommand::Load { file, name, quiet } => load(&store, file, name.as_deref(), *quiet),
        ImageCommand::Ls { format, quiet } => list(&store, format.format, *quiet),
        ImageCommand::Rm { names, quiet } => remove(&store, names, *quiet),
    }
}

fn load(
    store: &ImageStore,
    file: &Path,
    name: Option<&str>,
    quiet: bool,
) -> Result<ExitCode, Error> {
    let progress = Progress::new(quiet);
    let loaded = store.load(file, name, &|done, total| progress.bytes(done, total))?;
    drop(progress);
    if !quiet {
        for reference in &loaded.references {
            output::print(&format!("{reference}\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One image in `msb image ls --format json`.
#[derive(Serialize)]
struct Row<'a> {
    id: &'a str,
    names: &'a [String],
    size_bytes: u64,
    files: u64,
    loaded_at_ms: u64,
}

impl<'a> Row<'a> {
    fn of(image: &'a Image) -> Self {
        Self {
            id: &image.record.id,
            names: &image.references,
            size_bytes: image.record.size_bytes,
            files: image.record.entries,
            loaded_at_ms: image.record.loaded_at_ms,
        }
    }
}

fn list(store: &ImageStore, format: OutputFormat, quiet: bool) -> Result<ExitCode, Error> {
    let images = store.list()?;
    if quiet {
        for name in images.iter().flat_map(|image| &image.references) {
            output::print(&format!("{name}\n"))?;
        }
    } else if format == OutputFormat::Json {
        output::json(&images.iter().map(Row::of).collect::<Vec<_>>())?;
    } else {
        let mut table = Table::new(&["NAME", "ID", "SIZE", "FILES"]);
        for image in &images {
            let name = match image.references.as_slice() {
                [] => "-".to_owned(),
                names => names.join(", "),
            };
            let size = output::bytes(image.record.size_bytes);
            let id = image.record.id.clone();
            table.row([name, id, size, image.record.entries.to_string()]);
        }
        table.print()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn remove(store: &ImageStore, names: &[String], quiet: bool) -> Result<ExitCode, Error> {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match store.remove(name) {
            Ok(()) if quiet => {}
            Ok(()) => output::done(&format!("Removed {name}")),
            Err(error) => {
                code = ExitCode::FAILURE;
                output::error(&error);
            }
        }
    }
    Ok(code)
}
