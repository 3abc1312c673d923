#!/usr/bin/env bash
# revive.sh <node>: starts a node of the testbed again after its first process was killed.
set -euo pipefail
S=${SLURM_ROOT:-${TMPDIR:-/tmp}/slurm-testbed} N=$1
sed -i "/^slurmd-$N /d" "$S/pids"
setsid nsenter --net="/var/run/netns/$N" \
  unshare --uts --mount --pid --fork --mount-proc --kill-child bash -c "hostname $N
    mount --bind $S/tmp-$N /tmp/ray
    slurmd -D -N $N -f $S/slurm.conf & p=\$!; trap 'kill \$p' TERM; wait \$p; wait \$p" \
  </dev/null >"$S/log/slurmd-$N.out" 2>&1 &
echo "slurmd-$N $!" >>"$S/pids"
end=$((SECONDS + 180)); while [ $SECONDS -lt $end ]; do
  [ "$(SLURM_CONF=$S/slurm.conf sinfo -h -n "$N" -o %T)" = idle ] && exit 0
  sleep .1
done
echo "$N did not come up" >&2; exit 1
