#!/bin/bash
# A search on two machines with eight GPUs each, by Slurm:  sbatch examples/slurm.sh
#SBATCH --job-name=ofb-search
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1        # one torchrun on each machine; it starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail

# The first machine is where the others meet.
meeting_place=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Without this, torchrun hands the addresses of dead processes to those it starts after a failure (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=1

# --batch-size is that of all sixteen processes together; --workers is for each.
# The first process writes the run folder; any machine may be the first after a restart, so they share this disk.
srun torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node=8 \
    --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-endpoint="$meeting_place:29500" \
    --max-restarts=3 \
    -m ofb search \
    --model deit_small_patch16_224 --pretrained --target 50% \
    --data "" --data-dir /data/imagenet \
    --batch-size 1024 --workers 7 --amp \
    --output runs/deit-s-50
