//! The network itself, tiny and random: what a transfer carries is what decoding needs, to the bit.

use super::*;

fn engine(model: &std::path::Path) -> Arc<dyn Engine> {
    let checkpoint = model::Checkpoint::open(model).unwrap();
    let config = engine::cpu::Config {
        max_model_len: Some(512),
        kv_bytes: Some(8 << 20),
        threads: Some(1),
        options: Options {
            step_tokens: 64,
            chunk_tokens: 48,
            ..Options::default()
        },
        ..engine::cpu::Config::default()
    };
    engine::cpu::start_checkpoint(&checkpoint, &config, &mut |_| {}).unwrap()
}

#[tokio::test]
async fn a_handed_over_network_says_what_it_says_whole() {
    let folder = tempfile::tempdir().unwrap();
    testkit::checkpoint::write_tiny(folder.path(), 1).unwrap();
    let prefill = Node::start_real(Role::Prefill, "p", engine(folder.path()));
    let decode = Node::start_real(Role::Decode, "d", engine(folder.path()));
    let alone = Node::start_real(Role::Combined, "c", engine(folder.path()));
    let vocab = decode.engine.limits().vocab_size as u32;
    // The last shares its first block with the one before.
    for (i, len) in [5, 64, 150, 131].into_iter().enumerate() {
        let prompt: Vec<u32> = (0..len).map(|i| (i * i + 3) % vocab).collect();
        let request = format!("request-{i}");
        let sampled = v1::Sampling {
            temperature: Some(1.0),
            seed: 7,
            ..v1::Sampling::default()
        };
        for (kind, sampling) in [("greedy", v1::Sampling::default()), ("sampled", sampled)] {
            let request = format!("{request}-{kind}");
            let with = |produced: &[u32]| v1::Sequence {
                sampling: Some(sampling.clone()),
                ..sequence(&request, &prompt, produced, 12)
            };
            let stream = generate(&alone, with(&[]), None).await.unwrap();
            let (whole, _) = finish_generate(stream, 0).await.unwrap();

            let reserved = reserve(&decode, &request, &prompt).await.unwrap();
            let stream = run(&prefill, with(&[]), target(&decode, &reserved))
                .await
                .unwrap();
            let (first, _) = finish_run(stream).await.unwrap();
            let stream = generate(&decode, with(&[first]), Some(&reserved))
                .await
                .unwrap();
            let (rest, _) = finish_generate(stream, 1).await.unwrap();
            assert_eq!([vec![first], rest].concat(), whole, "{request}");
        }
    }
    for node in [prefill, decode, alone] {
        node.settled().await;
        assert_eq!(node.stop().await, Ended::Whole);
    }
}
