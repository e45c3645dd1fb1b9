#!/bin/bash
#SBATCH --job-name=mvptr-stage2
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=4
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Trains stage 2, which aligns text and images. It starts from the finished stage 1 in the same RUN_DIR.
#   sbatch --nodes=4 --gpus-per-node=8 slurm/stage2.sh [section.key=value ...]
# Environment variables set the site, configuration, data and run folder: see slurm/README.md.

MVPTR_DIR=${MVPTR_DIR:-${SLURM_SUBMIT_DIR:-$PWD}}  # SLURM runs a copy of this script, whose own path is useless
source "$MVPTR_DIR/slurm/common.sh" || { echo "no slurm/common.sh in $MVPTR_DIR: submit from the checkout, or set MVPTR_DIR to it"; exit 2; }
train 2 "$@"
