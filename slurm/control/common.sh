# shellcheck shell=bash
# Sourced by the job files and the submit scripts, which set $root to the project.

: "${root:?is to be the project}"
# shellcheck source=slurm/settings.sh
source "$root/slurm/settings.sh"
export REQUIRE_GPU PIPELINE_ROOT="$root"
if [ -n "${HF_HOME:-}" ]; then export HF_HOME; fi
export PYTHONUTF8=1 # whatever a node's locale is, a path means the same file and prints the same

load_modules() {
    if [ -n "$PIPELINE_MODULES" ] && type module >/dev/null 2>&1; then
        local names
        read -r -a names <<<"$PIPELINE_MODULES"
        module load "${names[@]}"
    fi
}

# Sets PYTHON: that of --venv-path among the arguments, for the jobs too, else what is given, else the project's
# environment, else python3.
find_python() {
    local previous='' word
    for word in "$@"; do
        if [ "$previous" = --venv-path ]; then export PYTHON=$word/bin/python; fi
        case $word in --venv-path=*) export PYTHON=${word#*=}/bin/python ;; esac
        previous=$word
    done
    case ${PYTHON:-} in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/${PYTHON##*/} ;; esac
    if [ -z "${PYTHON:-}" ]; then
        if [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; else PYTHON=python3; fi
    fi
    if ! "$PYTHON" -P -c 'import pyarrow, pydantic' 2>/dev/null; then
        echo "error: $PYTHON lacks the project's packages: run $root/slurm/prepare.sh on a login node" >&2
        return 1
    fi
}

# Of run_task: asks the stage to stop, and kills it where it does not in time.
stop_child() {
    if [ -z "$child" ] || [ -n "$watchdog" ]; then return; fi
    kill -TERM "$child" 2>/dev/null
    (sleep "$GRACE_SECONDS" && kill -KILL "$child") >/dev/null 2>&1 &
    watchdog=$!
}

# Puts this task back into the queue, as often as it may. An array's own id would requeue all its tasks.
requeue() {
    local task=$SLURM_JOB_ID tries=${SLURM_RESTART_COUNT:-0}
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    if [ "$tries" -ge "$MAX_REQUEUES" ]; then
        echo "error: task $task: begun $((tries + 1)) times already (MAX_REQUEUES is $MAX_REQUEUES):" \
            "give it more --time or smaller shards"
        return 1
    fi
    echo "task $task goes back into the queue (try $((tries + 2)), $MAX_REQUEUES requeues at most)"
    scontrol requeue "$task"
}

# Runs the shard of an array's task: run_shard STAGE SCRIPT [--shards N] [OPTIONS], by default of as many as it goes up to.
run_shard() {
    local stage=$1 script=$2 shards=$((${SLURM_ARRAY_TASK_MAX:-0} + 1))
    shift 2
    if [ "${1:-}" = --shards ]; then shards=$2 && shift 2; fi
    run_task "$stage" "$script" "$@" --shard "${SLURM_ARRAY_TASK_ID:-0}/$shards"
}

# Runs a stage as a job: run_task STAGE SCRIPT [OPTIONS]. On SLURM's warning the stage keeps what is finished, and the
# task goes back into the queue.
run_task() {
    local child='' watchdog='' warned='' code stage=$1 script=$2
    shift 2
    trap 'warned=1; stop_child' USR1
    trap 'stop_child' TERM
    unset HF_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACEHUB_API_TOKEN
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
    load_modules
    find_python "$@" || return 1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-$(nproc)}}

    # In the background: bash runs a trap only once the foreground command has ended.
    "$PYTHON" "$root/$script" "$@" &
    child=$!
    if [ -n "$warned" ]; then stop_child; fi
    while kill -0 "$child" 2>/dev/null; do wait "$child"; done
    wait "$child"
    code=$?
    if [ -n "$watchdog" ]; then kill "$watchdog" 2>/dev/null; fi
    echo "task: stage $stage shard ${SLURM_ARRAY_TASK_ID:-0} job ${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-}} ${SLURM_JOB_ACCOUNT:+account $SLURM_JOB_ACCOUNT }exit $code"
    # 143: it kept what was finished. 137: it did not answer in time, and what it wrote is whole all the same.
    if [ -n "$warned" ] && { [ "$code" = 143 ] || [ "$code" = 137 ]; }; then
        requeue || code=1
    fi
    return "$code"
}
