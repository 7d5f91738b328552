//! Agreement of processes, on manifests of small models.

use std::time::Instant;

use super::*;
use crate::Options;
use crate::tensor::{Dtype, Parameters, TensorView};
use crate::tracker::PostHocEma;

/// Tensor of one process.
#[derive(Clone)]
struct ProcessTensor {
    name: &'static str,
    global: Vec<usize>,
    offset: Vec<usize>,
    shape: Vec<usize>,
    values: Vec<f32>,
    is_buffer: bool,
}

fn held(name: &'static str, global: &[usize], offset: &[usize], shape: &[usize]) -> ProcessTensor {
    let values = vec![1.0; shape.iter().product()];
    ProcessTensor { name, global: global.into(), offset: offset.into(), shape: shape.into(), values, is_buffer: false }
}

impl ProcessTensor {
    fn view(&self) -> Result<TensorView<'_>> {
        let view = TensorView::host(self.name, Dtype::F32, &self.shape, bytemuck::cast_slice(&self.values))?;
        TensorView { is_buffer: self.is_buffer, ..view }.as_part_of(&self.global, &self.offset)
    }
}

struct ProcessModel(Vec<ProcessTensor>);

impl Parameters for ProcessModel {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        read(&self.0.iter().map(ProcessTensor::view).collect::<Result<Vec<_>>>()?)
    }
}

fn options() -> Options {
    PostHocEma::options("runs/of/all")
}

fn manifest(process: usize, tensors: Vec<ProcessTensor>) -> ShardManifest {
    let manifest = options().manifest(process, &ProcessModel(tensors)).unwrap();
    ShardManifest::from_json(&manifest.to_json()).unwrap()
}

fn refused(manifests: &[ShardManifest], processes: &[usize], parts: &[&str]) {
    let error = agree(manifests).unwrap_err();
    let text = error.to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    let Error::Disagreement { processes: named, .. } = error else { panic!("{text}") };
    assert_eq!(named, processes, "{text}");
}

/// Rows of `w` on the first processes; all have `bias`.
fn rows(process: usize) -> Vec<ProcessTensor> {
    vec![held("w", &[5, 2], &[2 * process, 0], &[if process < 2 { 2 } else { 1 }, 2]), held("bias", &[3], &[0], &[3])]
}

#[test]
fn lowest_process_stores_a_replica_and_ranks_count_those_that_store() {
    let mut manifests: Vec<ShardManifest> = (0..3).map(|process| manifest(process, rows(process))).collect();
    // A process of the number 3 has the rows of the first and an empty part.
    let empty = held("w", &[5, 2], &[5, 0], &[0, 2]);
    manifests.push(manifest(3, vec![empty, held("bias", &[3], &[0], &[3])]));
    manifests.swap(0, 2);
    let roles = agree(&manifests).unwrap();
    let ranks: Vec<Option<usize>> = roles.iter().map(|role| role.rank).collect();
    assert_eq!(ranks, [Some(2), Some(1), Some(0), None]);
    assert!(roles.iter().all(|role| role.ranks == 3 && role.id == roles[0].id && role.id.len() == 32));
    let replicas: Vec<Vec<&String>> = roles.iter().map(|role| role.replicas.iter().collect()).collect();
    assert_eq!(replicas[..3], [vec!["bias"], vec!["bias"], vec![]]);
    assert_eq!(ShardRole::from_json(&roles[3].to_json()).unwrap(), roles[3]);
    assert_ne!(agree(&manifests).unwrap()[0].id, roles[0].id);
    assert!(ShardRole::from_json("{}").unwrap_err().to_string().contains("same version"));
}

#[test]
fn what_differs_is_named_with_both_processes() {
    let model = || vec![held("w", &[4, 2], &[0, 0], &[4, 2])];
    let with = |options: Options| options.manifest(7, &ProcessModel(model())).unwrap();
    refused(&[manifest(0, model()), with(options().update_every(3))], &[0, 7], &["schedule", "\"update_every\":3"]);
    refused(&[manifest(0, model()), with(PostHocEma::options("other"))], &[0, 7], &["directory", "runs/of/all"]);
    let other = |tensor: ProcessTensor| [manifest(2, model()), manifest(4, vec![tensor])];
    refused(&other(held("w", &[8, 2], &[4, 0], &[4, 2])), &[2, 4], &["`w`", "[4, 2]", "[8, 2]"]);
    let buffer = ProcessTensor { is_buffer: true, ..held("w", &[4, 2], &[0, 0], &[4, 2]) };
    refused(&other(buffer), &[2, 4], &["`w`", "a buffer"]);
    let apart = ProcessTensor { values: vec![2.0; 8], ..held("w", &[4, 2], &[0, 0], &[4, 2]) };
    refused(&other(apart), &[2, 4], &["`w`", "different values", "names of their own"]);
    refused(&other(held("w", &[4, 2], &[0], &[8])), &[2, 4], &["`w`", "flattened"]);
    refused(&[manifest(3, model()), manifest(3, model())], &[3], &["two manifests"]);
    assert!(agree(&[]).is_err());
}

#[test]
fn holes_and_overlaps_are_refused() {
    let part =
        |process, offset: [usize; 2], shape: [usize; 2]| manifest(process, vec![held("w", &[4, 4], &offset, &shape)]);
    let grid = [([0, 0], [2, 1]), ([0, 1], [2, 3]), ([2, 0], [2, 1]), ([2, 1], [2, 3])];
    let all: Vec<ShardManifest> = grid.iter().enumerate().map(|(i, (at, shape))| part(i, *at, *shape)).collect();
    assert!(agree(&all).unwrap().iter().all(|role| role.replicas.is_empty()));
    refused(&all[..3], &[0, 1, 2], &["`w`", "10 of the 16"]);
    let overlapping = [all[..3].to_vec(), vec![part(5, [1, 1], [3, 3])]].concat();
    refused(&overlapping, &[1, 5], &["`w`", "overlap", "[3, 3] at [1, 1]"]);
    let flat = |process, at: usize, size: usize| manifest(process, vec![held("w", &[4, 4], &[at], &[size])]);
    agree(&[flat(0, 0, 5), flat(1, 5, 0), flat(2, 5, 11)]).unwrap();
    refused(&[flat(0, 0, 5), flat(1, 4, 12)], &[0, 1], &["overlap"]);
}

#[test]
fn buffers_may_differ_and_the_first_counts() {
    let buffer = |value| ProcessTensor { values: vec![value; 3], is_buffer: true, ..held("mean", &[3], &[0], &[3]) };
    let manifests = [0, 1].map(|i| manifest(i, vec![held("w", &[2, 2], &[i, 0], &[1, 2]), buffer(i as f32)]));
    let roles = agree(&manifests).unwrap();
    assert!(roles[0].replicas.is_empty() && roles[1].replicas.contains("mean"));
}

#[test]
fn patterns_are_checked_against_all_processes() {
    let stages = || [vec![held("first.w", &[2], &[0], &[2])], vec![held("last.w", &[2], &[0], &[2])]];
    let with = |options: fn() -> Options| -> Vec<ShardManifest> {
        stages()
            .into_iter()
            .enumerate()
            .map(|(i, model)| options().manifest(i, &ProcessModel(model)).unwrap())
            .collect()
    };
    let roles = agree(&with(|| options().average(["last.*"]))).unwrap();
    assert!(roles.iter().all(|role| role.only_named));
    let text = agree(&with(|| options().average(["lest.*"]))).unwrap_err().to_string();
    assert!(text.contains("`lest.*` matches no tensor"), "{text}");
    let error = agree(&with(|| options().leave_out(["*"]))).unwrap_err();
    assert!(matches!(error, Error::NothingToAverage), "{error}");
}

/// Model of one process in which `head` may share the memory of `embedding`.
struct TiedPair {
    embedding: Vec<f32>,
    head: Option<Vec<f32>>,
}

impl Parameters for TiedPair {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let (shape, offset) = ([self.embedding.len()], [4 - self.embedding.len()]);
        let [embedding, head] =
            [("embedding", &self.embedding), ("head", self.head.as_ref().unwrap_or(&self.embedding))].map(
                |(name, values)| {
                    let view = TensorView::host(name, Dtype::F32, &shape, bytemuck::cast_slice(values))?;
                    view.as_part_of(&[4], &offset)
                },
            );
        read(&[embedding?, head?])
    }
}

#[test]
fn ties_hold_on_processes_with_empty_parts() {
    let manifests = [vec![0.5; 4], vec![]].map(|embedding| TiedPair { embedding, head: None }).into_iter().enumerate();
    let manifests: Vec<ShardManifest> = manifests.map(|(i, model)| options().manifest(i, &model).unwrap()).collect();
    let roles = agree(&manifests).unwrap();
    assert_eq!(roles[1].ties, BTreeMap::from([("head".to_owned(), "embedding".to_owned())]));
    let separate = options().manifest(1, &TiedPair { embedding: vec![0.5; 4], head: Some(vec![0.5; 4]) }).unwrap();
    refused(&[manifests[0].clone(), separate], &[0, 1], &["`head`", "`embedding`", "not on another"]);
}

/// Checks the rectangles of 1,024 processes, in rows, columns and a grid. In a debug build it takes fewer tensors.
#[test]
fn many_processes_agree_quickly() {
    let (tensors, side) = if cfg!(debug_assertions) { (12, 32) } else { (1000, 32) };
    let names: Vec<&'static str> =
        (0..tensors).map(|i| &*Box::leak(format!("layers.{i}.weight").into_boxed_str())).collect();
    let place = |tensor: usize, process: usize| match tensor % 3 {
        0 => ([process, 0], [1, 1024], [1024, 1024]),
        1 => ([0, process], [1024, 1], [1024, 1024]),
        _ => ([process / side * 2, process % side * 3], [2, 3], [2 * side, 3 * side]),
    };
    let tensor = |i: usize, process| {
        let (offset, shape, global) = place(i, process);
        manifest::ManifestTensor {
            name: names[i].to_owned(),
            dtype: Dtype::BF16,
            global: global.to_vec(),
            offset: offset.to_vec(),
            shape: shape.to_vec(),
            is_buffer: false,
            is_replica: false,
            is_left_out: false,
            fingerprint: Some("0123456789abcdef".into()),
        }
    };
    let first = manifest(0, rows(0));
    let manifests: Vec<ShardManifest> = (0..1024)
        .map(|process| ShardManifest {
            process,
            tensors: (0..tensors).map(|i| tensor(i, process)).collect(),
            ..first.clone()
        })
        .collect();
    let texts: Vec<String> = manifests.iter().map(ShardManifest::to_json).collect();
    let start = Instant::now();
    let read: Vec<ShardManifest> = texts.iter().map(|text| ShardManifest::from_json(text).unwrap()).collect();
    let parsed = start.elapsed();
    let roles = agree(&read).unwrap();
    let bytes: usize = texts.iter().map(String::len).sum();
    eprintln!("{tensors} tensors of 1024 processes: {bytes} bytes, parsed in {parsed:?}, all in {:?}", start.elapsed());
    assert!(roles.iter().enumerate().all(|(i, role)| role.rank == Some(i) && role.replicas.is_empty()));
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}
