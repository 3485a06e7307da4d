//! Sends a load and times what comes back.

use std::{sync::Arc, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    load::{Arrivals, Job, Load},
    record::{Record, Run, Timing},
};
use crate::client::{Client, Error, delta_text};

/// Requests that an open loop may have under way: a server that hangs must not eat this machine's memory.
const MAX_UNDER_WAY: usize = 4096;

/// Sends requests to one model of one server.
#[derive(Clone, Debug)]
pub(super) struct Driver {
    client: Client,
    model: String,
    timeout: Duration,
}

impl Driver {
    pub(super) fn new(client: Client, model: String, timeout: Duration) -> Self {
        Self {
            client,
            model,
            timeout,
        }
    }

    /// Sends the first requests of the load once, one after the other, and forgets them.
    pub(super) async fn warm_up(&self, load: &Load, requests: usize, stop: &CancellationToken) {
        for index in 0..requests.min(load.requests) {
            let request = self.send(load.job(index), Instant::now(), Duration::ZERO);
            tokio::select! {
                _ = request => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Sends the load; ends when every request did, when time is up, or when told to stop.
    pub(super) async fn run(&self, load: &Load, limit: Duration, stop: &CancellationToken) -> Run {
        let bar = progress(load.requests as u64);
        let start = Instant::now();
        let places = Arc::new(Semaphore::new(match load.arrivals {
            Arrivals::Closed(places) => places,
            Arrivals::At(_) => MAX_UNDER_WAY,
        }));
        let mut running = JoinSet::new();
        let mut records = Vec::with_capacity(load.requests);
        let mut keep = |record: Record| {
            bar.inc(1);
            records.push(record);
        };
        let over = async {
            tokio::select! {
                () = sleep_until(start + limit) => {}
                () = stop.cancelled() => {}
            }
        };
        tokio::pin!(over);
        let mut started = 0;
        let cut_off = loop {
            let next = async {
                if started == load.requests {
                    return std::future::pending().await;
                }
                if let Arrivals::At(times) = &load.arrivals {
                    sleep_until(start + times[started]).await;
                }
                places.clone().acquire_owned().await.expect("never closed")
            };
            tokio::select! {
                place = next => {
                    let due = match &load.arrivals {
                        Arrivals::Closed(_) => start.elapsed(),
                        Arrivals::At(times) => times[started],
                    };
                    let (driver, job) = (self.clone(), load.job(started));
                    running.spawn(async move {
                        let record = driver.send(job, start + due, due).await;
                        drop(place);
                        record
                    });
                    started += 1;
                }
                Some(ended) = running.join_next() => keep(ended.expect("a request does not panic")),
                () = &mut over => break running.len(),
                else => break 0,
            }
            if started == load.requests && running.is_empty() {
                break 0;
            }
        };
        // Dropping the requests closes their connections, which cancels them on the server.
        drop(running);
        bar.finish_and_clear();
        Run {
            records,
            wall: start.elapsed(),
            cut_off,
        }
    }

    async fn send(&self, job: Job, due_at: Instant, due: Duration) -> Record {
        let input_tokens = job.prompt.len() as u64;
        let outcome = match timeout(self.timeout, self.answer(job, due_at)).await {
            Ok(Ok(timing)) => Ok(timing),
            Ok(Err(Error::Refused { status, .. })) => Err(format!("HTTP {status}")),
            Ok(Err(Error::Connect { .. })) => Err("not reached".into()),
            Ok(Err(Error::Broken(_) | Error::Url { .. })) => Err("broken off".into()),
            Ok(Err(Error::Timeout)) | Err(_) => Err("timed out".into()),
        };
        Record {
            due,
            input_tokens,
            outcome,
        }
    }

    async fn answer(&self, job: Job, due: Instant) -> Result<Timing, Error> {
        let body = json!({
            "model": self.model,
            "prompt": job.prompt,
            "max_tokens": job.output_tokens,
            "ignore_eos": true,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let mut events = self.client.stream("/v1/completions", &body).await?;
        let mut marks: Vec<Instant> = Vec::new();
        let (mut last_text, mut usage) = (due, Value::Null);
        while let Some(chunk) = events.next().await? {
            let now = Instant::now();
            // A token can be half a character, so a chunk without text may still be progress; the first one counts.
            if marks.is_empty() && chunk["choices"].get(0).is_some() || delta_text(&chunk).is_some()
            {
                marks.push(now);
                last_text = now;
            }
            if chunk["usage"].is_object() {
                usage = chunk["usage"].clone();
            }
        }
        let first = *marks
            .first()
            .ok_or_else(|| Error::Broken("an empty answer".into()))?;
        let gaps = marks.windows(2).map(|pair| pair[1] - pair[0]).collect();
        Ok(Timing {
            first_token: first - due,
            total: last_text - due,
            gaps,
            output_tokens: usage["completion_tokens"]
                .as_u64()
                .unwrap_or(marks.len() as u64),
        })
    }
}

fn progress(requests: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{bar:30} {pos}/{len} requests, {per_sec}, {elapsed} gone, {eta} left",
    )
    .expect("a constant template");
    ProgressBar::new(requests).with_style(style)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::{
        bench::prompts::Prompts,
        fake_server::{self, Behaviour},
    };

    const MINUTE: Duration = Duration::from_secs(60);

    fn driver(url: &str) -> Driver {
        Driver::new(Client::new(url, None).unwrap(), "fake".into(), MINUTE)
    }

    fn load(arrivals: Arrivals, requests: usize) -> Load {
        Load::drawn(
            arrivals,
            requests,
            (10, 5),
            Prompts {
                vocabulary: 50,
                seed: 1,
            },
        )
    }

    #[tokio::test]
    async fn a_closed_loop_keeps_its_places_filled_and_no_more() {
        let pause = Duration::from_millis(2);
        let (url, seen) = fake_server::serve(Behaviour { pause, accept: 100 }).await;
        let run = driver(&url)
            .run(
                &load(Arrivals::Closed(3), 12),
                MINUTE,
                &CancellationToken::new(),
            )
            .await;
        assert_eq!((run.records.len(), run.cut_off), (12, 0));
        assert_eq!(seen.most_under_way.load(Ordering::SeqCst), 3);
        for record in run.records {
            let timing = record.outcome.unwrap();
            assert_eq!(
                (record.input_tokens, timing.output_tokens, timing.gaps.len()),
                (10, 5, 4)
            );
            assert!(timing.first_token <= timing.total);
        }
    }

    #[tokio::test]
    async fn an_open_loop_does_not_wait_for_answers() {
        let pause = Duration::from_millis(50);
        let (url, seen) = fake_server::serve(Behaviour { pause, accept: 100 }).await;
        let times: Vec<Duration> = (0..8).map(Duration::from_millis).collect();
        let load = load(Arrivals::At(times.into()), 8);
        let run = driver(&url)
            .run(&load, MINUTE, &CancellationToken::new())
            .await;
        assert_eq!(run.records.len(), 8);
        assert_eq!(seen.most_under_way.load(Ordering::SeqCst), 8);
    }

    #[tokio::test]
    async fn refusals_are_counted_by_their_status() {
        let behaviour = Behaviour {
            pause: Duration::ZERO,
            accept: 2,
        };
        let (url, _) = fake_server::serve(behaviour).await;
        let run = driver(&url)
            .run(
                &load(Arrivals::Closed(1), 5),
                MINUTE,
                &CancellationToken::new(),
            )
            .await;
        let refused = run
            .records
            .iter()
            .filter_map(|record| record.outcome.as_ref().err());
        assert_eq!(
            refused.collect::<Vec<_>>(),
            ["HTTP 429 Too Many Requests"; 3]
        );
    }

    #[tokio::test]
    async fn time_that_is_up_cuts_off_what_runs() {
        let pause = Duration::from_secs(30);
        let (url, _) = fake_server::serve(Behaviour { pause, accept: 100 }).await;
        let run = driver(&url)
            .run(
                &load(Arrivals::Closed(2), 5),
                Duration::from_millis(100),
                &CancellationToken::new(),
            )
            .await;
        assert_eq!((run.records.len(), run.cut_off), (0, 2));
    }

    #[tokio::test]
    async fn warming_up_sends_the_first_requests_once() {
        let behaviour = Behaviour {
            pause: Duration::ZERO,
            accept: 100,
        };
        let (url, seen) = fake_server::serve(behaviour).await;
        let load = load(Arrivals::Closed(1), 5);
        driver(&url)
            .warm_up(&load, 3, &CancellationToken::new())
            .await;
        assert_eq!(seen.requests.load(Ordering::SeqCst), 3);
    }
}
