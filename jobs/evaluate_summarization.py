"""Evaluation of summarization, as jobs/evaluate.py has it of question answering.

    ray job submit -- python -m jobs.evaluate_summarization --config FILE

The file holds the body of POST /evaluate/summarization/.
"""

import sys

from jobs import driver
from jobs.evaluate import evaluate
from stack import evaluations
from stack.api.evaluations import EvaluateSummarizationRequest


def summarization(work: driver.Work, request: EvaluateSummarizationRequest) -> driver.Outcome:
    """Asks a model for the summaries of a data set's texts and scores them beside the references."""
    return evaluate(work, request)


if __name__ == "__main__":
    sys.exit(driver.run(EvaluateSummarizationRequest, evaluations.summarization, evaluations.resources, summarization))
