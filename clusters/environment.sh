# What every Ray process of a node without containers finds in its environment: clusters/local.yaml reads this before
# `ray start`. Those in containers have the same by the image and by the cluster's file.

# Ray asks everybody for the token: whoever has it can run code on every node.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$HOME/secrets/auth_token"
# The folder that all nodes share: models, and what jobs keep between their attempts.
export STACK_HOME=/mnt/stack
export STACK_CONFIG="$HOME/llama-stack-ray/serve_apps/cluster.yaml"
# PostgreSQL's password, and the keys of the object storage. Neither is in any config.
export PGPASSFILE="$HOME/secrets/pgpass"
export AWS_SHARED_CREDENTIALS_FILE="$HOME/secrets/aws_credentials"
export AWS_DEFAULT_REGION=us-west-2
# Another object storage than Amazon's that speaks S3:
# export AWS_ENDPOINT_URL=https://s3.example.com
export HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false
export RAY_USAGE_STATS_ENABLED=0
# A node is given up when it has not answered for 4 checks in a row.
export RAY_health_check_period_ms=2000
export RAY_health_check_timeout_ms=4000
export RAY_health_check_failure_threshold=4
# Without its head a node goes on for so many seconds, in which the head is started again. Ray's own 60 are too few for a
# person, and its end would be that of all that serves.
export RAY_gcs_rpc_server_reconnect_timeout_s=1800
export PATH="$HOME/llama-stack-ray/.venv/bin:$PATH"
