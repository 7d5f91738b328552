//! Tests of the library as a whole, in one binary: linking each alone would take longer than running them.

mod concurrency;
mod disk;
mod expected_movement;
mod layers;
mod live_states;
mod names;
mod noise;
mod numbers;
mod paper;
mod predictions;
mod sources;
mod tensor_groups;
mod trajectories;
