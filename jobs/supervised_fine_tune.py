"""Supervised fine-tuning, by TRL's SFTTrainer in workers of Ray Train.

    ray job submit -- python -m jobs.supervised_fine_tune --config jobs/examples/supervised_fine_tune.yaml

The file holds the body of POST /post_training/supervised_fine_tune. A trained adapter becomes an artifact and is served
at once as the model `base:job_uuid`; a whole model by an application of its own. jobs/training.py says how.
"""

import sys

from jobs import driver
from jobs.training import train
from stack import post_training
from stack.api.post_training import PostTrainingSFTRequest


def fine_tune(work: driver.Work, request: PostTrainingSFTRequest) -> driver.Outcome:
    """Fine-tunes a model on what its assistant should say."""
    return train(work, request, "sft")


if __name__ == "__main__":
    sys.exit(driver.run(PostTrainingSFTRequest, post_training.supervised_fine_tune, post_training.resources, fine_tune))
