//! Tests of reads of averages from a device.

use posthoc_ema::compute::cpu::{Averages, Layout, Precision};
use posthoc_ema::compute::cuda::{CudaDevice, DeviceAverages};

use crate::driver::driver;

/// Reads several blocks, so that both pinned buffers are reused.
#[test]
fn averages_larger_than_staging_buffers_keep_bits() {
    driver();
    let device = CudaDevice::open(0).unwrap();
    let n = (32 << 20) / 4 * 3 + 12_345;
    let layout = Layout::new([n]);
    let mut averages = Averages::zeros(&layout, Precision::Compensated);
    averages.high.iter_mut().enumerate().for_each(|(i, value)| *value = i as f32);
    let low = averages.low.as_mut().unwrap();
    low.iter_mut().enumerate().for_each(|(i, term)| *term = i as i16);
    let on_device =
        DeviceAverages::upload(&device, &layout, std::slice::from_ref(&averages), Precision::Compensated, &[]).unwrap();
    let read = on_device.reader().unwrap().averages(0).unwrap();
    assert!(read.high == averages.high && read.low == averages.low);
}
