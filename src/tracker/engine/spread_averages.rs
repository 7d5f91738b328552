//! Averages of a model in several places, each tensor's beside it.

use std::sync::Arc;

use safetensors::Dtype;

use super::averages::{HostAverages, first_refused};
use super::config::EngineConfig;
use super::gathered_copies::{host_bytes, memory_on};
use super::places::{PlacedTensors, group_by_place};
use crate::compute::cpu::{Averages, Incoming, Layout, Precision, UpdateWeights};
use crate::compute::cuda::{AveragesReader, CudaDevice, DeviceAverages};
use crate::error::{Error, Result};
use crate::synthesis::Elements;
use crate::tensor::{CudaMemory, NonFiniteElement};
use crate::tracker::registry::OrderedViews;
use crate::tracker::values::OwnedValues;

/// Averages of a model in several places.
pub(in crate::tracker) struct SpreadAverages {
    /// Devices, then the host.
    parts: Vec<PartAverages>,
    shape: Arc<SpreadShape>,
    /// Part of each averaged tensor, and its index there.
    averaged: Vec<(usize, usize)>,
    /// Element that the newest look has found in host memory, and its part.
    found_on_host: Option<(usize, NonFiniteElement)>,
    /// Reason why an update was done in some places only; nothing may be stored after that.
    lost: Option<String>,
}

/// Tensors of each part, and sizes of the model.
pub(super) struct SpreadShape {
    parts: Vec<(PlacedTensors, Layout)>,
    layout: Layout,
    profiles: usize,
    precision: Precision,
    copied: usize,
}

/// Averages of one place. The host's are shared with a thread that stores them.
enum PartAverages {
    Device(Box<DeviceAverages>),
    Host(Arc<HostAverages>),
}

/// Reader of one part, for any thread.
pub(in crate::tracker) enum PartReader {
    Device(AveragesReader),
    Host(Arc<HostAverages>),
}

/// Parameters of one update on a device.
type DeviceParameters<'a> = (Vec<(Dtype, CudaMemory<'a>)>, Vec<CudaMemory<'a>>);

impl SpreadShape {
    pub(super) fn new(places: &[Option<usize>], layout: &Layout, config: &EngineConfig) -> SpreadShape {
        let of_part = |tensors: PlacedTensors| {
            let own = Layout::new(tensors.averaged.iter().map(|&i| layout.range(i).len()));
            (tensors, own)
        };
        SpreadShape {
            parts: group_by_place(places, layout.len()).into_iter().map(of_part).collect(),
            layout: layout.clone(),
            profiles: config.profiles,
            precision: config.precision,
            copied: config.copied.len(),
        }
    }

    /// Returns the number of each device, the elements of its averaged tensors, and the bytes that its averages take.
    pub(super) fn device_bytes(&self, config: &EngineConfig) -> Vec<(usize, usize, usize)> {
        let bytes = |(tensors, layout): &(PlacedTensors, Layout)| {
            let copied = tensors.copied.iter().map(|&i| config.copied[i]).sum::<usize>();
            Some((tensors.place?, layout.total(), config.bytes_of_averages(layout) + copied))
        };
        self.parts.iter().filter_map(bytes).collect()
    }

    /// Reads the values of all parts into those of the model.
    pub(super) fn gather(&self, readers: &mut [PartReader]) -> Result<OwnedValues> {
        let mut averages = vec![Averages::zeros(&self.layout, self.precision); self.profiles];
        let mut copies = vec![Vec::new(); self.copied];
        for ((tensors, own), reader) in self.parts.iter().zip(readers) {
            for (profile, all) in averages.iter_mut().enumerate() {
                match reader {
                    PartReader::Host(host) => {
                        scatter(all, &host.values().averages[profile], tensors, own, &self.layout);
                    }
                    PartReader::Device(reader) => {
                        scatter(all, &reader.averages(profile)?, tensors, own, &self.layout);
                    }
                }
            }
            let part = reader.copies()?;
            tensors.copied.iter().zip(part).for_each(|(&i, copy)| copies[i] = copy);
        }
        Ok(OwnedValues { averages, copies, dtypes: None })
    }
}

/// Copies the averages of a part to their places in those of the model.
fn scatter(all: &mut Averages, part: &Averages, tensors: &PlacedTensors, own: &Layout, layout: &Layout) {
    for (at, &i) in tensors.averaged.iter().enumerate() {
        let (to, from) = (layout.range(i), own.range(at));
        all.high[to.clone()].copy_from_slice(&part.high[from.clone()]);
        if let (Some(all), Some(part)) = (&mut all.low, &part.low) {
            all[to].copy_from_slice(&part[from]);
        }
    }
}

/// Returns the averages of a part's tensors.
fn part_of(all: &Averages, tensors: &PlacedTensors, own: &Layout, layout: &Layout, precision: Precision) -> Averages {
    let mut part = Averages::zeros(own, precision);
    for (at, &i) in tensors.averaged.iter().enumerate() {
        let (to, from) = (own.range(at), layout.range(i));
        part.high[to.clone()].copy_from_slice(&all.high[from.clone()]);
        if let (Some(part), Some(all)) = (&mut part.low, &all.low) {
            part[to].copy_from_slice(&all[from]);
        }
    }
    part
}

impl PartAverages {
    fn on_device(&self) -> Option<&DeviceAverages> {
        match self {
            PartAverages::Device(averages) => Some(averages),
            PartAverages::Host(_) => None,
        }
    }
}

impl PartReader {
    fn copies(&mut self) -> Result<Vec<Vec<u8>>> {
        match self {
            PartReader::Device(reader) => reader.copies(),
            PartReader::Host(host) => Ok(host.values().copies.to_vec()),
        }
    }
}

impl SpreadAverages {
    /// Allocates the averages of each place, with the values of `config`.
    pub(super) fn start(shape: SpreadShape, config: EngineConfig) -> Result<SpreadAverages> {
        let EngineConfig { profiles, precision, copied, values, .. } = config;
        let mut parts = Vec::with_capacity(shape.parts.len());
        let mut averaged = vec![(0, 0); shape.layout.len()];
        for (k, (tensors, own)) in shape.parts.iter().enumerate() {
            tensors.averaged.iter().enumerate().for_each(|(at, &i)| averaged[i] = (k, at));
            let values = values.as_ref().map(|(averages, copies)| {
                let of_part = |all| part_of(all, tensors, own, &shape.layout, precision);
                let copies: Vec<Vec<u8>> = tensors.copied.iter().map(|&i| copies[i].clone()).collect();
                (averages.iter().map(of_part).collect::<Vec<Averages>>(), copies)
            });
            let copied: Vec<usize> = tensors.copied.iter().map(|&i| copied[i]).collect();
            parts.push(match tensors.place {
                None => {
                    let config =
                        EngineConfig { profiles, precision, averaged: Vec::new(), copied, values, device_copy: None };
                    PartAverages::Host(Arc::new(config.host(own)))
                }
                Some(number) => {
                    let device = CudaDevice::open(number)?;
                    PartAverages::Device(Box::new(match values {
                        Some((averages, copies)) => {
                            DeviceAverages::upload(&device, own, &averages, precision, &copies)?
                        }
                        None => DeviceAverages::zeros(&device, own, profiles, precision, &copied)?,
                    }))
                }
            });
        }
        Ok(SpreadAverages { parts, shape: Arc::new(shape), averaged, found_on_host: None, lost: None })
    }

    pub(super) fn shape(&self) -> &Arc<SpreadShape> {
        &self.shape
    }

    /// Checks that no update was lost.
    pub(super) fn check(&self) -> Result<()> {
        match &self.lost {
            Some(reason) => Err(Error::Cuda {
                device: self.shape.parts.iter().find_map(|(tensors, _)| tensors.place).unwrap_or(0),
                action: "go on with the averages".into(),
                reason: format!("an update was lost ({reason}): nothing is stored; start again and resume the run"),
            }),
            None => Ok(()),
        }
    }

    /// Returns the parameters of the part of an index, on its device.
    fn on_device<'a>(&self, part: usize, views: &OrderedViews<'_, 'a>, number: usize) -> Result<DeviceParameters<'a>> {
        let tensors = &self.shape.parts[part].0;
        let averaged = tensors.averaged.iter().map(|&i| views.averaged[i]);
        let averaged = averaged.map(|view| Ok((view.dtype, memory_on(view, number)?)));
        let copied = tensors.copied.iter().map(|&i| memory_on(views.copied[i], number));
        Ok((averaged.collect::<Result<_>>()?, copied.collect::<Result<_>>()?))
    }

    /// Returns the averaged and the copied parameters of the part of an index, in host memory.
    fn on_host<'a>(&self, part: usize, views: &OrderedViews<'_, 'a>) -> Result<(Vec<Incoming<'a>>, Vec<&'a [u8]>)> {
        let tensors = &self.shape.parts[part].0;
        let averaged = tensors.averaged.iter().map(|&i| views.averaged[i]);
        let averaged = averaged.map(|view| Ok(Incoming { dtype: view.dtype, bytes: host_bytes(view)? }));
        let copied = tensors.copied.iter().map(|&i| host_bytes(views.copied[i]));
        Ok((averaged.collect::<Result<_>>()?, copied.collect::<Result<_>>()?))
    }

    /// Checks that every place can take an update, so that none changes unless all do.
    ///
    /// # Errors
    /// As [`SpreadAverages::look`].
    pub(super) fn check_parameters(&self, views: &OrderedViews<'_, '_>) -> Result<()> {
        for (k, part) in self.parts.iter().enumerate() {
            match (part, self.shape.parts[k].0.place) {
                (PartAverages::Device(averages), Some(number)) => {
                    let (averaged, copied) = self.on_device(k, views, number)?;
                    averages.check(&averaged, &copied)?;
                }
                _ => drop(self.on_host(k, views)?),
            }
        }
        Ok(())
    }

    /// Returns true if every place is a device.
    pub(super) fn is_on_devices(&self) -> bool {
        self.shape.parts.iter().all(|(tensors, _)| tensors.place.is_some())
    }

    /// Looks for NaN and infinity in every place at once. On devices it only queues that.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a tensor that has moved, and [`Error::Cuda`].
    pub(super) fn look(&mut self, views: &OrderedViews<'_, '_>) -> Result<()> {
        self.found_on_host = None;
        for k in 0..self.parts.len() {
            match self.shape.parts[k].0.place {
                Some(number) => {
                    let (averaged, copied) = self.on_device(k, views, number)?;
                    if let PartAverages::Device(averages) = &mut self.parts[k] {
                        averages.look(&averaged, &copied)?;
                    }
                }
                None => {
                    let found = first_refused(&self.on_host(k, views)?.0);
                    self.found_on_host = found.map(|found| (k, found));
                }
            }
        }
        Ok(())
    }

    /// Waits for the newest [`SpreadAverages::look`], and returns the first element of the model that it has found.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub(super) fn refused(&self) -> Result<Option<NonFiniteElement>> {
        let mut found: Vec<(usize, Option<NonFiniteElement>)> =
            self.found_on_host.iter().map(|&(k, found)| (k, Some(found))).collect();
        for (k, part) in self.parts.iter().enumerate() {
            if let PartAverages::Device(averages) = part {
                found.push((k, averages.refused()?));
            }
        }
        let in_model = |(k, element): (usize, Option<NonFiniteElement>)| {
            let element = element?;
            Some(NonFiniteElement { tensor: self.shape.parts[k].0.averaged[element.tensor], ..element })
        };
        Ok(found.into_iter().filter_map(in_model).min_by_key(|element| element.tensor))
    }

    /// Updates the averages of every place. No thread may read them meanwhile. With `after_looks`, devices change
    /// nothing if the look of any device has found an element.
    ///
    /// # Errors
    /// As [`SpreadAverages::look`]. If some averages have changed already, all later calls fail, too.
    pub(super) fn update(
        &mut self,
        views: &OrderedViews<'_, '_>,
        weights: UpdateWeights<'_>,
        after_looks: bool,
    ) -> Result<()> {
        for k in 0..self.parts.len() {
            let outcome = self.update_part(k, views, weights, after_looks);
            if let (Err(error), true) = (&outcome, k > 0) {
                self.lost = Some(error.to_string());
            }
            outcome?;
        }
        Ok(())
    }

    fn update_part(
        &mut self,
        k: usize,
        views: &OrderedViews<'_, '_>,
        weights: UpdateWeights<'_>,
        after_looks: bool,
    ) -> Result<()> {
        match self.shape.parts[k].0.place {
            Some(number) => {
                let (averaged, copied) = self.on_device(k, views, number)?;
                let (before, rest) = self.parts.split_at_mut(k);
                let Some((PartAverages::Device(averages), after)) = rest.split_first_mut() else { return Ok(()) };
                if !after_looks {
                    return averages.update(&averaged, &copied, weights);
                }
                let others: Vec<_> = before.iter().chain(&*after).filter_map(PartAverages::on_device).collect();
                // All parts look again only after `refused` has waited for this update.
                averages.update_after_looks(&averaged, &copied, weights, &others)
            }
            None => {
                let (incoming, copied) = self.on_host(k, views)?;
                let PartAverages::Host(host) = &mut self.parts[k] else { return Ok(()) };
                let host = Arc::get_mut(host).ok_or_else(|| Error::Internal("the averages are being read".into()))?;
                host.update(&incoming, &copied, &self.shape.parts[k].1, weights);
                Ok(())
            }
        }
    }

    /// Waits until all updates have run.
    ///
    /// # Errors
    /// [`Error::Cuda`] if one of them failed.
    pub(in crate::tracker) fn wait(&self) -> Result<()> {
        self.check()?;
        self.parts.iter().try_for_each(|part| match part {
            PartAverages::Device(averages) => averages.wait(),
            PartAverages::Host(_) => Ok(()),
        })
    }

    /// Returns a reader of each part, after the newest update. `kept` has those of the devices from an earlier call.
    pub(in crate::tracker) fn readers(&self, kept: Vec<AveragesReader>) -> Result<Vec<PartReader>> {
        self.check()?;
        let mut kept = kept.into_iter();
        let reader = |part: &PartAverages| match part {
            PartAverages::Host(host) => Ok(PartReader::Host(host.clone())),
            PartAverages::Device(averages) => match kept.next() {
                Some(reader) => averages.follow(&reader).map(|()| PartReader::Device(reader)),
                None => averages.reader().map(PartReader::Device),
            },
        };
        self.parts.iter().map(reader).collect()
    }

    /// Returns the newest values of the copied tensors.
    pub(in crate::tracker) fn copies(&self) -> Result<Vec<Vec<u8>>> {
        let mut copies = vec![Vec::new(); self.shape.copied];
        for ((tensors, _), mut reader) in self.shape.parts.iter().zip(self.readers(Vec::new())?) {
            tensors.copied.iter().zip(reader.copies()?).for_each(|(&i, copy)| copies[i] = copy);
        }
        Ok(copies)
    }

    /// Returns the average of a tensor under a profile, where it is.
    pub(in crate::tracker) fn elements(&self, profile: usize, tensor: usize) -> Elements<'_> {
        let (part, at) = self.averaged[tensor];
        match &self.parts[part] {
            PartAverages::Device(averages) => Elements::Device(averages.input(profile, at)),
            PartAverages::Host(host) => {
                let average = &host.values().averages[profile].high[self.shape.parts[part].1.range(at)];
                Elements::Host(bytemuck::cast_slice(average))
            }
        }
    }

    /// Returns the number of a tensor's device; none for the host.
    pub(in crate::tracker) fn device_of(&self, tensor: usize) -> Option<usize> {
        self.shape.parts[self.averaged[tensor].0].0.place
    }

    /// Returns some elements of a tensor's average under a profile, copied to the host.
    pub(in crate::tracker) fn read(
        &self,
        readers: &mut [PartReader],
        profile: usize,
        tensor: usize,
        elements: std::ops::Range<usize>,
    ) -> Result<Vec<f32>> {
        let (part, at) = self.averaged[tensor];
        match &mut readers[part] {
            PartReader::Device(reader) => reader.elements(profile, at, elements),
            PartReader::Host(host) => {
                let average = &host.values().averages[profile].high[self.shape.parts[part].1.range(at)];
                Ok(average[elements].to_vec())
            }
        }
    }
}
