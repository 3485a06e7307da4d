//! Identifiers that follow a request from process to process: the W3C `traceparent` header
//! (<https://www.w3.org/TR/trace-context/>, version 00) and `x-request-id`, over HTTP headers and gRPC metadata alike
//! (tonic's `MetadataMap` is `AsRef`/`AsMut` of a header map).

use std::{fmt, str::FromStr};

use http::{HeaderMap, HeaderName, HeaderValue};

/// `traceparent`.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// `x-request-id`: shown to the client, never a key to anything inside.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A position in a distributed trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceContext {
    /// The whole trace; never 0.
    pub trace_id: u128,
    /// The span that this process's work is a child of; never 0.
    pub span_id: u64,
    /// Bit 0: sampled.
    pub flags: u8,
}

/// A `traceparent` that is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a traceparent header of version 00")]
pub struct ParseError;

impl TraceContext {
    /// A new, sampled trace from random numbers (which come from outside, so that a simulation repeats).
    pub fn root(trace_id: u128, span_id: u64) -> Self {
        Self {
            trace_id: trace_id.max(1),
            span_id: span_id.max(1),
            flags: 1,
        }
    }

    /// The same trace, one span further down.
    #[must_use]
    pub fn child(self, span_id: u64) -> Self {
        Self {
            span_id: span_id.max(1),
            ..self
        }
    }

    /// The context in `headers`; `None` where there is none or it is broken (the specification says to start anew then).
    pub fn extract(headers: &HeaderMap) -> Option<Self> {
        headers.get(TRACEPARENT)?.to_str().ok()?.parse().ok()
    }

    /// Puts the context into `headers`.
    pub fn inject(self, headers: &mut HeaderMap) {
        let value = HeaderValue::from_str(&self.to_string()).expect("hex digits and dashes");
        headers.insert(TRACEPARENT, value);
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "00-{:032x}-{:016x}-{:02x}",
            self.trace_id, self.span_id, self.flags
        )
    }
}

impl FromStr for TraceContext {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut fields = text.split('-');
        let mut field = |digits: usize| {
            fields
                .next()
                .filter(|field| field.len() == digits)
                .filter(|field| {
                    field
                        .bytes()
                        .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
                })
                .and_then(|field| u128::from_str_radix(field, 16).ok())
                .ok_or(ParseError)
        };
        let (version, trace_id, span_id, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
        if version != 0 || trace_id == 0 || span_id == 0 || fields.next().is_some() {
            return Err(ParseError);
        }
        Ok(Self {
            trace_id,
            span_id: span_id as u64,
            flags: flags as u8,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_specification_s_example_is_read() {
        let context: TraceContext = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
            .parse()
            .unwrap();
        assert_eq!(context.trace_id, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!(context.span_id, 0x00f0_67aa_0ba9_02b7);
        assert_eq!(context.flags, 1);
    }

    #[test]
    fn broken_headers_are_refused() {
        for text in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
        ] {
            assert_eq!(text.parse::<TraceContext>(), Err(ParseError), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_goes_into_headers_comes_out_of_them(
            trace_id in 1u128.., span_id in 1u64.., flags: u8,
        ) {
            let context = TraceContext { trace_id, span_id, flags };
            let mut headers = HeaderMap::new();
            context.inject(&mut headers);
            prop_assert_eq!(TraceContext::extract(&headers), Some(context));
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,64}") {
            let _ = text.parse::<TraceContext>();
        }
    }
}
