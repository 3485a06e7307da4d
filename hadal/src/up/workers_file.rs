//! The list of workers that the router re-reads whenever it changes.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::json;

use super::spec::Role;

/// Where the list lies in the directory of a run.
pub(super) fn path(folder: &Path) -> PathBuf {
    folder.join("workers.json")
}

/// Replaces the list in one step: a reader sees the old one or the new one, never half of either.
///
/// # Errors
/// When the directory cannot be written.
pub(super) fn write<'a>(
    folder: &Path,
    workers: impl Iterator<Item = (Role, &'a str)>,
) -> io::Result<()> {
    let workers: Vec<_> = workers
        .map(|(role, address)| json!({"role": role.as_str(), "address": format!("http://{address}")}))
        .collect();
    let next = folder.join("workers.json.next");
    fs::write(&next, json!({ "workers": workers }).to_string())?;
    fs::rename(next, path(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_holds_role_and_address_of_each_worker() {
        let folder = tempfile::tempdir().unwrap();
        write(
            folder.path(),
            [(Role::Prefill, "127.0.0.1:4242")].into_iter(),
        )
        .unwrap();
        let written = fs::read_to_string(path(folder.path())).unwrap();
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&written).unwrap(),
            json!({"workers": [{"role": "prefill", "address": "http://127.0.0.1:4242"}]})
        );
    }
}
