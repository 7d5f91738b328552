//! Live averages as sources of a synthesis and of a sample.

use safetensors::Dtype;

use super::engine::AveragesGuard;
#[cfg(feature = "cuda")]
use super::engine::SpreadAverages;
use super::registry::TensorRegistry;
use super::values::Values;
#[cfg(feature = "cuda")]
use crate::compute::cuda::DeviceAverages;
use crate::planning::{SampledElements, SampledSource, Segment};
use crate::synthesis::{Elements, TensorSource};
use crate::tensor::TensorSpec;

/// Live averages of one profile.
pub(super) struct LiveSource<'a> {
    pub registry: &'a TensorRegistry,
    pub values: LiveValues<'a>,
    pub index: usize,
}

/// Live averages in host or device memory, with the newest values of copied tensors.
#[derive(Clone, Copy)]
pub(super) enum LiveValues<'a> {
    Host(Values<'a>),
    #[cfg(feature = "cuda")]
    Device(&'a DeviceAverages, &'a [Vec<u8>]),
    #[cfg(feature = "cuda")]
    Spread(&'a SpreadAverages, &'a [Vec<u8>]),
}

/// Guard of an engine's averages during a synthesis.
pub(super) enum LiveGuard<'a> {
    Host(AveragesGuard<'a>),
    /// Averages that stay on the device; only the copied tensors are copied to the host.
    #[cfg(feature = "cuda")]
    Device(&'a DeviceAverages, Vec<Vec<u8>>),
    /// Averages that stay beside each tensor.
    #[cfg(feature = "cuda")]
    Spread(&'a SpreadAverages, Vec<Vec<u8>>),
}

impl LiveGuard<'_> {
    pub(super) fn values(&self) -> LiveValues<'_> {
        match self {
            LiveGuard::Host(averages) => LiveValues::Host(averages.values()),
            #[cfg(feature = "cuda")]
            LiveGuard::Device(averages, copies) => LiveValues::Device(averages, copies),
            #[cfg(feature = "cuda")]
            LiveGuard::Spread(averages, copies) => LiveValues::Spread(averages, copies),
        }
    }
}

impl TensorSource for LiveSource<'_> {
    fn stored(&self, name: &str) -> Option<(Dtype, Elements<'_>)> {
        let found = self.registry.find(name)?;
        match (self.values, found) {
            (LiveValues::Host(values), Ok(i)) => {
                let average = &values.averages[self.index].high[self.registry.layout().range(i)];
                Some((Dtype::F32, Elements::Host(bytemuck::cast_slice(average))))
            }
            (LiveValues::Host(Values { copies, .. }), Err(i)) => {
                Some((self.registry.copied()[i].dtype, Elements::Host(&copies[i])))
            }
            #[cfg(feature = "cuda")]
            (LiveValues::Device(averages, _), Ok(i)) => {
                Some((Dtype::F32, Elements::Device(averages.input(self.index, i))))
            }
            #[cfg(feature = "cuda")]
            (LiveValues::Spread(averages, _), Ok(i)) => Some((Dtype::F32, averages.elements(self.index, i))),
            #[cfg(feature = "cuda")]
            (LiveValues::Device(_, copies) | LiveValues::Spread(_, copies), Err(i)) => {
                Some((self.registry.copied()[i].dtype, Elements::Host(&copies[i])))
            }
        }
    }

    fn device(&self) -> Option<usize> {
        match self.values {
            LiveValues::Host(_) => None,
            #[cfg(feature = "cuda")]
            LiveValues::Device(averages, _) => Some(averages.device().number()),
            #[cfg(feature = "cuda")]
            LiveValues::Spread(averages, _) => {
                (0..self.registry.averaged().len()).find_map(|tensor| averages.device_of(tensor))
            }
        }
    }

    #[cfg(feature = "cuda")]
    fn device_of(&self, name: &str) -> Option<usize> {
        match self.values {
            LiveValues::Spread(averages, _) => averages.device_of(self.registry.find(name)?.ok()?),
            _ => self.device(),
        }
    }
}

impl SampledSource for LiveSource<'_> {
    fn read_segments(&self, tensors: &[TensorSpec], segments: &[Segment]) -> Option<SampledElements> {
        let mut sampled = SampledElements::default();
        #[cfg(feature = "cuda")]
        let mut reader = match self.values {
            LiveValues::Device(averages, _) => Some(averages.reader().ok()?),
            LiveValues::Host(_) | LiveValues::Spread(..) => None,
        };
        #[cfg(feature = "cuda")]
        let mut readers = match self.values {
            LiveValues::Spread(averages, _) => averages.readers(Vec::new()).ok()?,
            _ => Vec::new(),
        };
        for Segment { tensor, elements } in segments {
            let i = self.registry.find(&tensors[*tensor].name)?.ok()?;
            match self.values {
                LiveValues::Host(values) => {
                    let average = &values.averages[self.index].high[self.registry.layout().range(i)];
                    sampled.append(Dtype::F32, bytemuck::cast_slice(average.get(elements.clone())?))?;
                }
                #[cfg(feature = "cuda")]
                LiveValues::Device(..) => {
                    let values = reader.as_mut()?.elements(self.index, i, elements.clone()).ok()?;
                    sampled.append(Dtype::F32, bytemuck::cast_slice(&values))?;
                }
                #[cfg(feature = "cuda")]
                LiveValues::Spread(averages, _) => {
                    let values = averages.read(&mut readers, self.index, i, elements.clone()).ok()?;
                    sampled.append(Dtype::F32, bytemuck::cast_slice(&values))?;
                }
            }
        }
        Some(sampled)
    }
}
