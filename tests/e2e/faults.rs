//! Workers that die: the client sees a pause at most, and never another token than it would have seen.

use hadal_tests::{
    http::{self, Response, completion_text},
    up::Up,
};

use super::{MODEL, alone, checkpoint, completion, prompt};

/// Long enough to be under way when a worker dies.
const LONG_ANSWER: u32 = 6000;

fn start(http: &str, name: u32, prompt_tokens: u32, answer_tokens: u32) -> Response {
    let body = completion(&prompt(name, prompt_tokens), answer_tokens);
    http::send(http, "/v1/completions", None, Some(&body))
}

fn whole(http: &str, name: u32, prompt_tokens: u32, answer_tokens: u32) -> String {
    start(http, name, prompt_tokens, answer_tokens)
        .rest_of_completion()
        .expect("an answer without faults")
}

/// Value of a counter of the router, over all labels.
fn counter(up: &Up, name: &str) -> f64 {
    http::send(&up.http(), "/metrics", None, None)
        .text()
        .lines()
        .filter(|line| line.starts_with(name))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
        .sum()
}

#[test]
fn streams_go_on_unchanged_when_a_decode_worker_is_killed() {
    let _alone = alone();
    let mut up = Up::start(checkpoint(), &["--served-name", MODEL]);
    let undisturbed: Vec<String> = (0..4)
        .map(|name| whole(&up.http(), name, 200, LONG_ANSWER))
        .collect();
    // The least loaded decode worker is taken, so that each of the two has some of these.
    let mut streams: Vec<Response> = (0..4)
        .map(|name| start(&up.http(), name, 200, LONG_ANSWER))
        .collect();
    let mut begun: Vec<String> = streams
        .iter_mut()
        .map(|stream| completion_text(&stream.next_event().unwrap()).to_owned())
        .collect();
    up.signal("decode-0", "KILL");
    for (text, stream) in begun.iter_mut().zip(&mut streams) {
        *text += &stream.rest_of_completion().unwrap();
    }
    assert_eq!(begun, undisturbed);
    assert!(
        counter(&up, "hadal_router_migrations_total") >= 1.0,
        "a stream must have migrated"
    );
    up.wait_for_life("decode-0", 2);
    assert!(
        up.printed().contains("decode-0     was killed"),
        "{}",
        up.printed()
    );
    assert_eq!(whole(&up.http(), 0, 200, LONG_ANSWER), undisturbed[0]);
}

#[test]
fn requests_are_answered_although_prefill_workers_keep_dying() {
    let _alone = alone();
    let mut up = Up::start(checkpoint(), &["--served-name", MODEL, "--prefill", "2"]);
    let undisturbed = whole(&up.http(), 99, 1500, 20);
    for round in 0..20 {
        let victim = if round % 2 == 0 {
            "prefill-0"
        } else {
            "prefill-1"
        };
        let lives = up.member(victim).lives;
        // A prompt that no cache knows, so that there is something to compute and to move.
        let http = &up.http();
        let answers: Vec<Result<String, String>> = std::thread::scope(|scope| {
            let ask = |name| move || start(http, name, 1500, 20).rest_of_completion();
            let running = [0, 1].map(|i| scope.spawn(ask(100 + 2 * round + i)));
            std::thread::sleep(std::time::Duration::from_millis(15 * u64::from(round % 7)));
            up.signal(victim, "KILL");
            running.map(|thread| thread.join().unwrap()).into()
        });
        assert!(
            answers.iter().all(Result::is_ok),
            "round {round}: {answers:?}"
        );
        up.wait_for_life(victim, lives + 1);
        if counter(&up, "hadal_router_retries_total") >= 2.0 {
            assert_eq!(whole(&up.http(), 99, 1500, 20), undisturbed);
            return;
        }
    }
    unreachable!("no kill in 20 rounds hit a prefill worker at work");
}

#[test]
fn the_router_comes_back_where_it_was() {
    let _alone = alone();
    let mut up = Up::start(checkpoint(), &["--served-name", MODEL]);
    let before = whole(&up.http(), 1, 100, 20);
    let address = up.http();
    up.signal("router", "KILL");
    up.wait_for_life("router", 2);
    assert_eq!(up.http(), address);
    let deadline = std::time::Instant::now() + hadal_tests::up::PATIENCE;
    while http::send(&address, "/ready", None, None).status != 200 {
        assert!(
            std::time::Instant::now() < deadline,
            "the router finds its workers again"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(whole(&up.http(), 1, 100, 20), before);
}
