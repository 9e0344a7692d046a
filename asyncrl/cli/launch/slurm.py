"""A run on Slurm: one script that submits a job for the learner, and arrays of generators of any size at any time."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from asyncrl import __version__
from asyncrl.cli.launch.cluster import ClusterRun, Resources, filled

# @NAME@ stands for a value; everything else is the shell's.
SCRIPT = """\
#!/usr/bin/env bash
# The run @RUN@ on Slurm: one job for the learner, and arrays of generators that may grow and shrink at any time.
# Printed by asyncrl @VERSION@ from @CONFIG@. Change whatever your cluster wants otherwise.
#
#   bash FILE learner              submits the learner; again after a time limit or a crash: the run goes on
#   bash FILE generators 0-3       submits generators 0 to 3; later, for more, 4-7; scancel takes some away
#   bash FILE print learner        prints the job file that would be submitted (or: print generators)
#
# Needed on every node at the same path: this folder with the configuration and your task, the environment
# @PREFIX@, and the model. The run folder must be shared by all nodes.
# The rollout link is encrypted (CURVE, keys in @KEYS@); weights are not: use a private network.
@NOTES@
set -euo pipefail

readonly KEYS=@KEYS@
export PATH=@PREFIX@/bin:"$PATH"

# The keys of the learner and of each generator; the learner takes a new one into account while it runs.
make_keys() {
    local id
    for id in "$@"; do
        if [[ ! -f $KEYS/learner.key ]]; then
            asyncrl-keys make "$KEYS" "$id"
        elif [[ ! -f $KEYS/$id.key ]]; then
            asyncrl-keys add "$KEYS" "$id"
        fi
    done
}

learner_job() {
    cat <<'ASYNCRL_JOB'
@LEARNER@ASYNCRL_JOB
}

generator_job() {
    cat <<'ASYNCRL_JOB'
@GENERATOR@ASYNCRL_JOB
}

main() {
    case ${1:-} in
        print)
            case ${2:-} in
                learner) learner_job ;;
                generators) generator_job ;;
                *) echo "print learner, or print generators" >&2 && return 2 ;;
            esac
            ;;
        learner)
            mkdir -p @RUN_DIR@
            make_keys @PREFIX_OF_IDS@0
            learner_job | sbatch
            ;;
        generators)
            if [[ ! ${2:-} =~ ^([0-9]+)(-([0-9]+))?$ ]]; then
                echo "which ones? for example: generators 0-@LAST@" >&2
                return 2
            fi
            local first=${BASH_REMATCH[1]} last=${BASH_REMATCH[3]:-${BASH_REMATCH[1]}} number
            mkdir -p @RUN_DIR@
            for ((number = first; number <= last; number++)); do make_keys @PREFIX_OF_IDS@"$number"; done
            generator_job | sbatch --array="$2"
            ;;
        *)
            echo "learner, generators FIRST-LAST, or print learner|generators" >&2
            return 2
            ;;
    esac
}

main "$@"
"""

LEARNER = """\
#!/usr/bin/env bash
#SBATCH --job-name=@LABEL@-learner
#SBATCH --nodes=@NODES@
#SBATCH --ntasks-per-node=1
@RESOURCES@
#SBATCH --time=1-00:00:00
# Two minutes before the time limit the learner saves and ends; submitted again, it goes on from there.
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --output=@RUN_DIR_TEXT@/slurm-learner-%j.log
set -euo pipefail
export PATH=@PREFIX@/bin:"$PATH"

# The address of this node that generators and other ranks reach. Where the first is not the private one, name the
# interface: ip -4 -o addr show dev ib0 | awk '{split($4, a, "/"); print a[1]; exit}'
ADDRESS=$(hostname -I | cut -d' ' -f1)
[[ -n $ADDRESS ]] || { echo "this node has no address" >&2 && exit 2; }

# Where generators find the learner; they read it again when the learner has moved.
printf 'tcp://%s:@PORT@\\n' "$ADDRESS" >@RUN_DIR@/address.new
mv @RUN_DIR@/address.new @RUN_DIR@/address

settings=(
    @OVERRIDES@
    run.dir=@RUN_DIR@
    transport.address="tcp://$ADDRESS:@PORT@"
    transport.server_key_file=@KEYS@/learner.key
    transport.allowed_keys_file=@KEYS@/allowed_keys
    weights.host="$ADDRESS"@LEARNER_PORT@
)

# This script runs on the first node of the job: that is the learner's.
asyncrl-learner @CONFIG@ "${settings[@]}" &
learner=$!
trap 'kill -TERM "$learner" 2>/dev/null || true' TERM INT
@OTHER_NODES@
code=0
wait "$learner" || code=$?
# A signal ends `wait` early; the learner still saves.
while kill -0 "$learner" 2>/dev/null; do
    code=0
    wait "$learner" || code=$?
done
exit "$code"
"""

OTHER_NODES = """\

# The ranks of the other nodes; the end of this script ends them.
for ((node = 1; node < @NODES@; node++)); do
    srun --nodes=1 --ntasks=1 --relative="$node" --kill-on-bad-exit=0 \\
        asyncrl-trainer-node @CONFIG@ "${settings[@]}" --node "$node" &
done
"""

GENERATOR = """\
#!/usr/bin/env bash
#SBATCH --job-name=@LABEL@-generator
#SBATCH --nodes=1
#SBATCH --ntasks=1
@RESOURCES@
#SBATCH --time=1-00:00:00
# A generator may end at any time: what it had in hand goes to others.
#SBATCH --signal=B:TERM@30
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=@RUN_DIR_TEXT@/slurm-generator-%A_%a.log
set -euo pipefail
export PATH=@PREFIX@/bin:"$PATH"

: "${SLURM_ARRAY_TASK_ID:?submit this with --array}"
readonly ID=@PREFIX_OF_IDS@$SLURM_ARRAY_TASK_ID WAIT_S=3600
# The learner may still be in the queue.
until [[ -s @RUN_DIR@/address ]]; do
    ((SECONDS < WAIT_S)) || { echo "no learner within $WAIT_S s" >&2 && exit 3; }
    sleep 5
done
host=$(sed -nE '1s,^tcp://(.*):[0-9]+$,\\1,p' @RUN_DIR@/address)

settings=(
    @OVERRIDES@
    run.dir=@RUN_DIR@
    generator.id="$ID"
    transport.address=file:@RUN_DIR@/address
    transport.client_key_file=@KEYS@/"$ID".key
    transport.server_public_key_file=@KEYS@/learner.pub
    weights.host="$host"@LEARNER_PORT@
)
exec asyncrl-generator @CONFIG@ "${settings[@]}"
"""


def slurm_script(run: ClusterRun) -> str:
    """The script for `bash`."""
    config = run.config
    run_dir = Path(config.run.dir).absolute()
    nodes = config.learner.nodes
    words = {
        "RUN": config.run.name,
        "VERSION": __version__,
        "LABEL": run.label,
        "CONFIG": shlex.quote(str(Path(run.config_file).absolute())),
        "PREFIX": shlex.quote(sys.prefix),
        "RUN_DIR": shlex.quote(str(run_dir)),
        "RUN_DIR_TEXT": str(run_dir).replace("%", "%%"),
        "KEYS": shlex.quote(str(run_dir / "keys")),
        "PREFIX_OF_IDS": run.generator_prefix,
        "LAST": str(run.generators - 1),
        "NODES": str(nodes),
        "PORT": str(run.rollout_port),
        "LEARNER_PORT": f"\n    learner.port={config.learner.port}" if nodes > 1 else "",
        "NOTES": "".join(f"# Note: {note}.\n" for note in run.notes),
    }
    overrides = "\n    ".join(map(shlex.quote, run.overrides)) or "# what the configuration does not say"
    others = filled(OTHER_NODES, words) if nodes > 1 else ""
    learner = {**words, "OVERRIDES": overrides, "OTHER_NODES": others, "RESOURCES": _resources(run.learner)}
    generator = {**words, "OVERRIDES": overrides, "RESOURCES": _resources(run.generator)}
    jobs = {"LEARNER": filled(LEARNER, learner), "GENERATOR": filled(GENERATOR, generator)}
    return filled(SCRIPT, {**words, **jobs})


def _resources(needed: Resources) -> str:
    return "\n".join(f"#SBATCH {option}" for option in _options(needed))


def _options(needed: Resources) -> Iterator[str]:
    if needed.gpus:
        yield f"--gpus-per-node={needed.gpus}"
    yield f"--cpus-per-task={needed.cores}"
    yield f"--mem={needed.memory_gib}G"
