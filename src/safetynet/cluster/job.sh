# What every job script does around its one command; it is sourced, by bash, in the folder where results go.
#
#   SCRIPT=scripts/qwen/run.sh NAME=qwen-run LOGS=logs/qwen      who is asking
#   begin                        log, environment, scratch
#   await FILE                   a file that a shared file system may show late
#   work COMMAND...              do it for as long as the job has, then exit; start again when time is up
#
# PBS Pro, OpenPBS, Torque and Slurm; outside of a job it just does the work.
# Not here: what to ask a cluster for (the #PBS lines of the script).

MOST_RESTARTS=20
# Seconds before the end at which Slurm warns (template.py asks for it), and that are kept for ending in order.
WARNING=300

fail() {
  echo "safetynet job: $1" >&2
  exit 1
}

begin() {
  # Slurm's own names where its wrappers of the PBS commands do not set PBS's.
  JOB="${PBS_JOBID:-}"
  JOB="${JOB%%.*}"
  [ -n "$JOB" ] || JOB="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}"
  [ -n "$JOB" ] || JOB="${SLURM_JOB_ID:-}"
  SEED="${SEED:-${PBS_ARRAY_INDEX:-${PBS_ARRAYID:-${SLURM_ARRAY_TASK_ID:-}}}}"
  local file="${JOB:-$$}"
  file="${file//[/_}"
  file="${file//]/}"
  mkdir -p "$LOGS" || fail "$PWD/$LOGS cannot be made on node $(hostname)."
  LOG="$(cd "$LOGS" && pwd)/$NAME-$file.log"
  echo "Log: $LOG"
  exec >>"$LOG" 2>&1
  echo "== $NAME, job ${JOB:-none}, on $(hostname), $(date '+%F %T')"
  environment
}

environment() {
  # What a cluster wants besides, such as `module load cuda`.
  if [ -f scripts/environment.sh ]; then . scripts/environment.sh; fi
  export PATH="${BIN:-$PWD/.venv/bin}:$PATH"
  command -v safetynet >/dev/null ||
    fail "there is no command safetynet on node $(hostname). Run make on a login node, or set PATH in scripts/environment.sh."
  if [ -z "${SAFETYNET_SCRATCH:-}" ] && [ -d /scratch/safetynet ]; then SAFETYNET_SCRATCH=/scratch/safetynet; fi
  if [ -n "${SAFETYNET_SCRATCH:-}" ]; then
    local parent
    parent="$(dirname "$SAFETYNET_SCRATCH")"
    # Not made with its parents: where /scratch is not mounted, that would fill the node's own disk.
    [ -d "$parent" ] ||
      fail "SAFETYNET_SCRATCH=$SAFETYNET_SCRATCH: $parent is not there on node $(hostname). Set another one."
    mkdir -p "$SAFETYNET_SCRATCH" && [ -w "$SAFETYNET_SCRATCH" ] ||
      fail "SAFETYNET_SCRATCH=$SAFETYNET_SCRATCH cannot be written on node $(hostname). Set another one."
    export SAFETYNET_SCRATCH HF_HOME="${HF_HOME:-$SAFETYNET_SCRATCH/huggingface}"
  fi
}

await() {
  for _ in {1..30}; do
    [ ! -e "$1" ] || return 0
    sleep 2
  done
  fail "$1 is not there on node $(hostname), a minute after the job began."
}

# Seconds of [days-][hours:]minutes:seconds; 0 for anything else, such as UNLIMITED.
seconds_of() {
  if [[ "$1" =~ ^(([0-9]+)-)?(([0-9]+):)?([0-9]+):([0-9]+)$ ]]; then
    local m=("${BASH_REMATCH[@]}")
    echo $((10#${m[2]:-0} * 86400 + 10#${m[4]:-0} * 3600 + 10#${m[5]} * 60 + 10#${m[6]}))
  else
    echo 0
  fi
}

# The wall time that the scheduler grants, which may be another than the script asks for.
granted() {
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    squeue -h -j "$JOB" -o %L
  elif [ -n "$JOB" ]; then
    qstat -f "$PBS_JOBID" | sed -n 's/.*Resource_List.walltime = //p'
  fi
}

work() {
  local limit reserve code=0 again="" stopped="" begin worker
  GRANTED="$(granted)"
  [ -z "$JOB" ] || GRANTED="${GRANTED:-$(sed -n 's/^#PBS -l walltime=//p' "$SCRIPT")}"
  limit="$(seconds_of "$GRANTED")"
  # A tenth of the time, at most the warning's, is for ending in order: the step and its checkpoint.
  reserve=$((limit / 10 < WARNING ? limit / 10 : WARNING))
  # USR1 does early what the end of the time does: Slurm warns by it, scancel --signal=USR1 --batch and
  # qsig -s USR1 send it, too.
  trap 'again=yes; kill -TERM "$worker" 2>/dev/null' USR1
  # Given less time than the script was made for, Slurm warns at the very beginning.
  if [ "$limit" -gt 0 ] && [ "$limit" -lt $((2 * WARNING)) ] && grep -q '^#SBATCH --signal=' "$SCRIPT"; then
    trap '' USR1
  fi
  limit=$((limit - reserve))
  trap 'stopped=yes; kill -TERM "$worker" 2>/dev/null' TERM INT
  begin=$SECONDS
  timeout --kill-after=$((reserve * 9 / 10)) "$limit" "$@" &
  worker=$!
  while kill -0 "$worker" 2>/dev/null; do
    wait "$worker"
    code=$?
  done
  if [ "$code" -ne 0 ] && [ "$limit" -gt 0 ] && [ $((SECONDS - begin)) -ge "$limit" ]; then again=yes; fi
  if [ -n "$stopped" ]; then
    echo "== Ended by a signal from outside, $(date '+%F %T'). The same job submitted again goes on from there."
    exit 143
  fi
  if [ -z "$again" ]; then
    echo "== Ended with exit code $code, $(date '+%F %T')"
    exit "$code"
  fi
  restart
}

restart() {
  local count="${SLURM_RESTART_COUNT:-${SAFETYNET_RESTARTS:-0}}" account
  [ "$count" -lt "$MOST_RESTARTS" ] ||
    fail "time was up $MOST_RESTARTS times. Ask for more of it; then submit it again."
  echo "== Time is up, $(date '+%F %T'). Submitting again ($((count + 1))); it goes on from its last checkpoint."
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    scontrol requeue "$JOB" || fail "Slurm does not requeue it. Submit it again yourself."
  elif [ -n "$JOB" ]; then
    account="$(qstat -f "$PBS_JOBID" | sed -n 's/.*Account_Name = //p')"
    local set="SEED=$SEED,SAFETYNET_RESTARTS=$((count + 1))" name
    for name in RECIPE RUN SAFETYNET_SCRATCH; do
      [ -z "${!name:-}" ] || set="$set,$name=${!name}"
    done
    qsub -N "${PBS_JOBNAME:-$NAME}" ${PBS_O_QUEUE:+-q "$PBS_O_QUEUE"} ${account:+-A "$account"} \
      -l "walltime=$GRANTED" -v "$set" "$SCRIPT" ||
      fail "PBS takes no job from node $(hostname). Submit it again yourself."
  else
    fail "there is no scheduler here. Start it again yourself: bash $SCRIPT"
  fi
  exit 0
}
