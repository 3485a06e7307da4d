//! Where things are, and what the packages of the workspace depend on.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};
use serde::{Deserialize, de::DeserializeOwned};

/// The root of the checkout that this program was built from.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
        .to_owned()
}

/// Cargo, at the root.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// A package of the workspace.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) dependencies: Vec<Dependency>,
}

/// One line of a package's dependencies.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    /// `None` for normal ones, else "dev" or "build".
    pub(crate) kind: Option<String>,
    /// Set for packages of the workspace.
    pub(crate) path: Option<PathBuf>,
}

/// Where a package comes from, the workspace's and all that it is built from.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Origin {
    pub(crate) name: String,
    /// An SPDX expression.
    pub(crate) license: Option<String>,
    /// `None` for packages of the workspace.
    pub(crate) source: Option<String>,
}

#[derive(Deserialize)]
struct Metadata<P> {
    packages: Vec<P>,
}

/// Builds the `hadal` command as the tests' build does, so that their dependencies are compiled once for both, and gives
/// its path.
pub(crate) fn build_hadal() -> anyhow::Result<PathBuf> {
    let output = cargo()
        .args(["build", "--workspace", "--bins", "--tests"])
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("running cargo build")?;
    ensure!(output.status.success(), "the workspace does not build");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .find_map(hadal_executable)
        .context("cargo did not say where it put hadal")
}

/// The path in Cargo's message about the finished `hadal` program.
fn hadal_executable(message: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let is_hadal = message["target"]["name"] == "hadal" && message["profile"]["test"] == false;
    message["executable"]
        .as_str()
        .filter(|_| is_hadal)
        .map(PathBuf::from)
}

/// The workspace's packages as Cargo sees them.
pub(crate) fn packages() -> anyhow::Result<Vec<Package>> {
    metadata(&["--no-deps"])
}

/// The workspace's packages and all that they are built from, on any system.
pub(crate) fn origins() -> anyhow::Result<Vec<Origin>> {
    metadata(&["--locked"])
}

fn metadata<P: DeserializeOwned>(flags: &[&str]) -> anyhow::Result<Vec<P>> {
    let output = cargo()
        .args(["metadata", "--format-version", "1"])
        .args(flags)
        .output()
        .context("running cargo metadata")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Metadata<P> =
        serde_json::from_slice(&output.stdout).context("reading cargo metadata")?;
    Ok(metadata.packages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_program_itself_is_taken_from_cargo_s_messages() {
        let message = |name: &str, test: bool| {
            serde_json::json!({
                "target": {"name": name}, "profile": {"test": test}, "executable": "/t/x",
            })
            .to_string()
        };
        assert_eq!(
            hadal_executable(&message("hadal", false)),
            Some("/t/x".into())
        );
        assert_eq!(
            hadal_executable(&message("hadal", true)),
            None,
            "its unit tests"
        );
        assert_eq!(hadal_executable(&message("router", false)), None);
        assert_eq!(hadal_executable("no JSON"), None);
    }
}
