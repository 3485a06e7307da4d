//! Leaving in good order.

use hadal_tests::{
    http::{self, completion_text},
    up::{Up, wait_until_gone},
};

use super::{MODEL, alone, checkpoint, completion, prompt};

#[test]
fn a_decode_worker_that_is_asked_to_leave_breaks_no_stream() {
    let _alone = alone();
    let mut up = Up::start(checkpoint(), &["--served-name", MODEL]);
    let body = |name| completion(&prompt(name, 100), 6000);
    let ask = |up: &Up, name| http::send(&up.http(), "/v1/completions", None, Some(&body(name)));
    let undisturbed: Vec<String> = (0..4)
        .map(|name| ask(&up, name).rest_of_completion().unwrap())
        .collect();
    let mut streams: Vec<_> = (0..4).map(|name| ask(&up, name)).collect();
    let mut texts: Vec<String> = streams
        .iter_mut()
        .map(|stream| completion_text(&stream.next_event().unwrap()).to_owned())
        .collect();
    let leaving = up.member("decode-1").pid;
    up.signal("decode-1", "TERM");
    for (text, stream) in texts.iter_mut().zip(&mut streams) {
        *text += &stream.rest_of_completion().unwrap();
    }
    assert_eq!(texts, undisturbed);
    assert_eq!(wait_until_gone(&[leaving]), [0; 0]);
    up.wait_for_life("decode-1", 2);
}
