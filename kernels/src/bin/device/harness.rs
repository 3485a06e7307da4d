//! The device as checks and timings use it: memory with contents, graphs, bursts, rulers.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaGraph, CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits, sys};
use kernels::cuda::probe::{self, Kind};
use kernels::cuda::{Gpu, Span};

/// Result with any error inside.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A device, its kernels and one stream.
#[derive(Debug)]
pub(crate) struct Harness {
    /// The device.
    pub(crate) gpu: Gpu,
    /// Where everything is enqueued.
    pub(crate) stream: Arc<CudaStream>,
    /// Idle time before each timed burst. Without any, large products are bound by the power limit.
    rest: Duration,
}

/// One timed burst.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// Median time of one call.
    pub(crate) us: f64,
    /// Length of the burst it was measured in.
    pub(crate) burst_ms: f64,
    /// SM clock at the end of the burst.
    pub(crate) mhz: f64,
}

impl Harness {
    /// Opens device 0 and loads all kernels.
    pub(crate) fn open(cache: Option<PathBuf>) -> Result<Self> {
        let gpu = Gpu::open(0, cache)?;
        let start = std::time::Instant::now();
        gpu.load_all()?;
        let stream = gpu.context().new_stream()?;
        println!(
            "{}, {} SMs, kernels loaded in {:.2} s",
            gpu.context().name()?,
            gpu.sms(),
            start.elapsed().as_secs_f64()
        );
        let rest = std::env::var("HADAL_BENCH_REST_MS")
            .ok()
            .and_then(|ms| ms.parse().ok())
            .map_or(Duration::ZERO, Duration::from_millis);
        Ok(Self { gpu, stream, rest })
    }

    /// Memory with undefined contents.
    pub(crate) fn alloc<T: DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>> {
        // SAFETY: every user fills the memory or poisons it before it is read.
        Ok(unsafe { self.stream.alloc::<T>(len.max(1)) }?)
    }

    /// Memory filled with 0xff bytes: NaN in every float format.
    pub(crate) fn poisoned<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        len: usize,
    ) -> Result<CudaSlice<T>> {
        let slice = self.alloc::<T>(len)?;
        self.poison(&slice)?;
        Ok(slice)
    }

    /// Overwrites memory with 0xff bytes.
    pub(crate) fn poison<T>(&self, slice: &CudaSlice<T>) -> Result<()> {
        let span = self.span(slice);
        // SAFETY: the span covers the slice's own memory.
        unsafe {
            sys::cuMemsetD8Async(
                span.address(),
                0xff,
                span.len() * size_of::<T>(),
                self.stream.cu_stream(),
            )
        }
        .result()?;
        Ok(())
    }

    /// Random contents made on the device.
    pub(crate) fn random<T: DeviceRepr>(
        &self,
        len: usize,
        kind: Kind,
        scale: f32,
        seed: u64,
    ) -> Result<CudaSlice<T>> {
        let slice = self.alloc::<T>(len)?;
        probe::fill(
            &self.gpu,
            &self.stream,
            self.span(&slice),
            kind,
            scale,
            seed,
        )?;
        Ok(slice)
    }

    /// Contents from the host.
    pub(crate) fn upload<T: DeviceRepr>(&self, data: &[T]) -> Result<CudaSlice<T>> {
        Ok(self.stream.clone_htod(data)?)
    }

    /// Contents to the host, after everything enqueued.
    pub(crate) fn download<T: DeviceRepr + Clone + Default>(
        &self,
        slice: &CudaSlice<T>,
    ) -> Result<Vec<T>> {
        Ok(self.stream.clone_dtoh(slice)?)
    }

    /// A slice as launchers take it.
    pub(crate) fn span<T>(&self, slice: &CudaSlice<T>) -> Span<T> {
        Span::of(slice, &self.stream)
    }

    /// Captures what `enqueue` enqueues.
    pub(crate) fn capture(&self, enqueue: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        self.stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let outcome = enqueue();
        let graph = self.stream.end_capture(
            sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH,
        );
        outcome?;
        graph?.ok_or_else(|| "nothing was captured".into())
    }

    /// Times `call(i)`: a graph of calls over `i` = 0, 1, ... (each with its own buffers, so that weights are cold) long
    /// enough for a burst of `burst_ms`, median of `replays`.
    pub(crate) fn time(
        &self,
        burst_ms: f64,
        replays: usize,
        mut call: impl FnMut(usize) -> Result<()>,
    ) -> Result<Timing> {
        const PILOT: usize = 16;
        let pilot = self.capture(|| (0..PILOT).try_for_each(&mut call))?;
        pilot.launch()?;
        let rough = self.elapsed(&pilot)? / PILOT as f64;
        let calls = ((burst_ms / rough).ceil() as usize).clamp(PILOT, 4000);
        let graph = self.capture(|| (0..calls).try_for_each(&mut call))?;
        graph.upload()?;
        let clock = self.stream.alloc_zeros::<u64>(2)?;
        let mut times = Vec::with_capacity(replays);
        for _ in 0..replays {
            std::thread::sleep(self.rest);
            times.push(self.elapsed(&graph)?);
        }
        graph.launch()?;
        probe::clock_rate(&self.gpu, &self.stream, self.span(&clock))?;
        let clock = self.download(&clock)?;
        times.sort_by(f64::total_cmp);
        let median = times[replays / 2];
        Ok(Timing {
            us: median * 1000.0 / calls as f64,
            burst_ms: median,
            mhz: clock[0] as f64 * 1000.0 / clock[1] as f64,
        })
    }

    /// GB/s (read and written) of the copy kernel over a gigabyte: the ruler of a run.
    pub(crate) fn copy_rate(&self) -> Result<f64> {
        const BYTES: usize = 1 << 30;
        let (from, to) = (self.alloc::<u8>(BYTES)?, self.alloc::<u8>(BYTES)?);
        let timing = self.time(4.0, 5, |_| {
            Ok(probe::copy(
                &self.gpu,
                &self.stream,
                self.span(&from),
                self.span(&to),
            )?)
        })?;
        Ok(2.0 * BYTES as f64 / timing.us / 1000.0)
    }

    /// A number that differs when any bit of `slice` differs.
    pub(crate) fn digest<T>(&self, slice: &CudaSlice<T>) -> Result<u64> {
        let result = self.stream.alloc_zeros::<u64>(1)?;
        let words = slice.len() * size_of::<T>() / 4;
        // SAFETY: the words lie inside the slice.
        let span = unsafe { Span::<u32>::from_raw(self.span(slice).address(), words) };
        probe::digest(&self.gpu, &self.stream, span, self.span(&result))?;
        Ok(self.download(&result)?[0])
    }

    /// Milliseconds of one launch of a graph.
    fn elapsed(&self, graph: &CudaGraph) -> Result<f64> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let start = self.stream.record_event(flags)?;
        graph.launch()?;
        let end = self.stream.record_event(flags)?;
        Ok(f64::from(start.elapsed_ms(&end)?))
    }
}
