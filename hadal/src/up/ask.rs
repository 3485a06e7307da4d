//! The first question: the answer streams to standard output, figures about it follow.

use std::{
    fmt,
    io::Write,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use telemetry::definitions::KV_TRANSFER_BYTES;

use crate::{
    client::{Client, delta_text},
    format, series,
};

/// Tokens of an answer at most, where the model has room for twice as many.
const MAX_TOKENS: u64 = 256;
/// How long a worker's metrics may take.
const SCRAPE: Duration = Duration::from_secs(2);

/// Figures about one answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Report {
    first_token: Duration,
    /// From the first token to the end.
    rest: Duration,
    prompt_tokens: u64,
    completion_tokens: u64,
    sent: Vec<(String, u64)>,
    received: Vec<(String, u64)>,
}

/// Bytes of KV that each worker has sent and received so far.
type Moved = Vec<(String, u64, u64)>;

/// Asks and prints the answer as it comes. `workers` are names and metrics addresses.
pub(super) async fn ask(
    client: &Client,
    question: &str,
    workers: &[(String, String)],
) -> anyhow::Result<Report> {
    let model = client.model(None).await?;
    let room = model.max_model_len.map_or(MAX_TOKENS, |len| len / 2);
    let before = scrape(workers).await;
    let body = json!({
        "model": model.id,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_TOKENS.min(room).max(1),
        "temperature": 0,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let asked = Instant::now();
    let mut events = client.stream("/v1/chat/completions", &body).await?;
    let (mut first, mut usage) = (None, Value::Null);
    let mut out = std::io::stdout().lock();
    while let Some(chunk) = events.next().await? {
        if let Some(text) = delta_text(&chunk) {
            first.get_or_insert_with(Instant::now);
            out.write_all(text.as_bytes())
                .and_then(|()| out.flush())
                .context("printing")?;
        }
        if chunk["usage"].is_object() {
            usage = chunk["usage"].clone();
        }
    }
    // The last token may be a silent one, so that the end of the stream is what tells when it came.
    let end = Instant::now();
    writeln!(out).context("printing")?;
    drop(out);
    let Some(first) = first else {
        bail!("the answer was empty")
    };
    let (sent, received) = difference(&before, &scrape(workers).await);
    Ok(Report {
        first_token: first - asked,
        rest: end - first,
        prompt_tokens: usage["prompt_tokens"].as_u64().unwrap_or_default(),
        completion_tokens: usage["completion_tokens"].as_u64().unwrap_or_default(),
        sent,
        received,
    })
}

async fn scrape(workers: &[(String, String)]) -> Moved {
    let reads = workers.iter().map(|(name, address)| async move {
        let client = Client::new(&format!("http://{address}"), None).ok()?;
        let text = tokio::time::timeout(SCRAPE, client.text("/metrics"))
            .await
            .ok()?
            .ok()?;
        let bytes = |direction| series::sum(&text, KV_TRANSFER_BYTES.name, direction);
        Some((
            name.clone(),
            bytes("direction=\"sent\""),
            bytes("direction=\"received\""),
        ))
    });
    futures::future::join_all(reads)
        .await
        .into_iter()
        .flatten()
        .collect()
}

type Shares = Vec<(String, u64)>;

/// Who sent and who received how much in between.
fn difference(before: &Moved, after: &Moved) -> (Shares, Shares) {
    let mut shares = (Vec::new(), Vec::new());
    for (name, sent, received) in after {
        let earlier = before.iter().find(|(earlier, ..)| earlier == name);
        let (sent_before, received_before) = earlier.map_or((0, 0), |(_, s, r)| (*s, *r));
        for (list, bytes) in [
            (&mut shares.0, sent.saturating_sub(sent_before)),
            (&mut shares.1, received.saturating_sub(received_before)),
        ] {
            if bytes > 0 {
                list.push((name.clone(), bytes));
            }
        }
    }
    shares
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "\nFirst token after {}",
            format::duration(self.first_token)
        )?;
        if self.completion_tokens > 1 && !self.rest.is_zero() {
            let rate = (self.completion_tokens - 1) as f64 / self.rest.as_secs_f64();
            write!(f, ", then {rate:.1} tokens/s")?;
        }
        write!(
            f,
            " ({} tokens in, {} out).\nKV moved: ",
            self.prompt_tokens, self.completion_tokens
        )?;
        if self.sent.is_empty() && self.received.is_empty() {
            return write!(f, "none.");
        }
        let names = |shares: &Shares| {
            let names: Vec<&str> = shares.iter().map(|(name, _)| name.as_str()).collect();
            names.join(", ")
        };
        let bytes: u64 = self.received.iter().map(|(_, bytes)| bytes).sum();
        let (from, to) = (names(&self.sent), names(&self.received));
        write!(
            f,
            "{bytes} bytes ({}) from {from} to {to}.",
            format::bytes(bytes)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moved_is_told_with_both_ends() {
        let before = vec![("prefill-0".into(), 10, 0), ("decode-1".into(), 0, 10)];
        let after = vec![
            ("prefill-0".into(), 2058, 0),
            ("decode-0".into(), 0, 0),
            ("decode-1".into(), 0, 2058),
        ];
        let (sent, received) = difference(&before, &after);
        let report = Report {
            first_token: Duration::from_millis(50),
            rest: Duration::from_secs(1),
            prompt_tokens: 9,
            completion_tokens: 11,
            sent,
            received,
        };
        let text = report.to_string();
        assert!(
            text.contains("First token after 50.0 ms, then 10.0 tokens/s"),
            "{text}"
        );
        assert!(
            text.contains("2048 bytes (2.00 KiB) from prefill-0 to decode-1."),
            "{text}"
        );
    }
}
