//! Norms, activations, quantising.

use super::{Error, Host, Judged, Operation, Random, bf16};
use crate::backend::{Backend, Output, Quantised, Result, ScaleFormat};
use crate::cpu::Cpu;
use crate::fp8;
use crate::tensor::DType;

/// Epsilon of the norms.
pub const EPS: f32 = 1e-6;

/// An operation's output, plain and quantised 1x128.
#[derive(Debug)]
pub struct Rows {
    /// `[rows, cols]`.
    pub plain: Vec<f32>,
    /// `[rows, cols]` FP8.
    pub data: Vec<u8>,
    /// `[rows, cols / 128]`.
    pub scales: Vec<f32>,
}

impl Rows {
    /// Bytes and scales of the rows that `used` keeps that differ from quantising the plain values.
    fn misquantised(
        &self,
        cols: usize,
        format: ScaleFormat,
        used: impl Fn(usize) -> bool,
    ) -> usize {
        let mut wrong = 0;
        for (block, x) in self.plain.chunks_exact(fp8::BLOCK).enumerate() {
            if !used(block * fp8::BLOCK / cols) {
                continue;
            }
            let amax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let scale = match format {
                ScaleFormat::F32 => fp8::scale(amax),
                ScaleFormat::Ue8m0 => fp8::scale_ue8m0(amax),
            };
            wrong += usize::from(self.scales[block] != scale);
            let data = &self.data[block * fp8::BLOCK..];
            wrong += x
                .iter()
                .zip(data)
                .filter(|(x, byte)| fp8::encode(**x / scale) != **byte)
                .count();
        }
        wrong
    }

    /// Runs `operation` with room for its output.
    fn collect<'a>(
        host: &mut Host<'a>,
        rows: usize,
        cols: usize,
        format: ScaleFormat,
        operation: impl FnOnce(&mut Host<'a>, Output<'_, crate::cpu::Memory>) -> Result<()>,
    ) -> Result<Self> {
        let mut plain = host.alloc(DType::F32, rows, cols)?;
        let mut quantised = Quantised {
            data: host.alloc(DType::Fp8, rows, cols)?,
            scales: host.alloc(DType::F32, rows, cols / fp8::BLOCK)?,
        };
        let out = Output {
            plain: Some(&mut plain),
            quantised: Some((&mut quantised, format)),
        };
        operation(host, out)?;
        Ok(Self {
            plain: host.read(&plain)?,
            data: host.read(&quantised.data)?,
            scales: host.read(&quantised.scales)?,
        })
    }
}

/// Add, RMSNorm, quantise.
#[derive(Debug)]
pub struct AddNorm {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Before.
    pub residual: Vec<u16>,
    /// What is added first.
    pub delta: Option<Vec<u16>>,
    /// `[cols]`.
    pub weight: Vec<f32>,
    /// Of the quantised output.
    pub format: ScaleFormat,
}

/// What [`AddNorm`] leaves.
#[derive(Debug)]
pub struct Normed {
    /// `residual + delta`, as written back.
    pub residual: Vec<f32>,
    /// The norm.
    pub out: Rows,
}

impl AddNorm {
    /// Rows, columns, with a delta, format of the cases.
    pub fn list() -> Vec<(usize, usize, bool, ScaleFormat)> {
        let shapes = [
            (1, 7168, true),
            (64, 7168, true),
            (130, 7168, false),
            (33, 1536, false),
            (7, 128, true),
            (5, 8192, true),
        ];
        let formats = [ScaleFormat::F32, ScaleFormat::Ue8m0].into_iter();
        let both = |f| shapes.map(|(rows, cols, delta)| (rows, cols, delta, f));
        formats.flat_map(both).collect()
    }

    /// Random inputs.
    pub fn new(rows: usize, cols: usize, delta: bool, format: ScaleFormat) -> Self {
        let mut random = Random(rows as u64);
        Self {
            rows,
            cols,
            residual: random.bf16s(rows * cols, 2.0),
            delta: delta.then(|| random.bf16s(rows * cols, 1.0)),
            weight: random.weights(cols, 1.0),
            format,
        }
    }
}

impl Operation for AddNorm {
    type Out = Normed;
    const BOUND: f64 = 3e-3;
    const CPU_BOUND: f64 = 5e-6;

    fn cpu(&self, cpu: &Cpu) -> Result<Normed> {
        let mut host = Host::new(cpu)?;
        let mut residual = host.bf16s(self.cols, &self.residual)?;
        let delta = self.delta.as_ref().map(|d| host.bf16s(self.cols, d));
        let (delta, weight) = (delta.transpose()?, host.floats(self.cols, &self.weight)?);
        let out = Rows::collect(&mut host, self.rows, self.cols, self.format, |h, out| {
            let (stream, delta) = (&mut h.stream, delta.as_ref());
            h.cpu
                .add_norm(stream, &mut residual, delta, &weight, EPS, self.rows, out)
        })?;
        Ok(Normed {
            residual: host.read(&residual)?,
            out,
        })
    }

    fn judge(&self, out: &Normed) -> Judged {
        let mut error = Error::default();
        for r in 0..self.rows {
            let row = r * self.cols..(r + 1) * self.cols;
            let after = &out.residual[row.clone()];
            for (i, &sum) in row.clone().zip(after) {
                let delta = self.delta.as_ref().map_or(0.0, |d| bf16(d[i]));
                error.add(f64::from(sum), bf16(self.residual[i]) + delta);
            }
            let squares: f64 = after.iter().map(|&v| f64::from(v).powi(2)).sum();
            let inverse = 1.0 / (squares / self.cols as f64 + f64::from(EPS)).sqrt();
            for ((x, w), y) in after.iter().zip(&self.weight).zip(&out.out.plain[row]) {
                error.add(f64::from(*y), f64::from(*x) * inverse * f64::from(*w));
            }
        }
        Judged::new(
            &error,
            out.out.misquantised(self.cols, self.format, |_| true),
        )
    }

    fn work(&self) -> f64 {
        (self.rows * self.cols) as f64
    }
}

/// SwiGLU, quantise.
#[derive(Debug)]
pub struct Swiglu {
    /// Rows.
    pub rows: usize,
    /// Columns of the output.
    pub cols: usize,
    /// `[rows, gate | up]`.
    pub x: Vec<u16>,
    /// Rows used of each group of [`Self::GROUP`], for the masked layout; the CPU backend has no such layout and computes all.
    pub counts: Option<Vec<i32>>,
    /// Of the quantised output.
    pub format: ScaleFormat,
}

impl Swiglu {
    /// Rows of a masked group.
    pub const GROUP: usize = 24;

    /// Rows, columns, masked, format of the cases.
    pub fn list() -> Vec<(usize, usize, bool, ScaleFormat)> {
        let shapes = [
            (1, 2048, false),
            (128, 2048, false),
            (96, 2048, true),
            (9, 18432, false),
            (3, 128, false),
        ];
        let formats = [ScaleFormat::F32, ScaleFormat::Ue8m0].into_iter();
        let both = |f| shapes.map(|(rows, cols, masked)| (rows, cols, masked, f));
        formats.flat_map(both).collect()
    }

    /// Random inputs.
    pub fn new(rows: usize, cols: usize, masked: bool, format: ScaleFormat) -> Self {
        let groups = 0..rows.div_ceil(Self::GROUP);
        Self {
            rows,
            cols,
            x: Random(rows as u64).bf16s(rows * 2 * cols, 2.0),
            counts: masked.then(|| groups.map(|g| [24, 0, 1, 13][g % 4]).collect()),
            format,
        }
    }

    /// Whether row `r` counts.
    pub fn used(&self, r: usize) -> bool {
        let count = self.counts.as_ref().map(|c| c[r / Self::GROUP] as usize);
        count.is_none_or(|count| r % Self::GROUP < count)
    }
}

impl Operation for Swiglu {
    type Out = Rows;
    const BOUND: f64 = 3e-3;
    const CPU_BOUND: f64 = 1e-6;

    fn cpu(&self, cpu: &Cpu) -> Result<Rows> {
        let mut host = Host::new(cpu)?;
        let x = host.bf16s(2 * self.cols, &self.x)?;
        Rows::collect(&mut host, self.rows, self.cols, self.format, |h, out| {
            h.cpu.swiglu(&mut h.stream, &x, self.rows, out)
        })
    }

    fn judge(&self, out: &Rows) -> Judged {
        let mut error = Error::default();
        for r in (0..self.rows).filter(|&r| self.used(r)) {
            let (gate, up) = self.x[r * 2 * self.cols..(r + 1) * 2 * self.cols].split_at(self.cols);
            let y = &out.plain[r * self.cols..];
            for ((g, u), y) in gate.iter().zip(up).zip(y) {
                let gate = bf16(*g);
                error.add(f64::from(*y), gate / (1.0 + (-gate).exp()) * bf16(*u));
            }
        }
        Judged::new(
            &error,
            out.misquantised(self.cols, self.format, |r| self.used(r)),
        )
    }

    fn work(&self) -> f64 {
        (self.rows * self.cols) as f64
    }
}

/// Quantise alone.
#[derive(Debug)]
pub struct Quantise {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Input.
    pub x: Vec<u16>,
    /// Of the output.
    pub format: ScaleFormat,
}

impl Quantise {
    /// Rows, columns, format of the cases.
    pub fn list() -> [(usize, usize, ScaleFormat); 4] {
        [
            (1, 16384, ScaleFormat::F32),
            (77, 1536, ScaleFormat::F32),
            (1, 16384, ScaleFormat::Ue8m0),
            (77, 1536, ScaleFormat::Ue8m0),
        ]
    }

    /// Random inputs.
    pub fn new(rows: usize, cols: usize, format: ScaleFormat) -> Self {
        Self {
            rows,
            cols,
            x: Random(rows as u64).bf16s(rows * cols, 3.0),
            format,
        }
    }
}

impl Operation for Quantise {
    /// `plain` is the input.
    type Out = Rows;
    const BOUND: f64 = 0.0;
    const CPU_BOUND: f64 = 0.0;

    fn cpu(&self, cpu: &Cpu) -> Result<Rows> {
        let mut host = Host::new(cpu)?;
        let x = host.bf16s(self.cols, &self.x)?;
        let mut out = Quantised {
            data: host.alloc(DType::Fp8, self.rows, self.cols)?,
            scales: host.alloc(DType::F32, self.rows, self.cols / fp8::BLOCK)?,
        };
        cpu.quantise(&mut host.stream, &x, self.rows, self.format, &mut out)?;
        Ok(Rows {
            plain: super::floats(&self.x),
            data: host.read(&out.data)?,
            scales: host.read(&out.scales)?,
        })
    }

    fn judge(&self, out: &Rows) -> Judged {
        let wrong = out.misquantised(self.cols, self.format, |_| true);
        Judged::new(&Error::default(), wrong)
    }

    fn work(&self) -> f64 {
        (self.rows * self.cols) as f64
    }
}
