#!/usr/bin/env bash
# Starts one node of the cluster below CLUSTER_ROOT, also again after it was killed: start_node.sh node1
set -euo pipefail
exec unshare --uts --mount bash -c '
  hostname "$1"; mount --make-rprivate /; mount --bind "$2/hosts" /etc/hosts; exec slurmd -N "$1" -f "$2/slurm.conf"
' _ "$1" "$CLUSTER_ROOT" </dev/null >> "$CLUSTER_ROOT/log/boot.log" 2>&1
