#!/bin/bash
# Submits stage 1, stage 2 and the evaluation, and prints their three ids. With FINETUNE it fine-tunes before it evaluates.
# Each job starts after the one before it has succeeded. Overrides are those of pre-training.
#   NODES=4 SBATCH_GPUS_PER_NODE=8 slurm/submit.sh [section.key=value ...]
#   FINETUNE=vqa FINETUNE_DATA_DIR=/data/vqa slurm/submit.sh [section.key=value ...]
set -euo pipefail
export MVPTR_DIR=${MVPTR_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}

job() {  # SCRIPT [options of sbatch ...] -- [overrides ...]
  local script=$MVPTR_DIR/slurm/$1 options=(); shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done; shift
  local id; id=$(sbatch --parsable ${options[@]+"${options[@]}"} "$script" "$@")
  echo "${id%%;*}"  # sbatch appends the cluster's name where there are several clusters
}
after() { echo "--dependency=afterok:$1 --kill-on-invalid-dep=yes"; }

stage1=$(job stage1.sh --nodes="${NODES:-1}" -- "$@")
stage2=$(job stage2.sh --nodes="${NODES:-1}" $(after "$stage1") -- "$@")
last=$stage2
if [ -n "${FINETUNE-}" ]; then
  for argument in "$@"; do  # where pre-training writes, fine-tuning begins; the other overrides are not its own
    case $argument in run.dir=*) export RUN_DIR=${argument#run.dir=} ;; esac
  done
  finetuning=$(job finetune.sh --nodes="${NODES:-1}" $(after "$stage2") --) last=$finetuning
  set -- ${FINETUNE_OVERRIDES-}
fi
evaluation=$(job evaluate.sh --gpus-per-node=1 $(after "$last") -- "$@")
echo "stage1 $stage1"
echo "stage2 $stage2"
[ -z "${FINETUNE-}" ] || echo "finetune $finetuning"
echo "evaluate $evaluation"
