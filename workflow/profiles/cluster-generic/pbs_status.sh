#!/bin/sh
# pbs_status.sh JOB: running, success or failed, as PBS has it.
job=$(qstat -x -f "$1") || { sleep 5; job=$(qstat -x -f "$1"); } || { echo failed; exit; }
state=$(printf '%s\n' "$job" | sed -n 's/^ *job_state = //p')
code=$(printf '%s\n' "$job" | sed -n 's/^ *Exit_status = //p')
case $state in
    F | C) if [ "$code" = 0 ]; then echo success; else echo failed; fi ;;
    *) echo running ;;
esac
