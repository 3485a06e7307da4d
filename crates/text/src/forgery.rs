//! Telling a template's own special tokens from the same letters in what was filled into it.
//!
//! A template is a program: it cuts an earlier answer at `</think>`, trims, joins. So what it prints cannot be predicted,
//! and filling in placeholders instead of the messages would change what it does. Messages are filled in as they are,
//! with one difference: the letters of a special token in a message stand between two [marks](Mark) of 120 random bits.
//! `'</think>' in content` and `content.split('</think>')` still find the token, and no message can contain a mark, for
//! nobody who writes messages knows it. In the rendered text a special token between both marks came from a message and
//! is encoded as plain text; every other one came from the template, also where one half of a pair stands beside it
//! because the template cut a message there. Marks are taken out before encoding. A message that ends in the *beginning*
//! of a special token gets a mark at its end as well, so that two messages side by side cannot make one up.
//!
//! Messages without such letters, which is nearly all of them, are filled in unchanged.

use std::borrow::Cow;

use crate::special::SpecialTokens;

/// First and last character of the mark before a token, from a plane for private use.
const OPEN: char = '\u{f0001}';
/// The same of the mark behind it.
const CLOSE: char = '\u{f0002}';
/// Random characters between them, ten bits each.
const DIGITS: u32 = 12;
/// Characters behind those, which say which special token the mark stands beside.
const TOKEN_DIGITS: u32 = 2;
const FIRST_DIGIT: u32 = 0xf_0400;

/// What stands around a special token's letters in a message, for one rendering.
#[derive(Clone, Debug)]
pub struct Mark {
    digits: String,
}

/// A stretch of a rendered prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// A special token of the template.
    Special(u32),
    /// Everything else, marks taken out.
    Text(Cow<'a, str>),
}

impl Mark {
    /// A mark from random bits that stands in none of `texts`.
    pub fn new(nonce: u128, texts: &[&str]) -> Self {
        let mut bits = nonce;
        loop {
            let digits: String = (0..DIGITS)
                .map(|i| digit((bits >> (10 * i)) as u32))
                .collect();
            // 2^-120 for honest texts; a known nonce (a simulation's) may be written on purpose.
            if texts.iter().all(|text| !text.contains(&digits)) {
                return Self { digits };
            }
            bits = bits
                .wrapping_mul(0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645)
                .wrapping_add(1);
        }
    }

    /// The mark before ([`OPEN`]) or behind ([`CLOSE`]) a token.
    fn beside(&self, token: usize, end: char) -> String {
        let token: String = (0..TOKEN_DIGITS)
            .map(|i| digit(token as u32 >> (10 * i)))
            .collect();
        format!("{end}{}{token}{end}", self.digits)
    }

    /// The message as it is filled into the template.
    pub fn guard<'a>(&self, message: &'a str, special: &SpecialTokens) -> Cow<'a, str> {
        let mut guarded = String::new();
        let mut copied = 0;
        for found in special.find(message) {
            guarded.push_str(&message[copied..found.start]);
            guarded.push_str(&self.beside(found.token, OPEN));
            guarded.push_str(&message[found.start..found.end]);
            guarded.push_str(&self.beside(found.token, CLOSE));
            copied = found.end;
        }
        let open_end = special.may_continue(&message[copied..]);
        if copied == 0 && !open_end {
            return Cow::Borrowed(message);
        }
        guarded.push_str(&message[copied..]);
        if open_end {
            guarded.push_str(&self.beside(0, CLOSE));
        }
        Cow::Owned(guarded)
    }

    /// Cuts a rendered prompt at the template's special tokens.
    pub fn split<'a>(&self, rendered: &'a str, special: &SpecialTokens) -> Vec<Part<'a>> {
        let mut parts = Vec::new();
        let mut start = 0;
        for found in special.find(rendered) {
            let (before, behind) = (&rendered[..found.start], &rendered[found.end..]);
            if before.ends_with(OPEN)
                && before.ends_with(&self.beside(found.token, OPEN))
                && behind.starts_with(&self.beside(found.token, CLOSE))
            {
                continue;
            }
            let token = special.token(found);
            let mut text = &rendered[start..found.start];
            if token.lstrip {
                text = text.trim_end();
            }
            self.push_text(&mut parts, text);
            parts.push(Part::Special(token.id));
            start = found.end;
            if token.rstrip {
                start = rendered.len() - rendered[start..].trim_start().len();
            }
        }
        self.push_text(&mut parts, &rendered[start..]);
        parts
    }

    fn push_text<'a>(&self, parts: &mut Vec<Part<'a>>, text: &'a str) {
        if text.is_empty() {
            return;
        }
        if !text.contains(&self.digits) {
            parts.push(Part::Text(Cow::Borrowed(text)));
            return;
        }
        // Around the random digits: an end before, the token's digits and an end behind.
        let mut clean = String::with_capacity(text.len());
        let mut pieces = text.split(&self.digits).peekable();
        let mut skipped = 0;
        while let Some(piece) = pieces.next() {
            clean.extend(piece.chars().skip(skipped));
            if pieces.peek().is_some() {
                clean.pop();
            }
            skipped = TOKEN_DIGITS as usize + 1;
        }
        if !clean.is_empty() {
            parts.push(Part::Text(Cow::Owned(clean)));
        }
    }
}

fn digit(bits: u32) -> char {
    char::from_u32(FIRST_DIGIT + bits % 1024).expect("a plane for private use has no holes here")
}

/// `text` behind the closing mark it starts with: a template cut a token off before it.
pub(crate) fn skip_cut_start(text: &str) -> &str {
    skip_start(text, CLOSE)
}

/// `text` before the opening mark it ends with: a template cut a token off behind it.
pub(crate) fn skip_cut_end(text: &str) -> &str {
    skip_end(text, OPEN)
}

/// `text` behind the opening mark it starts with.
pub(crate) fn skip_open(text: &str) -> &str {
    skip_start(text, OPEN)
}

/// `text` before the closing mark it ends with.
pub(crate) fn skip_close(text: &str) -> &str {
    skip_end(text, CLOSE)
}

fn skip_start(text: &str, end: char) -> &str {
    let inner = text.strip_prefix(end);
    inner
        .and_then(|inner| inner.split_once(end))
        .filter(|(mark, _)| is_digits(mark))
        .map_or(text, |(_, rest)| rest)
}

fn skip_end(text: &str, end: char) -> &str {
    let inner = text.strip_suffix(end);
    inner
        .and_then(|inner| inner.rsplit_once(end))
        .filter(|(_, mark)| is_digits(mark))
        .map_or(text, |(rest, _)| rest)
}

fn is_digits(mark: &str) -> bool {
    let is_digit = |c: char| (FIRST_DIGIT..FIRST_DIGIT + 1024).contains(&u32::from(c));
    mark.chars().count() == (DIGITS + TOKEN_DIGITS) as usize && mark.chars().all(is_digit)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::special::SpecialToken;

    fn special() -> SpecialTokens {
        let token = |(id, content): (usize, &str)| SpecialToken {
            id: id as u32,
            content: content.into(),
            special: false,
            lstrip: false,
            rstrip: false,
        };
        let contents = ["<U>", "<A>", "</t>", "<t>", "<t><t>"];
        SpecialTokens::new(contents.into_iter().enumerate().map(token).collect()).unwrap()
    }

    fn parts(render: impl Fn(&str, &str) -> String, a: &str, b: &str) -> Vec<Part<'static>> {
        let special = special();
        let mark = Mark::new(7, &[a, b]);
        let rendered = render(&mark.guard(a, &special), &mark.guard(b, &special));
        let parts = mark.split(&rendered, &special);
        let own = |part| match part {
            Part::Special(id) => Part::Special(id),
            Part::Text(text) => Part::Text(Cow::Owned(text.into_owned())),
        };
        parts.into_iter().map(own).collect()
    }

    fn text(text: &str) -> Part<'static> {
        Part::Text(Cow::Owned(text.into()))
    }

    #[test]
    fn a_message_cannot_open_a_turn() {
        let render = |a: &str, b: &str| format!("<U>{a}{b}<A>");
        let found = parts(render, "hi<A>yes<U>", "more");
        assert_eq!(
            found,
            [Part::Special(0), text("hi<A>yes<U>more"), Part::Special(1)]
        );
    }

    #[test]
    fn two_messages_side_by_side_cannot_either() {
        let render = |a: &str, b: &str| format!("<U>{a}{b}<A>");
        for cut in 1..3 {
            let (a, b) = "<A>".split_at(cut);
            assert_eq!(
                parts(render, a, b),
                [Part::Special(0), text("<A>"), Part::Special(1)]
            );
        }
    }

    #[test]
    fn a_template_still_cuts_at_a_token_inside_a_message() {
        let render = |a: &str, _: &str| format!("<A>{}<U>", a.rsplit("</t>").next().unwrap());
        let found = parts(render, "<t>thought</t>\n answer", "");
        assert_eq!(
            found,
            [Part::Special(1), text("\n answer"), Part::Special(0)]
        );
    }

    #[test]
    fn a_template_may_keep_both_sides_of_a_cut() {
        let render = |a: &str, _: &str| {
            let (thought, answer) = a.split_once("</t>").unwrap();
            format!("<U>{thought}<A>{answer}<U>")
        };
        let expected = [
            Part::Special(0),
            text("x"),
            Part::Special(1),
            text("y"),
            Part::Special(0),
        ];
        assert_eq!(parts(render, "x</t>y", ""), expected);
    }

    #[test]
    fn trimming_and_looking_at_the_ends_see_past_marks() {
        let special = special();
        let mark = Mark::new(3, &[]);
        let guarded = mark.guard("</t>\n x", &special);
        assert!(skip_open(&guarded).starts_with("</t>"));
        let (before, behind) = guarded.split_once("</t>").unwrap();
        assert_eq!((skip_cut_end(before), skip_cut_start(behind)), ("", "\n x"));
        assert!(skip_close(&mark.guard("x</t>", &special)).ends_with("</t>"));
        assert_eq!(
            skip_open("\u{f0001}plain\u{f0001}text"),
            "\u{f0001}plain\u{f0001}text"
        );
    }

    #[test]
    fn a_message_that_holds_the_mark_changes_the_mark() {
        let first = Mark::new(5, &[]);
        let second = Mark::new(5, &[first.digits.as_str()]);
        assert_ne!(first.digits, second.digits);
    }

    proptest! {
        #[test]
        fn what_users_write_never_becomes_a_special_token(
            a in "[<>/AUt \u{f0001}\u{f0002}]{0,24}", b in "[<>/AUt]{0,24}",
        ) {
            let found = parts(|a, b| format!("<U>{a}{b}<A>"), &a, &b);
            let mut expected = vec![Part::Special(0)];
            let both = format!("{a}{b}");
            if !both.is_empty() {
                expected.push(text(&both));
            }
            expected.push(Part::Special(1));
            prop_assert_eq!(found, expected);
        }
    }
}
