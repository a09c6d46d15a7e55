#!/usr/bin/env bash
# Nodes of a SLURM cluster:   sbatch --nodes 2 scripts/slurm.sh RECIPE RUN [options of steadyvq train]
# Two minutes before its time is up the job saves a checkpoint, and queues itself again until the run is done.
#SBATCH --job-name=steadyvq
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: sbatch scripts/slurm.sh RECIPE RUN [options of steadyvq train]" >&2
    exit 2
fi
recipe=$1 run=$2
shift 2
export OMP_NUM_THREADS=1
srun --kill-on-bad-exit=1 python -m steadyvq train "$recipe" --out "$run" --auto-resume "$@"
if grep -q '"status": "interrupted"' "$run/run.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
