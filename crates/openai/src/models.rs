//! `/v1/models`.

use serde::{Deserialize, Serialize};

/// One model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// Its name in requests.
    pub id: String,
    /// Always `model`.
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// Who serves it.
    pub owned_by: String,
    /// Tokens of prompt and answer together; absent while nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,
}

impl Model {
    /// A model by its name.
    pub fn new(id: impl Into<String>, created: u64, max_model_len: Option<u32>) -> Self {
        let (object, owned_by) = ("model".into(), "hadal".into());
        Self {
            id: id.into(),
            object,
            created,
            owned_by,
            max_model_len,
        }
    }
}

/// All of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelList {
    /// Always `list`.
    pub object: String,
    /// The models.
    pub data: Vec<Model>,
}

impl ModelList {
    /// A list.
    pub fn new(data: Vec<Model>) -> Self {
        Self {
            object: "list".into(),
            data,
        }
    }
}
