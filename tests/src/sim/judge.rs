//! What must hold after a run (the invariants of ARCHITECTURE.md).

use std::fmt;

use super::{
    client::{End, Outcome},
    plan::Ask,
};

/// Something that must never happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A client got a token that the undisturbed answer does not have at this place.
    WrongToken {
        /// Request.
        ask: usize,
        /// Place in the answer.
        index: usize,
        /// What came.
        found: u32,
        /// What belongs there.
        expected: Option<u32>,
    },
    /// A client got tokens whose numbers do not go 0, 1, 2, ...
    Disorder {
        /// Request.
        ask: usize,
        /// Place in the stream.
        place: usize,
        /// The number that came.
        index: u32,
    },
    /// A request that was reported as complete lacks tokens.
    Short {
        /// Request.
        ask: usize,
        /// Tokens that came.
        found: usize,
        /// Tokens that belong there.
        expected: usize,
    },
    /// A request did not end exactly once.
    Ends {
        /// Request.
        ask: usize,
        /// How it ended.
        ends: Vec<End>,
    },
    /// An engine computed with wrong KV bytes.
    Bytes(String),
    /// A worker holds blocks, leases or sequences when nobody needs them any more.
    Leak(String),
    /// After everything healed, a request did not succeed.
    Dead(String),
    /// Code of a simulated host panicked, which ended the run.
    Panic(String),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Compares what clients saw with the undisturbed answers.
pub(super) fn judge(asks: &[Ask], answers: &[Vec<u32>], outcomes: &[Outcome]) -> Vec<Violation> {
    let all = asks.iter().zip(answers).zip(outcomes).enumerate();
    all.flat_map(|(number, ((_, answer), outcome))| judge_one(number, answer, outcome))
        .collect()
}

fn judge_one(ask: usize, answer: &[u32], outcome: &Outcome) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (place, &(index, found)) in outcome.tokens.iter().enumerate() {
        let expected = answer.get(place).copied();
        if index as usize != place {
            violations.push(Violation::Disorder { ask, place, index });
            break;
        }
        if expected != Some(found) {
            violations.push(Violation::WrongToken {
                ask,
                index: place,
                found,
                expected,
            });
            break;
        }
    }
    match outcome.ends[..] {
        [End::Finished(_)] if outcome.tokens.len() < answer.len() => {
            let (found, expected) = (outcome.tokens.len(), answer.len());
            violations.push(Violation::Short {
                ask,
                found,
                expected,
            });
        }
        [End::Finished(_) | End::Failed(_) | End::Left] => {}
        _ => violations.push(Violation::Ends {
            ask,
            ends: outcome.ends.clone(),
        }),
    }
    violations
}

#[cfg(test)]
mod tests {
    use proto::v1::FinishReason;

    use super::*;

    fn outcome(tokens: &[(u32, u32)], ends: &[End]) -> Outcome {
        Outcome {
            tokens: tokens.to_vec(),
            ends: ends.to_vec(),
        }
    }

    const DONE: End = End::Finished(FinishReason::Length);

    #[test]
    fn a_whole_answer_and_a_clean_error_are_fine() {
        assert_eq!(
            judge_one(0, &[7, 8], &outcome(&[(0, 7), (1, 8)], &[DONE])),
            []
        );
        assert_eq!(
            judge_one(
                0,
                &[7, 8],
                &outcome(&[(0, 7)], &[End::Failed(tonic::Code::Unavailable)])
            ),
            []
        );
    }

    #[test]
    fn wrong_doubled_missing_and_endless_answers_are_found() {
        assert!(matches!(
            judge_one(0, &[7, 8], &outcome(&[(0, 7), (1, 9)], &[DONE]))[..],
            [Violation::WrongToken {
                index: 1,
                found: 9,
                ..
            }]
        ));
        assert!(matches!(
            judge_one(0, &[7, 8], &outcome(&[(0, 7), (0, 7), (1, 8)], &[DONE]))[..],
            [Violation::Disorder {
                place: 1,
                index: 0,
                ..
            }]
        ));
        assert!(matches!(
            judge_one(0, &[7, 8], &outcome(&[(0, 7)], &[DONE]))[..],
            [Violation::Short { found: 1, .. }]
        ));
        for ends in [&[][..], &[DONE, DONE], &[End::Silent], &[End::Hung]] {
            assert!(matches!(
                judge_one(0, &[], &outcome(&[], ends))[..],
                [Violation::Ends { .. }]
            ));
        }
    }
}
