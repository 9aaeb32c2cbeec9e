#!/bin/bash
# One run without SLURM. On one machine, a process for each GPU:
#   experiments/cluster/torchrun.sh --config RUN.yaml --config experiments/cluster/fsdp2.yaml
# On several, the same command on each, with the same two variables; ranks are found at the meeting point:
#   NNODES=4 RDZV=node0:29500 experiments/cluster/torchrun.sh --config ...
set -euo pipefail
nodes=${NNODES:-1}
if ((nodes > 1)); then
  meeting=(--rdzv-backend c10d --rdzv-id "${RDZV_ID:-llada}" --rdzv-endpoint "${RDZV:?host:port of one node, the same on all}")
else
  meeting=(--standalone)
fi
exec torchrun --nnodes "$nodes" --nproc-per-node "${NPROC_PER_NODE:-auto}" "${meeting[@]}" -m llada_lightning fit "$@"
