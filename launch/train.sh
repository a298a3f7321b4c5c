#!/usr/bin/env bash
# Train one config on this machine, or on several; it goes on where it was.
#
#   launch/train.sh configs/train/quickstart.toml [--set key=value ...]
#   RANKS=2                    ranks on this machine; default: its GPUs, or 1
#   NODES=4 HEAD=host:29500    more machines: the same command on each; NODES=2:4 goes on with 2, 3 or 4 of them
#   RESTARTS=3                 how often all ranks start again after one that failed
#   GRACE=90                   seconds from a signal to SIGKILL; more than supervision.stop_seconds
# Exits 143 after SIGTERM, SIGUSR1 or SIGHUP, 130 after Ctrl-C, 2 for a mistake that is seen before a rank starts, else 1.
set -euo pipefail

[[ $# -ge 1 ]] || { echo "launch/train.sh: no config given; usage: launch/train.sh CONFIG [--set key=value ...]" >&2; exit 2; }
asked="" torchrun="" signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
# Under nohup a terminal that is closed is nobody's concern: torchrun would hand it on.
[[ $(trap -p HUP) == "trap -- '' SIGHUP" ]] || signals+=,SIGHUP
trap 'asked=143; [[ -z $torchrun ]] || kill -TERM "$torchrun"' TERM USR1 HUP
trap 'asked=130; [[ -z $torchrun ]] || kill -INT "$torchrun"' INT
PATH="$PWD/.venv/bin:$PATH"
# A mistake in the config is one line here, and a page of torchrun's from every rank below.
rlpt train "$@" --dry-run >/dev/null

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
meet=(--standalone)
if [[ ${NODES:-1} != 1 ]]; then
    : "${HEAD:?NODES=$NODES needs HEAD, host:port of one of the machines}"
    # Else ranks that start again find the addresses of those that are gone (pytorch issue 135712).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    meet=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${SLURM_JOB_ID:-rlpt}")
fi
torchrun "${meet[@]}" --nproc-per-node "${RANKS:-$((gpus > 0 ? gpus : 1))}" \
    --max-restarts "${RESTARTS:-3}" --shutdown-timeout "${GRACE:-90}" \
    --signals-to-handle "$signals" -m rlpt.train "$@" &
torchrun=$!
[[ -z $asked ]] || kill -TERM "$torchrun"
# A signal ends the first wait, not torchrun.
code=0
wait "$torchrun" || code=$?
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun" && code=0 || code=$?; done
[[ $code -eq 0 ]] || exit "${asked:-$code}"
