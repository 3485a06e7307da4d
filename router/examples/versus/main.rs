//! Both ends of the benchmark in `docs/benchmarks/router.md`: instant workers for Hadal (gRPC) and for its peer (HTTP),
//! and a closed loop of requests that measures whatever router stands between them.
//!
//! `versus workers` prints the workers' addresses and serves; `versus load` prints one line of JSON.

mod instant;

use std::{
    fs,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use axum::{
    Router,
    body::Bytes,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use clap::Parser;
use instant::Answers;
use proto::v1::Role;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
enum Command {
    /// Serves instant workers until it is killed.
    Workers,
    /// Sends requests and measures.
    Load(Load),
}

#[derive(Debug, clap::Args)]
struct Load {
    /// Address of the router, or of an HTTP worker for the baseline
    #[arg(long)]
    address: SocketAddr,
    /// Model in the requests
    #[arg(long, default_value = "m")]
    model: String,
    /// Connections, each with one request at a time
    #[arg(long)]
    connections: usize,
    /// Ask for a stream
    #[arg(long)]
    stream: bool,
    /// Seconds to measure, after a tenth of that to warm up
    #[arg(long)]
    seconds: f64,
    /// Process whose CPU time and memory are measured
    #[arg(long)]
    pid: Option<u32>,
}

/// Tokens of every answer.
const TOKENS: usize = 16;
/// A question of about 360 bytes.
const QUESTION: &str = "The quick brown fox jumps over the lazy dog. What is the capital of France? It is Paris. \
    Hello! How are you today? I'm fine, thanks; and you? Please explain in a few words how a router chooses the \
    worker that answers a question, and why the first token of an answer takes longer than all the others do. \
    Then count from one to ten, slowly.";

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Workers => workers().await,
        Command::Load(load) => measure(load).await,
    }
}

async fn workers() -> anyhow::Result<()> {
    let mut addresses = serde_json::Map::new();
    for (name, role) in [("prefill", Role::Prefill), ("decode", Role::Decode)] {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        addresses.insert(name.into(), json!(listener.local_addr()?.to_string()));
        let answers = Answers::new(role, name, TOKENS as u32);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if stream.set_nodelay(true).is_ok() {
                    tokio::spawn(instant::serve(stream, Arc::clone(&answers)));
                }
            }
        });
    }
    for name in ["http_prefill", "http_decode"] {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        addresses.insert(name.into(), json!(listener.local_addr()?.to_string()));
        tokio::spawn(async move { axum::serve(NoDelay(listener), http_worker()).await });
    }
    println!("{}", serde_json::Value::Object(addresses));
    std::future::pending().await
}

struct NoDelay(TcpListener);

impl axum::serve::Listener for NoDelay {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            if let Ok((stream, address)) = self.0.accept().await
                && stream.set_nodelay(true).is_ok()
            {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// What the peer's workers answer: the same tokens, at once.
fn http_worker() -> Router {
    let head = r#"{"id":"chatcmpl-0","created":1700000000,"model":"m""#;
    let whole = format!(
        r#"{head},"object":"chat.completion","choices":[{{"index":0,"message":{{"role":"assistant","content":"{}"}},"logprobs":null,"finish_reason":"length"}}],"usage":{{"prompt_tokens":120,"completion_tokens":{TOKENS},"total_tokens":{}}}}}"#,
        "word ".repeat(TOKENS),
        120 + TOKENS
    );
    let chunk = |delta: &str, reason: &str| {
        format!(
            "data: {head},\"object\":\"chat.completion.chunk\",\"choices\":[{{\"index\":0,\"delta\":{delta},\"logprobs\":null,\"finish_reason\":{reason}}}]}}\n\n"
        )
    };
    let mut stream = chunk(r#"{"role":"assistant","content":""}"#, "null");
    for _ in 0..TOKENS {
        stream += &chunk(r#"{"content":"word "}"#, "null");
    }
    stream += &chunk("{}", "\"length\"");
    stream += "data: [DONE]\n\n";
    let (whole, stream) = (Bytes::from(whole), Bytes::from(stream));
    let complete = move |body: Bytes| {
        let is_stream = body.windows(13).any(|part| part == b"\"stream\":true")
            || body.windows(14).any(|part| part == b"\"stream\": true");
        let (content, answer) = if is_stream {
            ("text/event-stream", stream.clone())
        } else {
            ("application/json", whole.clone())
        };
        async move { Response::into_response(([("content-type", content)], answer).into_response()) }
    };
    let info = json!({"model_path": "/nowhere", "tokenizer_path": "/nowhere", "served_model_name": "m",
        "is_generation": true, "tp_size": 1, "dp_size": 1});
    let facts = move || {
        let info = info.clone();
        async move { axum::Json(info) }
    };
    Router::new()
        .route("/health", get(|| async { "ok" }))
        .route("/server_info", get(facts.clone()))
        .route("/model_info", get(facts))
        .route("/v1/chat/completions", post(complete))
}

/// CPU seconds and resident MiB of a process.
fn usage(pid: u32) -> anyhow::Result<(f64, f64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("reading /proc")?;
    let rest = stat
        .rsplit_once(") ")
        .context("no command in /proc/PID/stat")?
        .1;
    let field = |n: usize| -> anyhow::Result<f64> {
        Ok(rest
            .split(' ')
            .nth(n - 3)
            .context("too few fields")?
            .parse()?)
    };
    Ok((
        (field(14)? + field(15)?) / 100.0,
        field(24)? * 4096.0 / 1_048_576.0,
    ))
}

async fn measure(load: Load) -> anyhow::Result<()> {
    let messages = json!([{"role": "user", "content": QUESTION}]);
    let body = json!({"model": load.model, "messages": messages, "max_tokens": TOKENS, "stream": load.stream});
    let body = serde_json::to_string(&body)?;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let start = Instant::now() + Duration::from_secs_f64(load.seconds / 10.0);
    let end = start + Duration::from_secs_f64(load.seconds);
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..load.connections {
        clients.spawn(client(
            load.address,
            request.clone(),
            load.stream,
            start,
            end,
        ));
    }
    tokio::time::sleep_until(start.into()).await;
    let before = load.pid.map(usage).transpose()?;
    let (mut whole, mut first) = (Vec::new(), Vec::new());
    tokio::time::sleep_until(end.into()).await;
    let after = load.pid.map(usage).transpose()?;
    while let Some(times) = clients.join_next().await {
        for (ttft, total) in times?? {
            first.push(ttft);
            whole.push(total);
        }
    }
    ensure!(!whole.is_empty(), "no request ended in time");
    let cpu = before
        .zip(after)
        .map(|(before, after)| (after.0 - before.0) / whole.len() as f64 * 1e6);
    println!(
        "{}",
        json!({"requests": whole.len(), "rps": whole.len() as f64 / load.seconds,
            "p50_us": quantile(&mut whole, 0.5), "p99_us": quantile(&mut whole, 0.99),
            "ttft50_us": quantile(&mut first, 0.5),
            "cpu_us": cpu, "rss_mib": after.map(|after| after.1)})
    );
    Ok(())
}

fn quantile(times: &mut [f64], q: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    times[((times.len() - 1) as f64 * q) as usize] * 1e6
}

/// One connection's loop; times to the first byte and to the last, in seconds.
async fn client(
    address: SocketAddr,
    request: String,
    is_stream: bool,
    start: Instant,
    end: Instant,
) -> anyhow::Result<Vec<(f64, f64)>> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut times = Vec::new();
    let mut buffer = Vec::with_capacity(1 << 16);
    loop {
        let sent = Instant::now();
        if sent >= end {
            return Ok(times);
        }
        stream.write_all(request.as_bytes()).await?;
        buffer.clear();
        let mut first = None;
        while !is_whole(&buffer, is_stream)? {
            if stream.read_buf(&mut buffer).await? == 0 {
                bail!("the connection was closed");
            }
            first.get_or_insert_with(|| sent.elapsed());
        }
        let total = sent.elapsed();
        if sent >= start && sent + total <= end {
            times.push((first.unwrap_or(total).as_secs_f64(), total.as_secs_f64()));
        }
    }
}

fn is_whole(buffer: &[u8], is_stream: bool) -> anyhow::Result<bool> {
    let Some(head) = find(buffer, b"\r\n\r\n") else {
        return Ok(false);
    };
    let text = std::str::from_utf8(&buffer[..head])?;
    ensure!(
        text.starts_with("HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(buffer)
    );
    if is_stream {
        let is_chunked = text
            .to_ascii_lowercase()
            .contains("transfer-encoding: chunked");
        let end: &[u8] = if is_chunked {
            b"\r\n0\r\n\r\n"
        } else {
            b"data: [DONE]\n\n"
        };
        return Ok(buffer.ends_with(end));
    }
    let length = text.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.parse::<usize>().ok())?
    });
    Ok(match length {
        Some(length) => buffer.len() >= head + 4 + length,
        None => buffer.ends_with(b"0\r\n\r\n"),
    })
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|part| part == needle)
}
