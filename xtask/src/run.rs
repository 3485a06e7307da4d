//! Running other programs, with what they print shown as it comes.

use std::{
    io::{self, BufRead, BufReader},
    process::Command,
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

/// Runs a program, passes all that it prints on and shows every line to `look`. Gives whether it ended well.
pub(crate) fn watch(mut command: Command, mut look: impl FnMut(&str)) -> anyhow::Result<bool> {
    let shown = format!("{command:?}");
    let (out, into) = io::pipe().context("a pipe")?;
    let mut child = command
        .stdout(into.try_clone().context("a pipe")?)
        .stderr(into)
        .spawn()
        .with_context(|| format!("running {shown}"))?;
    // It holds the pipe's other end, which would never close.
    drop(command);
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
