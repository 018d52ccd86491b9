"""The README's examples, run as they stand, in their order."""

import re
import sys
from pathlib import Path

import httpx
import pytest

from tests.running_stack import Stack, ended

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"^```(bash|python)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def outputs(stack: Stack) -> list[str]:
    """What each example prints."""
    printed = []
    for language, code in EXAMPLES:
        code = code.replace("http://127.0.0.1:8321", stack.url)
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = stack.run(*command)
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        printed.append(done.stdout)
    return printed


def test_both_doors_answer_by_curl_and_by_client(outputs: list[str]) -> None:
    assert len(outputs) == 7
    for output in outputs[:4]:
        assert "Paris" in output


def test_the_data_set_is_registered_and_the_job_accepted(client: httpx.Client, outputs: list[str]) -> None:
    assert '"rows":4' in outputs[4]
    assert '"job_uuid":"my-tune"' in outputs[5]
    assert ended(client, "post_training", "my-tune")["status"] == "completed"


def test_the_jobs_by_file_are_completed(client: httpx.Client, outputs: list[str]) -> None:
    assert '"status":"completed"' in outputs[6]
    assert ended(client, "post_training", "example-tune")["status"] == "completed"
