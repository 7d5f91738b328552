//! Registry of a run's tensors: averaged, copied and tied, with the place of each.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use safetensors::Dtype;

use super::shard_place::Sharding;
use super::tensor_choice::{Roles, TensorChoice};
use crate::compute::cpu::Layout;
use crate::error::{Difference, Error, Result};
use crate::snapshot::{FileLayout, PartPlace};
use crate::tensor::{TensorSpec, TensorView, byte_size};

/// Tensor of the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    /// Shape in this process.
    pub shape: Vec<usize>,
    /// Shape of the whole tensor, of which this process may hold a part.
    pub global: Vec<usize>,
    /// First element of the part.
    pub offset: Vec<usize>,
    /// Size in bytes in the model.
    pub bytes: usize,
    /// True if this process stores the tensor.
    pub is_stored: bool,
}

impl Entry {
    fn new(view: &TensorView<'_>, sharding: Option<&Sharding>) -> Result<Entry> {
        let TensorView { name, dtype, shape, .. } = *view;
        let bytes = byte_size(name, dtype, shape)?;
        let (global, offset) = view.placed();
        view.part.map_or(Ok(()), |part| part.check(name, shape))?;
        let is_stored = match sharding {
            None if global != shape || view.is_replica => {
                let reason = "it is a part or a replica, and this run is not sharded: set the option `shard`";
                return Err(Error::tensor(name, reason));
            }
            None => true,
            // All parts of a tensor without elements are empty, and still stored.
            Some(Sharding { rank, replicas, .. }) => {
                let is_empty = shape.contains(&0) && !global.contains(&0);
                rank.is_some() && !view.is_replica && !replicas.contains(name) && !is_empty
            }
        };
        Ok(Entry { name: name.to_owned(), dtype, shape: shape.to_vec(), global, offset, bytes, is_stored })
    }

    pub(super) fn spec(&self) -> TensorSpec {
        TensorSpec { name: self.name.clone(), dtype: self.dtype, shape: self.shape.clone() }
    }

    /// Returns the place of the tensor's elements in the whole tensor.
    pub(super) fn place(&self) -> PartPlace {
        PartPlace { global: self.global.clone(), offset: self.offset.clone() }
    }

    /// Returns true if a view is at the place of this tensor.
    fn is_at(&self, view: &TensorView<'_>) -> bool {
        match view.part {
            Some(part) => part.global == self.global && part.offset == self.offset,
            None => view.shape == self.global && self.offset.iter().all(|&offset| offset == 0),
        }
    }
}

/// Role of a tensor in an update, with its index among the tensors of that role.
#[derive(Clone, Debug, PartialEq, Eq)]
enum TensorRole {
    Averaged(usize),
    Copied(usize),
    /// Shares the elements of the tensor of this name.
    Tied(String),
    LeftOut,
}

/// All tensors of a run, in the order of their names.
#[derive(Clone, Debug, Default)]
pub(super) struct TensorRegistry {
    averaged: Vec<Entry>,
    copied: Vec<Entry>,
    tied: BTreeMap<String, String>,
    /// Ties of the whole model. A process of a sharded run may lack some of their tensors.
    model_tied: BTreeMap<String, String>,
    roles: BTreeMap<String, TensorRole>,
    layout: Layout,
    /// Order in which the model last listed its tensors, with their roles. It rarely changes.
    order: Vec<(String, TensorRole)>,
}

/// Views of one update, in the order of the registry.
pub(super) struct OrderedViews<'v, 'a> {
    pub averaged: Vec<&'v TensorView<'a>>,
    pub copied: Vec<&'v TensorView<'a>>,
}

impl<'v, 'a> OrderedViews<'v, 'a> {
    /// Iterates over all views, the averaged ones first.
    pub(super) fn all(&self) -> impl Iterator<Item = &'v TensorView<'a>> {
        self.averaged.iter().chain(&self.copied).copied()
    }
}

impl TensorRegistry {
    /// Registers the tensors of a new run and finds which are tied.
    pub(super) fn new(
        views: &[TensorView<'_>],
        choice: &TensorChoice,
        sharding: Option<&Sharding>,
    ) -> Result<TensorRegistry> {
        match sharding.and_then(|sharding| sharding.ties.as_ref()) {
            Some(ties) => TensorRegistry::resumed(views, choice, ties, &|_| None, sharding),
            None => {
                let roles = Roles::new(views, choice, &|_| None).of_part(sharding);
                TensorRegistry::build(views, &roles, ties_of(views, choice, |_| true), sharding)
            }
        }
    }

    /// Registers the tensors of a run that is extended. Of tied tensors, one that `is_known` to the run is kept.
    pub(super) fn extended(
        views: &[TensorView<'_>],
        choice: &TensorChoice,
        was_averaged: &dyn Fn(&str) -> Option<bool>,
        is_known: impl Fn(&str) -> bool,
    ) -> Result<TensorRegistry> {
        let ties = ties_of(views, choice, is_known);
        TensorRegistry::build(views, &Roles::new(views, choice, was_averaged), ties, None)
    }

    /// Registers the tensors of a resumed run, whose ties are known. `was_averaged` returns `None` for a new tensor.
    pub(super) fn resumed(
        views: &[TensorView<'_>],
        choice: &TensorChoice,
        tied: &BTreeMap<String, String>,
        was_averaged: &dyn Fn(&str) -> Option<bool>,
        sharding: Option<&Sharding>,
    ) -> Result<TensorRegistry> {
        let roles = Roles::new(views, choice, was_averaged).of_part(sharding);
        TensorRegistry::build(views, &roles, tied.clone(), sharding)
    }

    fn build(
        views: &[TensorView<'_>],
        roles: &Roles<'_>,
        model_tied: BTreeMap<String, String>,
        sharding: Option<&Sharding>,
    ) -> Result<TensorRegistry> {
        let mut tied = model_tied.clone();
        if sharding.is_some() {
            let names: BTreeSet<&str> = views.iter().map(|view| view.name).collect();
            tied.retain(|dropped, kept| names.contains(dropped.as_str()) && names.contains(kept.as_str()));
        }
        let mut sorted: Vec<&TensorView<'_>> = views.iter().collect();
        sorted.sort_by_key(|view| view.name);
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(Error::tensor(pair[0].name, "the name occurs twice: names must be unique"));
        }
        let mut registry = TensorRegistry { tied, model_tied, ..TensorRegistry::default() };
        for view in sorted {
            let role = registry.add(view, roles, sharding)?;
            registry.roles.insert(view.name.to_owned(), role);
        }
        // A process of a sharded run may have only tensors that are copied.
        if registry.averaged.is_empty() && sharding.is_none() {
            return Err(Error::NothingToAverage);
        }
        // Fails now, and not at the first snapshot, if a file cannot hold these tensors.
        let specs = registry.averaged.iter().chain(&registry.copied).map(Entry::spec).collect();
        FileLayout::new(specs)?;
        registry.layout = Layout::new(registry.averaged.iter().map(|entry| entry.shape.iter().product()));
        Ok(registry)
    }

    fn add(&mut self, view: &TensorView<'_>, roles: &Roles<'_>, sharding: Option<&Sharding>) -> Result<TensorRole> {
        if roles.choice.leave_out.contains(view.name) {
            return Ok(TensorRole::LeftOut);
        }
        if let Some(kept) = self.tied.get(view.name) {
            return Ok(TensorRole::Tied(kept.clone()));
        }
        let entry = Entry::new(view, sharding)?;
        check(view, &entry)?;
        let names: Vec<&str> = self.names_of(view.name).collect();
        if roles.is_averaged(view, &names)? {
            self.averaged.push(entry);
            return Ok(TensorRole::Averaged(self.averaged.len() - 1));
        }
        self.copied.push(entry);
        Ok(TensorRole::Copied(self.copied.len() - 1))
    }

    /// Iterates over a kept tensor's name and those tied to it; a user may give any of them.
    fn names_of<'n>(&'n self, kept: &'n str) -> impl Iterator<Item = &'n str> {
        let dropped = self.model_tied.iter().filter(move |(_, k)| *k == kept).map(|(dropped, _)| dropped.as_str());
        std::iter::once(kept).chain(dropped)
    }

    /// Returns the views of an update in the order of the registry, after checking that they are the run's tensors.
    pub(super) fn order_views<'v, 'a>(&mut self, views: &'v [TensorView<'a>]) -> Result<OrderedViews<'v, 'a>> {
        let is_same_order =
            views.len() == self.order.len() && views.iter().zip(&self.order).all(|(view, (name, _))| view.name == name);
        if !is_same_order {
            self.order = self.find_order(views)?;
        }
        let mut averaged = vec![None; self.averaged.len()];
        let mut copied = vec![None; self.copied.len()];
        for (view, (_, role)) in views.iter().zip(&self.order) {
            match role {
                TensorRole::Averaged(i) => averaged[*i] = Some(check(view, &self.averaged[*i])?),
                TensorRole::Copied(i) => copied[*i] = Some(check(view, &self.copied[*i])?),
                TensorRole::Tied(_) | TensorRole::LeftOut => {}
            }
        }
        self.check_ties(views)?;
        Ok(OrderedViews {
            averaged: averaged.into_iter().flatten().collect(),
            copied: copied.into_iter().flatten().collect(),
        })
    }

    /// Finds the role of each view. Every tensor of the run must occur exactly once, and no other.
    fn find_order(&self, views: &[TensorView<'_>]) -> Result<Vec<(String, TensorRole)>> {
        let mut seen = BTreeSet::new();
        let mut order = Vec::with_capacity(views.len());
        for view in views {
            let Some(role) = self.roles.get(view.name) else {
                return Err(Error::changed(
                    view.name,
                    Difference::new("the tensor", "missing when the run began", "new"),
                ));
            };
            if !seen.insert(view.name) {
                return Err(Error::tensor(view.name, "the name occurs twice: names must be unique"));
            }
            order.push((view.name.to_owned(), role.clone()));
        }
        match self.roles.keys().find(|name| !seen.contains(name.as_str())) {
            Some(missing) => Err(Error::changed(missing, Difference::new("the tensor", "present", "missing"))),
            None => Ok(order),
        }
    }

    fn check_ties(&self, views: &[TensorView<'_>]) -> Result<()> {
        if self.tied.is_empty() {
            return Ok(());
        }
        let by_name: HashMap<&str, &TensorView<'_>> = views.iter().map(|view| (view.name, view)).collect();
        for (dropped, kept) in &self.tied {
            let Some(dropped_view) = by_name.get(dropped.as_str()) else { continue };
            let Some(kept_view) = by_name.get(kept.as_str()) else { continue };
            let is_empty = dropped_view.byte_len() == 0 && kept_view.byte_len() == 0;
            if memory_key(dropped_view) != memory_key(kept_view) && !is_empty {
                let expected = format!("shared with `{kept}` when the run began");
                return Err(Error::changed(dropped, Difference::new("its memory", expected, "separate")));
            }
        }
        Ok(())
    }

    pub(super) fn averaged(&self) -> &[Entry] {
        &self.averaged
    }

    pub(super) fn copied(&self) -> &[Entry] {
        &self.copied
    }

    pub(super) fn tied(&self) -> &BTreeMap<String, String> {
        &self.tied
    }

    /// Returns the ties of the whole model.
    pub(super) fn model_tied(&self) -> &BTreeMap<String, String> {
        &self.model_tied
    }

    /// Returns the ties of the tensors that this process stores.
    pub(super) fn stored_ties(&self) -> BTreeMap<String, String> {
        let stored: BTreeSet<&String> =
            self.averaged.iter().chain(&self.copied).filter(|entry| entry.is_stored).map(|entry| &entry.name).collect();
        self.model_tied.iter().filter(|(_, kept)| stored.contains(kept)).map(|(a, b)| (a.clone(), b.clone())).collect()
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the index of an averaged tensor as `Ok`, of a copied one as `Err`.
    pub(super) fn find(&self, name: &str) -> Option<Result<usize, usize>> {
        match self.roles.get(name)? {
            TensorRole::Averaged(i) => Some(Ok(*i)),
            TensorRole::Copied(i) => Some(Err(*i)),
            TensorRole::Tied(_) | TensorRole::LeftOut => None,
        }
    }
}

fn check<'v, 'a>(view: &'v TensorView<'a>, entry: &Entry) -> Result<&'v TensorView<'a>> {
    if view.shape != entry.shape {
        return Err(Error::changed(
            view.name,
            Difference::new("its shape", format!("{:?}", entry.shape), format!("{:?}", view.shape)),
        ));
    }
    if view.dtype != entry.dtype {
        return Err(Error::changed(view.name, Difference::new("its dtype", entry.dtype, view.dtype)));
    }
    if !entry.is_at(view) {
        let (global, offset) = view.placed();
        let expected = format!("{:?} of {:?}", entry.offset, entry.global);
        return Err(Error::changed(
            view.name,
            Difference::new("its place", expected, format!("{offset:?} of {global:?}")),
        ));
    }
    let size = (entry.dtype.bitsize() / 8).max(1) as u64;
    if let (Some(device), address) = view.place()
        && !address.is_multiple_of(size)
    {
        let reason = format!(
            "its address on cuda:{device}, {address:#x}, is not a multiple of its element size of {size} bytes"
        );
        return Err(Error::tensor(view.name, reason));
    }
    // A view is a plain struct: its byte length may contradict its shape.
    if view.byte_len() != entry.bytes {
        let reason = format!("{} bytes were lent, but its shape and dtype take {}", view.byte_len(), entry.bytes);
        return Err(Error::tensor(view.name, reason));
    }
    Ok(view)
}

/// Returns the properties that two views share if they are the same memory.
fn memory_key<'v>(view: &'v TensorView<'_>) -> ((Option<usize>, u64), usize, Dtype, &'v [usize]) {
    (view.place(), view.byte_len(), view.dtype, view.shape)
}

/// Finds the ties among the tensors that are not left out.
pub(super) fn ties_of(
    views: &[TensorView<'_>],
    choice: &TensorChoice,
    is_known: impl Fn(&str) -> bool,
) -> BTreeMap<String, String> {
    let kept: Vec<&TensorView<'_>> = views.iter().filter(|view| !choice.leave_out.contains(view.name)).collect();
    find_tied(&kept, is_known)
}

/// Finds tensors that share their elements with another tensor: `dropped name -> kept name`.
///
/// The kept one is known, if one of them is, and the first in the model's order: the one that Hugging Face's
/// `save_pretrained` keeps.
fn find_tied(views: &[&TensorView<'_>], is_known: impl Fn(&str) -> bool) -> BTreeMap<String, String> {
    let mut sorted: Vec<&TensorView<'_>> = views.iter().copied().filter(|view| view.byte_len() > 0).collect();
    // Stable: of those that are alike, the first in the model's order comes first.
    sorted.sort_by_key(|view| !is_known(view.name));
    let mut kept: BTreeMap<_, &str> = BTreeMap::new();
    let mut tied = BTreeMap::new();
    for view in sorted {
        match kept.get(&memory_key(view)) {
            Some(first) => drop(tied.insert(view.name.to_owned(), (*first).to_owned())),
            None => drop(kept.insert(memory_key(view), view.name)),
        }
    }
    tied
}
