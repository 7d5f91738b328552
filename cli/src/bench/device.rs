//! The interface of a device that is measured.

use posthoc_ema::Result;

use super::cases::Sizes;
use super::session::Session;

/// A device on which everything can be measured.
pub(super) trait BenchDevice {
    /// Returns the name of the device, as [`Device`](posthoc_ema::Device) writes it.
    fn name(&self) -> String;

    /// Returns the name of the model by its maker.
    fn model(&self) -> String;

    /// Returns the default number of parameters, enough to reach full speed, beside the other sizes.
    fn default_parameters(&self, sizes: &Sizes) -> Result<usize>;

    /// Measures everything. Work that shares memory and limits shares one call of [`Session::measure`].
    fn run(&self, sizes: &Sizes, session: &mut Session<'_>) -> Result<()>;
}
