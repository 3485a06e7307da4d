//! What we build on must be free to use as Hadal itself is, and come from the public registry.

use anyhow::bail;

use crate::workspace::{self, Origin};

/// Licences that ask for no more than Apache-2.0 does: at most that their text is kept.
const ACCEPTED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];
/// Where packages come from, in Cargo's words.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Checks every package that the workspace is built from.
pub(crate) fn run() -> anyhow::Result<()> {
    let packages = workspace::origins()?;
    let problems: Vec<String> = packages.iter().filter_map(problem).collect();
    if problems.is_empty() {
        println!("licences: {} packages may be used", packages.len());
        return Ok(());
    }
    bail!(
        "packages that must not be used:\n  {}",
        problems.join("\n  ")
    );
}

fn problem(package: &Origin) -> Option<String> {
    // None: a package of the workspace.
    let source = package.source.as_ref()?;
    let name = &package.name;
    if source != REGISTRY {
        return Some(format!("{name} comes from {source}"));
    }
    let Some(licence) = &package.license else {
        return Some(format!("{name} names no licence"));
    };
    (!is_accepted(licence)).then(|| format!("{name} is under {licence}"))
}

/// Whether an SPDX expression can be fulfilled with accepted licences alone. `/` is how old packages write `OR`.
fn is_accepted(expression: &str) -> bool {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = &words[..];
    either(&mut rest).unwrap_or(false) && rest.is_empty()
}

/// `A OR B`; `None` for what is no expression.
fn either(words: &mut &[&str]) -> Option<bool> {
    let mut accepted = both(words)?;
    while let ["OR", rest @ ..] = *words {
        *words = rest;
        accepted |= both(words)?;
    }
    Some(accepted)
}

/// `A AND B`, which binds stronger.
fn both(words: &mut &[&str]) -> Option<bool> {
    let mut accepted = one(words)?;
    while let ["AND", rest @ ..] = *words {
        *words = rest;
        accepted &= one(words)?;
    }
    Some(accepted)
}

/// A name, with an exception (which only gives more freedom) or without; or an expression in parentheses.
fn one(words: &mut &[&str]) -> Option<bool> {
    let (&first, rest) = words.split_first()?;
    *words = rest;
    if first == "(" {
        let accepted = either(words)?;
        *words = words.strip_prefix(&[")"])?;
        return Some(accepted);
    }
    if let ["WITH", _, rest @ ..] = *words {
        *words = rest;
    }
    Some(ACCEPTED.contains(&first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_accepted_choice_is_enough_and_every_part_is_needed() {
        for (expression, accepted) in [
            ("MIT", true),
            ("MIT/GPL-3.0", true),
            ("GPL-3.0-only", false),
            ("MIT OR Apache-2.0 OR LGPL-2.1-or-later", true),
            ("MIT AND GPL-2.0-only", false),
            ("(MIT OR GPL-3.0) AND Unicode-3.0", true),
            ("GPL-3.0 OR MIT AND ISC", true),
            ("(GPL-3.0 OR MIT) AND AGPL-3.0", false),
            ("Apache-2.0 WITH LLVM-exception", true),
            ("", false),
            ("(MIT", false),
            ("MIT Apache-2.0", false),
        ] {
            assert_eq!(is_accepted(expression), accepted, "{expression:?}");
        }
    }

    #[test]
    fn packages_from_elsewhere_or_without_a_licence_are_named() {
        let package = |license: Option<&str>, source: Option<&str>| Origin {
            name: "thing".into(),
            license: license.map(Into::into),
            source: source.map(Into::into),
        };
        let problem = |license, source| problem(&package(license, source)).unwrap_or_default();
        assert_eq!(problem(None, None), "", "one of ours");
        assert_eq!(problem(Some("MIT"), Some(REGISTRY)), "");
        assert_eq!(problem(None, Some(REGISTRY)), "thing names no licence");
        assert_eq!(
            problem(Some("SSPL-1.0"), Some(REGISTRY)),
            "thing is under SSPL-1.0"
        );
        assert_eq!(
            problem(Some("MIT"), Some("git+https://example.org/thing")),
            "thing comes from git+https://example.org/thing"
        );
    }
}
