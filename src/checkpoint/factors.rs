//! Pairs of factors of low-rank adapters: `B` and `A`, whose product is added to a weight.

use std::collections::BTreeMap;
use std::path::Path;

use super::adapter;
use super::model::{CheckpointModel, TensorEntry};
use crate::error::{Error, Result, shown};
use crate::tensor::to_f64;

/// Names of the two factors in the names of tensors, that of `A` first: PEFT's, kohya's, and those of diffusers.
const NAMES: [(&str, &str); 6] = [
    ("lora_A", "lora_B"),
    ("lora_a", "lora_b"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
    ("lora_linear_layer.down", "lora_linear_layer.up"),
];

/// Parts of the names of adapters that add something else than a product of two factors, and the reason.
const OTHERS: [(&str, &str); 8] = [
    ("lora_magnitude_vector", "DoRA, whose magnitudes scale the sum of the product and the base's weight"),
    ("dora_scale", "DoRA, whose magnitudes scale the sum of the product and the base's weight"),
    ("hada_", "LoHa, the elementwise product of two products"),
    ("lokr_", "LoKr, a Kronecker product"),
    ("lora_mid", "a convolution in three factors"),
    ("lora_E", "AdaLoRA, a product of three factors"),
    ("oft_", "OFT, a rotation"),
    ("boft_", "BOFT, a rotation"),
];

/// Factor of a further multiplication, which LyCORIS trains on demand.
const SCALAR: &str = "scalar";

/// Pair of factors.
#[derive(Debug, PartialEq)]
pub(crate) struct FactorPair {
    /// Name of `B`, and of `A`.
    pub up: String,
    pub down: String,
    /// Names that the scale may have.
    pub alphas: [String; 2],
    pub rows: usize,
    pub columns: usize,
    pub rank: usize,
}

/// Low-rank adapters of some checkpoints.
#[derive(Debug)]
pub(crate) struct Adapters {
    pub pairs: Vec<FactorPair>,
    /// Value by which each checkpoint scales the product of each pair, over a power of the rank that is the same in all
    /// checkpoints. It is 1 if no checkpoint has it.
    pub scales: Vec<Vec<f64>>,
}

impl Adapters {
    /// Finds the pairs of factors in checkpoints that have been checked against each other.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if there are none, for adapters whose products cannot be averaged, and for a scale that
    /// some checkpoints lack; [`Error::Io`] and [`Error::Damaged`] for a configuration that cannot be read.
    pub(super) fn find(models: &[CheckpointModel]) -> Result<Adapters> {
        adapter::check_products(&models[0].found)?;
        let pairs = find_pairs(&models[0].found.path, &models[0].tensors)?;
        let mut scales = vec![vec![1.0; pairs.len()]; models.len()];
        let mut sources = Vec::with_capacity(models.len());
        for model in models {
            sources.push(adapter::ScaleSources::new(&model.found, model.metadata())?);
        }
        for (i, pair) in pairs.iter().enumerate() {
            let alphas: Vec<Option<f64>> =
                models.iter().zip(&sources).map(|(model, source)| alpha(model, source, pair)).collect();
            if alphas.iter().all(|alpha| *alpha == alphas[0]) {
                continue;
            }
            let bias = pair.up.strip_suffix(".weight").map(|up| format!("{up}.bias"));
            if let Some(bias) = bias.filter(|bias| models[0].tensors.contains_key(bias)) {
                let why =
                    format!("the scales of adapters differ, and `{bias}` is scaled too: leave one of the two out");
                return Err(Error::unexpected(&models[0].found.path, why));
            }
            for ((model, scales), alpha) in models.iter().zip(&mut scales).zip(&alphas) {
                scales[i] = alpha.filter(|alpha| alpha.is_finite() && *alpha != 0.0).ok_or_else(|| {
                    let why = format!(
                        "the scale of `{}` is zero or missing, unlike in {}: leave one of the two out",
                        pair.down,
                        shown(&models[usize::from(alpha == &alphas[0])].found.path)
                    );
                    Error::unexpected(&model.found.path, why)
                })?;
            }
        }
        Ok(Adapters { pairs, scales })
    }
}

/// Returns the `alpha` of a pair of factors: that beside them, or that of a configuration.
fn alpha(model: &CheckpointModel, source: &adapter::ScaleSources, pair: &FactorPair) -> Option<f64> {
    let stored = pair.alphas.iter().find_map(|name| {
        let entry = model.tensors.get(name).filter(|entry| adapter::may_be_scale(name, &entry.shape))?;
        to_f64(entry.dtype, &model.scale(name)?)?.first().copied()
    });
    stored.or_else(|| source.alpha(&pair.down))
}

/// Finds the pairs of factors.
///
/// # Errors
/// [`Error::Unexpected`] if there are none, and for adapters whose products cannot be averaged.
fn find_pairs(path: &Path, tensors: &BTreeMap<String, TensorEntry>) -> Result<Vec<FactorPair>> {
    let mut pairs = Vec::new();
    for name in tensors.keys() {
        let is_part = |mark: &str| name.split('.').any(|part| part.starts_with(mark));
        if let Some((_, kind)) = OTHERS.iter().find(|(mark, _)| is_part(mark)) {
            let why = format!(
                "tensor `{name}` is of {kind}: such adapters cannot be averaged by --product svd (`product`); average \
                 their factors without it"
            );
            return Err(Error::unexpected(path, why));
        }
        if let Some(split) = NAMES.iter().find_map(|(down, up)| FactorName::split(name, down, up)) {
            pairs.extend(split.pair(name, tensors).map_err(|why| Error::unexpected(path, why))?);
        }
    }
    if pairs.is_empty() {
        let why = "it has no factors of an adapter, such as `lora_A`: average it without --product svd (`product`)";
        return Err(Error::unexpected(path, why));
    }
    Ok(pairs)
}

/// Name of a tensor, split around that of a factor.
struct FactorName<'a> {
    before: &'a str,
    factor: &'a str,
    /// Name of the other factor.
    other: &'a str,
    after: &'a str,
}

impl<'a> FactorName<'a> {
    fn split(name: &'a str, factor: &'a str, other: &'a str) -> Option<FactorName<'a>> {
        let at = name.rfind(factor)?;
        let (before, after) = (&name[..at], &name[at + factor.len()..]);
        // Older versions of diffusers write `to_q_lora.down`.
        let begins = before.is_empty() || before.ends_with('.') || (factor.contains('.') && before.ends_with('_'));
        let ends = after.is_empty() || after.starts_with('.');
        (begins && ends).then_some(FactorName { before, factor, other, after })
    }

    /// Returns the pair whose `A` is the tensor `name`; `None` for a bias, and for factors that are copied.
    ///
    /// # Errors
    /// The reason why the two have no product.
    fn pair(&self, name: &str, tensors: &BTreeMap<String, TensorEntry>) -> Result<Option<FactorPair>, String> {
        let FactorName { before, factor, other, after } = self;
        let entry = &tensors[name];
        if *after == ".bias" {
            return Ok(None);
        }
        let up = format!("{before}{other}{after}");
        let Some(other) = tensors.get(&up) else {
            return Err(format!("the factor `{name}` of an adapter has no `{up}` beside it: leave it out"));
        };
        if entry.copied || other.copied {
            return Ok(None);
        }
        let (down_shape, up_shape) = (entry.shape.as_slice(), other.shape.as_slice());
        let ([rank, columns @ ..], [rows, inner, rest @ ..]) = (down_shape, up_shape) else {
            return Err(no_product(&up, name, up_shape, down_shape));
        };
        if inner != rank || rest.iter().any(|&extent| extent != 1) {
            return Err(no_product(&up, name, up_shape, down_shape));
        }
        let scalar = format!("{before}{SCALAR}");
        if tensors.contains_key(&scalar) {
            return Err(format!(
                "`{scalar}` is a further factor of this adapter: average its factors without --product svd (`product`)"
            ));
        }
        let stem = factor.split('.').next().unwrap_or(factor);
        Ok(Some(FactorPair {
            alphas: [format!("{before}alpha"), format!("{before}{stem}.alpha")],
            rows: *rows,
            columns: columns.iter().product(),
            rank: *rank,
            up,
            down: name.to_owned(),
        }))
    }
}

fn no_product(up: &str, down: &str, up_shape: &[usize], down_shape: &[usize]) -> String {
    format!(
        "the factors `{up}` and `{down}` have the shapes {up_shape:?} and {down_shape:?}, which have no product: \
         average the factors without --product svd (`product`)"
    )
}
