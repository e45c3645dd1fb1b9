#!/bin/bash
#SBATCH --job-name=mvptr-evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=4
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Evaluates the run in RUN_DIR on its held-out shards.
#   sbatch slurm/evaluate.sh [section.key=value ...]

RANKS_PER_NODE=1  # evaluation uses one rank, however many train
MVPTR_DIR=${MVPTR_DIR:-${SLURM_SUBMIT_DIR:-$PWD}}
source "$MVPTR_DIR/slurm/common.sh" || { echo "no slurm/common.sh in $MVPTR_DIR: submit from the checkout, or set MVPTR_DIR to it"; exit 2; }
evaluate "$@"
