//! Cutting text into the words that byte-pair merges stay within: by hand for the patterns of DeepSeek's tokenizers, by
//! running the patterns for any other. The patterns cost a request more than all its protobuf does; by hand they cost
//! next to nothing, and time grows with the text's length alone, whatever the text is made of.

use fancy_regex::Regex;
use regex_syntax::hir::{Class as HirClass, HirKind};

/// Numbers, of up to three digits each (V3) or of one (smaller tokenizers of its kind).
const NUMBERS: [(&str, usize); 2] = [(r"\p{N}{1,3}", 3), (r"\p{N}", 1)];
/// Chinese and Japanese.
const CJK: &str = "[一-龥぀-ゟ゠-ヿ]+";
/// Words with what stands before them, punctuation, white space.
const WORDS: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// Cuts text at the matches of patterns, each applied to the pieces that those before it left: a match is a piece, and so
/// is what lies between two.
#[derive(Debug)]
pub(crate) enum Cutter {
    /// DeepSeek's patterns.
    DeepSeek(DeepSeek),
    /// Any others.
    Patterns(Vec<Regex>),
}

impl Cutter {
    /// `None` if one of the patterns is not valid.
    pub(crate) fn new(patterns: &[&str]) -> Option<Self> {
        let plain: Vec<String> = patterns.iter().map(|pattern| plain(pattern)).collect();
        if let [numbers, cjk, words] = &plain[..]
            && let Some((_, digits)) = NUMBERS.iter().find(|(pattern, _)| pattern == numbers)
            && (cjk.as_str(), words.as_str()) == (CJK, WORDS)
        {
            return Some(Self::DeepSeek(DeepSeek::new(*digits)));
        }
        let patterns = patterns.iter().map(|pattern| Regex::new(pattern).ok());
        Some(Self::Patterns(patterns.collect::<Option<_>>()?))
    }

    /// Calls `found` with each piece of `text` in order.
    pub(crate) fn cut(&self, text: &str, found: &mut impl FnMut(&str)) {
        match self {
            Self::DeepSeek(words) => words.cut(text, found),
            Self::Patterns(patterns) => cut_at(patterns, text, found),
        }
    }
}

/// The same pattern in one spelling: some files escape a quote that needs none, or have the line breaks themselves.
fn plain(pattern: &str) -> String {
    pattern
        .replace("\\\"", "\"")
        .replace('\r', "\\r")
        .replace('\n', "\\n")
}

fn cut_at(patterns: &[Regex], text: &str, found: &mut impl FnMut(&str)) {
    let Some((first, rest)) = patterns.split_first() else {
        if !text.is_empty() {
            found(text);
        }
        return;
    };
    let mut end = 0;
    // A pattern that gives up (on a text made for that) cuts nothing more, as in the tokenizers crate.
    for piece in first.find_iter(text).map_while(Result::ok) {
        if piece.start() > end {
            cut_at(rest, &text[end..piece.start()], found);
        }
        cut_at(rest, piece.as_str(), found);
        end = piece.end();
    }
    if end < text.len() {
        cut_at(rest, &text[end..], found);
    }
}

/// What the patterns ask of a character. No character is of two kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `\p{L}`
    Letter,
    /// `\p{M}`
    Mark,
    /// `\p{N}`
    Number,
    /// `\p{P}` and `\p{S}`
    Symbol,
    /// `\r` and `\n`
    Break,
    /// The rest of `\s`
    Space,
    /// None of these
    Other,
}

/// The kind of every character.
#[derive(Debug)]
struct Kinds {
    /// Of the first 2^16.
    low: Box<[Kind]>,
    /// Ranges of the others, sorted.
    high: Vec<(char, char, Kind)>,
}

impl Kinds {
    fn new() -> Self {
        let classes = [
            (r"\p{L}", Kind::Letter),
            (r"\p{M}", Kind::Mark),
            (r"\p{N}", Kind::Number),
            (r"[\p{P}\p{S}]", Kind::Symbol),
            (r"\s", Kind::Space),
            (r"[\r\n]", Kind::Break),
        ];
        let mut low = vec![Kind::Other; 1 << 16].into_boxed_slice();
        let mut high = Vec::new();
        for (pattern, kind) in classes {
            for (start, end) in ranges(pattern) {
                let (first, last) = (start as usize, end as usize);
                if first < low.len() {
                    low[first..=last.min(0xffff)].fill(kind);
                }
                if last >= low.len() {
                    high.push((start, end, kind));
                }
            }
        }
        high.sort_unstable_by_key(|(start, ..)| *start);
        Self { low, high }
    }

    fn of(&self, c: char) -> Kind {
        if let Some(kind) = self.low.get(c as usize) {
            return *kind;
        }
        let behind = self.high.partition_point(|(start, ..)| *start <= c);
        match self.high[..behind].last() {
            Some((_, end, kind)) if c <= *end => *kind,
            _ => Kind::Other,
        }
    }
}

/// The characters of a class, as the regex engine understands it.
fn ranges(class: &str) -> Vec<(char, char)> {
    let parsed = regex_syntax::parse(class).expect("a constant pattern");
    match parsed.into_kind() {
        HirKind::Class(HirClass::Unicode(class)) => {
            let ranges = class.ranges().iter();
            ranges.map(|range| (range.start(), range.end())).collect()
        }
        // A class of ASCII characters alone may come as bytes.
        HirKind::Class(HirClass::Bytes(class)) => {
            let ranges = class.ranges().iter();
            ranges
                .map(|range| (char::from(range.start()), char::from(range.end())))
                .collect()
        }
        _ => Vec::new(),
    }
}

/// DeepSeek's patterns by hand.
#[derive(Debug)]
pub(crate) struct DeepSeek {
    digits: usize,
    kinds: Kinds,
}

/// Pieces that the first two patterns leave.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Script {
    Numbers,
    Cjk,
    Rest,
}

impl DeepSeek {
    fn new(digits: usize) -> Self {
        Self {
            digits,
            kinds: Kinds::new(),
        }
    }

    fn cut(&self, text: &str, found: &mut impl FnMut(&str)) {
        let (mut start, mut current) = (0, Script::Rest);
        for (at, c) in text.char_indices() {
            let script = self.script(c);
            if script != current {
                self.cut_script(current, &text[start..at], found);
                (start, current) = (at, script);
            }
        }
        self.cut_script(current, &text[start..], found);
    }

    fn script(&self, c: char) -> Script {
        match c {
            '\u{3040}'..='\u{30ff}' | '\u{4e00}'..='\u{9fa5}' => Script::Cjk,
            c if self.kinds.of(c) == Kind::Number => Script::Numbers,
            _ => Script::Rest,
        }
    }

    fn cut_script(&self, script: Script, text: &str, found: &mut impl FnMut(&str)) {
        if script != Script::Numbers {
            return self.cut_words(text, found);
        }
        // No other pattern matches a number.
        let mut rest = text;
        while !rest.is_empty() {
            let end = rest.char_indices().nth(self.digits);
            let (number, behind) = rest.split_at(end.map_or(rest.len(), |(end, _)| end));
            found(number);
            rest = behind;
        }
    }

    fn cut_words(&self, text: &str, found: &mut impl FnMut(&str)) {
        let (mut gap, mut at) = (0, 0);
        while let Some((c, kind)) = self.first(text, at) {
            let Some(end) = self.word(text, at, c, kind) else {
                at += c.len_utf8();
                continue;
            };
            if gap < at {
                found(&text[gap..at]);
            }
            found(&text[at..end]);
            (gap, at) = (end, end);
        }
        if gap < text.len() {
            found(&text[gap..]);
        }
    }

    /// Where the word that begins at `at` with `c` ends: the alternatives of [`WORDS`] in their order.
    fn word(&self, text: &str, at: usize, c: char, kind: Kind) -> Option<usize> {
        let behind = at + c.len_utf8();
        if c.is_ascii_punctuation() {
            let letters = text.as_bytes()[behind..].iter();
            let count = letters.take_while(|b| b.is_ascii_alphabetic()).count();
            if count > 0 {
                return Some(behind + count);
            }
        }
        // A mark may be what stands before the letters or the first of them: the word is the same.
        let letters = match kind {
            Kind::Letter | Kind::Mark => Some(at),
            Kind::Number | Kind::Space | Kind::Other => Some(behind),
            Kind::Symbol | Kind::Break => None,
        };
        if let Some(letters) = letters {
            let end = self.skip(text, letters, |k| matches!(k, Kind::Letter | Kind::Mark));
            if end > letters {
                return Some(end);
            }
        }
        let symbols = if c == ' ' { behind } else { at };
        let end = self.skip(text, symbols, |kind| kind == Kind::Symbol);
        if end > symbols {
            return Some(self.skip(text, end, |kind| kind == Kind::Break));
        }
        if !matches!(kind, Kind::Space | Kind::Break) {
            return None;
        }
        let end = self.skip(text, at, |k| matches!(k, Kind::Space | Kind::Break));
        let white = &text[at..end];
        if let Some(last) = white.rfind(['\r', '\n']) {
            return Some(at + last + 1);
        }
        // The last space before a word belongs to the word.
        match white.char_indices().next_back() {
            Some((last, _)) if last > 0 && end < text.len() => Some(at + last),
            _ => Some(end),
        }
    }

    fn first(&self, text: &str, at: usize) -> Option<(char, Kind)> {
        let c = text[at..].chars().next()?;
        Some((c, self.kinds.of(c)))
    }

    /// Where the characters from `at` on stop being `wanted`.
    fn skip(&self, text: &str, at: usize, wanted: impl Fn(Kind) -> bool) -> usize {
        let unwanted = text[at..].find(|c| !wanted(self.kinds.of(c)));
        unwanted.map_or(text.len(), |offset| at + offset)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(cutter: &Cutter, text: &str) -> Vec<String> {
        let mut pieces = Vec::new();
        cutter.cut(text, &mut |piece| pieces.push(piece.to_string()));
        pieces
    }

    fn both(numbers: &str) -> (Cutter, Cutter) {
        let patterns = [numbers, CJK, WORDS];
        let by_hand = Cutter::new(&patterns).unwrap();
        assert!(matches!(by_hand, Cutter::DeepSeek(_)));
        let regexes = patterns.iter().map(|pattern| Regex::new(pattern).unwrap());
        (by_hand, Cutter::Patterns(regexes.collect()))
    }

    #[test]
    fn words_take_the_space_before_them_along() {
        let (by_hand, _) = both(r"\p{N}{1,3}");
        assert_eq!(
            pieces(&by_hand, "I'm  12345 of them,\n 你好・x"),
            [
                "I", "'m", "  ", "123", "45", " of", " them", ",\n", " ", "你好", "・", "x"
            ]
        );
    }

    #[test]
    fn the_patterns_are_known_however_they_are_spelled() {
        let escaped = WORDS.replace('"', "\\\"");
        let raw = WORDS.replace("\\r", "\r").replace("\\n", "\n");
        for words in [escaped.as_str(), raw.as_str()] {
            let cutter = Cutter::new(&[r"\p{N}{1,3}", CJK, words]).unwrap();
            assert!(matches!(cutter, Cutter::DeepSeek(_)), "{words}");
        }
        assert!(matches!(
            Cutter::new(&[r"\p{N}", WORDS]),
            Some(Cutter::Patterns(_))
        ));
    }

    #[test]
    fn every_character_is_cut_as_the_patterns_cut_it() {
        let (by_hand, patterns) = both(r"\p{N}{1,3}");
        let all: Vec<char> = ('\0'..=char::MAX).collect();
        // Beside a letter and a space, and all of a block together.
        for chars in all.chunks(512) {
            let text: String = chars.iter().flat_map(|c| [*c, 'a', ' ', *c]).collect();
            assert_eq!(pieces(&by_hand, &text), pieces(&patterns, &text));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn any_text_is_cut_as_the_patterns_cut_it(
            text in prop::collection::vec(prop_oneof![
                4 => prop::sample::select(vec![
                    ' ', ' ', '\n', '\r', '\t', '\u{a0}', '\u{2028}', '\u{85}', 'a', 'Z', 'é', 'ß', '\u{301}', '\u{20dd}', '1', '2',
                    '٣', 'Ⅷ', '.', ',', '\'', '$', '€', '“', '_', '+', '你', '好', 'の', 'ア', '・', '\u{3099}', '\u{3097}', '\u{200d}',
                    '🙂', '𝔸', '\u{1d165}', '\0', '\u{f0001}',
                ]),
                1 => any::<char>(),
            ], 0..40),
            single in any::<bool>(),
        ) {
            let (by_hand, patterns) = both(if single { r"\p{N}" } else { r"\p{N}{1,3}" });
            let text: String = text.into_iter().collect();
            prop_assert_eq!(pieces(&by_hand, &text), pieces(&patterns, &text));
        }
    }
}
