//! The devices that can be measured.

use super::Result;
use super::cases::Sizes;
use super::cpu::Cpu;
use super::session::Session;
use posthoc_ema::Device;
use posthoc_ema::Error;

/// A device on which everything can be measured.
pub(super) trait Bench {
    /// Its name, as [`Device`] writes it.
    fn device(&self) -> String;

    /// Its maker's name for it.
    fn model(&self) -> String;

    /// As many parameters as show what it can do, beside the other sizes, where nobody says how many.
    fn parameters(&self, asked: &Sizes) -> Result<usize>;

    /// Measures everything, one call of [`Session::measure`] for what shares its memory and its limits.
    fn run(&self, sizes: &Sizes, session: &mut Session<'_>) -> Result<()>;
}

/// What was found.
pub(super) struct Found {
    pub benches: Vec<Box<dyn Bench>>,
    /// Why no CUDA device is among them, where any would have been welcome.
    pub without_cuda: Option<String>,
}

/// The devices that are meant by `device`.
pub(super) fn find(device: Device) -> Result<Found> {
    let cpu: Box<dyn Bench> = Box::new(Cpu);
    let (benches, without_cuda) = match device {
        Device::Cpu => (vec![cpu], None),
        Device::Cuda(number) => {
            let unusable = |why| Error::Setting {
                option: "device",
                reason: format!("cuda:{number}: {why}: choose cpu, or auto for whatever is there"),
            };
            (cuda(Some(number)).map_err(unusable)?, None)
        }
        Device::Auto => match cuda(None) {
            Ok(found) => (std::iter::once(cpu).chain(found).collect(), None),
            Err(why) => (vec![cpu], Some(why)),
        },
    };
    Ok(Found { benches, without_cuda })
}

/// The CUDA device of this number, or all of them; or why there is none.
#[cfg(feature = "cuda")]
fn cuda(number: Option<usize>) -> Result<Vec<Box<dyn Bench>>, String> {
    use posthoc_ema::compute::cuda;
    let count = cuda::devices().map_err(|why| why.to_string())?;
    let numbers = number.map_or(0..count, |number| number..number + 1);
    let open = |number| cuda::Device::open(number).map(|device| Box::new(super::cuda::Cuda(device)) as Box<dyn Bench>);
    numbers.map(open).collect::<Result<_>>().map_err(|error| error.to_string())
}

/// Why there is no CUDA device.
#[cfg(not(feature = "cuda"))]
fn cuda(_number: Option<usize>) -> Result<Vec<Box<dyn Bench>>, String> {
    Err("this program was built without the feature `cuda`".into())
}
