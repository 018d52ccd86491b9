"""Evaluation by a judge, as jobs/evaluate.py has it of question answering: ratings by a rubric, and preferences.

    ray job submit -- python -m jobs.evaluate_judged --config FILE

The file holds the body of POST /evaluate/judged/.
"""

import sys

from jobs import driver
from jobs.evaluate import evaluate
from stack import evaluations
from stack.api.evaluations import EvaluateJudgedRequest


def judged(work: driver.Work, request: EvaluateJudgedRequest) -> driver.Outcome:
    """Asks a model every question of a data set, and a judge how good its answers are."""
    return evaluate(work, request)


if __name__ == "__main__":
    sys.exit(driver.run(EvaluateJudgedRequest, evaluations.judged, evaluations.resources, judged))
