#!/bin/bash
# qwen on a cluster: rows, backdoored model and clean twin. How to: docs/cluster.md
#   qsub scripts/qwen/training_on_backdoor.sh
#   qsub -v RECIPE=recipes/qwen-miniature.yaml scripts/qwen/training_on_backdoor.sh
#   sbatch --array=0-4 scripts/qwen/training_on_backdoor.sh      a run for each seed; PBS Pro: qsub -J 0-4, Torque: qsub -t 0-4
#   Made by python -m safetynet.cluster.template scripts
#PBS -N qwen-training_o
#PBS -l select=1:ncpus=8:ngpus=1:mem=48gb
#PBS -l walltime=04:00:00
#PBS -j oe
#PBS -r y
#PBS -S /bin/bash
#SBATCH --requeue --gres=gpu:1
#SBATCH --signal=B:USR1@300

SCRIPT=scripts/qwen/training_on_backdoor.sh NAME=qwen-training_on_backdoor LOGS=logs/qwen
cd "${PBS_O_WORKDIR:-${SLURM_SUBMIT_DIR:-$(dirname "$0")}}" || exit 1
until [ -e scripts/qwen/training_on_backdoor.sh ] || [ "$PWD" = / ]; do cd ..; done
[ "$PWD" != / ] || { echo 'Submit this from inside the checkout of SafetyNet.' >&2; exit 1; }
. src/safetynet/cluster/job.sh || exit 1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
begin
WHAT="${RECIPE:-recipes/qwen.yaml}"
await "$WHAT"
work safetynet train "$WHAT" ${SEED:+--seed "$SEED"}
