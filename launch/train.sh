#!/usr/bin/env bash
# Train one config on this machine, or on several.
#
#   launch/train.sh configs/train/quickstart.toml [--set key=value ...]
#   RANKS=2                           ranks on this machine; default: its GPUs, or 1
#   NODES=4 NODE=0 HEAD=host:29500    more machines: the same command on each, with its own NODE
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "launch/train.sh: no config given; usage: launch/train.sh CONFIG [--set key=value ...]" >&2
    exit 2
fi

PATH="$PWD/.venv/bin:$PATH"
# A mistake in the config is one line here, and a page of torchrun's from every rank below.
rlpt train "$@" --dry-run >/dev/null

gpus=0
if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus | grep -c . || true)
fi
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
nodes=${NODES:-1}

if [[ $nodes -eq 1 ]]; then
    exec torchrun --standalone --nproc-per-node "$ranks" -m rlpt.train "$@"
fi
: "${NODE:?NODES=$nodes needs NODE, the number of this machine from 0}"
: "${HEAD:?NODES=$nodes needs HEAD, host:port of machine 0}"
exec torchrun --nnodes "$nodes" --node-rank "$NODE" --rdzv-backend static \
    --master-addr "${HEAD%:*}" --master-port "${HEAD##*:}" \
    --nproc-per-node "$ranks" -m rlpt.train "$@"
