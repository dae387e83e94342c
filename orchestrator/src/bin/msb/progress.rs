//! What is shown on a terminal while something takes longer than a second.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Nothing is shown before this has passed.
const SILENCE: Duration = Duration::from_secs(1);

/// One line that says what is being done, erased at the end.
pub(crate) struct Progress {
    bar: ProgressBar,
    since: Instant,
}

impl Progress {
    pub(crate) fn new(quiet: bool) -> Self {
        let bar = ProgressBar::hidden();
        if !quiet && stderr().is_terminal() {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Self {
            bar,
            since: Instant::now(),
        }
    }

    /// A new step begins.
    pub(crate) fn step(&self, step: &str) {
        self.bar.set_message(step.to_owned());
        self.show("{spinner} {msg} {elapsed:.dim}");
    }

    /// So many bytes are done.
    pub(crate) fn bytes(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.show("{spinner} {bytes:>10} of {total_bytes} {wide_bar}");
    }

    fn show(&self, template: &str) {
        let wanted = self.bar.is_hidden() && stderr().is_terminal();
        if wanted && self.since.elapsed() >= SILENCE {
            if let Ok(style) = ProgressStyle::with_template(template) {
                self.bar.set_style(style);
            }
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
