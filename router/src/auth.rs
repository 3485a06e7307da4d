//! API keys.

use std::sync::Arc;

use openai::ApiError;

/// The keys that are let in; none means that everybody is.
#[derive(Clone, Default)]
pub struct Keys(Arc<[Vec<u8>]>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

impl Keys {
    /// From their texts; empty ones are left out.
    pub fn new(keys: impl IntoIterator<Item = String>) -> Self {
        Self(
            keys.into_iter()
                .filter(|key| !key.is_empty())
                .map(String::into_bytes)
                .collect(),
        )
    }

    /// Checks the value of an `Authorization` header.
    ///
    /// # Errors
    /// 401 unless it is `Bearer` and one of the keys.
    pub fn check(&self, authorization: Option<&[u8]>) -> Result<(), ApiError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let given = authorization.and_then(bearer).unwrap_or_default();
        // All keys are compared, and each to its end, so that time tells nothing.
        let is_known = self
            .0
            .iter()
            .fold(false, |known, key| known | is_equal(key, given));
        if is_known {
            Ok(())
        } else {
            Err(ApiError::unauthorized())
        }
    }
}

fn bearer(authorization: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = authorization.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
}

fn is_equal(key: &[u8], given: &[u8]) -> bool {
    let difference = key.iter().enumerate().fold(0, |difference, (i, byte)| {
        difference | (byte ^ given.get(i).copied().unwrap_or(!byte))
    });
    difference == 0 && key.len() == given.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_key_is_let_in() {
        let keys = Keys::new(["secret".into(), "other".into(), String::new()]);
        let is_let_in = |header: &str| keys.check(Some(header.as_bytes())).is_ok();
        assert!(is_let_in("Bearer secret") && is_let_in("bearer other"));
        for header in [
            "Bearer secre",
            "Bearer secrets",
            "Bearer ",
            "Basic secret",
            "secret",
            "",
        ] {
            assert!(!is_let_in(header), "{header}");
        }
        assert_eq!(keys.check(None).unwrap_err().status, 401);
        assert!(Keys::default().check(None).is_ok());
    }
}
