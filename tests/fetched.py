"""What only some tests need and is fetched for them, by its hash, where that can be done."""

from pathlib import Path

import pytest

from scripts.prepare import DownloadFailed
from scripts.prepare_for_tests import prepared


def fetched(name: str) -> Path:
    """The folder of what scripts/prepare_for_tests.py knows by this name.

    A test that asks for it is skipped where the network is not there, and for no other reason.
    """
    try:
        return prepared(name)
    except DownloadFailed as error:
        if "could not be downloaded" not in str(error):
            raise
        pytest.skip(str(error))
