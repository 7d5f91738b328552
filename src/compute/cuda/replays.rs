//! State of updates in CUDA graphs. The kernels of a graph have fixed arguments, and read here what changes.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaStream, sys};

use super::arenas::Arenas;
use super::chunks::ChunkTable;
use super::device::Event;
use super::kernels::{Chunk, EndArgs, LookArgs, MAX_PROFILES, PrepareArgs};
use super::look::{FoundElement, NOTHING_FOUND};
use super::staging::Staging;
use super::{Buffer, CudaDevice, Pinned};
use crate::compute::cpu::UpdateWeights;
use crate::error::Result;

/// Key of a replay without an update (`NOT_DUE` in `kernels/chunk.cuh`).
const NOT_DUE: u64 = 3;

/// Bytes of `Replay` in `kernels/replay.cu`, after which the weights begin.
const STATE_BYTES: usize = 32;

/// Offset of the threshold in the state.
const THRESHOLD: u64 = 24;

/// Outcome of the newest replay with an update (`Outcome` in `kernels/replay.cu`).
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
struct Outcome {
    ticket: u64,
    found: u64,
    runs: u64,
    all_runs: u64,
}

/// Memory that the kernels of all graphs use.
#[derive(Debug)]
struct State {
    _arenas: Arc<Arenas>,
    memory: Buffer,
    outcome: Pinned,
}

/// Updates in CUDA graphs of one tracker.
#[derive(Debug)]
pub(super) struct Replays {
    device: Arc<CudaDevice>,
    state: Arc<State>,
    /// Chunks of the averaged tensors, the same in each graph except for the addresses.
    offsets: Vec<u64>,
    /// Event that passes when the newest replay has run.
    pub replayed: Event,
    /// Number of the newest update that was prepared.
    ticket: u64,
    /// Number of launches that were announced.
    runs: u64,
    /// Number of launches that were not, as far as they are reported.
    reported: Mutex<u64>,
    /// Value of `runs` after the newest update.
    runs_at_ticket: u64,
}

/// End of a replay with an update.
#[derive(Clone, Copy, Debug)]
pub struct ReplayEnd {
    /// False if the launch had no captured update of these averages.
    pub has_run: bool,
    /// Number of launches since the last report that were not announced.
    pub strays: u64,
}

/// Memory that one graph uses.
struct GraphMemory {
    _state: Arc<State>,
    _table: ChunkTable,
}

/// Memory of graphs that no longer exist. The driver's callback may not free it.
static UNUSED: Mutex<Vec<GraphMemory>> = Mutex::new(Vec::new());

/// Frees the memory of graphs that no longer exist.
pub(super) fn free_unused() {
    let unused = std::mem::take(&mut *UNUSED.lock().unwrap_or_else(PoisonError::into_inner));
    drop(unused);
}

/// Called by the driver when the last graph with the memory is gone and has run.
unsafe extern "C" fn hand_back(memory: *mut c_void) {
    // SAFETY: `keep_with_graph` made it from such a box, and the driver calls this once.
    let memory = unsafe { Box::from_raw(memory.cast::<GraphMemory>()) };
    UNUSED.lock().unwrap_or_else(PoisonError::into_inner).push(*memory);
}

impl Replays {
    /// Allocates the state, without an update that is due.
    pub(super) fn new(arenas: &Arc<Arenas>) -> Result<Replays> {
        let device = &arenas.device;
        let weights = 4 * arenas.high.len();
        let memory = Buffer::new(device, STATE_BYTES + weights, "updates in CUDA graphs")?;
        let mut initial = vec![0; STATE_BYTES + weights];
        initial[..8].copy_from_slice(&NOT_DUE.to_le_bytes());
        let stream = device.stream()?;
        // SAFETY: we own the memory, which is as long.
        unsafe { Staging::new(device, initial.len())?.send(&stream, memory.address(), &initial) }?;
        let outcome = Pinned::new(device, size_of::<Outcome>())?;
        Ok(Replays {
            device: device.clone(),
            state: Arc::new(State { _arenas: arenas.clone(), memory, outcome }),
            offsets: Vec::new(),
            replayed: device.event()?,
            ticket: 0,
            runs: 0,
            reported: Mutex::new(0),
            runs_at_ticket: 0,
        })
    }

    /// Returns the address of the key of what a look has found.
    pub(super) fn found_address(&self) -> u64 {
        self.state.memory.address()
    }

    /// Returns the address of the threshold.
    pub(super) fn threshold_address(&self) -> u64 {
        self.state.memory.address() + THRESHOLD
    }

    /// Returns the address of the weights of the profiles from `first` on.
    pub(super) fn weights_address(&self, first: usize) -> u64 {
        self.state.memory.address() + (STATE_BYTES + 4 * first) as u64
    }

    /// Makes a table of chunks that lives as long as the graph which a stream is captured into. Returns its address.
    pub(super) fn add_table(&mut self, stream: &CudaStream, chunks: Vec<Chunk>) -> Result<u64> {
        self.offsets = chunks.iter().map(|chunk| chunk.offset).collect();
        let mut table = ChunkTable::new(&self.device, chunks.len())?;
        // A stream of its own, because the upload is not part of the graph.
        let own = self.device.stream()?;
        table.set(&own, chunks)?;
        let _bound = self.device.bind()?;
        own.synchronize().map_err(self.device.driver_error("upload the table of tensors"))?;
        let address = table.address();
        self.keep_with_graph(stream, table)?;
        Ok(address)
    }

    /// Keeps the memory of an update as long as the graph which a stream is captured into.
    fn keep_with_graph(&self, stream: &CudaStream, table: ChunkTable) -> Result<()> {
        const NO_DESTRUCTOR_SYNC: u32 = 1;
        const MOVE: u32 = 1;
        let failed = || self.device.driver_error("keep the memory of a CUDA graph");
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let mut graph: sys::CUgraph = std::ptr::null_mut();
        use std::ptr::null_mut;
        // SAFETY: the stream exists, and the pointers are valid for the call or null, which is allowed.
        unsafe {
            let (status, graph) = (&raw mut status, &raw mut graph);
            let stream = stream.cu_stream();
            sys::cuStreamGetCaptureInfo_v3(stream, status, null_mut(), graph, null_mut(), null_mut(), null_mut())
        }
        .result()
        .map_err(failed())?;
        let memory = Box::into_raw(Box::new(GraphMemory { _state: self.state.clone(), _table: table }));
        let mut object: sys::CUuserObject = std::ptr::null_mut();
        // SAFETY: `hand_back` takes the box. The driver waits for no work in it.
        let created =
            unsafe { sys::cuUserObjectCreate(&raw mut object, memory.cast(), Some(hand_back), 1, NO_DESTRUCTOR_SYNC) };
        if let Err(error) = created.result() {
            // SAFETY: the driver has not taken the box.
            drop(unsafe { Box::from_raw(memory) });
            return Err(failed()(error));
        }
        // SAFETY: both exist. The graph takes the only reference. If it does not, the memory is never freed.
        unsafe { sys::cuGraphRetainUserObject(graph, object, 1, MOVE) }.result().map_err(failed())
    }

    /// Queues a look at the parameters in the first `chunks` chunks of a table.
    ///
    /// # Safety
    /// The parameters may be read in every launch of the graph, in the order of its stream.
    pub(super) unsafe fn look(&self, stream: &CudaStream, table: u64, chunks: usize) -> Result<()> {
        let args = LookArgs { chunks: table, found: self.found_address() };
        // SAFETY: the graph keeps state and table. The caller guarantees the rest.
        unsafe { self.device.kernels.look_in_graph(stream, &args, chunks) }
            .map_err(self.device.driver_error("capture the look at the parameters"))
    }

    /// Queues the end of an update.
    pub(super) fn end(&self, stream: &CudaStream) -> Result<()> {
        let args = EndArgs { replay: self.state.memory.address(), outcome: self.state.outcome.start().addr() as u64 };
        // SAFETY: the graph keeps the state. Memory that the driver has allocated has the same address on both sides.
        unsafe { self.device.kernels.end_replay(stream, &args) }
            .map_err(self.device.driver_error("capture the end of the update"))
    }

    /// Queues that the next replay updates the averages with these weights.
    pub(super) fn prepare(&mut self, stream: &CudaStream, weights: UpdateWeights<'_>) -> Result<()> {
        self.ticket += 1;
        for (group, each) in weights.each.chunks(MAX_PROFILES).enumerate() {
            let mut values = [0.0; MAX_PROFILES];
            values[..each.len()].copy_from_slice(each);
            let is_last = (group + 1) * MAX_PROFILES >= weights.each.len();
            self.set(
                stream,
                PrepareArgs {
                    weights: self.weights_address(group * MAX_PROFILES),
                    found: if is_last { NOTHING_FOUND } else { NOT_DUE },
                    threshold: weights.threshold,
                    count: each.len() as u32,
                    values,
                    ..Default::default()
                },
            )?;
        }
        Ok(())
    }

    /// Queues that the next replay updates nothing.
    pub(super) fn take_back(&self, stream: &CudaStream) -> Result<()> {
        self.set(stream, PrepareArgs { found: NOT_DUE, ..Default::default() })
    }

    fn set(&self, stream: &CudaStream, args: PrepareArgs) -> Result<()> {
        let args = PrepareArgs { replay: self.state.memory.address(), ticket: self.ticket, ..args };
        // SAFETY: we own the memory, which is freed after the replays have run.
        unsafe { self.device.kernels.prepare_replay(stream, &args) }
            .map_err(self.device.driver_error("prepare the update of a CUDA graph"))
    }

    /// Takes note of a launch of a graph, which was for an update or not.
    pub(super) fn note_launch(&mut self, has_update: bool, has_failed: bool) {
        self.runs += u64::from(!has_failed);
        if has_update {
            self.runs_at_ticket = self.runs;
        }
    }

    /// Waits for the newest replay.
    pub(super) fn wait(&self) -> Result<()> {
        let _bound = self.device.bind()?;
        self.replayed.synchronize().map_err(self.device.driver_error("finish the CUDA graph"))
    }

    /// Returns the end of the newest replay with an update, which has run.
    pub(super) fn end_of_newest(&self) -> ReplayEnd {
        let outcome = self.outcome();
        let has_run = outcome.ticket == self.ticket;
        let strays = if has_run { self.take_strays(outcome.runs, self.runs_at_ticket) } else { 0 };
        ReplayEnd { has_run, strays }
    }

    /// Waits for the newest replay, and returns the number of launches since the last report that were not announced.
    pub(super) fn strays(&self) -> Result<u64> {
        self.wait()?;
        Ok(self.take_strays(self.outcome().all_runs, self.runs))
    }

    /// Returns how many more updates in graphs have run than were launched by this crate, and counts them from now on.
    fn take_strays(&self, runs: u64, expected: u64) -> u64 {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        let strays = runs.saturating_sub(expected + *reported);
        *reported += strays;
        strays
    }

    /// Returns the element that the look of the newest update has found. It has run.
    pub(super) fn found(&self) -> Result<Option<FoundElement>> {
        FoundElement::of(self.outcome().found)
    }

    /// Returns the offset of a chunk in the arenas.
    pub(super) fn offset(&self, chunk: usize) -> Option<u64> {
        self.offsets.get(chunk).copied()
    }

    fn outcome(&self) -> Outcome {
        let outcome = self.state.outcome.start().cast::<Outcome>();
        // SAFETY: it is that long and aligned. A launch that was not announced may write one of the numbers meanwhile,
        // and each is written whole.
        unsafe { outcome.read_volatile() }
    }
}
