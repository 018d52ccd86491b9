"""Whether Ray is to be left alone on this host: python clusters/is_up.py HEAD

local.yaml asks that on a worker before it starts Ray there. A head that was started again does not know on which hosts
it had started Ray, as Ray keeps that in its folder in /tmp, and starts it on all of them: those serve meanwhile, and
are to go on. So Ray is left alone that is a node of the head at HEAD, started after the code and the secrets came here.
Exits with 0 then, and with another status where that is not so or cannot be told.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

PORT = 6379
SECONDS = 60  # for the head to answer
# What `ray up` does not bring.
MADE_HERE = {".venv", "__pycache__"}


def main(head: str) -> int:
    for raylet in raylets():
        node = dict(word.partition("=")[::2] for word in raylet.cmdline()).get("--node_id", "")
        changed = max(map(changed_at, brought()))
        if changed < raylet.create_time() and node in nodes_of(head):
            print(f"Ray runs here as a node of {head}, and is left alone")
            return 0
    return 1


def raylets() -> Iterator[psutil.Process]:
    """Ray's own processes on this host, of which a node has one."""
    for process in psutil.process_iter(["name", "username"]):
        if process.info["name"] == "raylet" and process.info["username"] == psutil.Process().username():
            yield process


def brought() -> Iterator[Path]:
    """The files that `ray up` brings to a host."""
    for folder in (Path(__file__).resolve().parents[1], Path.home() / "secrets"):
        for top in folder.iterdir():
            if top.name not in MADE_HERE and not top.name.endswith(".egg-info"):
                yield from (file for file in [top, *top.rglob("*")] if file.is_file() and file.suffix != ".pyc")


def changed_at(file: Path) -> float:
    """When a file came here as it is: the time in it is that of the one that was copied."""
    return file.stat().st_ctime


def nodes_of(head: str) -> set[str]:
    """The nodes that a head counts among its own. Raises RpcError if it does not answer."""
    # `ray list nodes` asks the dashboard, which is on the head's loopback.
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

    nodes = GcsClient(address=f"{head}:{PORT}").get_all_node_info(timeout=SECONDS)
    return {node.hex() for node, known in nodes.items() if known.state == GcsNodeInfo.ALIVE}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
