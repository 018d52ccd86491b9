"""A reward model, by TRL's RewardTrainer in workers of Ray Train.

    ray job submit -- python -m jobs.train_reward_model --config jobs/examples/train_reward_model.yaml

The file holds the body of POST /post_training/train_reward_model. The result is a whole model for the classification
of sequences with one number, the reward, that transformers loads. jobs/training.py says how it is done.
"""

import sys

from jobs import driver
from jobs.training import train
from stack import post_training
from stack.api.post_training import RewardModelRequest


def train_reward_model(work: driver.Work, request: RewardModelRequest) -> driver.Outcome:
    """Trains a model to say which answers people prefer."""
    return train(work, request, "reward")


if __name__ == "__main__":
    sys.exit(
        driver.run(RewardModelRequest, post_training.train_reward_model, post_training.resources, train_reward_model)
    )
