//! Published traces of real traffic, reduced to what a replay needs.
//!
//! - Mooncake (JSON lines): `timestamp` in milliseconds, `input_length`, `output_length`, and `hash_ids`, one for each
//!   512 tokens of the prompt; equal ids mean equal tokens, which is how prefixes recur.
//! - Azure (CSV): `TIMESTAMP,ContextTokens,GeneratedTokens`, time of day with seven decimals.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

/// Tokens that one of Mooncake's `hash_ids` stands for.
pub(super) const MOONCAKE_BLOCK_TOKENS: u64 = 512;
const AZURE_HEADER: &str = "TIMESTAMP,ContextTokens,GeneratedTokens";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// One recorded request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// After the first request of the trace.
    pub(super) at: Duration,
    pub(super) input_tokens: u64,
    pub(super) output_tokens: u64,
    /// Identity of each [`MOONCAKE_BLOCK_TOKENS`] of the prompt; empty where the trace has none.
    pub(super) blocks: Vec<u64>,
}

/// Reads the first `limit` requests of a trace; its first line tells the format.
pub(super) fn read(path: &Path, limit: usize) -> anyhow::Result<Vec<Entry>> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut lines = BufReader::new(file).lines().enumerate().peekable();
    let azure = match lines.peek() {
        Some((_, Ok(first))) => first
            .trim_start_matches('\u{feff}')
            .starts_with(AZURE_HEADER),
        _ => bail!("{} is empty or not readable", path.display()),
    };
    let mut entries: Vec<Entry> = Vec::new();
    let mut clock = Clock::default();
    for (index, line) in lines.skip(usize::from(azure)) {
        if entries.len() == limit {
            break;
        }
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let entry = if azure {
            azure_entry(&line, &mut clock)
        } else {
            mooncake_entry(&line)
        };
        entries.push(entry.with_context(|| format!("{} line {}", path.display(), index + 1))?);
    }
    entries.sort_by_key(|entry| entry.at);
    let start = entries.first().context("the trace holds no request")?.at;
    for entry in &mut entries {
        entry.at -= start;
    }
    Ok(entries)
}

#[derive(Deserialize)]
struct Mooncake {
    timestamp: u64,
    input_length: u64,
    output_length: u64,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

fn mooncake_entry(line: &str) -> anyhow::Result<Entry> {
    let row: Mooncake = serde_json::from_str(line)?;
    Ok(Entry {
        at: Duration::from_millis(row.timestamp),
        input_tokens: row.input_length,
        output_tokens: row.output_length,
        blocks: row.hash_ids,
    })
}

fn azure_entry(line: &str, clock: &mut Clock) -> anyhow::Result<Entry> {
    let mut fields = line.trim_end().split(',');
    let mut field = |name: &str| fields.next().with_context(|| format!("no {name}"));
    let at = clock.read(field("TIMESTAMP")?)?;
    Ok(Entry {
        at,
        input_tokens: field("ContextTokens")?.parse().context("ContextTokens")?,
        output_tokens: field("GeneratedTokens")?
            .parse()
            .context("GeneratedTokens")?,
        blocks: Vec::new(),
    })
}

/// Turns times of day into time since the first day; a trace may run past midnight.
#[derive(Default)]
struct Clock {
    date: Option<String>,
    days: u32,
}

impl Clock {
    fn read(&mut self, text: &str) -> anyhow::Result<Duration> {
        let (date, time) = text.trim().split_once(' ').context("no date and time")?;
        match &self.date {
            Some(current) if current != date => {
                self.days += 1;
                self.date = Some(date.to_owned());
            }
            Some(_) => {}
            None => self.date = Some(date.to_owned()),
        }
        // Offsets such as "+00:00" (2024 files) say nothing new.
        let time = time.split(['+', 'Z']).next().unwrap_or(time);
        let mut parts = time.split(':');
        let mut part = || parts.next().and_then(|part| part.parse::<f64>().ok());
        let (hours, minutes, seconds) = part()
            .zip(part())
            .zip(part())
            .map(|((h, m), s)| (h, m, s))
            .context("no h:m:s")?;
        let seconds = hours * 3600.0 + minutes * 60.0 + seconds;
        ensure!(
            (0.0..=DAY.as_secs_f64() + 1.0).contains(&seconds),
            "no time of day"
        );
        Ok(DAY * self.days + Duration::from_secs_f64(seconds))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn trace(text: &str, limit: usize) -> anyhow::Result<Vec<Entry>> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        read(file.path(), limit)
    }

    #[test]
    fn mooncake_lines_are_read() {
        let text = "{\"timestamp\": 1000, \"input_length\": 700, \"output_length\": 5, \"hash_ids\": [0, 7]}\n\
                    {\"timestamp\": 4000, \"input_length\": 9, \"output_length\": 2, \"hash_ids\": [3]}\n";
        let entries = trace(text, 10).unwrap();
        assert_eq!(
            entries[0],
            Entry {
                at: Duration::ZERO,
                input_tokens: 700,
                output_tokens: 5,
                blocks: vec![0, 7]
            }
        );
        assert_eq!(entries[1].at, Duration::from_secs(3));
        assert_eq!(trace(text, 1).unwrap().len(), 1);
    }

    #[test]
    fn azure_rows_are_read_across_midnight() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n\
                    2023-11-16 23:59:59.5000000,4808,10\r\n2023-11-17 00:00:01.0000000,110,27\r\n";
        let entries = trace(text, 10).unwrap();
        assert_eq!(entries[1].at, Duration::from_millis(1500));
        assert_eq!(
            (entries[1].input_tokens, entries[1].output_tokens),
            (110, 27)
        );
    }

    #[test]
    fn a_broken_line_is_named_by_its_number() {
        let error = trace(
            "{\"timestamp\": 0, \"input_length\": 1, \"output_length\": 1}\nnope\n",
            9,
        );
        assert!(error.unwrap_err().to_string().ends_with("line 2"));
        assert!(trace("", 9).is_err());
    }
}
