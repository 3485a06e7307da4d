//! `tokenizer_config.json` and `generation_config.json`: names of special tokens, the chat template, whether a prompt
//! starts with the beginning-of-text token.

use std::{fs, path::Path};

use serde_json::Value;

use crate::Error;

/// What is read from both files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// Text of the beginning-of-text token.
    pub bos_token: Option<String>,
    /// Text of the end-of-text token.
    pub eos_token: Option<String>,
    /// Text of the padding token.
    pub pad_token: Option<String>,
    /// End-of-text ids of `generation_config.json`.
    pub eos_ids: Vec<u32>,
    /// A raw prompt starts with `bos_token`.
    pub add_bos: bool,
    /// Jinja source.
    pub chat_template: Option<String>,
    /// How the model's makers would sample.
    pub sampling: SamplingDefaults,
}

/// How tokens are chosen where a request does not say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingDefaults {
    /// 0 is greedy.
    pub temperature: f32,
    /// 1 is off.
    pub top_p: f32,
}

impl Default for SamplingDefaults {
    /// The API's own defaults.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
        }
    }
}

impl Config {
    /// Reads the files of a checkpoint.
    ///
    /// # Errors
    /// When `tokenizer_config.json` is missing or a file is not JSON.
    pub fn load(folder: &Path) -> Result<Self, Error> {
        let tokenizer = read_json(&folder.join("tokenizer_config.json"))?;
        let generation = folder.join("generation_config.json");
        let generation = if generation.exists() {
            read_json(&generation)?
        } else {
            Value::Null
        };
        let mut config = Self::from_json(&tokenizer, &generation);
        // Newer checkpoints keep the template in a file of its own.
        let template = folder.join("chat_template.jinja");
        if template.exists() {
            config.chat_template = Some(read(&template)?);
        }
        Ok(config)
    }

    fn from_json(tokenizer: &Value, generation: &Value) -> Self {
        let token = |name: &str| token_text(&tokenizer[name]);
        let ids = match &generation["eos_token_id"] {
            Value::Array(ids) => ids.iter().filter_map(Value::as_u64).collect(),
            id => id.as_u64().into_iter().collect::<Vec<_>>(),
        };
        Self {
            bos_token: token("bos_token"),
            eos_token: token("eos_token"),
            pad_token: token("pad_token"),
            eos_ids: ids
                .into_iter()
                .filter_map(|id| u32::try_from(id).ok())
                .collect(),
            add_bos: tokenizer["add_bos_token"].as_bool().unwrap_or(false),
            chat_template: template_source(&tokenizer["chat_template"]),
            sampling: sampling_defaults(generation),
        }
    }

    /// Variables that every template sees.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let tokens = [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
            ("pad_token", &self.pad_token),
        ];
        tokens
            .into_iter()
            .map(|(name, text)| (name, text.clone().unwrap_or_default()))
            .collect()
    }
}

fn sampling_defaults(generation: &Value) -> SamplingDefaults {
    let defaults = SamplingDefaults::default();
    let number = |name: &str, default: f32| generation[name].as_f64().map_or(default, |n| n as f32);
    SamplingDefaults {
        temperature: number("temperature", defaults.temperature),
        top_p: number("top_p", defaults.top_p),
    }
}

/// A token is its text, or an object that has it as `content`.
fn token_text(value: &Value) -> Option<String> {
    value
        .as_str()
        .or_else(|| value["content"].as_str())
        .map(Into::into)
}

/// One template, or a list of named ones of which `default` is the one for chat.
fn template_source(value: &Value) -> Option<String> {
    match value {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(Into::into),
        _ => None,
    }
}

pub(crate) fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|error| file_error(path, &error))
}

fn read_json(path: &Path) -> Result<Value, Error> {
    serde_json::from_str(&read(path)?).map_err(|error| file_error(path, &error))
}

fn file_error(path: &Path, error: &dyn std::error::Error) -> Error {
    Error::File {
        path: path.display().to_string(),
        message: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tokens_and_templates_come_in_two_shapes_each() {
        let old = Config::from_json(
            &json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": true, "chat_template": "a"}),
            &json!({"eos_token_id": 1}),
        );
        assert_eq!(old.bos_token.as_deref(), Some("<s>"));
        assert_eq!(old.eos_token.as_deref(), Some("</s>"));
        assert_eq!((old.eos_ids, old.add_bos), (vec![1], true));
        assert_eq!(old.chat_template.as_deref(), Some("a"));
        let new = Config::from_json(
            &json!({"bos_token": null, "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}),
            &json!({"eos_token_id": [1, 7], "temperature": 0.5}),
        );
        assert_eq!(new.chat_template.as_deref(), Some("d"));
        assert_eq!((new.bos_token, new.eos_ids), (None, vec![1, 7]));
        assert_eq!((new.sampling.temperature, new.sampling.top_p), (0.5, 1.0));
    }

    #[test]
    fn a_missing_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Config::load(folder.path()).unwrap_err();
        assert!(
            error.to_string().contains("tokenizer_config.json"),
            "{error}"
        );
    }
}
