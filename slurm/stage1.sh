#!/bin/bash
#SBATCH --job-name=mvptr-stage1
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=4
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Trains stage 1: the text encoder and the visual encoder, each on its own.
#   sbatch --nodes=4 --gpus-per-node=8 slurm/stage1.sh [section.key=value ...]
# Environment variables set the site, configuration, data and run folder: see slurm/README.md.

MVPTR_DIR=${MVPTR_DIR:-${SLURM_SUBMIT_DIR:-$PWD}}  # SLURM runs a copy of this script, whose own path is useless
source "$MVPTR_DIR/slurm/common.sh" || { echo "no slurm/common.sh in $MVPTR_DIR: submit from the checkout, or set MVPTR_DIR to it"; exit 2; }
train 1 "$@"
