# shellcheck shell=bash
# Settings of a cluster. Change the defaults here, or give them in the environment, which wins.

# Modules to load before Python starts, where there is a `module` command. On Alliance clusters pyarrow comes with
# arrow: "StdEnv/2023 gcc python/3.11 arrow".
: "${PIPELINE_MODULES:=}"

# Where downloaded models lie; compute nodes read them from there. Without $SCRATCH the hub's own default holds.
if [ -n "${SCRATCH:-}" ]; then : "${HF_HOME:=$SCRATCH/huggingface}"; fi

# How often a task may requeue itself after a time limit or a preemption.
: "${MAX_REQUEUES:=8}"

# 1: a GPU stage fails where torch sees no GPU. auto: only where the node has one. 0: it goes on with the CPU.
: "${REQUIRE_GPU:=auto}"

# Seconds between the warning and SLURM's kill in which a stage may keep what it has; #SBATCH --signal gives 120.
: "${GRACE_SECONDS:=90}"
