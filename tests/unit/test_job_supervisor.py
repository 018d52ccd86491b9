"""What the job supervisor tells everybody."""

import warnings

import pytest
from sqlalchemy.exc import OperationalError

from stack.errors import BadInput

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from serve_apps.job_supervisor import problem_of

URL = "postgresql://stack:s3cret@10.0.0.7/stack"


@pytest.mark.parametrize(
    ("error", "who"),
    [
        (
            OperationalError("SELECT jobs.id", {"tenant": "acme"}, OSError(f"connection to {URL} failed")),
            "the database",
        ),
        (ConnectionError("Failed to connect to Ray at address: http://10.0.0.7:8265."), "Ray"),
        (RuntimeError("Request failed with status code 500: Traceback ... 10.0.0.7"), "Ray"),
    ],
)
def test_a_problem_says_who_does_not_answer_and_nothing_that_is_not_for_everybody(error: Exception, who: str) -> None:
    problem = problem_of(error)
    assert problem == f"jobs cannot be handed to Ray: {who} does not answer as it should ({type(error).__name__})", (
        problem
    )


def test_what_nodes_do_not_share_is_told_in_its_own_words() -> None:
    problem = problem_of(BadInput("this Ray has 2 nodes, and store is 'stack.db'"))
    assert problem == "jobs cannot be handed to Ray: this Ray has 2 nodes, and store is 'stack.db'"
