"""Evaluation of function calls, as jobs/evaluate.py has it of question answering, on data in BFCL's format.

    ray job submit -- python -m jobs.evaluate_function_calling --config FILE

The file holds the body of POST /evaluate/function_calling/.
"""

import sys

from jobs import driver
from jobs.evaluate import evaluate
from stack import evaluations
from stack.api.evaluations import EvaluateFunctionCallingRequest


def function_calling(work: driver.Work, request: EvaluateFunctionCallingRequest) -> driver.Outcome:
    """Asks a model every question of a data set and compares the functions that it calls with the expected ones."""
    return evaluate(work, request)


if __name__ == "__main__":
    sys.exit(
        driver.run(
            EvaluateFunctionCallingRequest, evaluations.function_calling, evaluations.resources, function_calling
        )
    )
