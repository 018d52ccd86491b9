#!/usr/bin/env bash
# Ends Ray on all hosts of clusters/local.yaml, and empties the head's Redis. It is run on the head, before `ray down`, which
# would end Ray there alone: the others would look for their head for half an hour (environment.sh).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ray stop --grace-period 30 # first of all, as its autoscaler starts workers again
# By the address, the user and the key that `ray up` gave to the autoscaler.
workers=$(python - <<'PYTHON'
from pathlib import Path
import yaml
cluster = yaml.safe_load(Path("~/ray_bootstrap_config.yaml").expanduser().read_text())
print(*(f"{cluster['auth']['ssh_user']}@{address}" for address in cluster["provider"]["worker_ips"]))
PYTHON
)
stops=()
for worker in $workers; do
  ssh -n -i ~/ray_bootstrap_key.pem -o BatchMode=yes -o ConnectTimeout=10 -o StrictHostKeyChecking=no \
    -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$worker" \
    '. ~/llama-stack-ray/clusters/environment.sh; ray stop --grace-period 30' &
  stops+=($!)
done
status=0
for stop in "${stops[@]}"; do
  wait "$stop" || status=1 # a host that is not reached says so, and the others end
done
# Or the next cluster would look for the nodes of this one.
REDISCLI_AUTH="$(cat ~/secrets/redis_password)" redis-cli -p 6390 flushall
exit "$status"
