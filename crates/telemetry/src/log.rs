//! Flags and set-up of `tracing`. Logs go to standard error: standard output belongs to [`announce`](crate::announce).

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Logging flags; flatten into a command's arguments.
// No group of its own: those of two structures of this name would clash.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Args {
    /// What to log: a level or a list of `target=level` (error, warn, info, debug, trace)
    #[arg(
        long,
        env = "RUST_LOG",
        default_value = "info",
        global = true,
        value_name = "FILTER"
    )]
    pub log: String,
    /// How log lines look
    #[arg(
        long,
        env = "HADAL_LOG_FORMAT",
        value_enum,
        default_value = "text",
        global = true,
        value_name = "FORMAT"
    )]
    pub log_format: Format,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// One readable line for each event.
    Text,
    /// One JSON object for each event, with its spans.
    Json,
}

impl Format {
    /// The value that the `--log-format` flag takes for this format.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter is not one.
    #[error("cannot read the log filter {filter:?}")]
    Filter {
        /// As it was given.
        filter: String,
        /// What is wrong with it.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Something else already installed a subscriber in this process.
    #[error("logging is already set up")]
    Installed,
}

/// Installs the process's subscriber. Call once, first thing in `main`.
///
/// # Errors
/// [`Error::Filter`] for a filter that cannot be read, [`Error::Installed`] on a second call.
pub fn init(args: &Args) -> Result<(), Error> {
    let filter = EnvFilter::try_new(&args.log).map_err(|source| Error::Filter {
        filter: args.log.clone(),
        source,
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match args.log_format {
        Format::Text => builder
            .with_ansi(std::io::stderr().is_terminal())
            .try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(|_| Error::Installed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_filter_is_an_error_that_quotes_it() {
        let args = Args {
            log: "router=loud".into(),
            log_format: Format::Text,
        };
        assert!(init(&args).unwrap_err().to_string().contains("router=loud"));
    }
}
