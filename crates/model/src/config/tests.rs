use serde_json::{Value, json};

use super::*;

fn released() -> Value {
    json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
        "num_hidden_layers": 61, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5,
        "norm_topk_prob": true, "num_attention_heads": 128, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "attention_bias": false, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "rope_theta": 10000, "max_position_embeddings": 163_840, "vocab_size": 129_280,
        "tie_word_embeddings": false, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3",
            "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    })
}

fn parse(json: &Value) -> Result<Config, Error> {
    Config::parse(json.to_string().as_bytes())
}

#[test]
fn released_configuration_is_read_whole() {
    let config = parse(&released()).unwrap();
    assert_eq!(
        (config.layers, config.hidden_size, config.vocab_size),
        (61, 7168, 129_280)
    );
    assert_eq!(config.attention.entry(), 576);
    assert!((config.attention.scale() - 0.135_233_78).abs() < 1e-7);
    let moe = config.moe.as_ref().unwrap();
    assert_eq!(
        (
            moe.gate.experts,
            moe.gate.groups,
            moe.gate.top_k,
            moe.shared
        ),
        (256, 8, 8, 1)
    );
    assert_eq!(
        (config.is_moe(2), config.is_moe(3), config.is_moe(61)),
        (false, true, true)
    );
    assert_eq!((config.kv_layers(true), config.kv_layers(false)), (62, 61));
    assert_eq!(
        config.quantisation,
        Some(Quantisation {
            scale_format: ScaleFormat::F32
        })
    );
}

#[test]
fn v31_asks_for_power_of_two_scales() {
    let mut json = released();
    json["quantization_config"]["scale_fmt"] = json!("ue8m0");
    let quantisation = parse(&json).unwrap().quantisation.unwrap();
    assert_eq!(quantisation.scale_format, ScaleFormat::Ue8m0);
}

#[test]
fn recent_transformers_spelling_means_the_same() {
    let mut json = released();
    let mut rope = json["rope_scaling"].take();
    rope["rope_type"] = rope["type"].take();
    rope["rope_theta"] = json!(10000.0);
    let fields = json.as_object_mut().unwrap();
    for gone in [
        "rope_scaling",
        "rope_theta",
        "topk_method",
        "scoring_func",
        "moe_layer_freq",
    ] {
        fields.remove(gone);
    }
    json["rope_parameters"] = rope;
    assert_eq!(parse(&json).unwrap(), parse(&released()).unwrap());
}

#[test]
fn missing_and_absurd_values_are_named() {
    for (field, bad, says) in [
        ("hidden_size", Value::Null, "hidden_size: missing"),
        ("hidden_size", json!(-1), "hidden_size: -1 is not in"),
        ("num_hidden_layers", json!(0), "num_hidden_layers"),
        ("vocab_size", json!(i64::MAX), "vocab_size"),
        ("qk_rope_head_dim", json!(7), "qk_rope_head_dim: 7 is odd"),
        ("n_group", json!(7), "n_group: 256 experts do not divide"),
        ("topk_group", json!(9), "topk_group"),
        (
            "num_experts_per_tok",
            json!(129),
            "num_experts_per_tok: 129 is not in 1..=128",
        ),
        ("scoring_func", json!("softmax"), "scoring_func"),
        ("topk_method", json!("greedy"), "topk_method"),
        ("hidden_act", json!("gelu"), "hidden_act"),
        ("model_type", json!("llama"), "model_type"),
        ("rms_norm_eps", json!(0.0), "rms_norm_eps"),
        (
            "routed_scaling_factor",
            json!(-2.5),
            "routed_scaling_factor",
        ),
        ("rope_theta", json!(0.0), "rope_theta"),
        ("attention_bias", json!(true), "attention_bias"),
    ] {
        let mut json = released();
        json[field] = bad;
        let error = parse(&json).unwrap_err().to_string();
        assert!(error.contains(says), "{field}: {error}");
    }
    let mut json = released();
    json["quantization_config"]["weight_block_size"] = json!([64, 64]);
    assert!(
        parse(&json)
            .unwrap_err()
            .to_string()
            .contains("weight_block_size")
    );
}

#[test]
fn what_is_not_json_is_an_error() {
    for bytes in [
        &b""[..],
        b"[]",
        b"{",
        b"{\"hidden_size\": \"x\"}",
        &[0xff; 40],
    ] {
        assert!(Config::parse(bytes).is_err());
    }
}
