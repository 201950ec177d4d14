#!/usr/bin/env bash
# Slurm on this machine alone, for a test: a GPU node with two cards that are none and a CPU node.
#   slurm.sh start FOLDER    installs slurm-wlm and munge where they are missing (root, apt-get)
#   slurm.sh stop FOLDER     stops what was started and takes its configuration away
# State and logs lie in FOLDER. Exit code 3: cannot be done here; the last line says why.
set -euo pipefail

cannot() { echo "$*"; exit 3; }
wait_for() { for _ in $(seq 600); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done; return 1; }
munge_works() { munge -n | unmunge; }
nodes_idle() { [ "$(sinfo -h -N -o %T | sort -u)" = idle ]; }

action=${1:-} state=${2:-}
conf=/etc/slurm/slurm.conf
mark="# written by tests/cluster/slurm.sh"
[[ $action =~ ^(start|stop)$ && -n $state ]] || { sed -n '3,4s/^# *//p' "$0" >&2; exit 2; }

stop() {
    local pid
    for name in slurmctld slurmd-cpu1 slurmd-gpu1 munged; do
        pid=$(cat "$state/$name.pid" 2>/dev/null) && kill "$pid" 2>/dev/null || true
        [ -z "$pid" ] || wait_for eval "! kill -0 $pid" || true
        rm -f "$state/$name.pid"
    done
    if grep -qsxF "$mark" $conf; then rm -f $conf /etc/slurm/gres.conf; fi
}
if [ "$action" = stop ]; then stop; exit; fi

[ "$(id -u)" = 0 ] || cannot "only root can start Slurm here"
[ ! -e $conf ] || grep -qxF "$mark" $conf || cannot "this machine has a Slurm of its own ($conf)"
needed=()
command -v slurmctld >/dev/null && command -v slurmd >/dev/null || needed+=(slurm-wlm)
command -v munged >/dev/null || needed+=(munge)
if [ ${#needed[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || cannot "no apt-get to install ${needed[*]} with"
    { apt-get update -q && apt-get install -q -y --no-install-recommends "${needed[@]}"; } \
        >/tmp/slurm-install.log 2>&1 </dev/null \
        || { tail -3 /tmp/slurm-install.log; cannot "apt-get could not install ${needed[*]}"; }
fi

stop  # what a killed test left
install -d "$state" "$state/cpu1" "$state/gpu1" "$state/ctld" /etc/slurm
host=$(hostname -s)
# Nodes are said to have what the profile asks for, whatever this machine has.
cat >$conf <<CONF
$mark
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$state/ctld
SlurmctldPidFile=$state/slurmctld.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdSpoolDir=$state/%n
SlurmdPidFile=$state/slurmd-%n.pid
SlurmdLogFile=$state/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MinJobAge=3600
NodeName=gpu1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=32 RealMemory=64000 Gres=gpu:2
NodeName=cpu1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=32 RealMemory=64000
PartitionName=gpu Nodes=gpu1 MaxTime=120 State=UP
PartitionName=cpu Nodes=cpu1 MaxTime=120 Default=YES State=UP
CONF
cat >/etc/slurm/gres.conf <<CONF
NodeName=gpu1 Name=gpu File=/dev/null
NodeName=gpu1 Name=gpu File=/dev/zero
CONF

if ! munge_works >/dev/null 2>&1; then
    install -d -o munge -g munge -m 755 /run/munge
    runuser -u munge -- munged --force >"$state/munged.log" 2>&1
    wait_for munge_works || cannot "munged does not answer; see $state/munged.log"
    cp /run/munge/munged.pid "$state/munged.pid"
fi
slurmctld
for node in gpu1 cpu1; do slurmd -N $node; done
wait_for nodes_idle || cannot "the nodes do not come up; see the logs in $state"
sinfo -h -N -o "%N %P %T %G"
