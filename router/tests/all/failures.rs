//! What a client gets when workers fail, and that nothing stays behind.

use std::time::Duration;

use testkit::fake_worker::{Fault, Faults};
use tonic::Code;

use crate::{
    client::text_of,
    harness::{Harness, Setup, completion},
};

const PROMPT: [u32; 3] = [11, 12, 13];

fn run(faults: impl IntoIterator<Item = Fault>) -> Faults {
    Faults {
        run: faults.into_iter().collect(),
        ..Faults::default()
    }
}

fn generate(faults: impl IntoIterator<Item = Fault>) -> Faults {
    Faults {
        generate: faults.into_iter().collect(),
        ..Faults::default()
    }
}

fn reserve(faults: impl IntoIterator<Item = Fault>) -> Faults {
    Faults {
        reserve: faults.into_iter().collect(),
        ..Faults::default()
    }
}

/// Streams an answer of 24 tokens and checks that it is whole, right and ends once.
async fn streams_well(harness: &Harness) {
    let events = harness.stream(&PROMPT, 24).await.rest().await;
    assert_eq!(
        text_of(&events),
        harness.expected(&PROMPT, 24),
        "{events:?}"
    );
    let ends = events
        .iter()
        .filter(|event| event.contains(r#""finish_reason":"length""#));
    assert_eq!(ends.count(), 1);
    assert!(events[events.len() - 2].contains(r#""completion_tokens":24"#));
    assert_eq!(events.last().unwrap(), "[DONE]");
}

#[tokio::test(start_paused = true)]
async fn whatever_happens_to_prefill_another_one_takes_over() {
    for fault in [
        Fault::Refuse(Code::Unavailable),
        Fault::Refuse(Code::Internal),
        Fault::Refuse(Code::DataLoss),
        Fault::Hang(0),
        Fault::Break(0),
        Fault::Fail(0, Code::Unavailable),
        Fault::Skip(0),
        Fault::Die(0),
    ] {
        let harness = Setup::default().start().await;
        for worker in &harness.prefill {
            worker.set_faults(run([fault]));
        }
        // The second takes its own fault too, unless the first one is alive to try again.
        if matches!(fault, Fault::Die(_)) {
            harness.prefill[1].set_faults(Faults::default());
        }
        streams_well(&harness).await;
        harness.wait_for_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_prefill_that_dies_after_the_first_token_costs_no_token() {
    for fault in [
        Fault::Die(1),
        Fault::Fail(1, Code::Unavailable),
        Fault::Break(1),
    ] {
        let harness = Setup::default().start().await;
        harness.prefill[0].set_faults(run([fault]));
        harness.prefill[1].set_faults(run([fault]));
        // Decode waits for a transfer that will not come.
        for worker in &harness.decode {
            worker.set_faults(generate([Fault::Hang(0)]));
        }
        if matches!(fault, Fault::Die(_)) {
            harness.prefill[1].set_faults(Faults::default());
        }
        streams_well(&harness).await;
        harness.wait_for_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_happens_to_decode_another_one_goes_on_without_a_gap() {
    for at in [0, 1, 2, 7, 23, 24] {
        for fault in [
            Fault::Hang(at),
            Fault::Break(at),
            Fault::Fail(at, Code::Unavailable),
            Fault::Fail(at, Code::Internal),
            Fault::Skip(at),
            Fault::Repeat(at),
            Fault::Die(at),
        ] {
            let harness = Setup::default().start().await;
            harness.decode[0].set_faults(generate([fault]));
            harness.decode[1].set_faults(generate([Fault::None]));
            streams_well(&harness).await;
            harness.wait_for_quiet().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn several_decode_workers_in_a_row_may_fail() {
    let harness = Setup::of(1, 4).start().await;
    for (i, worker) in harness.decode.iter().enumerate().take(3) {
        worker.set_faults(generate([Fault::Fail(i + 3, Code::Unavailable)]));
    }
    streams_well(&harness).await;
    let died = r#"hadal_router_migrations_total{reason="died"}"#;
    assert_eq!(harness.metric(died).await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_dies_before_it_takes_a_request_does_not_count_against_it() {
    let retried = r#"hadal_router_retries_total{reason="lost"}"#;
    let migrated = r#"hadal_router_migrations_total{reason="lost"}"#;
    for (prefill, decode, series) in [
        (run([Fault::DieUntaken]), Faults::default(), retried),
        (Faults::default(), reserve([Fault::DieUntaken]), retried),
        (Faults::default(), generate([Fault::DieUntaken]), migrated),
    ] {
        let mut setup = Setup::default();
        // The first one that counted would be the last.
        setup.config.pipeline.retry.max_deaths = 1;
        let harness = setup.start().await;
        harness.prefill[0].set_faults(prefill);
        harness.decode[0].set_faults(decode);
        // Whether a request goes to the first or the second worker is chance.
        for _ in 0..10 {
            streams_well(&harness).await;
        }
        assert_eq!(harness.metric(series).await, 1, "{series}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_kills_its_workers_gets_no_more_than_two() {
    let poisoned = "hadal_router_poisoned_requests_total";
    // In the prompt's half, before anything was answered.
    let harness = Setup::of(5, 1).start().await;
    for worker in &harness.prefill {
        worker.set_faults(run([Fault::Die(0)]));
    }
    let reply = harness
        .post("/v1/completions", &completion(&PROMPT, 24, ""))
        .await;
    assert_eq!(reply.status, 500, "{}", reply.body);
    assert!(reply.body.contains("workers_died"), "{}", reply.body);
    assert_eq!(reply.header("x-should-retry"), "false");
    harness.wait_for_workers(4).await;
    assert_eq!(harness.metric(poisoned).await, 1);
    harness.wait_for_quiet().await;
    // Others are served by those that are left.
    for worker in &harness.prefill {
        worker.set_faults(Faults::default());
    }
    streams_well(&harness).await;

    // In the middle of an answer, whose stream then ends with the error.
    let harness = Setup::of(1, 5).start().await;
    for worker in &harness.decode {
        worker.set_faults(generate([Fault::Die(3)]));
    }
    let events = harness.stream(&PROMPT, 24).await.rest().await;
    assert!(
        events.last().unwrap().contains("workers_died"),
        "{events:?}"
    );
    harness.wait_for_workers(4).await;
    assert_eq!(harness.metric(poisoned).await, 1);
    harness.wait_for_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn the_answers_of_one_request_count_their_dead_workers_together() {
    let harness = Setup::of(1, 6).start().await;
    for worker in &harness.decode {
        worker.set_faults(generate([Fault::Die(3); 4]));
    }
    let reply = harness
        .post("/v1/completions", &completion(&PROMPT, 24, r#","n":2"#))
        .await;
    assert_eq!(reply.status, 500, "{}", reply.body);
    // Both answers were at a worker of their own, and each may have gone on to another one before it was known.
    let dead = harness
        .decode
        .iter()
        .filter(|worker| worker.is_dead())
        .count();
    assert!((2..=3).contains(&dead), "{dead}");
}

#[tokio::test(start_paused = true)]
async fn a_full_decode_worker_sends_the_request_elsewhere_or_lets_it_wait() {
    let harness = Setup::of(1, 2).start().await;
    for worker in &harness.decode {
        worker.set_faults(reserve([Fault::Refuse(Code::ResourceExhausted); 3]));
    }
    streams_well(&harness).await;
}

#[tokio::test(start_paused = true)]
async fn a_reservation_that_is_not_answered_is_given_back_when_it_is() {
    let harness = Setup::of(1, 1).start().await;
    harness.decode[0].set_faults(reserve([Fault::Hang(0)]));
    let body = completion(&PROMPT, 24, "");
    let mut client = harness.client().await;
    // The client leaves while the worker is being asked.
    let gone = tokio::time::timeout(
        Duration::from_millis(500),
        client.post("/v1/completions", &body),
    );
    assert!(gone.await.is_err());
    drop(client);
    tokio::time::sleep(Duration::from_secs(3)).await;
    harness.wait_for_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_frees_everything_at_every_stage() {
    // Stage by stage: prefill computes, transfer runs, decode generates.
    for (prefill, decode) in [
        (run([Fault::Hang(0)]), Faults::default()),
        (run([Fault::Hang(1)]), generate([Fault::Hang(0)])),
        (Faults::default(), generate([Fault::Hang(4)])),
    ] {
        let harness = Setup::of(1, 1).start().await;
        harness.prefill[0].set_faults(prefill);
        harness.decode[0].set_faults(decode);
        let reading = async { harness.stream(&PROMPT, 24).await.rest().await };
        assert!(
            tokio::time::timeout(Duration::from_secs(1), reading)
                .await
                .is_err()
        );
        harness.wait_for_quiet().await;
        assert_eq!(harness.metric("hadal_router_running_requests").await, 0);
        assert_eq!(
            harness
                .metric(r#"hadal_router_requests_total{code="499",model="m"}"#)
                .await,
            1
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_user_s_mistake_that_only_workers_see_is_not_retried() {
    let harness = Setup::default().start().await;
    for worker in &harness.prefill {
        worker.set_faults(run([Fault::Refuse(Code::InvalidArgument)]));
    }
    let reply = harness
        .post("/v1/completions", &completion(&PROMPT, 4, ""))
        .await;
    assert_eq!(reply.status, 400);
    let prefills: usize = harness
        .prefill
        .iter()
        .map(|worker| worker.counts().prefills)
        .sum();
    assert_eq!(prefills, 1);
    harness.wait_for_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn workers_that_always_fail_end_in_503_before_and_an_error_event_after_the_first_token() {
    let harness = Setup::default().start().await;
    for worker in &harness.decode {
        worker.set_faults(generate([Fault::Fail(3, Code::Internal); 20]));
    }
    let events = harness.stream(&PROMPT, 200).await.rest().await;
    let last = events.last().unwrap();
    assert!(last.starts_with(r#"{"error":{"message":"#), "{last}");
    assert!(!events.iter().any(|event| event == "[DONE]"));
    assert!(
        harness
            .expected(&PROMPT, 200)
            .starts_with(&text_of(&events))
    );
    for worker in &harness.prefill {
        worker.set_faults(run([Fault::Refuse(Code::Internal); 20]));
    }
    let reply = harness
        .post("/v1/completions", &completion(&PROMPT, 4, ""))
        .await;
    assert_eq!((reply.status, reply.header("retry-after")), (503, "1"));
    harness.wait_for_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_keeps_failing_is_left_alone_for_a_while() {
    let harness = Setup::of(2, 1).start().await;
    harness.prefill[0].set_faults(run([Fault::Refuse(Code::Internal); 100]));
    for _ in 0..40 {
        assert_eq!(
            harness
                .post("/v1/completions", &completion(&PROMPT, 4, ""))
                .await
                .status,
            200
        );
    }
    let tried = harness.prefill[0].counts().prefills;
    assert!((5..=7).contains(&tried), "{tried} tries");
}

#[tokio::test(start_paused = true)]
async fn nobody_to_serve_is_503_in_time_and_a_worker_that_comes_is_used() {
    let harness = Setup::of(1, 1).start().await;
    harness.decode[0].kill();
    harness.prefill[0].kill();
    let start = tokio::time::Instant::now();
    let reply = harness
        .post("/v1/completions", &completion(&PROMPT, 4, ""))
        .await;
    assert_eq!(reply.status, 503);
    assert!(
        start.elapsed() < Duration::from_secs(12),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(harness.client().await.get("/ready").await.status, 503);
    // The same address, another life.
    let mut setup = Setup::of(1, 1);
    for mut options in setup.prefill.drain(..).chain(setup.decode.drain(..)) {
        let address = options.incarnation.clone();
        options.incarnation = format!("{address}-reborn");
        testkit::fake_worker::FakeWorker::start(&harness.network, &address, options);
    }
    harness.wait_for_workers(2).await;
    streams_well(&harness).await;
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_drains_gets_nothing_new() {
    let harness = Setup::of(1, 2).start().await;
    harness.decode[0].drain();
    tokio::time::sleep(Duration::from_millis(50)).await;
    for _ in 0..6 {
        streams_well(&harness).await;
    }
    assert_eq!(harness.decode[0].counts().generations, 0);
}

#[tokio::test(start_paused = true)]
async fn a_drain_lets_running_answers_end_and_takes_no_new_ones() {
    let harness = Setup::of(1, 1)
        .paced(Duration::from_millis(100))
        .start()
        .await;
    let mut events = harness.stream(&PROMPT, 24).await;
    events.next().await.unwrap();
    harness.begin_stop();
    let rest = events.rest().await;
    assert_eq!(rest.last().unwrap(), "[DONE]");
    harness.wait_for_quiet().await;
    harness.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_still_runs_at_the_drain_s_deadline_ends_with_an_error() {
    let mut setup = Setup::of(1, 1);
    setup.config.drain = Duration::from_secs(5);
    let harness = setup.start().await;
    harness.decode[0].set_faults(generate([Fault::Hang(3)]));
    let mut events = harness.stream(&PROMPT, 24).await;
    events.next().await.unwrap();
    harness.begin_stop();
    let start = tokio::time::Instant::now();
    let decode = harness.decode[0].clone();
    let (rest, ()) = tokio::join!(events.rest(), harness.stop());
    assert!(rest.last().unwrap().contains("shutting down"), "{rest:?}");
    assert!(
        start.elapsed() < Duration::from_secs(8),
        "{:?}",
        start.elapsed()
    );
    crate::harness::eventually(async || decode.counts().generating == 0).await;
}
