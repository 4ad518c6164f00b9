#!/usr/bin/env bash
# tune.sh LAYERS PER-TASK FOLDER DUMP... -- OPTION-OF-CHOOSE...
# kvmix-tune as jobs of Slurm, each after the one before it: the dumps are calibrated, one a task;
# merged; the LAYERS of the model measured, PER-TASK of them a task; merged; the plan chosen.
# FOLDER, which all nodes share, holds the parts and what each job said. A task that was killed, a
# job that did not start because of it: the same command again does what is left to do.
#   tune.sh 80 4 /shared/work /shared/c4.safetensors -- --budget 0.49 -o /shared/plan.json
# KVMIX_TUNE    the program, as the nodes find it (kvmix-tune)
# KVMIX_MEASURE options of measure: --candidates int8, or --target AVX2 where CPUs differ
# SBATCH_...    sbatch's own variables: SBATCH_PARTITION, SBATCH_CPUS_PER_TASK, SBATCH_TIMELIMIT ...
#SBATCH --requeue --open-mode=append
set -euo pipefail

step=
[ "${1:-}" != --step ] || { step=$2; shift 2; }
[ $# -ge 5 ] || { sed -n '2,11s/^# //p' "$0"; exit 2; }
layers=$1 per_task=$2 folder=$3
place=("$1" "$2" "$3")
shift 3
dumps=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do dumps+=("$1"); shift; done
[ $# -gt 0 ] || { printf 'tune.sh: expected -- between the dumps and the options\n' >&2; exit 2; }
shift
options=("$@")

tune=${KVMIX_TUNE:-kvmix-tune}
threads=(--threads "${SLURM_CPUS_PER_TASK:-0}")
read -ra measuring <<<"${KVMIX_MEASURE:-}"
tasks=$(((layers + per_task - 1) / per_task))
task=${SLURM_ARRAY_TASK_ID:-0}

range() { # TASK: FIRST:LAST of the layers that it measures
  local last=$((($1 + 1) * per_task))
  printf '%s:%s' $(($1 * per_task)) $((last < layers ? last : layers))
}

case $step in
  calibrate)
    exec "$tune" calibrate "${dumps[task]}" "${threads[@]}" -o "$folder/calibration.$task" ;;
  merge-calibration)
    parts=()
    for ((i = 0; i < ${#dumps[@]}; ++i)); do parts+=("$folder/calibration.$i"); done
    exec "$tune" merge "${parts[@]}" -o "$folder/calibration" ;;
  measure)
    exec "$tune" measure "${dumps[@]}" --calibration "$folder/calibration" \
      --layers "$(range "$task")" "${measuring[@]}" "${threads[@]}" \
      -o "$folder/measurement.$(range "$task")" ;;
  merge-measurement)
    parts=()
    for ((i = 0; i < tasks; ++i)); do parts+=("$folder/measurement.$(range $i)"); done
    exec "$tune" merge "${parts[@]}" -o "$folder/measurement" ;;
  choose)
    exec "$tune" choose "$folder/measurement" "${dumps[@]}" "${threads[@]}" "${options[@]}" ;;
esac

after=
submit() { # STEP SBATCH-OPTION...
  after=$(sbatch --parsable --kill-on-invalid-dep=yes ${after:+"--dependency=afterok:$after"} \
    --job-name="kvmix-$1" --output="$folder/$1.%A.%a.log" "${@:2}" \
    "$0" --step "$1" "${place[@]}" "${dumps[@]}" -- "${options[@]}")
  printf '%s: job %s\n' "$1" "$after"
}
mkdir -p "$folder"
submit calibrate --array=0-$((${#dumps[@]} - 1))
submit merge-calibration
submit measure --array=0-$((tasks - 1))
submit merge-measurement
submit choose
