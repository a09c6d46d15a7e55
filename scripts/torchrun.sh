#!/usr/bin/env bash
# All GPUs of one machine:   scripts/torchrun.sh RECIPE RUN [options of steadyvq train]
# Started again with the same words it continues the run. PROCESSES sets their number (default: one per GPU), RESTARTS how often
# all of them are started again by themselves after one has died (default: never).
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: scripts/torchrun.sh RECIPE RUN [options of steadyvq train]" >&2
    exit 2
fi
recipe=$1 run=$2
shift 2
processes=${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
if [ "$processes" -lt 1 ]; then
    processes=1
fi
# Time to finish a step and save when the job is told to stop; torchrun's own 30 seconds may be too short.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# Workers of a restart must not meet in the store of the dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --standalone --nproc_per_node "$processes" --max-restarts "${RESTARTS:-0}" \
    -m steadyvq train "$recipe" --out "$run" --auto-resume "$@"
