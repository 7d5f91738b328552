#!/usr/bin/env bash
# Runs the GPU check: tests, measurements and sanitizers on one device, in one call of at most ten minutes, with the
# binaries of build.sh. See README.md.
#
#     benches/gpu/check.sh [FOLDER]      # folder of the binaries; gpu-check by default
#
# Variables: RECORD (folder of the results, benches/record), DEVICE (cuda:0), LIMIT (seconds for everything, 570), and
# the sizes below. Stages that need python3 with torch or compute-sanitizer are skipped with a message if it is missing.
set -uo pipefail
here=benches/gpu
folder=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
folder=${folder:-$PWD/gpu-check}
record=${RECORD:-benches/record}
export DEVICE=${DEVICE:-cuda:0}
export PARAMETERS=${PARAMETERS:-1000000000} FEW=${FEW:-300} MANY=${MANY:-10000} REPEATS=${REPEATS:-7}
export SNAPSHOT_PARAMETERS=${SNAPSHOT_PARAMETERS:-250000000} SNAPSHOTS=${SNAPSHOTS:-40} TARGETS=${TARGETS:-8}
export RUN_PARAMETERS=${RUN_PARAMETERS:-100000000} RUN_SNAPSHOTS=${RUN_SNAPSHOTS:-20}
limit=${LIMIT:-570}

# Keeps the files of a run in memory, so that the disk does not matter.
roomy=/dev/shm
# Bytes of a run of two profiles: two f16 snapshots at each step, the live state in full, and the results.
needed=$((RUN_PARAMETERS * (4 * RUN_SNAPSHOTS + 40)))
free=$(df --output=avail -B1 "$roomy" 2>/dev/null | tail -1)
{ [ -w "$roomy" ] && ((${free:-0} > needed)); } || roomy=${TMPDIR:-/tmp}
work=$(mktemp -d "$roomy/gpu-check.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$record" "$work/results"

# stage NAME SECONDS COMMAND...: runs a command for at most SECONDS or the time that is left, and records its outcome.
stage() {
    local name=$1 most=$2 left=$((limit - SECONDS)) begun=$SECONDS status
    shift 2
    if ((left < 5)); then
        echo "$name: skipped, no time is left" | tee -a "$work/results/stages.txt"
        return 1
    fi
    echo "== $name (at ${SECONDS} s)"
    timeout --kill-after=5 "$((most < left ? most : left))" "$@"
    status=$?
    local outcome=passed
    ((status == 0)) || outcome="failed ($status)"
    ((status == 124 || status == 137)) && outcome="out of time"
    echo "$name: $outcome, $((SECONDS - begun)) s" | tee -a "$work/results/stages.txt"
    return $status
}
into() { local file=$1; shift; "$@" >"$file"; }

tests() { "$folder/cuda-tests" --test-threads 1 && "$folder/program-cuda-tests" --test-threads 1; }

bench() { # NAME ARGUMENTS...
    local name=$1
    shift
    into "$work/results/$name.json" "$folder/posthoc-ema" bench --device "$DEVICE" --repeats "$REPEATS" --json "$@"
}

synthesis() {
    local run=$work/run
    "$folder/gpu-check-run" write "$run" "$RUN_PARAMETERS" "$RUN_SNAPSHOTS" &&
        into "$work/results/synthesis.json" \
            "$folder/gpu-check-run" synthesize "$run" "$DEVICE" "$work/out.safetensors" "$REPEATS" &&
        into "$work/results/synthesize-command.json" \
            "$folder/posthoc-ema" synthesize "$run" --sigma-rel 0.15 --dtype f16 -o "$work/command.safetensors" \
            --device "$DEVICE" --json &&
        "$folder/posthoc-ema" synthesize "$run" --sigma-rel 0.15 --dtype f16 -o "$work/cpu.safetensors" --device cpu &&
        cmp "$work/command.safetensors" "$work/cpu.safetensors" && cmp "$work/out.safetensors" "$work/cpu.safetensors"
    local status=$?
    rm -rf "$run" "$work"/*.safetensors
    return $status
}

# Compares the Python package with PyTorch. Of its dependencies, only numpy is needed.
python_tests() { PYTHONPATH=$work/python python3 -m pytest -q -p no:cacheprovider python/tests/test_cuda.py; }
python_compare() {
    PYTHONPATH=$work/python python3 benches/peers/run.py --python "$(command -v python3)" --only updates --device cuda \
        --folder "$work" --record "$work/results/python.json"
}

sanitize() { # TOOL TEST...
    local tool=$1
    shift
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$folder/cuda-tests" --test-threads 1 "$@"
}

# `timeout` cannot run functions: each stage runs in a shell of its own.
export here folder work
export -f into tests bench synthesis python_tests python_compare sanitize

if nvidia-smi -L >/dev/null 2>&1; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >"$work/results/device.txt"
else
    echo "no nvidia-smi: a stand-in, or none" | tee "$work/results/device.txt"
fi
cp "$folder/manifest.txt" "$work/results/" 2>/dev/null

stage "tests" 150 bash -c tests
stage "update, $FEW tensors" 75 bash -c "bench few --parameters $PARAMETERS --tensors $FEW --snapshots 1 --targets 1"
stage "update, $MANY tensors" 75 bash -c "bench many --parameters $PARAMETERS --tensors $MANY --snapshots 1 --targets 1"
stage "blend" 75 bash -c \
    "bench blend --parameters $SNAPSHOT_PARAMETERS --tensors $FEW --snapshots $SNAPSHOTS --targets $TARGETS"
stage "synthesis" 120 bash -c synthesis
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    stage "peers" 120 bash -c 'into "$work/results/peers.json" python3 "$here/peers.py"'
else
    echo "peers: skipped, python3 has no torch that sees a device" | tee -a "$work/results/stages.txt"
fi
if ! ls "$folder"/*.whl >/dev/null 2>&1; then
    echo "python: skipped, build.sh made no wheel" | tee -a "$work/results/stages.txt"
elif ! python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    echo "python: skipped, python3 has no torch that sees a device" | tee -a "$work/results/stages.txt"
else
    python3 -m zipfile -e "$folder"/*.whl "$work/python"
    if python3 -c 'import pytest' 2>/dev/null; then
        stage "python, tests" 90 bash -c python_tests
    else
        echo "python, tests: skipped, there is no pytest" | tee -a "$work/results/stages.txt"
    fi
    stage "python, beside PyTorch" 120 bash -c python_compare
fi
if ! command -v compute-sanitizer >/dev/null; then
    echo "sanitizers: skipped, there is no compute-sanitizer" | tee -a "$work/results/stages.txt"
elif compute-sanitizer "$folder/cuda-tests" --exact offload::stream_that_waits_for_fence_may_change_tensor 2>&1 |
    grep -qiE "not supported|unable to find"; then
    # On a virtual device, for example.
    echo "sanitizers: skipped, compute-sanitizer does not support this device" | tee -a "$work/results/stages.txt"
else
    for tool in memcheck racecheck initcheck; do
        stage "$tool" 60 bash -c "sanitize $tool update::aligned_and_unaligned_update blend::blend_of_every_length \
            offload::copy_of_every_size reader::averages non_finite::look_passes"
    done
fi

python3 "$here/report.py" "$work/results" "$record"
