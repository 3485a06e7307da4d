//! Rotary positions, with or without YaRN (arXiv 2309.00071; `inference/model.py` of DeepSeek-V3).

use std::f64::consts::PI;

use serde::Deserialize;

use crate::config::{Error, value};

/// Frequencies of the rotated pairs and the two factors YaRN adds.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Radians per position of pair i (neighbours 2i and 2i + 1).
    pub frequencies: Vec<f32>,
    /// Factor on cosine and sine.
    amplitude: f32,
    /// `mscale(factor, mscale_all_dim)`, whose square multiplies attention scores.
    mscale: f64,
}

/// Positions for a pair to turn by one radian. The reference computes in f32, in this order; far positions would show a
/// difference.
fn periods(dim: usize, theta: f64) -> impl Iterator<Item = f32> {
    (0..dim / 2).map(move |i| (theta as f32).powf((2 * i) as f32 / dim as f32))
}

impl Rope {
    /// Rotation of `dim` values without YaRN.
    pub fn plain(dim: usize, theta: f64) -> Self {
        Self {
            frequencies: periods(dim, theta).map(f32::recip).collect(),
            amplitude: 1.0,
            mscale: 1.0,
        }
    }

    /// What YaRN multiplies the softmax scale with.
    pub fn softmax_factor(&self) -> f64 {
        self.mscale * self.mscale
    }

    /// Cosine and sine side by side for each pair: `[positions, 2 * pairs]`.
    pub fn table(&self, positions: usize) -> Vec<f32> {
        let mut table = Vec::with_capacity(positions * 2 * self.frequencies.len());
        for position in 0..positions {
            for frequency in &self.frequencies {
                // The angle is an f32 product in the reference; its cosine and sine are exact to f32.
                let angle = f64::from(position as f32 * frequency);
                table.push(angle.cos() as f32 * self.amplitude);
                table.push(angle.sin() as f32 * self.amplitude);
            }
        }
        table
    }
}

/// Rotary fields in both spellings.
#[derive(Deserialize)]
#[expect(clippy::struct_field_names, reason = "the names in the file")]
pub(crate) struct RopeJson {
    rope_theta: Option<f64>,
    rope_scaling: Option<Scaling>,
    rope_parameters: Option<Scaling>,
}

#[derive(Deserialize)]
struct Scaling {
    #[serde(rename = "type")]
    kind: Option<String>,
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    attention_factor: Option<f64>,
    truncate: Option<bool>,
    partial_rotary_factor: Option<f64>,
}

const ORIGINAL: &str = "rope_scaling.original_max_position_embeddings";

fn positive(field: &'static str, given: f64) -> Result<f64, Error> {
    if given.is_finite() && given > 0.0 {
        Ok(given)
    } else {
        Err(value(field, format!("{given} is not a positive number")))
    }
}

impl RopeJson {
    /// The rotation of `dim` values.
    pub(crate) fn check(&self, dim: usize, max_position: Option<i64>) -> Result<Rope, Error> {
        let scaling = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let theta = scaling
            .and_then(|s| s.rope_theta)
            .or(self.rope_theta)
            .unwrap_or(10_000.0);
        if !(theta.is_finite() && theta > 1.0) {
            return Err(value("rope_theta", format!("{theta} is not above 1")));
        }
        let kind = scaling.and_then(|s| s.rope_type.as_deref().or(s.kind.as_deref()));
        match (kind, scaling) {
            (None | Some("default"), _) | (_, None) => Ok(Rope::plain(dim, theta)),
            (Some("yarn"), Some(scaling)) => scaling.yarn(dim, theta, max_position),
            (Some(other), _) => Err(value(
                "rope_scaling.type",
                format!("\"{other}\" is not supported (only yarn)"),
            )),
        }
    }
}

/// `0.1 m ln(factor) + 1`: how much sharper attention gets for a longer context.
fn mscale(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * m * factor.ln() + 1.0
    }
}

impl Scaling {
    fn yarn(&self, dim: usize, theta: f64, max_position: Option<i64>) -> Result<Rope, Error> {
        if self
            .partial_rotary_factor
            .is_some_and(|part| (part - 1.0).abs() > f64::EPSILON)
        {
            return Err(value(
                "rope_parameters.partial_rotary_factor",
                "must be 1".into(),
            ));
        }
        let original = self
            .original_max_position_embeddings
            .ok_or_else(|| value(ORIGINAL, "missing".into()))
            .and_then(|given| positive(ORIGINAL, given))?;
        let factor = match (self.factor, max_position) {
            (Some(factor), _) => factor,
            (None, Some(max)) => max as f64 / original,
            (None, None) => return Err(value("rope_scaling.factor", "missing".into())),
        };
        let factor = positive("rope_scaling.factor", factor)?;
        let beta = |field, given: Option<f64>, default| match given {
            None | Some(0.0) => Ok(default),
            Some(given) => positive(field, given),
        };
        let fast = beta("rope_scaling.beta_fast", self.beta_fast, 32.0)?;
        let slow = beta("rope_scaling.beta_slow", self.beta_slow, 1.0)?;
        // The pair that turns `beta` times over the original context.
        let pair =
            |beta: f64| dim as f64 * (original / (beta * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (pair(fast), pair(slow));
        if self.truncate.unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if (high - low).abs() < f64::EPSILON {
            high += 0.001;
        }
        let frequencies = periods(dim, theta)
            .enumerate()
            .map(|(i, period)| {
                let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let keep = 1.0 - ramp;
                (factor as f32 * period).recip() * (1.0 - keep) + period.recip() * keep
            })
            .collect();
        let all_dim = self.mscale_all_dim.unwrap_or(0.0);
        let amplitude = match (self.attention_factor, self.mscale) {
            (Some(given), _) => given,
            (None, Some(m)) if m != 0.0 && all_dim != 0.0 => {
                mscale(factor, m) / mscale(factor, all_dim)
            }
            (None, _) => mscale(factor, 1.0),
        };
        let amplitude = positive("rope_scaling.attention_factor", amplitude)? as f32;
        let mscale = if all_dim == 0.0 {
            1.0
        } else {
            mscale(factor, all_dim)
        };
        Ok(Rope {
            frequencies,
            amplitude,
            mscale: positive("rope_scaling.mscale_all_dim", mscale)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yarn() -> Rope {
        let json = r#"{"rope_theta": 10000, "rope_scaling": {"type": "yarn", "factor": 40,
            "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0}}"#;
        serde_json::from_str::<RopeJson>(json)
            .unwrap()
            .check(64, Some(163_840))
            .unwrap()
    }

    #[test]
    fn released_yarn_gives_the_published_frequencies() {
        let expected: [f64; 32] = [
            1.0,
            0.749_894_21,
            0.562_341_33,
            0.421_696_5,
            0.316_227_77,
            0.237_137_37,
            0.177_827_94,
            0.133_352_14,
            0.1,
            0.074_989_421,
            0.056_234_133,
            0.039_006_927,
            0.026_879_36,
            0.018_378_146,
            0.012_447_956,
            0.008_334_509,
            0.0055,
            0.003_561_997_5,
            0.002_249_365_3,
            0.001_370_513_6,
            0.000_790_569_42,
            0.000_414_990_4,
            0.000_177_827_94,
            3.333_803_6e-5,
            2.5e-5,
            1.874_735_5e-5,
            1.405_853_3e-5,
            1.054_241_3e-5,
            7.905_694_2e-6,
            5.928_434_3e-6,
            4.445_698_5e-6,
            3.333_803_6e-6,
        ];
        let rope = yarn();
        for (got, want) in rope.frequencies.iter().zip(expected) {
            assert!(
                (f64::from(*got) - want).abs() <= 1e-6 * want,
                "{got} {want}"
            );
        }
        assert_eq!(rope.frequencies.len(), 32);
        assert!((rope.softmax_factor() * 192f64.powf(-0.5) - 0.135_233_778_9).abs() < 1e-9);
    }

    #[test]
    fn table_holds_the_published_check_values() {
        let table = yarn().table(1001);
        for (position, pair, cos, sin) in [
            (1, 16, 0.999_984_9, 0.005_500_0),
            (1000, 0, 0.562_379_1, 0.826_879_5),
            (1000, 10, 0.950_940_3, -0.309_374_6),
            (1000, 16, 0.708_669_8, -0.705_540_3),
            (1000, 22, 0.984_230_2, 0.176_892_2),
            (1000, 31, 0.999_994_4, 0.003_333_8),
        ] {
            let at = position * 64 + 2 * pair;
            assert!(
                (table[at] - cos).abs() < 1e-5,
                "{position} {pair}: {}",
                table[at]
            );
            assert!(
                (table[at + 1] - sin).abs() < 1e-5,
                "{position} {pair}: {}",
                table[at + 1]
            );
        }
    }

    #[test]
    fn plain_rotation_has_no_factors() {
        let rope = serde_json::from_str::<RopeJson>(r#"{"rope_theta": 100}"#).unwrap();
        let rope = rope.check(4, None).unwrap();
        assert_eq!(rope.frequencies, [1.0, 0.1]);
        assert!((rope.softmax_factor() - 1.0).abs() < f64::EPSILON);
    }

    #[test]
    fn yarn_without_all_dim_scales_the_table_and_not_the_scores() {
        let json = r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
            "original_max_position_embeddings": 64}}"#;
        let rope = serde_json::from_str::<RopeJson>(json)
            .unwrap()
            .check(8, Some(256))
            .unwrap();
        assert!((rope.softmax_factor() - 1.0).abs() < f64::EPSILON);
        assert!((rope.table(1)[0] - (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        let json = r#"{"rope_scaling": {"type": "llama3", "factor": 4.0}}"#;
        let error = serde_json::from_str::<RopeJson>(json)
            .unwrap()
            .check(8, None)
            .unwrap_err();
        assert!(
            error.to_string().contains("rope_scaling.type: \"llama3\""),
            "{error}"
        );
    }
}
