//! The official Python client against the router on real sockets, with fake workers behind it.

use std::{env, path::PathBuf, process::Stdio, time::Duration};

use router::cli::Args;
use testkit::fake_worker::{FakeWorker, Options};
use tokio::{net::TcpListener, process::Command, time::timeout};
use tokio_stream::wrappers::TcpListenerStream;

use crate::harness::{Setup, eventually};

/// Starts a fake worker on a port of its own.
async fn worker(options: Options) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(FakeWorker::new(options).serve(TcpListenerStream::new(listener)));
    address
}

async fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().port()
}

#[tokio::test]
async fn the_official_client_is_content() {
    let Ok(python) = env::var("HADAL_TEST_PYTHON") else {
        eprintln!("skipped: HADAL_TEST_PYTHON names no interpreter ('cargo xtask test' sets it)");
        return;
    };
    let Setup {
        prefill, decode, ..
    } = Setup::of(1, 2);
    let mut workers = Vec::new();
    for options in prefill.into_iter().chain(decode) {
        workers.push(worker(options).await);
    }
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let (http, grpc) = (free_port().await, free_port().await);
    let args = <Args as clap::Parser>::parse_from([
        "router".to_string(),
        format!(
            "--model={}",
            root.join("crates/text/tests/fixtures").display()
        ),
        "--served-name=m".into(),
        "--api-key=secret".into(),
        format!("--http=127.0.0.1:{http}"),
        format!("--grpc=127.0.0.1:{grpc}"),
        format!("--workers={}", workers.join(",")),
    ]);
    let router = tokio::spawn(router::run(args));
    let is_ready = async || {
        let mut probe = Command::new(&python);
        probe
            .args([
                "-c",
                "import sys, urllib.request as r; r.urlopen(sys.argv[1])",
            ])
            .arg(format!("http://127.0.0.1:{http}/ready"))
            .stderr(Stdio::null());
        probe.status().await.unwrap().success()
    };
    eventually(is_ready).await;
    let mut client = Command::new(&python);
    client
        .arg(root.join("tests/e2e/test_openai_client.py"))
        .env("HADAL_URL", format!("http://127.0.0.1:{http}"))
        .env("HADAL_API_KEY", "secret")
        .kill_on_drop(true);
    let status = timeout(Duration::from_secs(120), client.status())
        .await
        .unwrap()
        .unwrap();
    router.abort();
    assert!(status.success());
}
