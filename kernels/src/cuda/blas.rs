//! BF16 products through cuBLASLt: the language-model head, the absorbed per-head products, the gate's logits.
//!
//! A [`Plan`] is made once for a shape, outside of any capture: it asks the library for its algorithm. [`Plan::run`] only
//! enqueues.

use cudarc::cublaslt::sys;
use cudarc::driver::CudaStream;

use super::{Error, Result, Span, require};

/// A handle of the library. One per device.
#[derive(Debug)]
pub struct Blas {
    handle: sys::cublasLtHandle_t,
}

// SAFETY: the library documents its handle as usable from several threads at once.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// `out[b][t][n] = sum over k of x[b][t][k] * w[b][n][k]` for `batch` pairs of matrices, sums in float32.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of `x` and `out`.
    pub m: usize,
    /// Rows of `w`, columns of `out`.
    pub n: usize,
    /// Columns of `x` and `w`.
    pub k: usize,
    /// Products.
    pub batch: usize,
    /// Row pitch of `x`, and elements from one product's `x` to the next's (heads side by side: pitch heads * k, step k).
    pub x: Pitch,
    /// The same of `w`.
    pub w: Pitch,
    /// The same of `out`.
    pub out: Pitch,
    /// `out` is F32, not BF16.
    pub float_out: bool,
}

impl Shape {
    /// One product of whole matrices.
    pub fn plain(m: usize, n: usize, k: usize, float_out: bool) -> Self {
        let pitch = |row, rows| Pitch {
            row,
            product: row * rows,
        };
        Self {
            m,
            n,
            k,
            batch: 1,
            x: pitch(k, m),
            w: pitch(k, n),
            out: pitch(n, m),
            float_out,
        }
    }
}

/// Elements between rows and between products.
#[derive(Clone, Copy, Debug)]
pub struct Pitch {
    /// From row to row.
    pub row: usize,
    /// From product to product.
    pub product: usize,
}

impl Pitch {
    /// Elements up to the last one of `batch` products of `rows` x `cols`.
    fn extent(self, batch: usize, rows: usize, cols: usize) -> usize {
        (batch.max(1) - 1) * self.product + (rows.max(1) - 1) * self.row + cols
    }
}

/// A shape with its algorithm.
#[derive(Debug)]
pub struct Plan {
    shape: Shape,
    operation: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: the descriptors are only read after `Blas::plan` has made them.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Blas {
    /// Opens the library in the current context.
    ///
    /// # Errors
    /// [`Error::NoDriver`] where it is missing.
    pub fn open() -> Result<Self> {
        // SAFETY: only asks the dynamic loader whether the library is there.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDriver("libcublasLt"));
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes the handle.
        check(|| "opening".into(), unsafe {
            sys::cublasLtCreate(&raw mut handle)
        })?;
        Ok(Self { handle })
    }

    /// Chooses the algorithm for a shape, allowed `workspace_bytes` at each run.
    pub fn plan(&self, shape: Shape, workspace_bytes: usize) -> Result<Plan> {
        let what = || format!("planning {shape:?}");
        let (bf16, float) = (
            sys::cudaDataType_t::CUDA_R_16BF,
            sys::cudaDataType_t::CUDA_R_32F,
        );
        let out_type = if shape.float_out { float } else { bf16 };
        // Column-major, the library computes the transpose: out^T [n x m] = w [n x k] * x^T [k x m].
        let mut plan = Plan {
            shape,
            operation: std::ptr::null_mut(),
            layouts: [
                layout(bf16, shape.k, shape.n, shape.w, shape.batch)
                    .map_err(|status| failed(what(), status))?,
                layout(bf16, shape.k, shape.m, shape.x, shape.batch)
                    .map_err(|status| failed(what(), status))?,
                layout(out_type, shape.n, shape.m, shape.out, shape.batch)
                    .map_err(|status| failed(what(), status))?,
            ],
            // SAFETY: plain numbers, overwritten below.
            algorithm: unsafe { std::mem::zeroed() },
        };
        let transposed = 1i32; // CUBLAS_OP_T, which the bindings of this library leave out
        let mut preference = std::ptr::null_mut();
        let mut found = 0;
        // SAFETY: plain numbers, written by the library.
        let mut results: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: every pointer is to a live local of the size given; descriptors were made by the library.
        let status = unsafe {
            all([
                &mut || sys::cublasLtMatmulDescCreate(&raw mut plan.operation, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, float),
                &mut || sys::cublasLtMatmulPreferenceCreate(&raw mut preference),
            ])
            .and_then(|()| {
                all([
                    &mut || {
                        sys::cublasLtMatmulDescSetAttribute(
                            plan.operation,
                            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                            (&raw const transposed).cast(),
                            size_of_val(&transposed),
                        )
                    },
                    &mut || {
                        sys::cublasLtMatmulPreferenceSetAttribute(
                            preference,
                            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                            (&raw const workspace_bytes).cast(),
                            size_of_val(&workspace_bytes),
                        )
                    },
                    &mut || {
                        sys::cublasLtMatmulAlgoGetHeuristic(
                            self.handle,
                            plan.operation,
                            plan.layouts[0],
                            plan.layouts[1],
                            plan.layouts[2],
                            plan.layouts[2],
                            preference,
                            1,
                            &raw mut results,
                            &raw mut found,
                        )
                    },
                ])
            })
        };
        if !preference.is_null() {
            // SAFETY: made above, used no more.
            unsafe { sys::cublasLtMatmulPreferenceDestroy(preference) };
        }
        status.map_err(|status| failed(what(), status))?;
        require("cublaslt", found > 0, || {
            format!("no algorithm for {shape:?}")
        })?;
        plan.algorithm = results.algo;
        Ok(plan)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: made by `open`, used no more.
        unsafe { sys::cublasLtDestroy(self.handle) };
    }
}

impl Plan {
    /// Enqueues the product. `out` holds BF16, or F32 where the shape says so.
    pub fn run<T>(
        &self,
        blas: &Blas,
        stream: &CudaStream,
        x: Span<u16>,
        w: Span<u16>,
        out: Span<T>,
        workspace: Span<u8>,
    ) -> Result<()> {
        let s = &self.shape;
        let fits = x.len() >= s.x.extent(s.batch, s.m, s.k)
            && w.len() >= s.w.extent(s.batch, s.n, s.k)
            && out.len() >= s.out.extent(s.batch, s.m, s.n)
            && size_of::<T>() == if s.float_out { 4 } else { 2 };
        require("cublaslt", fits, || {
            format!("{} x {} to {} for {s:?}", x.len(), w.len(), out.len())
        })?;
        let (one, zero) = (1.0f32, 0.0f32);
        let [a, b, d] = self.layouts;
        // SAFETY: descriptors of this plan; the memory is as large as they say, checked above.
        let status = unsafe {
            sys::cublasLtMatmul(
                blas.handle,
                self.operation,
                (&raw const one).cast(),
                w.address() as *const _,
                a,
                x.address() as *const _,
                b,
                (&raw const zero).cast(),
                out.address() as *const _,
                d,
                out.address() as *mut _,
                d,
                &raw const self.algorithm,
                workspace.address() as *mut _,
                workspace.len(),
                stream.cu_stream().cast(),
            )
        };
        check(|| format!("{s:?}"), status)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `Blas::plan`, used no more.
        unsafe {
            if !self.operation.is_null() {
                sys::cublasLtMatmulDescDestroy(self.operation);
            }
            for layout in self.layouts {
                sys::cublasLtMatrixLayoutDestroy(layout);
            }
        }
    }
}

type Status = std::result::Result<(), sys::cublasStatus_t>;

/// A column-major layout of `batch` matrices.
fn layout(
    kind: sys::cudaDataType_t,
    rows: usize,
    cols: usize,
    pitch: Pitch,
    batch: usize,
) -> std::result::Result<sys::cublasLtMatrixLayout_t, sys::cublasStatus_t> {
    let mut layout = std::ptr::null_mut();
    let (count, step) = (batch as i32, pitch.product as i64);
    // SAFETY: writes the layout; the attributes' values are live locals of the sizes given.
    unsafe {
        all([&mut || {
            sys::cublasLtMatrixLayoutCreate(
                &raw mut layout,
                kind,
                rows as u64,
                cols as u64,
                pitch.row as i64,
            )
        }])?;
        all([
            &mut || {
                sys::cublasLtMatrixLayoutSetAttribute(
                    layout,
                    sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                    (&raw const count).cast(),
                    size_of_val(&count),
                )
            },
            &mut || {
                sys::cublasLtMatrixLayoutSetAttribute(
                    layout,
                    sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                    (&raw const step).cast(),
                    size_of_val(&step),
                )
            },
        ])?;
    }
    Ok(layout)
}

/// Calls one after the other until one fails.
fn all<const N: usize>(calls: [&mut dyn FnMut() -> sys::cublasStatus_t; N]) -> Status {
    for call in calls {
        match call() {
            sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => {}
            status => return Err(status),
        }
    }
    Ok(())
}

fn check(what: impl FnOnce() -> String, status: sys::cublasStatus_t) -> Result<()> {
    all([&mut || status]).map_err(|status| failed(what(), status))
}

fn failed(what: String, status: sys::cublasStatus_t) -> Error {
    Error::Blas {
        what,
        status: format!("{status:?}"),
    }
}
