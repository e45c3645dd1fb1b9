# Shared by the jobs, which source this file with MVPTR_DIR set: the environment of a rank, and when a job is requeued.
# Every variable with `:-` may be set from outside. slurm/README.md says what each does.

say() { echo "$(date '+%F %T') [job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}] $*"; }
die() { say "error: $*"; exit 2; }

[ -n "${SLURM_JOB_ID-}" ] || { echo "this runs inside a job: sbatch $0"; exit 2; }

if [ -n "${SETUP-}" ]; then source "$SETUP" || die "SETUP=$SETUP failed"; fi  # it may set any variable below

CONFIG=${CONFIG:-demo}
RUN_DIR=${RUN_DIR:-runs/$(basename "$CONFIG" .yaml)}
gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-1}}  # salloc sets only the latter, perhaps as h100:8
case $gpus in *,*) ;; *) gpus=${gpus##*:} ;; esac
RANKS_PER_NODE=${RANKS_PER_NODE:-$gpus}
[ "$RANKS_PER_NODE" != 0 ] ||
  die "a node has no rank: SLURM gave the job no GPU, or RANKS_PER_NODE is 0; ask for GPUs (sbatch --gpus-per-node=8), or set RANKS_PER_NODE to train on CPUs"
[[ $RANKS_PER_NODE =~ ^[1-9][0-9]*$ ]] || die "there are '$RANKS_PER_NODE' ranks a node, expected a number: set RANKS_PER_NODE"
MAX_NO_PROGRESS=${MAX_NO_PROGRESS:-3}
node_disk=${SLURM_TMPDIR:-${TMPDIR-}}  # not /tmp: other users could place kernels there for us to load
LOCAL_CACHE=${LOCAL_CACHE:-${node_disk:+$node_disk/mvptr-$(id -un)}}
for argument in "$@"; do case $argument in run.dir=*) RUN_DIR=${argument#run.dir=} ;; esac; done

# ---- modules, conda and container of the site
for module in ${MODULES-}; do module load "$module" || die "module load $module failed (MODULES)"; done
if [ -n "${CONDA_ENV-}" ]; then
  eval "$(conda shell.bash hook)" && conda activate "$CONDA_ENV" || die "conda activate $CONDA_ENV failed (CONDA_ENV)"
fi
if [ -z "${PYTHON-}" ]; then
  PYTHON=python
  if [ -z "${CONDA_ENV-}${CONTAINER-}" ] && [ -x "$MVPTR_DIR/.venv/bin/python" ]; then PYTHON=$MVPTR_DIR/.venv/bin/python; fi
fi
case ${CONTAINER-} in
  "") inside=() srun_container=() ;;
  *.sif) inside=(apptainer exec --nv ${CONTAINER_ARGS-} "$CONTAINER") srun_container=() ;;
  *) inside=() srun_container=(--container-image="$CONTAINER" --container-workdir="$PWD" ${CONTAINER_ARGS-}) ;;
esac

# ---- environment of the ranks
cpus=  # CPUs of the smallest node, since srun requests the same number on every node
for node in ${SLURM_JOB_CPUS_PER_NODE//,/ }; do  # written as 64(x2),32
  node=${node%%[!0-9]*}; [ "${cpus:-$node}" -lt "$node" ] || cpus=$node
done
cpus=$((${cpus:-1} / RANKS_PER_NODE)); [ "$cpus" -ge 1 ] || cpus=1
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
# Kernels compiled at run time are kept on the node. Hundreds of ranks that lock files of one network folder would block each other.
if [ -n "$LOCAL_CACHE" ]; then
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$LOCAL_CACHE/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$LOCAL_CACHE/inductor}
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$LOCAL_CACHE/extensions}
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # prints why a connection fails, and nothing else
unset SLURM_CPUS_PER_GPU  # newer versions of SLURM refuse it together with --cpus-per-task

# ranks NODES RANKS_PER_NODE COMMAND...
# Replaces this process by srun, which starts one task a rank. When a rank ends, the others have 30 s to end as well.
ranks() {
  local nodes=$1 per_node=$2; shift 2
  exec srun --nodes="$nodes" --ntasks-per-node="$per_node" --ntasks=$((nodes * per_node)) --cpus-per-task="$cpus" \
    --kill-on-bad-exit=0 --wait=30 --open-mode=append --export=ALL ${log:+--output="$log"} \
    "${srun_container[@]}" ${SRUN_ARGS-} "${inside[@]}" "$@"
}

# Prints the newest checkpoint of each stage that this job runs, in one line.
progress() {
  local stage; for stage in $stage_dirs; do
    ls -d "$RUN_DIR/$stage"/checkpoints/step-*/checksums.json 2>/dev/null | tail -n 1
  done | paste -s -d' ' -
}

# stage_of CONFIG
# Prints the one stage that a configuration trains, where its file has a line like `run: {..., stages: [vqa]}`.
stage_of() {
  local file; for file in "$1" "$MVPTR_DIR/mvptr_ds/configs/$1" "$MVPTR_DIR/mvptr_ds/configs/$1.yaml"; do
    [ ! -f "$file" ] || { sed -n 's/^[^#]*\bstages: *\[ *\([a-z]\+\) *\].*/\1/p' "$file"; return; }
  done
}

# train STAGE [section.key=value ...]
# Trains a stage, 1, 2 or the name of a task, until it is done. The job may be requeued and started again many times.
train() {
  local stage=$1 name=$1 spoken=$1 code srun_pid= guard_pid= argument; shift
  case $stage in [12]) name=stage$stage spoken="stage $stage" ;; esac
  local log=$RUN_DIR/logs/$name-rank%t.log
  [ "${NODES:-$SLURM_JOB_NUM_NODES}" = "$SLURM_JOB_NUM_NODES" ] ||
    die "NODES is $NODES, but the job got $SLURM_JOB_NUM_NODES: sbatch reads no such variable, write sbatch --nodes=$NODES or use slurm/submit.sh"
  stage_dirs=$name
  for argument in "$@"; do
    case $argument in run.stages=*) stage_dirs=$(sed 's/[][,]/ /g; s/\b[12]\b/stage&/g' <<< "${argument#run.stages=}") ;; esac
  done
  local data=()
  if [ -n "${DATA_DIR-}" ]; then
    data=(data.demo_source=null data.train="$DATA_DIR/train")
    [ ! -d "$DATA_DIR/held_out" ] || data+=(data.held_out="$DATA_DIR/held_out")
    case $stage in
      [12]|joint)
        [ ! -f "$DATA_DIR/phrase_vocab.json" ] || data+=(data.phrase_vocab="$DATA_DIR/phrase_vocab.json")
        [ ! -f "$DATA_DIR/word_vocab.txt" ] || data+=(data.word_vocab="$DATA_DIR/word_vocab.txt") ;;
      vqa) [ ! -f "$DATA_DIR/answers.json" ] || data+=(vqa.answers="$DATA_DIR/answers.json") ;;
    esac  # a task has the vocabularies of the model that it starts from
  fi
  mkdir -p "$RUN_DIR/logs" || exit 2
  count_start "$RUN_DIR/logs/$name-starts"
  # Before the time limit SLURM sends USR1 to this script (#SBATCH --signal). srun passes it to the ranks, which save and end.
  trap 'say "the time limit is near: the ranks are told to save"; kill -USR1 $srun_pid; end_in_time $srun_pid & guard_pid=$!' USR1
  say "$spoken: $SLURM_JOB_NUM_NODES nodes x $RANKS_PER_NODE ranks, output of rank 0 in ${log/\%t/0}"
  ranks "$SLURM_JOB_NUM_NODES" "$RANKS_PER_NODE" "$PYTHON" "$MVPTR_DIR/mvptr_ds/train.py" \
    --deepspeed "${DEEPSPEED_JSON:-$MVPTR_DIR/ds_configs/z2.json}" --config "$CONFIG" \
    run.stages="[$stage]" "${data[@]}" run.dir="$RUN_DIR" "$@" &
  srun_pid=$!
  while wait "$srun_pid"; code=$?; kill -0 "$srun_pid" 2>/dev/null; do :; done
  trap - USR1
  [ -z "$guard_pid" ] || kill "$guard_pid" 2>/dev/null
  case $code in
    0) say "$spoken ended well"; exit 0 ;;
    2) say "not started again: ${log/\%t/0} says what is wrong"; tail -n 5 "${log/\%t/0}"; exit 2 ;;
    75) say "$spoken is saved" ;;
    *) say "srun ended with $code: see the ends of $RUN_DIR/logs/$name-rank*.log" ;;
  esac
  start_again "$code"
}

# Sets `fruitless`: how many earlier starts of this job in a row have saved no step.
count_start() {
  starts_file=$1 before=$(progress) fruitless=0
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$starts_file" ]; then
    local last count; { read -r count; read -r last; } < "$starts_file"
    [ "$last" != "$before" ] || fruitless=$((count + 1))
  fi
  printf '%s\n' "$fruitless" "$before" > "$starts_file"
}

start_again() {  # CODE
  [ "$(progress)" != "$before" ] || [ "$fruitless" -lt "$MAX_NO_PROGRESS" ] || {
    say "not started again: $fruitless restarts have saved no step (MAX_NO_PROGRESS=$MAX_NO_PROGRESS)"; exit "$1"; }
  # A cancelled job is not RUNNING any more. A preempted one is not either: SLURM requeues it itself.
  local state; state=$(squeue -h -j "$SLURM_JOB_ID" -o %T)
  [ "$state" = RUNNING ] || { say "not started again from here: the job is $state"; exit "$1"; }
  say "back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || { say "cannot be requeued here: submit it again, it goes on from what is saved"; exit "$1"; }
  sleep 120  # SLURM ends this script meanwhile. Otherwise the job must end with an error.
  exit "$1"
}

# end_in_time PID
# Ends srun 20 s before the time limit. This script then still has time to requeue the job, which resumes from the save before.
end_in_time() {
  local end left; end=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s) || return
  left=$((end - $(date +%s) - 20))
  sleep $((left > 0 ? left : 0)) && kill -KILL "$1"
}

evaluate() {
  say "evaluates $RUN_DIR"
  ranks 1 1 "$PYTHON" "$MVPTR_DIR/mvptr_ds/eval.py" "$RUN_DIR" "$@"
}
