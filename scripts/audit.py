"""Asks PyPI's advisories about every pinned package, by pip-audit: python -m scripts.audit

Ends with 0 where none is known to be vulnerable, with 1 where one is, and with 3 where the advisories of any of them
could not be read: then nothing is known of it. pip-audit itself takes that for well.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stack.config import ROOT

LOCKS = (ROOT / "scripts" / "constraints.txt", ROOT / "scripts" / "constraints-gpu.txt")
NOT_DONE = 3
# Advisories that do not concern us, by their ids, with the reason.
ACCEPTED: dict[str, str] = {}


@dataclass(frozen=True)
class Findings:
    """What is known: of how many packages the advisories were read, of which they were not, and what was found."""

    read: int
    unread: list[str]
    vulnerable: list[str]


def pins(locks: Iterable[Path] = LOCKS) -> list[str]:
    """Every pinned package, once for each of its versions: lines of `name==version`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {one.split("#")[0].strip() for one in project["dependencies"] if one.startswith("torch==")}
    for lock in locks:
        found |= {line.split(";")[0].strip() for line in lock.read_text().splitlines() if "==" in line[:80]}
    return sorted(one for one in found if not one.startswith("#"))


def batches(pinned: Iterable[str]) -> list[list[str]]:
    """The same such that no list has two versions of a package: pip-audit takes one of each."""
    found: list[dict[str, str]] = []
    for one in pinned:
        name = one.partition("==")[0]
        free = next((batch for batch in found if name not in batch), None)
        if free is None:
            found.append(free := {})
        free[name] = one
    return [list(batch.values()) for batch in found]


def asked(pinned: list[str]) -> str:
    """pip-audit's answer about packages, as JSON; empty where it has none."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pinned))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--requirement", file.name, "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def findings(pinned: list[str], answer: str) -> Findings:
    """What an answer says of packages. What it does not name was not asked about."""
    try:
        dependencies = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        dependencies = []
    read = {one["name"]: one for one in dependencies if "skip_reason" not in one}
    unread = [one for one in pinned if one.partition("==")[0] not in read]
    vulnerable = [
        f"{name} {one['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'no version yet'}"
        for name, one in read.items()
        for found in one["vulns"]
        if not {found["id"], *found["aliases"]} & ACCEPTED.keys()
    ]
    return Findings(len(read), unread, vulnerable)


def main() -> int:
    all_found = [findings(batch, asked(batch)) for batch in batches(pins())]
    unread = [one for found in all_found for one in found.unread]
    vulnerable = [one for found in all_found for one in found.vulnerable]
    read = sum(found.read for found in all_found)
    for one in vulnerable:
        print(f"audit: {one}", file=sys.stderr)
    if unread:
        told = ", ".join(unread[:5]) + (", …" if len(unread) > 5 else "")
        print(f"audit: NOT DONE for {len(unread)} of {read + len(unread)} packages, as PyPI's advisories could not be "
              f"read: {told}", file=sys.stderr)  # fmt: skip
    if not unread and not vulnerable:
        print(f"audit: no advisory of {read} packages concerns the versions that are pinned")
    return 1 if vulnerable else NOT_DONE if unread else 0


if __name__ == "__main__":
    sys.exit(main())
