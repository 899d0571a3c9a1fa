export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it from sbatch

# In the background, so that this shell can hand on signals that SLURM sends to it instead of to the ranks.
{command} &
ranks=$!
hand_on() { handed=1; kill -s "$1" "$ranks" 2>/dev/null; }
trap 'hand_on USR1' USR1
trap 'hand_on TERM' TERM
while handed=; wait "$ranks"; code=$?; [ -n "$handed" ]; do :; done

# Stopped by a signal; killed, for want of memory or with a node; or an error, perhaps of a lost network.
if [ "$code" -eq 1 ] || [ "$code" -eq {late} ] || [ "$code" -gt 128 ] && [ "$code" -ne 130 ]; then
  {judged}
fi
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
