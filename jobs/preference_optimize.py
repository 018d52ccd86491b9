"""Direct preference optimization, by TRL's DPOTrainer in workers of Ray Train.

    ray job submit -- python -m jobs.preference_optimize --config jobs/examples/preference_optimize.yaml

The file holds the body of POST /post_training/preference_optimize. jobs/training.py says how it is done.
"""

import sys

from jobs import driver
from jobs.training import train
from stack import post_training
from stack.api.post_training import PostTrainingRLHFRequest


def optimize(work: driver.Work, request: PostTrainingRLHFRequest) -> driver.Outcome:
    """Trains a model to give the answers that people prefer."""
    return train(work, request, "dpo")


if __name__ == "__main__":
    sys.exit(driver.run(PostTrainingRLHFRequest, post_training.preference_optimize, post_training.resources, optimize))
