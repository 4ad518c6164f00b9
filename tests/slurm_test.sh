#!/usr/bin/env bash
# slurm_test.sh TUNE.SH KVMIX-TUNE SAMPLE: tools/slurm/tune.sh on a cluster of this machine alone,
# which this test starts in a folder of its own. One task is killed in the middle of its work; the
# same command again gives, byte for byte, the plan of the short form. Skipped (exit code 77) where
# there is no Slurm: on Debian, the packages slurm-wlm and munge.
set -euo pipefail
script=$(realpath "$1") program=$(realpath "$2") sample=$(realpath "$3")
for needed in munged slurmctld slurmd sbatch; do
  PATH=$PATH:/usr/sbin command -v $needed >/dev/null || {
    printf 'slurm_test: SKIPPED, there is no %s here (Debian: slurm-wlm, munge)\n' $needed >&2
    exit 77
  }
done
export PATH=$PATH:/usr/sbin
folder=$(mktemp -d /tmp/kvmix-slurm-XXXXXX)  # short: it holds sockets
export SLURM_CONF=$folder/slurm.conf  # from here on no command sees another cluster
pids=()
clean() {
  local status=$?
  squeue -h -o %A 2>/dev/null | xargs -r scancel || true
  until_true jobs_are_done || true  # slurmd would wait for them
  [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true
  [ ${#pids[@]} -eq 0 ] || wait "${pids[@]}" 2>/dev/null || true
  [ $status -eq 0 ] || tail -n 20 "$folder"/*.log "$folder"/work/*.log >&2 || true
  rm -rf "$folder"
}
trap clean EXIT
jobs_are_done() { [ -z "$(squeue -h 2>/dev/null)" ]; }
fail() { printf 'slurm_test: %s\n' "$*" >&2; exit 1; }
until_true() { # COMMAND...: within a minute
  local i
  for ((i = 0; i < 600; ++i)); do
    if "$@" >/dev/null 2>&1; then return 0; fi
    sleep 0.1
  done
  printf 'slurm_test: waited a minute for: %s\n' "$*" >&2
  return 1
}

# ---- a cluster
port=$((20000 + $$ % 20000 * 2))
mkdir "$folder"/{state,spool,work}
cat >"$SLURM_CONF" <<CONF
ClusterName=kvmix
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthInfo=socket=$folder/munge.socket
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
KillWait=1
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
CONF
head -c 1024 /dev/urandom >"$folder"/munge.key
chmod 600 "$folder"/munge.key
chmod 755 "$folder"
munged --foreground --force --key-file="$folder"/munge.key --socket="$folder"/munge.socket \
  --pid-file="$folder"/munged.pid --log-file="$folder"/munged.log \
  --seed-file="$folder"/munged.seed >"$folder"/munged.out.log 2>&1 &
pids+=($!)
until_true test -S "$folder"/munge.socket
slurmctld -D >"$folder"/slurmctld.log 2>&1 &
pids+=($!)
slurmd -D -N "$(hostname -s)" >"$folder"/slurmd.log 2>&1 &
pids+=($!)
until_true bash -c 'sinfo -h -o %T | grep -qx idle'

# ---- the work
# kvmix-tune, but the first run of one task of measure is killed as soon as a layer is in its file.
cat >"$folder"/tune <<TUNE
#!/usr/bin/env bash
if [ "\$1" != measure ] || [ "\$SLURM_ARRAY_TASK_ID" != 1 ] || [ -e "$folder/killed" ]; then
  exec "$program" "\$@"
fi
OMP_NUM_THREADS=1 "$program" "\$@" &
until [ -e "$folder/work/measurement.14:28" ]; do kill -0 \$! || exit 1; done
kill -9 \$!
touch "$folder/killed"
wait \$!
TUNE
chmod +x "$folder"/tune
export KVMIX_TUNE=$folder/tune
run() {
  "$script" 28 14 "$folder"/work "$sample"/*.calibration.safetensors -- --budget 0.49 \
    --holdout "$sample"/*.holdout.safetensors -o "$folder"/plan.json >"$folder"/run.log
  until_true jobs_are_done
}
run
[ -e "$folder"/killed ] || fail "no task was killed"
[ ! -e "$folder"/plan.json ] || fail "there is a plan, though a task was killed"
"$program" merge "$folder"/work/measurement.14:28 -o "$folder"/half >"$folder"/half.txt
grep -q 'lacks.* to 27 of' "$folder"/half.txt || fail "the killed task had done all of its work"
run
[ -e "$folder"/plan.json ] || fail "there is no plan"
mkdir "$folder"/short
"$program" "$sample"/*.calibration.safetensors --budget 0.49 -o "$folder"/short/plan.json \
  --holdout "$sample"/*.holdout.safetensors >"$folder"/short.log
cmp "$folder"/short/plan.json "$folder"/plan.json
