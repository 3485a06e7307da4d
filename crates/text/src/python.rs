//! The few Python methods that chat templates call on strings and dictionaries, and `tojson` as `transformers` has it
//! (`json.dumps` without escaping, where Jinja's own escapes for HTML). Methods that look at the ends of a text look
//! past the marks of [`forgery`].

use minijinja::{Error, ErrorKind, State, Value, value::ValueKind};

use crate::forgery;

/// Answers method calls that Jinja itself does not know.
pub(crate) fn call_method(
    _: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => call_on_string(value.as_str().unwrap_or_default(), method, args),
        ValueKind::Map => call_on_map(value, method, args),
        _ => Err(unknown(method)),
    }
}

fn unknown(method: &str) -> Error {
    Error::new(
        ErrorKind::UnknownMethod,
        format!("no method named {method}"),
    )
}

fn call_on_string(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let argument = |index: usize| args.get(index).and_then(Value::as_str);
    let required = |index: usize| {
        let message = format!("{method} needs a string");
        argument(index).ok_or_else(|| Error::new(ErrorKind::MissingArgument, message))
    };
    let strip = |start: bool, end: bool| {
        let is_stripped = |c: char| match argument(0) {
            Some(set) => set.contains(c),
            None => c.is_whitespace(),
        };
        let mut rest = text;
        if start {
            rest = forgery::skip_cut_start(rest.trim_start_matches(is_stripped))
                .trim_start_matches(is_stripped);
        }
        if end {
            rest = forgery::skip_cut_end(rest.trim_end_matches(is_stripped))
                .trim_end_matches(is_stripped);
        }
        Value::from(rest)
    };
    Ok(match method {
        "split" => {
            let limit = args
                .get(1)
                .and_then(Value::as_i64)
                .filter(|limit| *limit >= 0);
            match argument(0) {
                Some("") => return Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
                Some(separator) => match limit {
                    Some(limit) => text.splitn(limit as usize + 1, separator).collect(),
                    None => text.split(separator).collect(),
                },
                None => text.split_whitespace().collect(),
            }
        }
        "strip" => strip(true, true),
        "lstrip" => strip(true, false),
        "rstrip" => strip(false, true),
        "startswith" => Value::from(forgery::skip_open(text).starts_with(required(0)?)),
        "endswith" => Value::from(forgery::skip_close(text).ends_with(required(0)?)),
        "replace" => Value::from(text.replace(required(0)?, required(1)?)),
        "upper" => Value::from(text.to_uppercase()),
        "lower" => Value::from(text.to_lowercase()),
        "find" => {
            let at = text.find(required(0)?).map(|at| text[..at].chars().count());
            Value::from(at.map_or(-1, |at| at as i64))
        }
        _ => return Err(unknown(method)),
    })
}

fn call_on_map(map: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match (method, args) {
        ("keys", []) => Ok(map.try_iter()?.collect()),
        ("values", []) => map.try_iter()?.map(|key| map.get_item(&key)).collect(),
        ("items", []) => {
            let pair = |key: Value| {
                map.get_item(&key)
                    .map(|value| Value::from(vec![key, value]))
            };
            map.try_iter()?.map(pair).collect()
        }
        ("get", [key, rest @ ..]) => {
            let value = map.get_item(key)?;
            let default = rest.first().cloned().unwrap_or_else(|| Value::from(()));
            Ok(if value.is_undefined() { default } else { value })
        }
        _ => Err(unknown(method)),
    }
}

/// Jinja's `trim` filter: the method `strip`.
pub(crate) fn trim(text: &str, characters: Option<&str>) -> Result<Value, Error> {
    let arguments: Vec<Value> = characters.into_iter().map(Value::from).collect();
    call_on_string(text, "strip", &arguments)
}

/// `json.dumps(value, ensure_ascii=False)`.
pub(crate) fn to_json(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write_json(value, &mut out)?;
    Ok(out)
}

fn write_json(value: &Value, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::String => write_json_string(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                write_json(&item, out)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                write_json_string(&key.to_string(), out);
                out.push_str(": ");
                write_json(&value.get_item(&key)?, out)?;
            }
            out.push('}');
        }
        kind => {
            let message = format!("a value of kind {kind} has no JSON form");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    }
    Ok(())
}

fn write_json_string(text: &str, out: &mut String) {
    out.push_str(&serde_json::to_string(text).expect("text always serialises"));
}
