#!/bin/bash
# The same without accelerate's launcher: torchrun starts the processes, and the environment says how they share the work.
#
#   GPUS=8 ENGINE=fsdp2 recipes/slurm/torchrun.sh recipes/configs/yarn_llama_32k.yaml [key=value ...]
#
# ENGINE is ddp, fsdp2, zero3 or ulysses. For several machines set NODES, RANK_OF_NODE and MAIN (host:port) on each.
set -euo pipefail
GPUS=${GPUS:-8}
case ${ENGINE:-ddp} in
    ddp) ;;
    fsdp2) export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP \
        FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT FSDP_CPU_RAM_EFFICIENT_LOADING=false ;;
    zero3 | ulysses) export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=3 \
        ACCELERATE_DEEPSPEED_ZERO3_INIT=false ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL=true ;;
    *) echo "ENGINE=$ENGINE is none of ddp, fsdp2, zero3, ulysses" >&2; exit 2 ;;
esac
if [ "${ENGINE:-}" = ulysses ]; then
    export ACCELERATE_USE_PARALLELISM_CONFIG=true PARALLELISM_CONFIG_SP_SIZE="${SP_SIZE:-$GPUS}"
fi
if [ "${NODES:-1}" -gt 1 ]; then
    where=(--nnodes "$NODES" --node-rank "$RANK_OF_NODE" --rdzv-backend c10d --rdzv-endpoint "$MAIN" --rdzv-id pe_patch)
else
    where=(--standalone)
fi
exec torchrun "${where[@]}" --nproc-per-node "$GPUS" recipes/finetune.py "$@"
