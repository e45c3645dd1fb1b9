#!/bin/bash
#SBATCH --job-name=mvptr-finetune
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=4
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Fine-tunes a pre-trained model for the task of a configuration.
#   CONFIG=vqa RUN_DIR=runs/vqa sbatch --gpus-per-node=8 slurm/finetune.sh run.init_from=runs/base [section.key=value ...]
#   CONFIG=base FINETUNE=vqa sbatch --gpus-per-node=8 slurm/finetune.sh     # in the run folder of CONFIG, from its stage 2
# Environment variables set the site, configuration, data and run folder: see slurm/README.md.

MVPTR_DIR=${MVPTR_DIR:-${SLURM_SUBMIT_DIR:-$PWD}}  # SLURM runs a copy of this script, whose own path is useless
source "$MVPTR_DIR/slurm/common.sh" || { echo "no slurm/common.sh in $MVPTR_DIR: submit from the checkout, or set MVPTR_DIR to it"; exit 2; }
if [ -n "${FINETUNE-}" ]; then CONFIG=$FINETUNE DATA_DIR=${FINETUNE_DATA_DIR-}; fi  # RUN_DIR stays that of pre-training
TASK=${TASK:-$(stage_of "$CONFIG")}
[ -n "$TASK" ] || die "$CONFIG names no task as 'stages: [vqa]' in one line: set TASK to retrieval, vqa, entailment or referring"
train "$TASK" "$@" ${FINETUNE_OVERRIDES-}
