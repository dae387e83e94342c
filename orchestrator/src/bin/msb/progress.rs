//! What is shown on a terminal while something takes longer than a second.

use std::io::{IsTerminal, stderr};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Nothing is shown before this has passed.
const SILENCE: Duration = Duration::from_secs(1);

/// One line that says what is being done, erased at the end.
pub(crate) struct Progress {
    bar: ProgressBar,
    /// What shows the line once the silence is over, unless this ends first.
    patience: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    pub(crate) fn new(quiet: bool) -> Self {
        let bar = ProgressBar::hidden();
        let wanted = !quiet && stderr().is_terminal();
        let patience = wanted.then(|| {
            let (over, ended) = channel::<()>();
            let bar = bar.clone();
            let shows = std::thread::spawn(move || {
                if ended.recv_timeout(SILENCE) == Err(RecvTimeoutError::Timeout) {
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                    bar.enable_steady_tick(Duration::from_millis(100));
                }
            });
            (over, shows)
        });
        Self { bar, patience }
    }

    /// A new step begins.
    pub(crate) fn step(&self, step: &str) {
        self.show("{spinner} {msg} {elapsed:.dim}");
        self.bar.set_message(step.to_owned());
    }

    /// So many bytes are done.
    pub(crate) fn bytes(&self, done: u64, total: u64) {
        self.show("{spinner} {bytes:>10} of {total_bytes} {wide_bar}");
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    fn show(&self, template: &str) {
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((over, shows)) = self.patience.take() {
            drop(over);
            // It only waits and shows.
            let _ = shows.join();
        }
        self.bar.finish_and_clear();
    }
}
