//! The instances of the kernel templates, read from the lists in their sources.

use std::sync::OnceLock;

use super::super::Program;

/// One instance of a kernel template, as `fp8_gemm.cu` and `fp8_prefill.cu` list them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Kernel name.
    pub name: &'static str,
    /// Which operand has the tensor cores' 64 rows.
    pub design: Design,
    /// Weight rows of a tile.
    pub rows: u32,
    /// Most tokens of a tile.
    pub tokens: u32,
    /// Warpgroups that multiply.
    pub warpgroups: u32,
    /// CTAs that share a tile's K.
    pub split_k: u32,
    /// What the two CTAs of a cluster share.
    pub share: Share,
    /// Depth of the ring.
    pub stages: u32,
    /// Shared memory holds a whole tile of the output on its way.
    pub whole: bool,
    /// One weight matrix per group.
    pub grouped: bool,
}

/// The two kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Design {
    /// `fp8_gemm.cu`: weights are the 64-row operand; any number of tokens wastes little.
    Weights,
    /// `fp8_prefill.cu`: tokens are; cheaper sums and larger tiles, 64 tokens at a time.
    Tokens,
}

/// What two CTAs of a cluster fetch together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// Nothing.
    Alone,
    /// The tokens of two neighbouring weight tiles.
    Tokens,
    /// The weights of two neighbouring token tiles.
    Weights,
}

impl Instance {
    /// All instances, read from the lists in the kernels' sources.
    pub fn all() -> &'static [Self] {
        static ALL: OnceLock<Vec<Instance>> = OnceLock::new();
        ALL.get_or_init(|| {
            [Design::Weights, Design::Tokens]
                .into_iter()
                .flat_map(|design| {
                    let source = Program::find(design.program()).map_or("", |p| p.source);
                    source
                        .lines()
                        .filter_map(move |line| Self::parse(design, line))
                })
                .collect()
        })
    }

    /// The instance of this name.
    pub fn find(name: &str) -> Option<Self> {
        Self::all().iter().copied().find(|i| i.name == name)
    }

    fn parse(design: Design, line: &'static str) -> Option<Self> {
        let prefix = match design {
            Design::Weights => "FP8_GEMM(",
            Design::Tokens => "FP8_PREFILL(",
        };
        let fields: Vec<_> = line
            .strip_prefix(prefix)?
            .strip_suffix(')')?
            .split(", ")
            .collect();
        let number = |i: usize| fields.get(i)?.parse::<u32>().ok();
        let instance = match design {
            Design::Weights => Self {
                name: fields.get(6)?,
                design,
                rows: 64 * number(0)?,
                tokens: number(2)?,
                warpgroups: number(0)? * number(1)?,
                split_k: number(3)?,
                share: Share::Alone,
                stages: number(4)?,
                whole: false,
                grouped: *fields.get(5)? == "true",
            },
            Design::Tokens => Self {
                name: fields.get(7)?,
                design,
                rows: number(2)?,
                tokens: 64 * number(0)? * number(1)?,
                warpgroups: number(0)?,
                split_k: 1,
                share: match *fields.get(3)? {
                    "TOKENS" => Share::Tokens,
                    "WEIGHTS" => Share::Weights,
                    _ => Share::Alone,
                },
                stages: number(4)?,
                whole: *fields.get(5)? == "true",
                grouped: *fields.get(6)? == "true",
            },
        };
        Some(instance)
    }

    /// Dynamic shared memory, the same sum as in the kernel.
    pub(super) fn shared_bytes(self, groups: usize) -> usize {
        let (rows, tokens, stages) = (
            self.rows as usize,
            self.tokens as usize,
            self.stages as usize,
        );
        let epilogue = match self.design {
            Design::Weights if self.split_k > 1 => {
                let share = (tokens / 8).div_ceil(self.split_k as usize);
                (self.split_k as usize - 1) * share * rows * 2 * 16
            }
            Design::Weights => rows / 64 * 32 * 144,
            Design::Tokens if self.whole => rows * tokens * 2,
            Design::Tokens => 4 * self.warpgroups as usize * 2048,
        };
        let exchange = (self.depth() as usize - 1) * rows * tokens * 4;
        stages * ((rows + tokens) * 128 + tokens * 4 + 16 + 16)
            + epilogue
            + 32
            + exchange
            + groups * 4
    }

    /// Token rows of one bulk copy, `BOX` in the kernel.
    pub(super) fn token_box(self) -> u32 {
        match (self.design, self.tokens) {
            (Design::Tokens, _) if self.grouped => 64,
            (Design::Tokens, t) if self.share == Share::Tokens => t / 2,
            (Design::Tokens, t) => t,
            (Design::Weights, t) if !self.grouped && t % 64 == 0 => 64,
            (Design::Weights, t) if t > 64 => 32,
            (Design::Weights, _) => 16,
        }
    }

    /// Weight rows of one bulk copy.
    pub(super) fn weight_box(self) -> u32 {
        match self.share {
            Share::Weights => self.rows / 2,
            Share::Alone | Share::Tokens => self.rows,
        }
    }

    /// Weight rows and tokens that a cluster, or a CTA alone, works on.
    pub(super) fn cluster_tile(self) -> (u32, u32) {
        match self.share {
            Share::Alone => (self.rows, self.tokens),
            Share::Tokens => (2 * self.rows, self.tokens),
            Share::Weights => (self.rows, 2 * self.tokens),
        }
    }

    /// CTAs of a cluster.
    pub(super) fn cluster(self) -> u32 {
        match self.share {
            Share::Alone => self.split_k,
            Share::Tokens | Share::Weights => 2,
        }
    }

    /// Clusters that the device holds at once.
    pub(super) fn clusters(self, sms: u32) -> u32 {
        sms / self.cluster()
    }

    /// Warpgroups that share 64 weight rows and take turns on the blocks of K.
    fn depth(self) -> u32 {
        match self.design {
            Design::Weights => 64 * self.warpgroups / self.rows,
            Design::Tokens => 1,
        }
    }

    pub(super) fn threads(self) -> u32 {
        // Register counts change by whole warpgroups.
        let whole = self.design == Design::Tokens || self.tokens > 64 && self.split_k == 1;
        self.warpgroups * 128 + if whole { 128 } else { 32 }
    }
}

impl Design {
    /// Name of the kernel's file.
    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Weights => "fp8_gemm",
            Self::Tokens => "fp8_prefill",
        }
    }
}
