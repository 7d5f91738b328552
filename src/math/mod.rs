//! The mathematics in f64: profiles, histories of updates, Gram matrices and the solve. No files, no devices.
//!
//! | symbol | name here | where |
//! | --- | --- | --- |
//! | `F_T(tau)` share of the average at time `T` seen up to time `tau` | [`Profile::cumulative`] | `profile` |
//! | `beta_k` decay of update `k` | [`Decays::beta`](chain::Decays) | `chain` |
//! | `w_k` weight of update `k` in an average | [`Chain::weights`](chain::Chain) | `chain` |
//! | `t_k`, `delta_k` time of update `k`, and the interval before it | `times`, `intervals` | `history` |
//! | `<a, b>` inner product of two averages | `gram` | `gram` |
//! | `x` weights of the snapshots | [`Solution::weights`] | `solve` |
//! | `x_i` weights of raw checkpoints, without tracked averages | [`Resolution::weights`] | `resolution` |
//!
//! Equation numbers are those of Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion
//! Models", arXiv:2312.02696, section 3 and appendix C.

pub mod chain;
mod conversion;
mod ema_chain;
mod gram;
mod groups;
pub mod history;
mod low_rank;
pub(crate) mod noise;
mod profile;
mod resolution;
mod retention;
mod rounding;
pub mod schedule;
mod solve;
mod student;

pub use chain::Chain;
pub use conversion::{
    MAX_SIGMA_REL, beta_to_half_life, beta_to_sigma_rel, gamma_to_sigma_rel, half_life_to_beta, half_life_to_sigma_rel,
    sigma_rel_to_beta, sigma_rel_to_gamma, sigma_rel_to_half_life,
};
pub use ema_chain::{EmaChain, EmaDecay, Ramp};
pub use gram::power_function_gram;
pub use history::History;
pub(crate) use low_rank::{CutProduct, ProductShape, ProductStack, instruction_set};
pub use profile::{Family, Profile, Shape, Unit, Window};
pub use resolution::Resolution;
pub use retention::Retention;
pub(crate) use retention::{dense_errors, targets};
pub use rounding::relative_rounding;
pub use schedule::{SNAPSHOT_GROWTH, Schedule};
pub use solve::{ChainSource, Densities, Solution, System};
pub(crate) use student::upper_quantile;
