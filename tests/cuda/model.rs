//! Model that is trained in host memory and on a device.

use std::path::Path;

use posthoc_ema::{Dtype, Parameters, ParametersMut, Result, Tensor, TensorView, TensorViewMut, Tensors};
use rand::Rng;

use crate::owner::{Owned, Owner};
use crate::values::{encode, random};

/// Model with equal tensors on host and device, which change together.
pub struct Model<'o> {
    pub host: Tensors,
    pub device: OnDevice<'o>,
}

/// Tensors on a device.
pub struct OnDevice<'o> {
    pub tensors: Vec<(String, Tensor, Owned<'o>)>,
    /// True if the tensors are lent until the fence has passed.
    pub until_fence: bool,
}

/// Tensors of mixed dtypes and odd sizes, averaged and copied.
const TENSORS: [(&str, Dtype, &[usize]); 8] = [
    ("a.weight", Dtype::F32, &[33, 7]),
    ("b.weight", Dtype::BF16, &[5, 1001]),
    ("c.scale", Dtype::F32, &[]),
    ("d.half", Dtype::F16, &[130]),
    ("e.double", Dtype::F64, &[17]),
    ("f.empty", Dtype::F32, &[0, 4]),
    ("g.count", Dtype::I64, &[]),
    ("h.mask", Dtype::BOOL, &[13]),
];

impl<'o> Model<'o> {
    pub fn new(owner: &'o Owner) -> Model<'o> {
        let mut random = random(77);
        let mut host = Tensors::default();
        let mut tensors = Vec::new();
        for (i, (name, dtype, shape)) in TENSORS.into_iter().enumerate() {
            let elements = shape.iter().product::<usize>();
            let bytes: Vec<u8> = match dtype {
                Dtype::I64 => 3i64.to_le_bytes().to_vec(),
                Dtype::BOOL => (0..elements).map(|i| (i % 3 == 0) as u8).collect(),
                dtype => (0..elements).flat_map(|_| encode(random.random::<f64>() - 0.5, dtype)).collect(),
            };
            let owned = owner.own(&bytes, [0, 8, 4][i % 3] * (dtype.bitsize() / 8).min(2));
            let tensor = Tensor { dtype, shape: shape.to_vec(), bytes };
            host.insert(name, tensor.clone());
            tensors.push((name.to_owned(), tensor, owned));
        }
        Model { host, device: OnDevice { tensors, until_fence: false } }
    }

    /// Changes the tensors on both sides, as an optimiser does.
    pub fn train(&mut self, step: u64) {
        self.train_host(step);
        self.try_train_device().unwrap();
    }

    /// Changes the tensors on the host.
    pub fn train_host(&mut self, step: u64) {
        let mut random = random(1000 + step);
        for (name, tensor, _) in &mut self.device.tensors {
            tensor.bytes = match tensor.dtype {
                Dtype::I64 => (step as i64).to_le_bytes().to_vec(),
                Dtype::BOOL => tensor.bytes.iter().map(|b| 1 - b).collect(),
                dtype => {
                    let elements = tensor.shape.iter().product::<usize>();
                    let value = |i: usize| (step as f64 / 7.0 + i as f64).sin() + 0.1;
                    (0..elements).flat_map(|i| encode(value(i) + 0.1 * random.random::<f64>(), dtype)).collect()
                }
            };
            self.host.insert(name.clone(), tensor.clone());
        }
    }

    /// Copies the new values to the device.
    pub fn try_train_device(&self) -> Result<(), String> {
        self.device.tensors.iter().try_for_each(|(_, tensor, owned)| owned.try_set(&tensor.bytes))
    }

    /// Reads the tensors from the device.
    pub fn on_device(&self) -> Tensors {
        let read = |(name, tensor, owned): &(String, Tensor, Owned<'_>)| {
            (name.clone(), Tensor { bytes: owned.get(), ..tensor.clone() })
        };
        self.device.tensors.iter().map(read).collect()
    }
}

impl Parameters for OnDevice<'_> {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let mut views = Vec::new();
        for (name, tensor, owned) in &self.tensors {
            let lent = owned.lend();
            // SAFETY: the tests change the memory only after its stream has waited for the fence.
            let lent = if self.until_fence { unsafe { lent.until_fence() } } else { lent };
            views.push(TensorView::cuda(name, tensor.dtype, &tensor.shape, lent)?);
        }
        read(&views)
    }
}

impl ParametersMut for OnDevice<'_> {
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
        self.for_each_batch_mut(&mut |views| views.into_iter().try_for_each(&mut *write))
    }

    fn for_each_batch_mut(&mut self, write: &mut dyn FnMut(Vec<TensorViewMut<'_>>) -> Result<()>) -> Result<()> {
        let views = self
            .tensors
            .iter()
            .map(|(name, tensor, owned)| TensorViewMut::cuda(name, tensor.dtype, &tensor.shape, owned.lend_mut()));
        write(views.collect::<Result<_>>()?)
    }
}

/// Name of a file, its tensors and its metadata.
pub type Contents = (String, Vec<(String, Tensor)>, Vec<(String, String)>);

/// Reads the files of a run, without the metadata that differs between runs.
pub fn files(dir: &Path) -> Vec<Contents> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.ends_with(".safetensors"));
    names.sort();
    let read = |name: String| {
        let file = posthoc_ema::snapshot::StoredFile::open(&dir.join(&name)).unwrap();
        file.verify().unwrap();
        let tensor = |(name, t): (&str, &posthoc_ema::snapshot::StoredTensor)| {
            (name.to_owned(), Tensor { dtype: t.dtype, shape: t.shape.clone(), bytes: file.bytes(t).to_vec() })
        };
        let tensors: Vec<(String, Tensor)> = file.tensors().iter().map(tensor).collect();
        let mut metadata: Vec<(String, String)> = file.metadata().clone().into_iter().collect();
        metadata.retain(|(key, _)| !["run", "session", "state", "header_checksum"].contains(&key.as_str()));
        (name, tensors, metadata)
    };
    names.into_iter().map(read).collect()
}
