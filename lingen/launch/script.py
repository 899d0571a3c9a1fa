"""The script that sbatch is given: it starts the ranks, hands signals on, and puts the job into the queue again."""

import shlex
import sys
from collections.abc import Sequence

from lingen.launch.options import ClusterSettings, Options
from lingen.ranks.signals import REQUEUE

WAITS = """\
# In the background, so that this shell can hand on signals that SLURM sends to it instead of to the ranks.
{command} &
ranks=$!
hand_on() { handed=1; kill -s "$1" "$ranks" 2>/dev/null; }
trap 'hand_on USR1' USR1
trap 'hand_on TERM' TERM
while handed=; wait "$ranks"; code=$?; [ -n "$handed" ]; do :; done
"""

REQUEUES = """\
if [ "$code" -eq {late} ]; then
  restarts=${SLURM_RESTART_COUNT:-0}
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) || state=RUNNING  # SLURM does not answer
  if [ "$state" != RUNNING ]; then  # cancelled, or in the queue again already
    echo "lingen: job $SLURM_JOB_ID is ${state:-gone}; it is left so."
  elif [ "$restarts" -ge {most} ]; then
    echo "lingen: job $SLURM_JOB_ID was requeued $restarts times, --max-requeues={most}; it ends here."
  else
    echo "lingen: job $SLURM_JOB_ID goes into the queue again, $((restarts + 1)) of at most {most} times."
    if [ -n "$unfit" ]; then
      echo "lingen: it goes on without $unfit, where the preflight failed."
      unfit="$unfit,$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%x)"
    fi
    tries=0
    until scontrol requeue "$SLURM_JOB_ID" || [ $((tries += 1)) -ge 10 ]; do sleep 30; done
    # Only a job in the queue can be told to leave nodes out; SLURM lets this script live for some seconds.
    until [ -z "$unfit" ] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${unfit%,}"; do sleep 1; done
    sleep 60  # SLURM ends this script
  fi
fi
exit "$code"
"""


def script_of(options: Options, command: Sequence[str], settings: ClusterSettings, judge: Sequence[str] = ()) -> str:
    """The whole script.

    Args:
        options: of sbatch, all of them.
        command: of each rank, behind `srun`; words that begin with $ are left to the shell.
        judge: a command that gets the code of ranks that were stopped, failed or were killed, and returns `REQUEUE`
            where they are worth another start, and prints the nodes to do without, if any; none: those that were killed
            are."""
    srun = ["srun", "--kill-on-bad-exit=1", *settings.srun]
    judged = f'unfit=$({_shell(judge)} "$code"); code=$?' if judge else f'[ "$code" -eq 1 ] || code={REQUEUE}'
    parts = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()),
        "",
        f"# Written by: {shlex.join(['lingen', *sys.argv[1:]])}",
        *settings.setup,
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it from sbatch",
        "",
        WAITS.replace("{command}", _shell([*srun, *command])),
        "# Stopped by a signal; killed, for want of memory or with a node; or an error, perhaps of a lost network.",
        f'if [ "$code" -eq 1 ] || [ "$code" -eq {REQUEUE} ] || [ "$code" -gt 128 ] && [ "$code" -ne 130 ]; then',
        f"  {judged}",
        "fi",
        REQUEUES.replace("{late}", str(REQUEUE)).replace("{most}", str(settings.max_requeues)),
    ]
    return "\n".join(parts)


def _shell(words: Sequence[str]) -> str:
    return " ".join(f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in words)
