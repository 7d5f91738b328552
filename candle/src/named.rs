//! Models as named tensors: candle's own map, or names with tensors or variables.

use std::collections::HashMap;
use std::sync::PoisonError;

use candle_core::{Tensor, Var};
use candle_nn::VarMap;
use posthoc_ema::{Parameters, ParametersMut, Result, TensorView, TensorViewMut};

use crate::read::with_tensors;
use crate::write::write_var;

/// Variables of a [`VarMap`], read and written in place: the optimiser and the layers see the new values.
///
/// A variable in the map under two names counts as tied.
#[derive(Clone, Copy)]
pub struct Variables<'a>(pub &'a VarMap);

impl Variables<'_> {
    /// Returns handles to the variables, so that the map is not locked while they are in use.
    fn handles(self) -> Vec<(String, Var)> {
        // A thread that panicked while it held the lock has left the variables whole.
        let map = self.0.data().lock().unwrap_or_else(PoisonError::into_inner);
        map.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    }
}

impl Parameters for Variables<'_> {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        NamedVars::from(self.handles().as_slice()).with_tensors(read)
    }
}

impl ParametersMut for Variables<'_> {
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
        NamedVars::from(self.handles().as_slice()).for_each_mut(write)
    }
}

/// Named tensors, to be read. Tensors that are not contiguous are copied for the time of a call.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use posthoc_ema::Parameters;
/// use posthoc_ema_candle::NamedTensors;
///
/// let model = [("weight".to_owned(), Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?)];
/// NamedTensors::from(&model[..]).with_tensors(&mut |views| {
///     assert_eq!((views[0].name, views[0].shape), ("weight", [2, 2].as_slice()));
///     Ok(())
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct NamedTensors<'a>(Vec<(&'a str, &'a Tensor)>);

impl Parameters for NamedTensors<'_> {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        with_tensors(&self.0, read)
    }
}

/// Named variables, to be read, and to be written in place.
#[derive(Clone, Debug)]
pub struct NamedVars<'a>(Vec<(&'a str, &'a Var)>);

impl Parameters for NamedVars<'_> {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        self.0.iter().map(|&(name, var)| (name, var.as_tensor())).collect::<NamedTensors<'_>>().with_tensors(read)
    }
}

impl ParametersMut for NamedVars<'_> {
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
        self.0.iter().try_for_each(|(name, var)| write_var(name, var, write))
    }
}

macro_rules! named {
    ($named:ident of $element:ty) => {
        impl<'a> FromIterator<(&'a str, &'a $element)> for $named<'a> {
            fn from_iter<I: IntoIterator<Item = (&'a str, &'a $element)>>(pairs: I) -> Self {
                let mut pairs: Vec<_> = pairs.into_iter().collect();
                // Each hash map has its own order.
                pairs.sort_by_key(|(name, _)| *name);
                $named(pairs)
            }
        }

        impl<'a, N: AsRef<str>> From<&'a [(N, $element)]> for $named<'a> {
            fn from(pairs: &'a [(N, $element)]) -> Self {
                pairs.iter().map(|(name, element)| (name.as_ref(), element)).collect()
            }
        }

        impl<'a> From<&'a HashMap<String, $element>> for $named<'a> {
            fn from(map: &'a HashMap<String, $element>) -> Self {
                map.iter().map(|(name, element)| (name.as_str(), element)).collect()
            }
        }
    };
}
named!(NamedTensors of Tensor);
named!(NamedVars of Var);
