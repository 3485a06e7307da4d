//! What `hadal up` does before it serves, and after.

use std::net::TcpListener;

use hadal_tests::up::{Up, hadal, is_alive, wait_until_gone};

use super::{alone, checkpoint};

const ANY: [&str; 4] = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];

fn up(model: &str, flags: &[&str]) -> (Option<i32>, String, String) {
    let output = hadal(&[&["up", "--model", model], flags].concat());
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("hadal prints UTF-8");
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn model() -> &'static str {
    checkpoint().to_str().expect("a path of UTF-8")
}

/// Ids in lines like "decode-0  ready at ... (metrics at ..., pid 7)".
fn pids(printed: &str) -> Vec<u32> {
    printed
        .lines()
        .filter_map(|line| line.rsplit_once("pid ")?.1.strip_suffix(')')?.parse().ok())
        .collect()
}

#[test]
fn one_question_is_answered_through_two_pools_and_nothing_is_left_behind() {
    let _alone = alone();
    let (code, answer, printed) = up(model(), &[&ANY[..], &["--once", "hello"]].concat());
    assert_eq!(code, Some(0), "{printed}");
    assert!(!answer.trim().is_empty(), "an answer on standard output");
    for part in [
        "First token after",
        "KV moved: ",
        "from prefill-0 to decode-",
    ] {
        assert!(printed.contains(part), "{part:?} in {printed}");
    }
    assert!(!printed.contains("KV moved: 0 bytes"), "{printed}");
    let pids = pids(&printed);
    assert_eq!(
        pids.len(),
        4,
        "prefill, two decode workers, router: {printed}"
    );
    assert!(!pids.iter().any(|&pid| is_alive(pid)));
}

#[test]
fn the_demo_checkpoint_is_found_and_answers_right() {
    let _alone = alone();
    let output = hadal(&[&["up", "--quiet", "--once", "What is 17 + 25?"], &ANY[..]].concat());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(
        (text(&output.stdout), text(&output.stderr)),
        ("42\n".into(), String::new())
    );
}

#[test]
fn combined_workers_answer_without_moving_anything() {
    let _alone = alone();
    let flags = ["--mode", "combined", "--decode", "1", "--once", "hello"];
    let (code, answer, printed) = up(model(), &[&ANY[..], &flags].concat());
    assert_eq!(code, Some(0), "{printed}");
    assert!(
        !answer.trim().is_empty() && printed.contains("KV moved: none"),
        "{printed}"
    );
}

#[test]
fn both_modes_give_the_same_answer() {
    let _alone = alone();
    let two = up(
        model(),
        &[&ANY[..], &["--quiet", "--once", "the same"]].concat(),
    );
    let one = up(
        model(),
        &[
            &ANY[..],
            &["--quiet", "--mode", "combined", "--once", "the same"],
        ]
        .concat(),
    );
    assert_eq!(
        (two.0, &two.2),
        (Some(0), &String::new()),
        "quiet prints nothing but the answer"
    );
    assert_eq!(two.1, one.1);
}

#[test]
fn a_taken_port_is_explained_before_anything_starts() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, _, printed) = up(model(), &["--http", &address, "--grpc", "127.0.0.1:0"]);
    assert_eq!(code, Some(1));
    assert!(
        printed.contains("is taken") && printed.contains(&address),
        "{printed}"
    );
    assert_eq!(pids(&printed), [0; 0]);
}

#[test]
fn a_missing_model_is_explained() {
    let (code, _, printed) = up("/no/such/model", &ANY);
    assert_eq!(code, Some(1));
    assert!(
        printed.contains("/no/such/model") && printed.contains("--model"),
        "{printed}"
    );
}

#[test]
fn a_broken_checkpoint_ends_the_start_with_the_reason() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(checkpoint()).unwrap() {
        let path = entry.unwrap().path();
        let copy = folder.path().join(path.file_name().unwrap());
        std::fs::copy(&path, &copy).unwrap();
        if copy
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            let whole = std::fs::metadata(&copy).unwrap().len();
            std::fs::File::options()
                .write(true)
                .open(&copy)
                .unwrap()
                .set_len(whole / 2)
                .unwrap();
        }
    }
    let (code, _, printed) = up(folder.path().to_str().unwrap(), &ANY);
    assert_eq!(code, Some(1), "{printed}");
    assert!(
        printed.contains("could not start") && printed.contains(".safetensors"),
        "{printed}"
    );
}

#[test]
fn an_interrupt_stops_everything_cleanly() {
    let _alone = alone();
    let mut up = Up::start(checkpoint(), &[]);
    let pids = up.pids();
    up.signal_parent("INT");
    assert_eq!(up.wait(), Some(0));
    assert_eq!(wait_until_gone(&pids), [0; 0]);
}

#[test]
fn children_do_not_outlive_a_parent_that_was_killed() {
    let _alone = alone();
    let mut up = Up::start(checkpoint(), &[]);
    let pids = up.pids();
    up.signal_parent("KILL");
    assert_eq!(up.wait(), None);
    assert_eq!(wait_until_gone(&pids), [0; 0]);
}
