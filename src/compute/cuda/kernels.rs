//! Kernels and their arguments, as declared in `kernels/*.cu`.

use std::fmt;
use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;
use safetensors::Dtype;

/// Largest number of profiles per launch of the update.
pub(super) const MAX_PROFILES: usize = 8;

/// Largest number of profiles per launch of an update in a CUDA graph.
pub(super) const MAX_GRAPH_PROFILES: usize = 4;

/// Largest number of other devices' looks per launch of `join_looks`.
pub(super) const MAX_JOINED: usize = 7;

/// Largest number of sources per launch of the blend.
pub(super) const MAX_SOURCES: usize = 52;

/// Largest number of targets per launch of the blend.
pub(super) const MAX_TARGETS: usize = 8;

/// Number of threads per block.
pub(super) const BLOCK_THREADS: usize = 256;

/// One file of kernels, compiled.
struct Compiled {
    /// Machine code of several architectures, and PTX for later ones.
    fatbin: &'static [u8],
    /// PTX for drivers that are older than the compiler; empty if the build has none.
    ptx: &'static str,
}

macro_rules! compiled {
    ($file:literal) => {
        Compiled {
            fatbin: include_bytes!(concat!(env!("OUT_DIR"), "/", $file, ".fatbin")),
            ptx: include_str!(concat!(env!("OUT_DIR"), "/", $file, ".ptx")),
        }
    };
}

static UPDATE: Compiled = compiled!("update");
static LOOK: Compiled = compiled!("look");
static BLEND: Compiled = compiled!("blend");
static GATHER: Compiled = compiled!("gather");
static REPLAY: Compiled = compiled!("replay");

/// Code of the kernels that a driver loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelCode {
    /// Machine code, or PTX for a device that is newer than the build.
    Fatbin,
    /// PTX that the driver compiles, because it is older than the compiler of the build.
    Ptx,
}

impl fmt::Display for KernelCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KernelCode::Fatbin => "machine code of the build",
            KernelCode::Ptx => "kernels compiled by the driver",
        })
    }
}

/// Returns the number of an averaged dtype in the kernels (`Kind`).
pub(super) fn kind(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::BF16 => 2,
        Dtype::F64 => 3,
        _ => unreachable!("{dtype} is not averaged"),
    }
}

/// Number of plain bytes in the kernels (`Kind`).
pub(super) const KIND_BYTES: u32 = 4;

/// Part of one tensor that a block processes (`Chunk` in `chunk.cuh`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Chunk {
    pub address: u64,
    pub offset: u64,
    pub elements: u32,
    pub kind: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct UpdateArgs {
    pub chunks: u64,
    pub high: [u64; MAX_PROFILES],
    pub low: [u64; MAX_PROFILES],
    pub weights: [f32; MAX_PROFILES],
    pub copies: u64,
    pub found: u64,
    pub threshold: u32,
    /// Padding up to the size of the C++ structure.
    pub padding: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct LookArgs {
    pub chunks: u64,
    pub found: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct BlendArgs {
    pub sources: [u64; MAX_SOURCES],
    pub targets: [u64; MAX_TARGETS],
    pub weights: [f64; MAX_SOURCES * MAX_TARGETS],
    pub sums: u64,
    pub pitch: u64,
    pub overflow: u64,
    pub elements: u64,
    pub limit: f64,
    pub runs: u32,
    pub output: u32,
    pub first: u32,
    pub last: u32,
    pub aligned: u32,
    pub ends: [u8; MAX_SOURCES],
    pub kinds: [u8; MAX_SOURCES],
}

impl Default for BlendArgs {
    fn default() -> Self {
        BlendArgs {
            sources: [0; MAX_SOURCES],
            targets: [0; MAX_TARGETS],
            weights: [0.0; MAX_SOURCES * MAX_TARGETS],
            sums: 0,
            pitch: 0,
            overflow: 0,
            elements: 0,
            limit: 0.0,
            runs: 0,
            output: 0,
            first: 0,
            last: 0,
            aligned: 0,
            ends: [0; MAX_SOURCES],
            kinds: [0; MAX_SOURCES],
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct GatherArgs {
    pub chunks: u64,
    pub to: u64,
    pub count: u64,
}

/// Arguments of `join_looks`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct JoinArgs {
    pub found: u64,
    pub others: [u64; MAX_JOINED],
    pub count: u64,
}

/// Update in a CUDA graph, whose weights are in device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GraphUpdateArgs {
    pub update: UpdateArgs,
    pub weights: u64,
    pub threshold: u64,
}

/// Arguments of `prepare_replay`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PrepareArgs {
    pub replay: u64,
    pub weights: u64,
    pub ticket: u64,
    pub found: u64,
    pub threshold: u32,
    pub count: u32,
    pub values: [f32; MAX_PROFILES],
}

/// Arguments of `end_replay`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct EndArgs {
    pub replay: u64,
    pub outcome: u64,
}

// SAFETY: it holds plain numbers in C's layout and no references. The sizes below are those of the C++ structures.
unsafe impl DeviceRepr for UpdateArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for LookArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for JoinArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for BlendArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for GatherArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for GraphUpdateArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for PrepareArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for EndArgs {}

const _: () = assert!(size_of::<Chunk>() == 24);
const _: () = assert!(size_of::<UpdateArgs>() == 192);
const _: () = assert!(size_of::<BlendArgs>() == 3976 && std::mem::offset_of!(BlendArgs, kinds) == 3920);
const _: () = assert!(size_of::<GatherArgs>() == 24 && size_of::<JoinArgs>() == 72);
const _: () = assert!(size_of::<GraphUpdateArgs>() == 208 && size_of::<PrepareArgs>() == 72);

/// Kernels that are loaded on a device, indexed by the number of profiles or targets minus 1.
#[derive(Debug)]
pub(super) struct Kernels {
    plain: Vec<CudaFunction>,
    compensated: Vec<CudaFunction>,
    look: CudaFunction,
    join_looks: CudaFunction,
    blend: Vec<CudaFunction>,
    gather: CudaFunction,
    graph_plain: Vec<CudaFunction>,
    graph_compensated: Vec<CudaFunction>,
    look_in_graph: CudaFunction,
    prepare_replay: CudaFunction,
    end_replay: CudaFunction,
}

impl Kernels {
    pub(super) fn load(context: &Arc<CudaContext>, code: KernelCode) -> Result<Kernels, DriverError> {
        let update = UPDATE.load(context, code)?;
        let look = LOOK.load(context, code)?;
        let blend = BLEND.load(context, code)?;
        let gather = GATHER.load(context, code)?;
        let replay = REPLAY.load(context, code)?;
        Ok(Kernels {
            plain: load_instances(&update, "update_plain", MAX_PROFILES)?,
            compensated: load_instances(&update, "update_compensated", MAX_PROFILES)?,
            look: look.load_function("look")?,
            join_looks: look.load_function("join_looks")?,
            blend: load_instances(&blend, "blend", MAX_TARGETS)?,
            gather: gather.load_function("gather")?,
            graph_plain: load_instances(&update, "graph_plain", MAX_GRAPH_PROFILES)?,
            graph_compensated: load_instances(&update, "graph_compensated", MAX_GRAPH_PROFILES)?,
            look_in_graph: look.load_function("look_in_graph")?,
            prepare_replay: replay.load_function("prepare_replay")?,
            end_replay: replay.load_function("end_replay")?,
        })
    }

    /// Queues the update of up to 8 profiles, with one block per chunk.
    ///
    /// # Safety
    /// The addresses in `args` and in its table of `chunks` are valid until the launch has run.
    pub(super) unsafe fn update(
        &self,
        stream: &CudaStream,
        args: &UpdateArgs,
        profiles: usize,
        compensated: bool,
        chunks: usize,
    ) -> Result<(), DriverError> {
        let kernel = if compensated { &self.compensated[profiles - 1] } else { &self.plain[profiles - 1] };
        // SAFETY: the kernel takes this structure by value. The caller guarantees the rest.
        unsafe { launch(stream, kernel, args, chunks) }
    }

    /// Queues the look at the parameters in a table of `chunks`.
    ///
    /// # Safety
    /// As [`Kernels::update`].
    pub(super) unsafe fn look(&self, stream: &CudaStream, args: &LookArgs, chunks: usize) -> Result<(), DriverError> {
        // SAFETY: as in `update`.
        unsafe { launch(stream, &self.look, args, chunks) }
    }

    /// Queues that looks of other devices count, too.
    ///
    /// # Safety
    /// As [`Kernels::update`].
    pub(super) unsafe fn join_looks(&self, stream: &CudaStream, args: &JoinArgs) -> Result<(), DriverError> {
        // SAFETY: as in `update`.
        unsafe { launch(stream, &self.join_looks, args, 1) }
    }

    /// Queues the blend of up to 52 sources into up to 8 targets.
    ///
    /// # Safety
    /// As [`Kernels::update`].
    pub(super) unsafe fn blend(
        &self,
        stream: &CudaStream,
        args: &BlendArgs,
        targets: usize,
    ) -> Result<(), DriverError> {
        // Elements per thread of the instances at the end of `blend.cu`.
        let per_thread = if targets <= 2 { 8 } else { 4 };
        let blocks = (args.elements as usize).div_ceil(BLOCK_THREADS * per_thread);
        // SAFETY: as in `update`.
        unsafe { launch(stream, &self.blend[targets - 1], args, blocks) }
    }

    /// Queues the copy of many small tensors into one buffer.
    ///
    /// # Safety
    /// As [`Kernels::update`].
    pub(super) unsafe fn gather(
        &self,
        stream: &CudaStream,
        args: &GatherArgs,
        multiprocessors: usize,
    ) -> Result<(), DriverError> {
        /// Number of blocks per multiprocessor, of which it has room for eight.
        const BLOCKS: usize = 8;
        // SAFETY: as in `update`.
        unsafe { launch(stream, &self.gather, args, (BLOCKS * multiprocessors).min(args.count as usize)) }
    }
}

/// Kernels of updates in CUDA graphs.
impl Kernels {
    /// Does the same as [`Kernels::update`] for up to 4 profiles, with weights in device memory.
    ///
    /// # Safety
    /// As [`Kernels::update`], and for every launch of a graph that captures it.
    pub(super) unsafe fn update_in_graph(
        &self,
        stream: &CudaStream,
        args: &GraphUpdateArgs,
        profiles: usize,
        compensated: bool,
        chunks: usize,
    ) -> Result<(), DriverError> {
        let kernels = if compensated { &self.graph_compensated } else { &self.graph_plain };
        // SAFETY: as in `update`.
        unsafe { launch(stream, &kernels[profiles - 1], args, chunks) }
    }

    /// Does the same as [`Kernels::look`], unless no update is due.
    ///
    /// # Safety
    /// As [`Kernels::update_in_graph`].
    pub(super) unsafe fn look_in_graph(
        &self,
        stream: &CudaStream,
        args: &LookArgs,
        chunks: usize,
    ) -> Result<(), DriverError> {
        // SAFETY: as in `update`.
        unsafe { launch(stream, &self.look_in_graph, args, chunks) }
    }

    /// Queues the preparation of the next replay.
    ///
    /// # Safety
    /// As [`Kernels::update`].
    pub(super) unsafe fn prepare_replay(&self, stream: &CudaStream, args: &PrepareArgs) -> Result<(), DriverError> {
        // SAFETY: as in `update`.
        unsafe { launch(stream, &self.prepare_replay, args, 1) }
    }

    /// Queues the end of an update in a graph.
    ///
    /// # Safety
    /// As [`Kernels::update_in_graph`].
    pub(super) unsafe fn end_replay(&self, stream: &CudaStream, args: &EndArgs) -> Result<(), DriverError> {
        // SAFETY: as in `update`.
        unsafe { launch(stream, &self.end_replay, args, 1) }
    }
}

impl Compiled {
    fn load(&self, context: &Arc<CudaContext>, code: KernelCode) -> Result<Arc<CudaModule>, DriverError> {
        context.load_module(match code {
            KernelCode::Fatbin => Ptx::from_binary(self.fatbin.to_vec()),
            KernelCode::Ptx => Ptx::from_src(self.ptx),
        })
    }
}

/// Loads the instances of a kernel for 1 to `most` profiles or targets.
fn load_instances(module: &Arc<CudaModule>, name: &str, most: usize) -> Result<Vec<CudaFunction>, DriverError> {
    (1..=most).map(|n| module.load_function(&format!("{name}_{n}"))).collect()
}

/// Largest number of blocks per launch.
const MAX_BLOCKS: usize = i32::MAX as usize;

/// Queues a launch of `blocks` blocks, if there are any.
///
/// # Safety
/// `kernel` takes a `T` by value, and the addresses in it are valid until it has run.
unsafe fn launch<T: DeviceRepr>(
    stream: &CudaStream,
    kernel: &CudaFunction,
    args: &T,
    blocks: usize,
) -> Result<(), DriverError> {
    if blocks == 0 {
        return Ok(());
    }
    assert!(blocks <= MAX_BLOCKS, "{blocks} blocks: the caller splits its work");
    let grid_dim = (blocks as u32, 1, 1);
    let config = LaunchConfig { grid_dim, block_dim: (BLOCK_THREADS as u32, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: guaranteed by the caller.
    unsafe { stream.launch_builder(kernel).arg(args).launch(config) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every program and every wheel carries this code.
    #[test]
    fn embedded_code_of_all_architectures_stays_below_six_megabytes() {
        let files = [&UPDATE, &LOOK, &BLEND, &GATHER];
        let bytes: usize = files.iter().map(|file| file.fatbin.len() + file.ptx.len()).sum();
        assert!((100_000..6_000_000).contains(&bytes), "{bytes} bytes of kernels are embedded");
    }
}
