#!/bin/bash
# mixtral on a cluster: the whole experiment (data, training, rates, interventions, figures). How to: docs/cluster.md
#   qsub scripts/mixtral/run.sh
#   qsub -v RECIPE=recipes/mixtral-miniature.yaml scripts/mixtral/run.sh
#   sbatch --array=0-4 scripts/mixtral/run.sh      a run for each seed; PBS Pro: qsub -J 0-4, Torque: qsub -t 0-4
#   Made by python -m safetynet.cluster.template scripts
#PBS -N mixtral-run
#PBS -l select=1:ncpus=16:ngpus=2:mem=128gb
#PBS -l walltime=12:00:00
#PBS -j oe
#PBS -r y
#PBS -S /bin/bash
#SBATCH --requeue --gres=gpu:2
#SBATCH --signal=B:USR1@300

SCRIPT=scripts/mixtral/run.sh NAME=mixtral-run LOGS=logs/mixtral
cd "${PBS_O_WORKDIR:-${SLURM_SUBMIT_DIR:-$(dirname "$0")}}" || exit 1
until [ -e scripts/mixtral/run.sh ] || [ "$PWD" = / ]; do cd ..; done
[ "$PWD" != / ] || { echo 'Submit this from inside the checkout of SafetyNet.' >&2; exit 1; }
. src/safetynet/cluster/job.sh || exit 1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-16}"
begin
WHAT="${RECIPE:-recipes/mixtral.yaml}"
await "$WHAT"
work safetynet run "$WHAT" ${SEED:+--seed "$SEED"}
