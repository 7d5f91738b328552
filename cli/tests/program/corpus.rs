//! Replays the corpora of the fuzz targets (`fuzz/corpus`) and thousands of mutated copies of their inputs.

use std::fs;
use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Checks every input of a corpus, then copies with some bytes changed, removed, repeated or taken from another input.
fn replay(target: &str, rounds: usize, check: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 5, "{} inputs in {}", files.len(), dir.display());
    let inputs: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    for (file, input) in files.iter().zip(&inputs) {
        run(input, check, &file.display().to_string());
    }
    let mut random = ChaCha8Rng::seed_from_u64(7);
    for round in 0..rounds {
        let input = mutated(&inputs, &mut random);
        run(&input, check, &format!("round {round} of {target}: {}", input.escape_ascii()));
    }
}

fn run(input: &[u8], check: fn(&[u8]), name: &str) {
    if std::panic::catch_unwind(|| check(input)).is_err() {
        panic!("{name}");
    }
}

fn mutated(inputs: &[Vec<u8>], random: &mut ChaCha8Rng) -> Vec<u8> {
    let mut input = inputs[random.random_range(0..inputs.len())].clone();
    for _ in 0..random.random_range(1..5) {
        if input.is_empty() {
            break;
        }
        let at = random.random_range(0..input.len());
        let end = random.random_range(at..input.len()).min(at + 40);
        match random.random_range(0..5) {
            0 => input[at] ^= 1 << random.random_range(0..8),
            1 => input[at] = *b"0189-+.,:;e[]{}()\"\\ \n\t\0\xff".get(random.random_range(0..30)).unwrap_or(&b'9'),
            2 => drop(input.drain(at..end)),
            3 => input.splice(at..at, input[at..end].to_vec()).for_each(drop),
            _ => {
                let other = &inputs[random.random_range(0..inputs.len())];
                let from = random.random_range(0..=other.len());
                let to = random.random_range(from..=other.len()).min(from + 60);
                input.splice(at..end, other[from..to].iter().copied()).for_each(drop);
            }
        }
    }
    input
}

#[test]
fn header_corpus_holds() {
    replay("header", 20_000, crate::oracles::header::check);
}

#[test]
fn metadata_corpus_holds() {
    replay("metadata", 3_000, crate::oracles::metadata::check);
}

#[test]
fn checkpoint_corpus_holds() {
    replay("checkpoint", 5_000, crate::oracles::checkpoint::check);
}

#[test]
fn list_corpus_holds() {
    replay("lists", 100_000, crate::oracles::lists::check);
}

#[test]
fn density_corpus_holds() {
    replay("density", 50_000, crate::oracles::density::check);
}

#[test]
fn model_file_corpus_holds() {
    replay("model_file", 2_000, crate::oracles::weights::check_file);
}

#[test]
fn distributed_corpus_holds() {
    replay("distributed", 1_000, crate::oracles::weights::check_distributed);
}

#[test]
fn deepspeed_corpus_holds() {
    replay("deepspeed", 1_000, crate::oracles::weights::check_deepspeed);
}
