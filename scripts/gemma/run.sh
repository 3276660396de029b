#!/bin/bash
# gemma on a cluster: the whole experiment (data, training, rates, interventions, figures). How to: docs/cluster.md
#   qsub scripts/gemma/run.sh
#   qsub -v RECIPE=recipes/gemma-miniature.yaml scripts/gemma/run.sh
#   sbatch --array=0-4 scripts/gemma/run.sh      a run for each seed; PBS Pro: qsub -J 0-4, Torque: qsub -t 0-4
#   Made by python -m safetynet.cluster.template scripts
#PBS -N gemma-run
#PBS -l select=1:ncpus=8:ngpus=1:mem=64gb
#PBS -l walltime=08:00:00
#PBS -j oe
#PBS -r y
#PBS -S /bin/bash
#SBATCH --requeue --gres=gpu:1
#SBATCH --signal=B:USR1@300

SCRIPT=scripts/gemma/run.sh NAME=gemma-run LOGS=logs/gemma
cd "${PBS_O_WORKDIR:-${SLURM_SUBMIT_DIR:-$(dirname "$0")}}" || exit 1
until [ -e scripts/gemma/run.sh ] || [ "$PWD" = / ]; do cd ..; done
[ "$PWD" != / ] || { echo 'Submit this from inside the checkout of SafetyNet.' >&2; exit 1; }
. src/safetynet/cluster/job.sh || exit 1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
begin
WHAT="${RECIPE:-recipes/gemma.yaml}"
await "$WHAT"
work safetynet run "$WHAT" ${SEED:+--seed "$SEED"}
