#!/usr/bin/env bash
# Writes a run, synthesizes from it on a device again and again, once by the program, and once on the CPU: the files must
# be the same. Prints one JSON document for each of the first two.
#
#     synthesis.sh BINARIES WORK DEVICE      # sizes from RUN_PARAMETERS, RUN_SNAPSHOTS, REPEATS
set -euo pipefail
binaries=$1 work=$2 device=$3
trap 'rm -rf "$work/run" "$work"/*.safetensors' EXIT
"$binaries/gpu-check-run" write "$work/run" "$RUN_PARAMETERS" "$RUN_SNAPSHOTS"
"$binaries/gpu-check-run" synthesize "$work/run" "$device" "$work/out.safetensors" "$REPEATS"
command() { "$binaries/posthoc-ema" synthesize "$work/run" --sigma-rel 0.15 --dtype f16 "$@"; }
command -o "$work/command.safetensors" --device "$device" --json
command -o "$work/cpu.safetensors" --device cpu >&2
cmp "$work/command.safetensors" "$work/cpu.safetensors" >&2
cmp "$work/out.safetensors" "$work/cpu.safetensors" >&2
