#!/bin/bash
# A search on several machines without a scheduler. Start it on each of them, the first one included:
#     examples/torchrun_multi_node.sh ADDRESS_OF_THE_FIRST_MACHINE NUMBER_OF_MACHINES
# On a single machine, `torchrun --standalone --nproc-per-node 8 -m ofb search ...` is enough.
set -euo pipefail
meeting_place=$1
machines=$2

# Without this, torchrun hands the addresses of dead processes to those it starts after a failure (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=1

# A process that fails ends all of them; torchrun starts them anew, and they go on from the last epoch's checkpoint.
torchrun \
    --nnodes="$machines" \
    --nproc-per-node=gpu \
    --rdzv-backend=c10d \
    --rdzv-id=deit-s-50 \
    --rdzv-endpoint="$meeting_place:29500" \
    --max-restarts=3 \
    -m ofb search \
    --model deit_small_patch16_224 --pretrained --target 50% \
    --data "" --data-dir /data/imagenet \
    --batch-size 1024 --workers 7 --amp \
    --output runs/deit-s-50
