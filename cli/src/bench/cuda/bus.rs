//! The bus between host and device: its limits, and parameters on their way to averages on the host.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use safetensors::Dtype;

use super::super::Work;
use super::super::cases::{PERIOD, Sizes, name, parameter, plural, split};
use super::super::machine::free_memory;
use super::super::session::{Row, Session, Task, timed};
use super::copy::{Copy, Lanes, compare, same};
use super::pieces;
use posthoc_ema::CudaMemory;
use posthoc_ema::compute::cuda::{Buffer, Device, Locked, Offload, TimedStream};
use posthoc_ema::{Error, Result};

const COPY: &str = "copy within the device, beside the bus";
const TO_DEVICE: &str = "pinned host to device";
const TO_HOST: &str = "device to host, pinned";

/// Parameters that travel at most: a gigabyte of f32 is enough for any bus.
const MOST: usize = 1 << 28;

/// Bytes of the host that a parameter takes: two pinned copies each in f32 and bf16 wait to be folded, and the limits
/// need pinned and pageable memory of 4.
const HOST_BYTES: usize = 2 * (4 + 2) + 4 + 4;

/// Repetitions of the parameters that are written by the host; the device makes the others.
const REPETITIONS: usize = 1 << 12;

/// Copies that last as long as parameters travel: no more than these, whatever the clocks say.
const COPIES: usize = 1000;

/// A tensor's place among the parameters is rounded up to as many bytes, as frameworks allocate them.
const ALIGNMENT: usize = 256;

/// Times all cases.
pub(super) fn measure(device: &Arc<Device>, sizes: &Sizes, session: &mut Session<'_>) -> Result<()> {
    let parameters = parameters(sizes);
    let elements = split(parameters, sizes.tensors.min(parameters));
    let offloaded = |dtype| Offloaded::new(dtype, &elements);
    let (f32s, bf16s, beside) = (offloaded(Dtype::F32), offloaded(Dtype::BF16), offloaded(Dtype::F32));
    let mut state = State::new(device, &[&f32s, &bf16s])?;
    let tasks: Vec<Box<dyn Task<State>>> = vec![
        Box::new(Copy { name: COPY, bytes: state.parameters.len() }),
        Box::new(Bus::PinnedToDevice(state.parameters.len())),
        Box::new(Bus::PinnedToHost(state.parameters.len())),
        Box::new(Bus::PageableToDevice(state.parameters.len())),
        Box::new(Bus::PageableToHost(state.parameters.len())),
        Box::new(f32s),
        Box::new(bf16s),
        Box::new(Beside { offloaded: beside, bytes: state.parameters.len(), times: Cell::new(1) }),
    ];
    session.measure("bus", &mut state, &tasks)
}

/// The bytes that are held on the device.
pub(super) fn bytes(sizes: &Sizes) -> u128 {
    // Each small tensor has an entry in a table, which is as long in both dtypes.
    let each = size_of::<f32>() * sizes.parameters.min(MOST) + 2 * ALIGNMENT * sizes.tensors;
    2 * each as u128
}

/// Parameters on the device, and memory on both sides of the bus.
struct State {
    trial: TimedStream,
    parameters: Buffer,
    /// The destination of copies on the device.
    copy: Buffer,
    pinned: Locked,
    pageable: Vec<u8>,
    pattern: Vec<u8>,
    offloads: Vec<(Dtype, Offload)>,
}

impl State {
    fn new(device: &Arc<Device>, offloaded: &[&Offloaded]) -> Result<State> {
        let bytes = offloaded.iter().filter_map(|case| case.places.last()).map(|place| place.end).max().unwrap_or(1);
        let buffer = || Buffer::new(device, bytes, "parameters");
        let (trial, mut parameters, copy) = (TimedStream::new(device)?, buffer()?, buffer()?);
        let pattern: Vec<u8> = (0..PERIOD * REPETITIONS).map(parameter).flat_map(f32::to_le_bytes).collect();
        trial.repeat(&mut parameters, &pattern)?;
        let offload = |case: &&Offloaded| {
            let sizes: Vec<usize> = case.places.iter().map(Range::len).collect();
            Ok((case.dtype, Offload::new(device, &sizes)?))
        };
        let offloads = offloaded.iter().map(offload).collect::<Result<_>>()?;
        let (pinned, pageable) = (Locked::new(device, bytes)?, vec![0; bytes]);
        Ok(State { trial, parameters, copy, pinned, pageable, pattern, offloads })
    }

    /// What is needed to move the parameters of a dtype.
    fn offload(&mut self, dtype: Dtype) -> Result<Parts<'_>> {
        let found = self.offloads.iter_mut().find(|(of, _)| *of == dtype);
        let missing = || Error::Internal(format!("no memory was locked for {dtype}"));
        let (_, offload) = found.ok_or_else(missing)?;
        let State { trial, parameters, copy, pattern, .. } = self;
        Ok(Parts { trial, parameters, copy, pattern, offload })
    }
}

struct Parts<'s> {
    trial: &'s TimedStream,
    parameters: &'s Buffer,
    copy: &'s mut Buffer,
    pattern: &'s [u8],
    offload: &'s mut Offload,
}

impl Lanes for State {
    fn lanes(&mut self) -> (&TimedStream, &mut Buffer, &Buffer) {
        (&self.trial, &mut self.copy, &self.parameters)
    }

    fn pattern(&self) -> &[u8] {
        &self.pattern
    }
}

/// A limit of the bus, one way, for so many bytes.
#[derive(Clone, Copy, Debug)]
enum Bus {
    PinnedToDevice(usize),
    PinnedToHost(usize),
    PageableToDevice(usize),
    PageableToHost(usize),
}

impl Bus {
    fn name(self) -> (&'static str, usize) {
        match self {
            Bus::PinnedToDevice(bytes) => (TO_DEVICE, bytes),
            Bus::PinnedToHost(bytes) => (TO_HOST, bytes),
            Bus::PageableToDevice(bytes) => ("pageable host to device", bytes),
            Bus::PageableToHost(bytes) => ("pageable device to host", bytes),
        }
    }
}

impl Task<State> for Bus {
    fn row(&self) -> Row {
        let (name, bytes) = self.name();
        Row::limit(name, bytes)
    }

    fn check(&self, state: &mut State) -> Result<()> {
        let (name, bytes) = self.name();
        let State { trial, copy, pinned, pageable, pattern, .. } = state;
        let to_device = matches!(self, Bus::PinnedToDevice(_) | Bus::PageableToDevice(_));
        for host in [pinned.bytes_mut(), pageable] {
            match to_device {
                true => pieces(pattern, 0..bytes).fold(host, |rest, piece| {
                    let (own, rest) = rest.split_at_mut(piece.len());
                    own.copy_from_slice(piece);
                    rest
                }),
                false => {
                    host.fill(0xff);
                    &mut []
                }
            };
        }
        trial.poison(copy)?;
        self.seconds(state)?;
        match self {
            Bus::PinnedToHost(_) => same(state.pinned.bytes(), &state.pattern, 0, name),
            Bus::PageableToHost(_) => same(&state.pageable, &state.pattern, 0, name),
            _ => compare(state, name, bytes),
        }
    }

    fn seconds(&self, state: &mut State) -> Result<f64> {
        let State { trial, parameters, copy, pinned, pageable, .. } = state;
        let mut outcome = Ok(());
        let seconds = match self {
            Bus::PinnedToDevice(_) => trial.upload(copy, pinned)?,
            Bus::PinnedToHost(_) => trial.download(pinned, parameters)?,
            Bus::PageableToDevice(_) => timed(|| outcome = trial.write(copy, pageable)),
            Bus::PageableToHost(_) => timed(|| outcome = trial.read(pageable, parameters)),
        };
        outcome.map(|()| seconds)
    }
}

/// Parameters of a dtype that are copied to averages on the host, until they can be folded there.
struct Offloaded {
    dtype: Dtype,
    /// Where each tensor lies, in bytes.
    places: Vec<Range<usize>>,
}

impl Offloaded {
    fn new(dtype: Dtype, elements: &[usize]) -> Offloaded {
        let mut end = 0;
        let place = |elements: &usize| {
            let (start, bytes) = (end, elements * dtype.bitsize() / 8);
            end += bytes.next_multiple_of(ALIGNMENT);
            start..start + bytes
        };
        Offloaded { dtype, places: elements.iter().map(place).collect() }
    }

    fn name(&self) -> String {
        let tensors = self.places.len();
        format!("{} parameters in {tensors} tensor{} to the host", name(self.dtype), plural(tensors))
    }

    fn tensors<'s>(&self, trial: &'s TimedStream, parameters: &'s Buffer) -> Vec<CudaMemory<'s>> {
        self.places.iter().map(|place| trial.lend(parameters, place.clone())).collect()
    }
}

impl Task<State> for Offloaded {
    fn row(&self) -> Row {
        let bytes = self.places.iter().map(Range::len).sum::<usize>() as u64;
        Row { name: self.name(), work: Work::Offload, bytes, limit: Some(TO_HOST.into()) }
    }

    fn check(&self, state: &mut State) -> Result<()> {
        let Parts { trial, parameters, pattern, offload, .. } = state.offload(self.dtype)?;
        let (staged, _) = offload.copy(&self.tensors(trial, parameters))?;
        let arrived = staged.wait()?;
        let mut places = self.places.iter().enumerate();
        places.try_for_each(|(i, place)| same(arrived.tensor(i), pattern, place.start, &self.name()))
    }

    fn seconds(&self, state: &mut State) -> Result<f64> {
        let Parts { trial, parameters, offload, .. } = state.offload(self.dtype)?;
        let tensors = self.tensors(trial, parameters);
        let mut outcome = Ok(());
        let seconds = timed(|| outcome = offload.copy(&tensors).and_then(|(staged, _)| staged.wait()).map(drop));
        outcome.map(|()| seconds)
    }
}

/// What the stream that trains loses while parameters travel: copies within the device, which want all of its memory's
/// bandwidth, are queued behind the beginning of an offload and last as long as it.
struct Beside {
    offloaded: Offloaded,
    bytes: usize,
    /// Copies that last as long.
    times: Cell<usize>,
}

impl Task<State> for Beside {
    fn row(&self) -> Row {
        let name = format!("copies within the device, while {} go", self.offloaded.name());
        let bytes = (2 * self.bytes * self.times.get()) as u64;
        Row { name, work: Work::Offload, bytes, limit: Some(COPY.into()) }
    }

    fn check(&self, state: &mut State) -> Result<()> {
        let offload = self.offloaded.seconds(state)?;
        let (trial, to, from) = state.lanes();
        let copy = trial.seconds(&mut || trial.copy(to, from))?;
        self.times.set(((offload / copy).ceil() as usize).clamp(1, COPIES));
        trial.poison(to)?;
        self.seconds(state)?;
        compare(state, COPY, self.bytes)
    }

    fn seconds(&self, state: &mut State) -> Result<f64> {
        let Parts { trial, parameters, copy, offload, .. } = state.offload(self.offloaded.dtype)?;
        let tensors = self.offloaded.tensors(trial, parameters);
        trial.copy_beside(copy, parameters, self.times.get(), offload, &tensors)
    }
}

/// Parameters that travel: all, or what is enough; a quarter of the host's free memory at most.
fn parameters(sizes: &Sizes) -> usize {
    let free = free_memory().map_or(usize::MAX, |bytes| bytes as usize);
    sizes.parameters.min(MOST).min(free / 4 / HOST_BYTES).max(1)
}
