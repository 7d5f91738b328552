//! The 8x8 handwritten digits, their split, and the random draws that flow matching trains on.
//!
//! The data are the test set of the UCI "Optical Recognition of Handwritten Digits" data
//! (E. Alpaydin, C. Kaynak, 1998; CC BY 4.0), as distributed with scikit-learn.

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use flate2::read::GzDecoder;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// Pixels of one image, eight rows of eight.
pub const PIXELS: usize = 64;
/// Digits 0 to 9.
pub const CLASSES: usize = 10;
/// Half the largest pixel value of the file, 16. Divided by it and minus 1, pixels are in [-1, 1].
const HALF_RANGE: f32 = 8.0;

const CSV_GZ: &[u8] = include_bytes!("digits.csv.gz");

/// One image and the digit it shows.
#[derive(Clone)]
pub struct Digit {
    /// Values in [-1, 1]; -1 is paper, 1 is ink.
    pub pixels: [f32; PIXELS],
    pub class: u32,
}

/// Images to train on, and images that the training never sees.
pub struct Split {
    pub train: Vec<Digit>,
    pub held_out: Vec<Digit>,
}

/// Inputs and target of one flow-matching step, one row for each image.
pub struct Batch {
    /// `(rows, PIXELS)`: the point at time `t` on the line from noise (t = 0) to image (t = 1).
    pub x_t: Tensor,
    /// `(rows, 1)`, in [0, 1).
    pub t: Tensor,
    /// `(rows,)`, u32.
    pub class: Tensor,
    /// `(rows, PIXELS)`: image minus noise, the velocity along that line.
    pub velocity: Tensor,
}

/// Reads the images and splits them. The split has a seed of its own, so that trainings with different seeds are
/// evaluated on the same held-out images.
pub fn load(train_count: usize, split_seed: u64) -> Result<Split> {
    let mut train = parse()?;
    ensure!(
        (1..train.len()).contains(&train_count),
        "cannot train on {train_count} of {} images: at least one must be trained on, and at least one held out",
        train.len()
    );
    train.shuffle(&mut ChaCha8Rng::seed_from_u64(split_seed));
    let held_out = train.split_off(train_count);
    Ok(Split { train, held_out })
}

fn parse() -> Result<Vec<Digit>> {
    csv::ReaderBuilder::new()
        .has_headers(false)
        .from_reader(GzDecoder::new(CSV_GZ))
        .records()
        .enumerate()
        .map(|(row, record)| {
            let record = record.with_context(|| format!("digits.csv.gz, row {row}"))?;
            digit(&record).with_context(|| format!("digits.csv.gz, row {row}"))
        })
        .collect()
}

fn digit(record: &csv::StringRecord) -> Result<Digit> {
    let values = record
        .iter()
        .map(|field| field.parse::<u8>().with_context(|| format!("{field:?}")))
        .collect::<Result<Vec<_>>>()?;
    ensure!(values.len() == PIXELS + 1, "{} fields, expected {PIXELS} pixels and the digit", values.len());
    let class = u32::from(values[PIXELS]);
    ensure!(class < CLASSES as u32, "digit {class}, expected 0 to 9");
    let pixels = std::array::from_fn(|i| f32::from(values[i]) / HALF_RANGE - 1.0);
    Ok(Digit { pixels, class })
}

/// Chooses `rows` of the images, with replacement.
pub fn choose<'a>(digits: &'a [Digit], rows: usize, rng: &mut impl Rng) -> Vec<&'a Digit> {
    (0..rows).map(|_| &digits[rng.random_range(0..digits.len())]).collect()
}

/// Draws noise and a time for each image, and moves it to that time: `x_t = (1 - t) noise + t image`.
pub fn batch(digits: &[&Digit], rng: &mut impl Rng) -> Result<Batch> {
    let rows = digits.len();
    let mut x_t = Vec::with_capacity(rows * PIXELS);
    let mut velocity = Vec::with_capacity(rows * PIXELS);
    let mut times = Vec::with_capacity(rows);
    for digit in digits {
        let t: f32 = rng.random();
        for &pixel in &digit.pixels {
            let noise: f32 = rng.sample(StandardNormal);
            x_t.push((1.0 - t) * noise + t * pixel);
            velocity.push(pixel - noise);
        }
        times.push(t);
    }
    let class = digits.iter().map(|digit| digit.class).collect::<Vec<_>>();
    let device = &Device::Cpu;
    Ok(Batch {
        x_t: Tensor::from_vec(x_t, (rows, PIXELS), device)?,
        t: Tensor::from_vec(times, (rows, 1), device)?,
        class: Tensor::from_vec(class, rows, device)?,
        velocity: Tensor::from_vec(velocity, (rows, PIXELS), device)?,
    })
}
