//! The layers of the house: which package may know which. `ARCHITECTURE.md` shows this table; `cargo xtask docs` copies
//! it there.

use std::collections::BTreeSet;

use anyhow::bail;

use crate::workspace::{self, Package};

/// A package and what it may use: the packages named, and whatever those may use.
pub(crate) struct Layer {
    pub(crate) package: &'static str,
    pub(crate) uses: Uses,
    /// Whether it is a leaf of pure logic, without I/O, runtime or device.
    pub(crate) pure: bool,
}

/// What a package may use.
pub(crate) enum Uses {
    Only(&'static [&'static str]),
    Anything,
}

const fn layer(package: &'static str, uses: &'static [&'static str]) -> Layer {
    Layer {
        package,
        uses: Uses::Only(uses),
        pure: false,
    }
}

const fn pure(package: &'static str, uses: &'static [&'static str]) -> Layer {
    Layer {
        package,
        uses: Uses::Only(uses),
        pure: true,
    }
}

const fn top(package: &'static str) -> Layer {
    Layer {
        package,
        uses: Uses::Anything,
        pure: false,
    }
}

/// From the ground up.
pub(crate) const TABLE: &[Layer] = &[
    layer("proto", &[]),
    layer("kernels", &[]),
    pure("prefix", &[]),
    pure("planted", &[]),
    pure("openai", &[]),
    layer("telemetry", &[]),
    pure("text", &["openai"]),
    layer("kv", &["kernels", "planted", "prefix"]),
    layer("model", &["kernels", "kv"]),
    layer("engine", &["model", "kv", "text"]),
    layer("transfer", &["kernels", "planted", "proto"]),
    layer("worker", &["engine", "transfer", "proto", "telemetry"]),
    layer("prefill-worker", &["worker"]),
    layer("decode-worker", &["worker"]),
    layer(
        "router",
        &["proto", "openai", "text", "planted", "prefix", "telemetry"],
    ),
    top("hadal"),
    top("testkit"),
    top("hadal-tests"),
    top("xtask"),
];

/// What pure packages must not depend on.
const IMPURE: &[&str] = &["tokio", "tonic", "kube", "hyper", "axum", "cudarc"];
/// The only package that may depend on `cudarc`.
const DEVICE_PACKAGE: &str = "kernels";

/// Checks the workspace against [`TABLE`].
pub(crate) fn run() -> anyhow::Result<()> {
    let problems = check(&workspace::packages()?);
    if problems.is_empty() {
        println!("layers: {} packages keep to the table", TABLE.len());
        return Ok(());
    }
    bail!("the layers do not hold:\n  {}", problems.join("\n  "));
}

fn check(packages: &[Package]) -> Vec<String> {
    let mut problems = Vec::new();
    for package in packages {
        let Some(layer) = TABLE.iter().find(|layer| layer.package == package.name) else {
            problems.push(format!(
                "{} is not in the table (xtask/src/layers.rs)",
                package.name
            ));
            continue;
        };
        let allowed = closure(layer);
        for dependency in &package.dependencies {
            let (name, dev) = (
                dependency.name.as_str(),
                dependency.kind.as_deref() == Some("dev"),
            );
            if dependency.path.is_some() {
                // Tests may be helped by the kit, which knows everything.
                let allowed = allowed
                    .as_ref()
                    .is_none_or(|allowed| allowed.contains(name));
                if name == "testkit" && !dev && package.name != "hadal-tests" {
                    problems.push(format!("{} may use testkit in tests only", package.name));
                } else if name != "testkit" && !allowed {
                    problems.push(format!("{} must not use {name}", package.name));
                }
            } else if !dev && layer.pure && IMPURE.contains(&name) {
                problems.push(format!("{} is pure and must not use {name}", package.name));
            } else if name == "cudarc" && package.name != DEVICE_PACKAGE {
                problems.push(format!(
                    "only {DEVICE_PACKAGE} may use cudarc, not {}",
                    package.name
                ));
            }
        }
    }
    for layer in TABLE {
        if !packages.iter().any(|package| package.name == layer.package) {
            problems.push(format!(
                "{} is in the table but not in the workspace",
                layer.package
            ));
        }
    }
    problems
}

/// All that a package may use; `None` for anything.
fn closure(layer: &Layer) -> Option<BTreeSet<&'static str>> {
    let Uses::Only(direct) = layer.uses else {
        return None;
    };
    let mut all: BTreeSet<&str> = direct.iter().copied().collect();
    for name in direct {
        let below = TABLE
            .iter()
            .find(|layer| layer.package == *name)
            .and_then(closure);
        all.extend(below.unwrap_or_default());
    }
    Some(all)
}

/// The table in Markdown.
pub(crate) fn markdown() -> String {
    let mut text = String::from("| package | may use (and what those may use) |\n|---|---|\n");
    for layer in TABLE {
        let uses = match layer.uses {
            Uses::Only([]) => "nothing of ours".into(),
            Uses::Only(names) => format!("`{}`", names.join("`, `")),
            Uses::Anything => "anything".into(),
        };
        let pure = if layer.pure {
            "; pure: no runtime, no I/O, no device"
        } else {
            ""
        };
        text.extend(["| `", layer.package, "` | ", &uses, pure, " |\n"]);
    }
    text
}

#[cfg(test)]
mod tests {
    use crate::workspace::Dependency;

    use super::*;

    fn package(name: &str, dependencies: &[(&str, Option<&str>, bool)]) -> Package {
        let dependency = |&(name, kind, ours): &(&str, Option<&str>, bool)| Dependency {
            name: name.into(),
            kind: kind.map(Into::into),
            path: ours.then(|| "/somewhere".into()),
        };
        Package {
            name: name.into(),
            dependencies: dependencies.iter().map(dependency).collect(),
        }
    }

    /// Every package without dependencies, but this one.
    fn workspace_with(changed: Package) -> Vec<Package> {
        let unchanged = TABLE.iter().filter(|layer| layer.package != changed.name);
        let mut packages: Vec<Package> =
            unchanged.map(|layer| package(layer.package, &[])).collect();
        packages.push(changed);
        packages
    }

    #[test]
    fn edges_of_the_table_and_below_are_allowed() {
        let worker = package("worker", &[("engine", None, true), ("kernels", None, true)]);
        assert_eq!(check(&workspace_with(worker)), [""; 0]);
    }

    #[test]
    fn the_router_must_not_know_the_network() {
        for name in ["kernels", "kv", "model", "engine"] {
            let router = package("router", &[(name, None, true)]);
            assert_eq!(
                check(&workspace_with(router)),
                [format!("router must not use {name}")]
            );
        }
    }

    #[test]
    fn pure_packages_stay_without_a_runtime_outside_their_tests() {
        let text = package("text", &[("tokio", None, false)]);
        assert_eq!(
            check(&workspace_with(text)),
            ["text is pure and must not use tokio"]
        );
        let text = package("text", &[("tokio", Some("dev"), false)]);
        assert_eq!(check(&workspace_with(text)), [""; 0]);
    }

    #[test]
    fn the_test_kit_and_the_device_stay_where_they_belong() {
        let kv = package("kv", &[("testkit", None, true)]);
        assert_eq!(
            check(&workspace_with(kv)),
            ["kv may use testkit in tests only"]
        );
        let kv = package("kv", &[("testkit", Some("dev"), true)]);
        assert_eq!(check(&workspace_with(kv)), [""; 0]);
        let hadal = package("hadal", &[("cudarc", None, false)]);
        assert_eq!(
            check(&workspace_with(hadal)),
            ["only kernels may use cudarc, not hadal"]
        );
    }

    #[test]
    fn a_package_that_the_table_lacks_is_a_problem() {
        let mut packages = workspace_with(package("kv", &[]));
        packages.push(package("shed", &[]));
        assert!(check(&packages)[0].starts_with("shed is not in the table"));
    }
}
