//! Quantized weights: integers beside their scales, which cannot be averaged.

use super::model::CheckpointModel;
use crate::error::{Error, Result};

/// Endings of the names of tensors that only quantized weights have, with the library that writes them.
const MARKS: [(&str, &str); 14] = [
    (".SCB", "bitsandbytes, 8 bits"),
    (".weight_format", "bitsandbytes, 8 bits"),
    (".absmax", "bitsandbytes, 4 bits"),
    (".quant_map", "bitsandbytes, 4 bits"),
    (".quant_state.bitsandbytes__nf4", "bitsandbytes, 4 bits"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes, 4 bits"),
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale", "compressed-tensors or another library"),
    (".weight_scale_inv", "a model in 8 bits of floating point"),
    ("_weight_qdata", "torchao"),
    (":_data", "torchao"),
    ("._packed_params._packed_params", "PyTorch's own quantization"),
];

/// Refuses a model with quantized weights. Copies of its scales beside averages of its integers would fit nothing.
///
/// # Errors
/// [`Error::Unexpected`] with the tensor.
pub(super) fn check(model: &CheckpointModel) -> Result<()> {
    for (name, entry) in model.tensors.iter().filter(|(_, entry)| !entry.copied) {
        if let Some((_, library)) = MARKS.iter().find(|(mark, _)| name.ends_with(mark)) {
            let why = format!(
                "tensor `{name}` belongs to quantized weights ({library}), whose integers and scales cannot be \
                 averaged: average the weights before they were quantized, or copy what is quantized with --copy \
                 (`copy`)"
            );
            return Err(Error::unexpected(&model.found.files[entry.file], why));
        }
    }
    Ok(())
}
