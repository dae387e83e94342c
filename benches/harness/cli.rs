//! Flags of the benchmark programs.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// Compares our backends with their peers, natively and without a VM. `make bench` runs everything.
///
/// The programs under test lie in MSB_BIN_DIR (default: where cargo put them); with MSB_BIN_DIR_B
/// a second build of ours is compared as well. virtiofsd lies in MSB_PEERS (default: target/peers/bin).
#[derive(Debug, Clone, Parser)]
#[command(name = "bench")]
pub struct Options {
    /// Rows to measure, by number or name, separated by commas (default: all of this program).
    #[arg(value_delimiter = ',')]
    pub rows: Vec<String>,

    /// Rows in the same form; what other programs measure is passed over.
    #[arg(long, env = "ROWS", value_delimiter = ',', hide_env_values = true)]
    pub pick: Vec<String>,

    /// Only the contenders whose label contains one of these texts.
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<String>,

    /// Requests in flight in each queue, instead of those of the row.
    #[arg(long)]
    pub depth: Option<u16>,

    /// Seconds that one run of one contender is measured for.
    #[arg(long, default_value_t = 0.4)]
    pub seconds: f64,

    /// Runs of each contender, in turns.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,

    /// Let the scheduler place front end and server, instead of CPU 0 and CPU 1.
    #[arg(long)]
    pub unpinned: bool,

    /// The front end spins instead of waiting for interrupts.
    #[arg(long)]
    pub spin: bool,

    /// Data of a request lies in scattered pages, as a guest's page cache often does.
    #[arg(long)]
    pub scattered: bool,

    /// More flags for our backend, in one word separated by spaces.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    pub msb_flags: String,

    /// Folder for trees and images (default: the target folder).
    #[arg(long)]
    pub scratch: Option<PathBuf>,

    /// Number of files in the rows that walk a large tree.
    #[arg(long, default_value_t = 100_000)]
    pub files: usize,

    /// Lists the rows and ends.
    #[arg(long)]
    pub list: bool,

    /// Cargo passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    /// Whether a row with this number and name was asked for.
    pub fn wants(&self, id: &str, name: &str) -> bool {
        let asked = || self.rows.iter().chain(&self.pick);
        asked().all(|text| text.is_empty())
            || asked().any(|text| text.eq_ignore_ascii_case(id) || text == name)
    }

    /// Whether a contender takes part.
    pub fn takes(&self, label: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|text| label.contains(text.as_str()))
    }

    /// How long one run is measured for.
    pub fn time(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    /// The flags of `msb_flags`.
    pub fn extra(&self) -> Vec<String> {
        self.msb_flags
            .split_whitespace()
            .map(str::to_owned)
            .collect()
    }

    /// Where trees and images are made.
    pub fn scratch(&self) -> PathBuf {
        self.scratch.clone().unwrap_or_else(target)
    }
}

/// The folder that cargo builds into.
pub fn target() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    // target/release/deps/<program>
    program
        .ancestors()
        .nth(3)
        .map_or_else(PathBuf::new, PathBuf::from)
}
