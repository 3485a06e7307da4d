//! Python environments of tests: virtual environments outside the tree, made again when their requirements change.

use std::{
    env, fs,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};

use crate::{run, workspace};

/// The interpreter of the environment `name` with everything that a requirements file (from the root) names.
pub(crate) fn interpreter(name: &str, requirements: &str) -> anyhow::Result<PathBuf> {
    let shown = requirements;
    let requirements = workspace::root().join(requirements);
    let wanted = fs::read_to_string(&requirements).with_context(|| format!("reading {shown}"))?;
    let folder = cache()?.join("python").join(name);
    let (python, mark) = (folder.join("bin/python"), folder.join("requirements.txt"));
    if fs::read_to_string(&mark).is_ok_and(|installed| installed == wanted) && starts(&python) {
        return Ok(python);
    }
    eprintln!("installing {shown} into {}", folder.display());
    run::run(
        Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(&folder),
    )
    .context(
        "making a virtual environment; the end-to-end tests need Python 3 with its venv module",
    )?;
    run::run(
        Command::new(&python)
            .args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "-r",
            ])
            .arg(&requirements),
    )?;
    ensure!(starts(&python), "{} does not start", python.display());
    // Written last: an installation that broke off is begun again.
    fs::write(mark, wanted)?;
    Ok(python)
}

fn starts(python: &PathBuf) -> bool {
    let mut command = Command::new(python);
    command
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// `$XDG_CACHE_HOME/hadal`, or `~/.cache/hadal`.
fn cache() -> anyhow::Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()) {
        Some(path) => PathBuf::from(path),
        None => env::home_dir()
            .context("no home directory for the cache")?
            .join(".cache"),
    };
    Ok(base.join("hadal"))
}
