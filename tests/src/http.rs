//! HTTP/1.0 by hand: one connection a request, the body ends with the connection.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use serde_json::Value;

/// No answer takes longer than this.
const TIMEOUT: Duration = Duration::from_secs(60);

/// An answer: its status, and its body still to be read.
#[derive(Debug)]
pub struct Response {
    /// HTTP status code.
    pub status: u16,
    /// Header lines as they came.
    pub headers: Vec<String>,
    body: BufReader<TcpStream>,
}

/// Sends a request to `address` ("host:port"). A body makes it a POST of JSON.
pub fn send(address: &str, path: &str, key: Option<&str>, body: Option<&Value>) -> Response {
    let mut stream = TcpStream::connect(address).expect("the server accepts connections");
    stream
        .set_read_timeout(Some(TIMEOUT))
        .expect("a timeout above zero");
    let payload = body.map(ToString::to_string).unwrap_or_default();
    let method = if body.is_some() { "POST" } else { "GET" };
    let mut head = format!("{method} {path} HTTP/1.0\r\nHost: {address}\r\n");
    if let Some(key) = key {
        head += "Authorization: Bearer ";
        head += key;
        head += "\r\n";
    }
    if body.is_some() {
        head += "Content-Type: application/json\r\n";
        head += "Content-Length: ";
        head += &payload.len().to_string();
        head += "\r\n";
    }
    write!(stream, "{head}\r\n{payload}").expect("the server reads the request");
    let mut body = BufReader::new(stream);
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        body.read_line(&mut line)
            .expect("the server answers in time");
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        headers.push(line.to_owned());
    }
    let status = headers
        .first()
        .and_then(|line| line.split(' ').nth(1)?.parse().ok());
    Response {
        status: status.expect("a status line"),
        headers,
        body,
    }
}

impl Response {
    /// The whole body.
    pub fn text(mut self) -> String {
        let mut text = String::new();
        self.body
            .read_to_string(&mut text)
            .expect("a whole body of UTF-8 in time");
        text
    }

    /// The whole body as JSON.
    pub fn json(self) -> Value {
        serde_json::from_str(&self.text()).expect("a body of JSON")
    }

    /// The next event of a stream: `None` after `[DONE]` or at the end.
    pub fn next_event(&mut self) -> Option<Value> {
        loop {
            let mut line = String::new();
            let read = self
                .body
                .read_line(&mut line)
                .expect("the next event comes in time");
            let data = line.strip_prefix("data: ").map(str::trim_end);
            match data {
                Some("[DONE]") => return None,
                Some(data) => return Some(serde_json::from_str(data).expect("an event of JSON")),
                None if read == 0 => return None,
                None => {}
            }
        }
    }

    /// The texts of all events to come, joined.
    ///
    /// # Errors
    /// The message of an error event, or that the stream ended without a finish reason.
    pub fn rest_of_completion(&mut self) -> Result<String, String> {
        let (mut text, mut finished) = (String::new(), false);
        while let Some(event) = self.next_event() {
            if let Some(message) = event["error"]["message"].as_str() {
                return Err(message.to_owned());
            }
            text += completion_text(&event);
            finished |= event["choices"][0]["finish_reason"].is_string();
        }
        if finished {
            Ok(text)
        } else {
            Err(format!("no finish reason after {text:?}"))
        }
    }
}

/// The text of one event of a completion.
pub fn completion_text(event: &Value) -> &str {
    event["choices"][0]["text"].as_str().unwrap_or_default()
}
