#!/usr/bin/env bash
# Starts a real SLURM cluster on this machine: munged, slurmctld, and two slurmd that each live in a name space of their own
# as node1 and node2. As root, with Debian's slurmctld slurmd slurm-client munge. Everything stays below CLUSTER_ROOT.
#
#   CLUSTER_ROOT=FOLDER [CLUSTER_PORT=17000] tests/slurm/start_cluster.sh; source FOLDER/env.sh; sinfo
#
# Partitions: `main` (the default) and `urgent`, whose jobs preempt those of `main` by requeueing them.
set -euo pipefail
: "${CLUSTER_ROOT:?a folder for the configuration, state and logs}"
ROOT=$CLUSTER_ROOT
PORT=${CLUSTER_PORT:-17000}  # slurmctld's; the nodes take those after it
NODES=${CLUSTER_NODES:-2}
CPUS=64 MEM_MB=512000 GPUS=8  # declared, not real: scripts for a GPU cluster are accepted as they are
GRACE_S=${CLUSTER_GRACE_S:-30}  # between a preemption's SIGTERM and the end
CTL_IP=127.0.0.1
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
HOST=$(hostname -s)

die() {
  echo "cluster: $*" >&2
  for f in "$ROOT"/log/*.log; do [ -f "$f" ] && { echo "--- $f"; tail -n 20 "$f"; } >&2; done
  exit 1
}

mkdir -p "$ROOT"/{state,spool,log,dev}
cat > "$ROOT/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$HOST($CTL_IP)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket=$ROOT/munge.socket,cred_expire=5
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/slurmctld.pid
SlurmdPidFile=$ROOT/slurmd.%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
Epilog=$ROOT/epilog.sh
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
# without slurmdbd: finished jobs stay visible to "scontrol show job"
MinJobAge=86400
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=5,sched_min_interval=0
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldTimeout=30
SlurmdTimeout=20
InactiveLimit=0
KillWait=10
BatchStartTimeout=10
MessageTimeout=10
TCPTimeout=5
ReturnToService=2
JobRequeue=1
MailProg=/bin/true
GresTypes=gpu
END
hosts="$CTL_IP $HOST"
for i in $(seq "$NODES"); do
  echo "NodeName=node$i NodeHostname=node$i NodeAddr=127.0.1.$i Port=$((PORT + i)) CPUs=$CPUS RealMemory=$MEM_MB Gres=gpu:$GPUS"
  hosts+=$'\n'"127.0.1.$i node$i"
done >> "$ROOT/slurm.conf"
cat >> "$ROOT/slurm.conf" <<END
PartitionName=main Nodes=ALL Default=YES DefaultTime=60 PriorityTier=1 GraceTime=$GRACE_S
PartitionName=urgent Nodes=ALL DefaultTime=60 PriorityTier=2 PreemptMode=OFF
END
# node1 and node2 must resolve inside jobs (MASTER_ADDR): each node gets this in place of /etc/hosts
{ cat /etc/hosts; echo "$hosts"; } > "$ROOT/hosts"
# clones of /dev/null as devices: SLURM then sets CUDA_VISIBLE_DEVICES as it does for real ones
for g in $(seq 0 $((GPUS - 1))); do
  [ -e "$ROOT/dev/nvidia$g" ] || mknod "$ROOT/dev/nvidia$g" c 1 3 2>/dev/null || : > "$ROOT/dev/nvidia$g"
done
printf 'AutoDetect=off\nName=gpu File=%s/dev/nvidia[0-%d] Flags=nvidia_gpu_env\n' "$ROOT" $((GPUS - 1)) > "$ROOT/gres.conf"
# slurmd 22.05 loads a cgroup plugin though nothing here uses it; v1 named outright loads anywhere
printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$ROOT/cgroup.conf"
# Ends what a finished job left on this node, known by the job's own environment: linuxproc follows parents, and loses a
# process whose parent was killed.
cat > "$ROOT/epilog.sh" <<'END'
#!/bin/bash
for e in /proc/[0-9]*/environ; do
  p=${e#/proc/}; p=${p%/environ}
  [ "$p" != $$ ] && [ "$p" != $PPID ] && [ "$(cat "/proc/$p/comm" 2>/dev/null)" != slurmstepd ] || continue
  v=$(tr '\0' '\n' <"$e" 2>/dev/null | grep -E '^(SLURM_JOB_ID|SLURMD_NODENAME|SLURM_CONF|SLURM_TASK_PID)=') || continue
  grep -qx "SLURM_JOB_ID=$SLURM_JOB_ID" <<<"$v" && grep -qx "SLURMD_NODENAME=$SLURMD_NODENAME" <<<"$v" \
    && grep -qx "SLURM_CONF=$SLURM_CONF" <<<"$v" && grep -q '^SLURM_TASK_PID=' <<<"$v" && kill -9 "$p" 2>/dev/null
done
exit 0
END
chmod +x "$ROOT/epilog.sh"
echo "export SLURM_CONF=$ROOT/slurm.conf" > "$ROOT/env.sh"
export SLURM_CONF=$ROOT/slurm.conf

[ -s "$ROOT/munge.key" ] || (umask 077; head -c 128 /dev/urandom > "$ROOT/munge.key")
# -f: a parent folder that others may write to is a warning, no error
munged -f --socket="$ROOT/munge.socket" --key-file="$ROOT/munge.key" --pid-file="$ROOT/munged.pid" \
  --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/munged.seed" 2>> "$ROOT/log/boot.log" || die "munged"
slurmctld -c -f "$SLURM_CONF" </dev/null >> "$ROOT/log/boot.log" 2>&1 || die "slurmctld"
for i in $(seq "$NODES"); do "$HERE/start_node.sh" "node$i" || die "slurmd node$i"; done

idle() { [ "$(sinfo -h -N -o '%N %t' 2>/dev/null | sort -u | awk '$2 == "idle"' | wc -l)" = "$NODES" ]; }
for _ in $(seq 600); do idle && break; sleep 0.1; done
idle || die "after 60 s not all nodes are idle: $(sinfo -N -l)"
