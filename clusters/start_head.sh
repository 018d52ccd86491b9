#!/usr/bin/env bash
# Starts the head of clusters/local.yaml again, on its host and as its user, with the commands that `ray up` has run there
# last: head_start_ray_commands. head.service runs it when the host is switched on.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python - <<'PYTHON' |
from pathlib import Path
import yaml
cluster = yaml.safe_load(Path("~/ray_bootstrap_config.yaml").expanduser().read_text())
print(*cluster["head_start_ray_commands"], sep="\0", end="\0")
PYTHON
  while IFS= read -r -d '' command; do
    bash -c "$command" </dev/null
  done
