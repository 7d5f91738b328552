//! Tests of the work that an evaluation queues: a model of many small tensors takes few launches and waits.

use posthoc_ema::{At, Device, Dtype, PostHocEma, Profile, Run, Tensor, Tensors};

use crate::driver::{check_in_own_process, count, driver};
use crate::model::OnDevice;
use crate::owner::Owner;
use crate::values::encode;

const TENSORS: usize = 400;

/// Returns the same tensors on the host and on a device.
fn many(owner: &Owner, step: usize) -> (Tensors, OnDevice<'_>) {
    let mut host = Tensors::default();
    let mut tensors = Vec::new();
    for i in 0..TENSORS {
        let name = format!("block.{i:03}.weight");
        let (dtype, elements) = ([Dtype::F32, Dtype::BF16, Dtype::F32, Dtype::I64][i % 4], 4 * (i % 9 + 1));
        let value = |k: usize| ((i * step + 31 * k) % 101) as f64 / 101.0;
        let bytes: Vec<u8> = match dtype {
            Dtype::I64 => (0..elements).flat_map(|k| (step + k).to_le_bytes()).collect(),
            dtype => (0..elements).flat_map(|k| encode(value(k), dtype)).collect(),
        };
        let tensor = Tensor { dtype, shape: vec![elements], bytes };
        let owned = owner.own(&tensor.bytes, 0);
        host.insert(name.clone(), tensor.clone());
        tensors.push((name, tensor, owned));
    }
    (host, OnDevice { tensors, until_fence: false })
}

/// Runs in its own process, because the driver counts the work of all tests.
#[test]
#[ignore = "run by `evaluation_of_many_tensors_takes_few_launches_and_waits`"]
fn evaluations() {
    driver();
    let owner = Owner::new();
    let profile = Profile::sigma_rel(0.12).unwrap();
    for device in [Device::AnyCuda, Device::Cpu] {
        let temp = tempfile::tempdir().unwrap();
        let (host, mut model) = many(&owner, 1);
        let options = |name: &str| PostHocEma::options(temp.path().join(name)).update_every(1).checkpoint_every(2);
        let mut ema = options("device").device(device).create(&model).unwrap();
        let mut twin = options("host").create(&host).unwrap();
        let mut before = host;
        for step in 1..=4 {
            let (host, now) = many(&owner, step);
            model = now;
            ema.update(&model).unwrap();
            twin.update(&host).unwrap();
            before = host;
        }
        ema.flush().unwrap();
        let average = twin.synthesize(profile.clone()).unwrap();
        let run = Run::open(temp.path().join("device")).unwrap();
        let plan = run.plan(profile.clone(), At::Latest).unwrap();
        for is_live in [true, false] {
            let names = ["launches", "memsets", "copies", "events", "host_waits"];
            let counted = || names.map(|name| count(name).unwrap_or(0));
            let start = counted();
            let swapped = match is_live {
                true => ema.swap_in(profile.clone(), &mut model).unwrap(),
                false => run.swap_in(&plan, &mut model).unwrap(),
            };
            let end = counted();
            let right = if is_live { average.clone() } else { run.load(&plan).unwrap() };
            for (name, _, owned) in &swapped.tensors {
                assert!(owned.get() == right.get(name).unwrap().bytes, "{name}");
            }
            let restored = counted();
            swapped.restore().unwrap();
            let restored_end = counted();
            for (name, _, owned) in &model.tensors {
                assert!(owned.get() == before.get(name).unwrap().bytes, "{name}");
            }
            let used: Vec<u64> = (0..names.len()).map(|i| end[i] - start[i] + restored_end[i] - restored[i]).collect();
            // Each tensor is saved, written, and restored by one copy. Two neighbours in an average are one more.
            let most = [8, 8, 4 * TENSORS as u64 + 40, 40, 40];
            assert!(used.iter().zip(most).all(|(used, most)| *used <= most), "{names:?}: {used:?}, at most {most:?}");
        }
    }
}

#[test]
fn evaluation_of_many_tensors_takes_few_launches_and_waits() {
    check_in_own_process("submissions::evaluations", &[]);
}
