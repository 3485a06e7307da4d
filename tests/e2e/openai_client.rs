//! The official `openai` Python client against a running deployment.

use std::process::Command;

use hadal_tests::up::Up;

use super::{MODEL, alone, checkpoint};

#[test]
fn the_official_python_client_is_content() {
    let python = std::env::var_os("HADAL_TEST_PYTHON")
        .expect("HADAL_TEST_PYTHON names a Python with tests/e2e/requirements.txt; `cargo xtask test` makes one");
    let _alone = alone();
    let key = "s3cret";
    let up = Up::start(checkpoint(), &["--served-name", MODEL, "--api-key", key]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/e2e/test_openai_client.py");
    let output = Command::new(python)
        .arg(script)
        .env("HADAL_URL", format!("http://{}", up.http()))
        .env("HADAL_API_KEY", key)
        .output()
        .expect("Python starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{}\n{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}
