#!/usr/bin/env bash
# Ends the cluster below CLUSTER_ROOT: its jobs, then the processes that its own pid files name. May be repeated.
set -uo pipefail
ROOT=${CLUSTER_ROOT:?the folder that start_cluster.sh was given}
export SLURM_CONF=$ROOT/slurm.conf

alive() {  # PIDFILE NAME: the process lives (no zombie) and is that daemon
  local p; p=$(cat "$1" 2>/dev/null) || return 1
  [ -n "$p" ] && [ "$(awk '/^Name:/{n=$2} /^State:/{s=$2} END{print n, s == "Z" ? "dead" : "live"}' "/proc/$p/status" 2>/dev/null)" = "$2 live" ]
}
end() {  # PIDFILE NAME
  local p; p=$(cat "$1" 2>/dev/null) || return 0
  if alive "$1" "$2"; then
    kill "$p"
    for _ in $(seq 100); do alive "$1" "$2" || break; sleep 0.1; done
    ! alive "$1" "$2" || kill -9 "$p"
  fi
  rm -f "$1"
}
if alive "$ROOT/slurmctld.pid" slurmctld; then  # jobs first, so that no rank outlives the cluster
  jobs=$(timeout 10 squeue -h -o %A 2>/dev/null | sort -u)
  [ -z "$jobs" ] || timeout 20 scancel $jobs 2>/dev/null
  for _ in $(seq 60); do [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break; sleep 0.5; done
fi
for f in "$ROOT"/slurmd.*.pid; do [ ! -f "$f" ] || end "$f" slurmd; done
end "$ROOT/slurmctld.pid" slurmctld
end "$ROOT/munged.pid" munged
