"""Ray Train and Ray Data drivers, run as Ray jobs: `ray job submit -- python -m jobs.NAME --config FILE`."""
