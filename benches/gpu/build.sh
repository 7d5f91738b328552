#!/usr/bin/env bash
# Builds the binaries of the GPU check, for a machine without Rust, into gpu-check/ (or the folder in the first
# argument). Needs Rust and nvcc (see build.rs); POSTHOC_EMA_CUDA_ARCHS=90 compiles for H100 and H200 alone. PROFILE=dev
# takes Cargo's quick profile, to try the check on the stand-in driver. UNROLL="2 8" also builds binaries whose kernels
# keep at most so many loads in flight; the check compares them.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-gpu-check}
export CARGO_PROFILE_RELEASE_STRIP=symbols CARGO_TERM_COLOR=never
profile=${PROFILE:-release}

mkdir -p "$folder"
on_cuda=(-p posthoc-ema -p posthoc-ema-cli --features posthoc-ema/cuda,posthoc-ema-cli/cuda)
cargo build --profile "$profile" "${on_cuda[@]}" --bin posthoc-ema --example gpu-check-run
# Cargo's messages have the paths of the test binaries, that of the program's in cli/.
tests=$(cargo test --profile "$profile" "${on_cuda[@]}" --test cuda --no-run --message-format=json \
    | python3 -c '
import json, sys
built = [json.loads(line) for line in sys.stdin if line.startswith("{")]
tests = [b for b in built if b.get("executable") and b["target"]["name"] == "cuda"]
tests.sort(key=lambda b: b["target"]["src_path"].endswith("/cli/tests/cuda/main.rs"))
print(*[b["executable"] for b in tests], sep="\n")')
{ read -r library_tests && read -r program_tests; } <<<"$tests"
built=${CARGO_TARGET_DIR:-target}/${profile/#dev/debug}
install "$built/posthoc-ema" "$built/examples/gpu-check-run" "$folder/"
install "$library_tests" "$folder/cuda-tests"
install "$program_tests" "$folder/program-cuda-tests"

rm -f "$folder"/*-unroll-*
for most in ${UNROLL:-}; do
    POSTHOC_EMA_CUDA_UPDATE_UNROLL=$most POSTHOC_EMA_CUDA_BLEND_UNROLL=$most \
        cargo build --profile "$profile" "${on_cuda[@]}" --bin posthoc-ema --example gpu-check-run
    install "$built/posthoc-ema" "$folder/posthoc-ema-unroll-$most"
    install "$built/examples/gpu-check-run" "$folder/gpu-check-run-unroll-$most"
done

# Builds the Python package if maturin is installed.
rm -f "$folder"/*.whl
if [ "$profile" != release ]; then
    echo "no wheel of the Python package: the profile is $profile"
elif command -v maturin >/dev/null; then
    maturin build --quiet --release --features cuda --compatibility linux --manifest-path python/Cargo.toml \
        --out "$folder"
else
    echo "no wheel of the Python package: maturin was not found (pip install maturin)"
fi

nvcc=${NVCC:-nvcc}
{
    echo "built $(date -u +%FT%TZ)"
    echo "commit $(git rev-parse HEAD)$(git diff --quiet HEAD || echo ', changed')"
    "$folder/posthoc-ema" --version
    rustc --version
    echo "nvcc $("$nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')"
    echo "architectures ${POSTHOC_EMA_CUDA_ARCHS:-all}"
    (cd "$folder" && sha256sum posthoc-ema gpu-check-run cuda-tests program-cuda-tests)
} >"$folder/manifest.txt"
du -ch "$folder"/* | tail -n 1
