use super::super::convert::to_f64;
use super::*;
use rand::{Rng, SeedableRng};

const ALL: [Dtype; 4] = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64];

fn element(bytes: &[u8], dtype: Dtype, i: usize) -> f64 {
    let mut value = [0.0];
    let size = dtype.bitsize() / 8;
    to_f64(SimdLevel::best(), &mut value, &bytes[i * size..][..size], dtype);
    value[0]
}

fn encode(values: &[f64], dtype: Dtype) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.bitsize() / 8];
    from_f64(SimdLevel::best(), &mut bytes, values, dtype);
    bytes
}

/// Returns the distance between neighbours of `dtype` around `value`.
fn ulp(value: f64, dtype: Dtype) -> f64 {
    let (digits, smallest) = match dtype {
        Dtype::F16 => (10, -24),
        Dtype::BF16 => (7, -133),
        Dtype::F32 => (23, -149),
        _ => (52, -1074),
    };
    let exponent = if value == 0.0 { smallest } else { value.abs().log2().floor() as i32 };
    2f64.powi((exponent - digits).max(smallest))
}

/// Returns a sum of products in doubled precision: the rounding errors of products and sums are added at the end.
fn exact_sum(weights: &[f64], values: impl Iterator<Item = f64>) -> f64 {
    let (mut high, mut low) = (0.0, 0.0);
    for (w, x) in weights.iter().zip(values) {
        let product = w * x;
        let sum = high + product;
        let t = sum - high;
        low += (high - (sum - t)) + (product - t) + w.mul_add(x, -product);
        high = sum;
    }
    high + low
}

fn check(elements: usize, sources: usize, targets: usize, output: Dtype, shift: usize) {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64((elements * 31 + sources) as u64);
    let dtypes: Vec<Dtype> = (0..sources).map(|k| ALL[k % 4]).collect();
    let stored: Vec<Vec<u8>> = dtypes
        .iter()
        .map(|&dtype| {
            let values: Vec<f64> = (0..elements).map(|_| random.random::<f64>() * 2.0 - 1.0).collect();
            [vec![0u8; shift], encode(&values, dtype)].concat()
        })
        .collect();
    let stored: Vec<&[u8]> = stored.iter().map(|bytes| &bytes[shift..]).collect();
    // Weights of both signs and a noise gain of tens, as in synthesis.
    let weights: Vec<f64> = (0..sources * targets).map(|_| random.random::<f64>() * 40.0 - 20.0).collect();
    let size = output.bitsize() / 8;
    let blended = |level: SimdLevel| {
        let mut results = vec![vec![0xa5u8; shift + elements * size + 5]; targets];
        let mut dst: Vec<&mut [u8]> = results.iter_mut().map(|r| &mut r[shift..shift + elements * size]).collect();
        blend_with(level, &mut dst, &stored, &Blend { dtypes: &dtypes, weights: &weights, output }).unwrap();
        results
    };
    let results = blended(SimdLevel::BASELINE);
    for level in SimdLevel::all() {
        assert_eq!(blended(level), results, "{}", level.name());
    }
    for (m, result) in results.iter().enumerate() {
        let weights = &weights[m * sources..][..sources];
        for i in 0..elements {
            let exact = exact_sum(weights, stored.iter().zip(&dtypes).map(|(b, &d)| element(b, d, i)));
            let got = element(&result[shift..], output, i);
            // In f64 the sum itself rounds, by K 2^-53 of the sum of magnitudes.
            let rounding =
                if output == Dtype::F64 { sources as f64 * 20.0 * f64::EPSILON * sources as f64 } else { 0.0 };
            let difference = (got - exact).abs();
            assert!(difference <= ulp(exact, output) + rounding, "{output} {i}: {got} {exact}");
        }
        assert!(result[..shift].iter().chain(&result[shift + elements * size..]).all(|&b| b == 0xa5));
    }
}

#[test]
fn blend_of_every_length_is_within_one_ulp_of_exact_sum() {
    for elements in 0..70 {
        for output in ALL {
            check(elements, 9, 2, output, elements % 3);
        }
    }
}

#[test]
fn blend_of_any_number_of_sources_and_targets_is_exact() {
    for sources in [0, 1, 2, 3, 4, 5, 8, 40, 81] {
        for targets in [1, 2, 3, 4, 5, 6, 7, 8, 9, 31] {
            check(203, sources, targets, Dtype::F32, 1);
        }
    }
    check(4097, 40, 5, Dtype::F16, 0);
    check(1, 0, 0, Dtype::F32, 0);
}

#[test]
fn blend_in_pieces_keeps_bits() {
    let values: Vec<f64> = (0..3000).map(|i| f64::from(i).sin()).collect();
    let stored: Vec<Vec<u8>> = ALL.iter().map(|&dtype| encode(&values, dtype)).collect();
    let weights = [0.3, -1.7, 2.9, -0.5];
    let task = Blend { dtypes: &ALL, weights: &weights, output: Dtype::F32 };
    let sources: Vec<&[u8]> = stored.iter().map(Vec::as_slice).collect();
    let mut whole = vec![0u8; 12_000];
    blend(&mut [&mut whole], &sources, &task).unwrap();
    for cut in [1, 17, 512, 1999] {
        let mut pieces = vec![0u8; 12_000];
        let (head, tail) = pieces.split_at_mut(4 * cut);
        let part = |range: std::ops::Range<usize>| -> Vec<&[u8]> {
            let bytes = |d: Dtype| d.bitsize() / 8;
            stored.iter().zip(ALL).map(|(s, d)| &s[range.start * bytes(d)..range.end * bytes(d)]).collect()
        };
        blend(&mut [head], &part(0..cut), &task).unwrap();
        blend(&mut [tail], &part(cut..3000), &task).unwrap();
        assert_eq!(pieces, whole);
    }
}

#[test]
fn overflowing_sum_is_reported() {
    let values = encode(&[1.0, 70_000.0, f64::NAN], Dtype::F32);
    let mut out = [0u8; 12];
    let task = |output| Blend { dtypes: &[Dtype::F32], weights: &[1.0], output };
    let overflow = blend(&mut [&mut out[..6]], &[&values], &task(Dtype::F16)).unwrap_err();
    assert_eq!((overflow.element, overflow.value), (1, 70_000.0));
    let overflow = blend(&mut [&mut out], &[&values], &task(Dtype::F32)).unwrap_err();
    assert!(overflow.element == 2 && overflow.value.is_nan());
}

#[test]
fn single_target_has_bits_of_one_among_several() {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    for dtype in ALL {
        for elements in (0..70).chain([511, 512, 513, 1500]) {
            for (sources, shift) in [(4, 0), (9, 1), (12, 3)] {
                let size = dtype.bitsize() / 8;
                let mut stored = |_| {
                    let values: Vec<f64> = (0..elements).map(|_| random.random::<f64>() * 2.0 - 1.0).collect();
                    [vec![0u8; shift], encode(&values, dtype)].concat()
                };
                let stored: Vec<Vec<u8>> = (0..sources).map(&mut stored).collect();
                let stored: Vec<&[u8]> = stored.iter().map(|bytes| &bytes[shift..]).collect();
                let weights: Vec<f64> = (0..2 * sources).map(|_| random.random::<f64>() * 40.0 - 20.0).collect();
                let dtypes = vec![dtype; sources];
                let mut alone = vec![0x55u8; 8 * elements];
                let mut first = vec![0xaau8; 8 * elements];
                let mut second = vec![0u8; 8 * elements];
                let task = |weights| Blend { dtypes: &dtypes, weights, output: Dtype::F64 };
                blend(&mut [&mut alone], &stored, &task(&weights[..sources])).unwrap();
                blend(&mut [&mut first, &mut second], &stored, &task(&weights)).unwrap();
                assert_eq!(alone, first, "{dtype} of {size} bytes, {elements} elements, {sources} sources");
            }
        }
    }
}
