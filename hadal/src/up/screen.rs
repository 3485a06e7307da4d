//! What a person sees. Everything but the answer goes to standard error, so that the answer can be piped.

use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Lines and progress bars on standard error; bars only where it is a terminal.
#[derive(Clone, Debug)]
pub(super) struct Screen {
    quiet: bool,
    bars: MultiProgress,
}

impl Screen {
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            quiet,
            bars: MultiProgress::new(),
        }
    }

    /// Prints a line, unless quiet.
    pub(super) fn line(&self, text: &str) {
        if !self.quiet {
            self.problem(text);
        }
    }

    /// Prints a line that nobody may miss.
    pub(super) fn problem(&self, text: &str) {
        if self.bars.is_hidden() {
            eprintln!("{text}");
        } else {
            // Only fails where the terminal went away, and then nobody reads.
            let _ = self.bars.println(text);
        }
    }

    /// A bar for a process that starts.
    pub(super) fn bar(&self, name: &str) -> ProgressBar {
        if self.quiet {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template("  {prefix:12} {spinner} {msg}")
            .expect("a constant template");
        let bar = self.bars.add(ProgressBar::new_spinner().with_style(style));
        bar.set_prefix(name.to_owned());
        bar.set_message("starting");
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    }
}
