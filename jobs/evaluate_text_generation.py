"""Evaluation of text generation, as jobs/evaluate.py has it of question answering.

    ray job submit -- python -m jobs.evaluate_text_generation --config FILE

The file holds the body of POST /evaluate/text_generation/.
"""

import sys

from jobs import driver
from jobs.evaluate import evaluate
from stack import evaluations
from stack.api.evaluations import EvaluateTextGenerationRequest


def text_generation(work: driver.Work, request: EvaluateTextGenerationRequest) -> driver.Outcome:
    """Asks a model to continue the prompts of a data set and scores what it says beside the references."""
    return evaluate(work, request)


if __name__ == "__main__":
    sys.exit(
        driver.run(EvaluateTextGenerationRequest, evaluations.text_generation, evaluations.resources, text_generation)
    )
