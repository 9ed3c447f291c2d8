#!/bin/bash
# One run on several nodes under SLURM, one launcher per node. From the repository root, which all nodes must share:
#   sbatch --nodes 2 recipes/slurm.sh zero_configs/zero3.yaml recipes/llava15_7b/finetune.yaml --cal
# The arguments: launcher settings, recipe, options of the run. Tried with stand-ins for srun and scontrol only.
#SBATCH --job-name=cal_train
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --output=%x-%j.log
set -euo pipefail

# Ten minutes before its time is up, the job gets SIGTERM: the step in hand is finished and saved. The launcher, which
# passes the signal on, would kill after 30 seconds what is still saving.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540

export SETTINGS=$1
shift
export PROCESSES=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export FIRST_NODE=${NODES[0]}
export PORT=$((20000 + SLURM_JOB_ID % 20000))  # jobs that share a node must not meet

# In single quotes: SLURM_NODEID is known only on the node itself.
srun --kill-on-bad-exit=1 bash -c '
exec accelerate launch --config_file "$SETTINGS" \
  --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" --deepspeed_multinode_launcher standard \
  -m cal_train train "$@"' launcher "$@"
