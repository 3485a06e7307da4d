//! Running other programs, with what they print shown as it comes.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};

/// Runs a program to its end.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let shown = format!("{command:?}");
    let status = command
        .status()
        .with_context(|| format!("running {shown}"))?;
    ensure!(status.success(), "{shown}: {status}");
    Ok(())
}

/// Runs a program, passes its standard output on and shows every line to `look`. Gives whether it ended well.
pub(crate) fn watch(command: &mut Command, mut look: impl FnMut(&str)) -> anyhow::Result<bool> {
    let shown = format!("{command:?}");
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {shown}"))?;
    let out = child
        .stdout
        .take()
        .expect("asked for a pipe when it was spawned");
    for line in BufReader::new(out).lines() {
        let line = line.with_context(|| format!("reading from {shown}"))?;
        println!("{line}");
        look(&line);
    }
    Ok(child
        .wait()
        .with_context(|| format!("waiting for {shown}"))?
        .success())
}
