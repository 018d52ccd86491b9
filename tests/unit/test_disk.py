"""Room on local disks."""

import errno
import os
from pathlib import Path

import pytest

from stack.disk import require_room, telling_full
from stack.errors import StorageFull


def test_a_disk_without_room_is_told_with_what_is_needed(tmp_path: Path) -> None:
    require_room(tmp_path / "new" / "folder", 1, "the disk")
    with pytest.raises(StorageFull, match=f"the disk has .* bytes left, and {2**60} are needed"):
        require_room(tmp_path, 2**60, "the disk")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_told_so(number: int) -> None:
    with pytest.raises(StorageFull, match="the disk is full"), telling_full("the disk"):
        raise OSError(number, os.strerror(number))


def test_other_errors_of_a_disk_are_not_taken_for_a_full_one() -> None:
    with pytest.raises(PermissionError), telling_full("the disk"):
        raise PermissionError(errno.EACCES, "no")
