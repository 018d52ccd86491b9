"""What a model takes of GPUs, by formula: python -m scripts.sizing [FOLDER]

Without a folder it prints the tables of docs/sizing.md, which has the formulas with their sources; with the folder of a
model in the format of Hugging Face, what that one takes. All of it is arithmetic: nothing is measured or loaded.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GB = 1e9
# Of a GPU's memory what engines are given (`gpu_memory_utilization`), and what of that is for activations, CUDA's
# graphs and buffers of communication.
SHARE, OVERHEAD_GB = 0.9, 3.0
# The GPUs of one node that NVLink connects: more workers of one replica are a pipeline over nodes.
OF_A_NODE = 8
GPUS = {"L4": 24, "A100-40G": 40, "H100": 80, "H200": 141, "B200": 180}
# Bytes of a weight. Of 4 bits, groups of 128 have a scale of 16 bits.
PRECISIONS = {"bfloat16": 2.0, "fp8": 1.0, "4 bits": 0.5 + 2 / 128}
# Bytes of each parameter that is trained: its weight, its gradient and both moments of AdamW, all in float32.
TRAINED = 4 + 4 + 8


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind, by the words of its config.json."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False

    @classmethod
    def of(cls, folder: Path) -> "Shape":
        """The shape of a model's folder. Raises OSError and KeyError where it is of another kind."""
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            folder.resolve().name, config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"],
            heads, config.get("num_key_value_heads", heads),
            config.get("head_dim") or config["hidden_size"] // heads, config["vocab_size"],
            config.get("tie_word_embeddings", False),
        )  # fmt: skip

    @property
    def linear(self) -> list[tuple[int, int]]:
        """The inputs and outputs of a layer's linear modules: q, k, v, o and the three of the MLP."""
        of_queries, of_keys = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = [(self.hidden, of_queries), *[(self.hidden, of_keys)] * 2, (of_queries, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]

    @property
    def parameters(self) -> int:
        of_layer = sum(inputs * outputs for inputs, outputs in self.linear) + 2 * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * of_layer + self.hidden

    @property
    def kv_bytes(self) -> int:
        """Of one token, with keys and values in 16 bits."""
        return 2 * self.layers * self.kv_heads * self.head_size * 2

    def adapter_parameters(self, rank: int) -> int:
        """Of LoRA on all linear layers."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linear)


LLAMAS = (
    Shape("Llama-3.2-1B", 16, 2_048, 8_192, 32, 8, 64, 128_256, tied=True),
    Shape("Llama-3.2-3B", 28, 3_072, 8_192, 24, 8, 128, 128_256, tied=True),
    Shape("Llama-3.1-8B", 32, 4_096, 14_336, 32, 8, 128, 128_256),
    Shape("Llama-3.1-70B", 80, 8_192, 28_672, 64, 8, 128, 128_256),
    Shape("Llama-3.1-405B", 126, 16_384, 53_248, 128, 8, 128, 128_256),
)


def weights_gb(shape: Shape, precision: str) -> float:
    return shape.parameters * PRECISIONS[precision] / GB


def kv_tokens(shape: Shape, precision: str, gpu_gb: float, gpus: int) -> int:
    """How many tokens the KV cache of a replica holds; 0 where the weights do not fit."""
    room = gpus * (SHARE * gpu_gb - OVERHEAD_GB) - weights_gb(shape, precision)
    return max(0, int(room * GB / shape.kv_bytes))


def least_gpus(shape: Shape, precision: str, gpu_gb: float, context: int) -> int | None:
    """The fewest GPUs that hold a replica and one request of full length, of numbers that share its heads evenly.

    None where two nodes do not.
    """
    for gpus in (1, 2, 4, OF_A_NODE, 2 * OF_A_NODE):
        if kv_tokens(shape, precision, gpu_gb, gpus) >= context:
            return gpus
    return None


def training_gb(shape: Shape, method: str, rank: int = 16) -> float:
    """What a training keeps in the memory of all its GPUs together, without activations."""
    adapter = shape.adapter_parameters(rank) * TRAINED / GB
    return {
        "full": shape.parameters * TRAINED / GB,
        "lora": weights_gb(shape, "bfloat16") + adapter,
        "qlora": weights_gb(shape, "4 bits") + adapter,
    }[method]


def activations_gb(shape: Shape, tokens: int) -> float:
    """Of a pass over so many tokens, where layers are computed again on the way back: their inputs, in 16 bits."""
    return 2 * shape.layers * shape.hidden * tokens / GB


# The tables


def serving_table(context: int = 32_768) -> str:
    lines = [f"| model | weights | GB | a token's KV, KiB | {' | '.join(f'{n}, {gb} GB' for n, gb in GPUS.items())} |"]
    lines.append("| --- | --- | ---: | ---: |" + " ---: |" * len(GPUS))
    for shape in LLAMAS:
        for precision in PRECISIONS:
            cells = [_cell(shape, precision, gb, context) for gb in GPUS.values()]
            size = f"{weights_gb(shape, precision):.1f} | {shape.kv_bytes / 1024:g}"
            lines.append(f"| {shape.name} | {precision} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(shape: Shape, precision: str, gpu_gb: float, context: int) -> str:
    gpus = least_gpus(shape, precision, gpu_gb, context)
    if gpus is None:
        return "–"
    return f"{gpus} ({kv_tokens(shape, precision, gpu_gb, gpus) // 1_000:,}k)"


def training_table() -> str:
    lines = ["| model | lora, GB | qlora, GB | full, GB | full, by zero3 or fsdp: GPUs of 80 GB | activations, GB |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for shape in LLAMAS:
        full = training_gb(shape, "full")
        activations = activations_gb(shape, 4_096)
        least = math.ceil(full / (SHARE * GPUS["H100"] - OVERHEAD_GB - activations))
        numbers = f"{training_gb(shape, 'lora'):.0f} | {training_gb(shape, 'qlora'):.0f} | {full:,.0f}"
        lines.append(f"| {shape.name} | {numbers} | {least} | {activations:.1f} |")
    return "\n".join(lines)


# What was measured (docs/benchmarks.md, "Inference"): at 64 streams, CPU seconds of everything but the engine; and what
# one gateway passed on there of the 3,200 that were offered, with the 99th percentile of first tokens at 0.3 seconds.
# At 256 streams it passed on 9,030 of 12,800, but first tokens took up to 2.3 seconds: that is what it breaks at.
CPU_S_PER_1000_TOKENS = 0.34
TOKENS_PER_S_OF_A_GATEWAY = 2_900
# Of a Store's pool (stack/store/connection.py), of which each process has one: so many connections are kept when they
# were needed at once, and so many are open at most.
KEPT, MOST = 10, 30
# What Ray reserves for a session's actor (serve_apps/session_pool.py).
ACTOR_GB = 150 * 2**20 / GB


@dataclass(frozen=True)
class Jobs:
    """Those that run at once. Beside its driver, a job that asks models has a worker that asks, and while it reads a
    data set one that reads; a training has `workers` of its own."""

    asking: int = 8
    trainings: int = 8
    workers: int = 1


JOBS = Jobs()  # 16, as `max_running_jobs` of serve_apps/cluster.yaml


def connections(gateways: int, nodes: int, sessions: int, jobs: Jobs) -> tuple[int, int]:
    """How many connections the database has: as a rule, and at most.

    `nodes` are those on which sessions have actors, of which there are `sessions` with the `warm` ones. As a rule a
    gateway keeps what it needed at once; who asks one after the other has one connection, and a driver and the job
    supervisor have two, as two of their threads ask all the time. At most, each process has its whole pool.
    """
    engines = nodes if sessions else 0
    drivers = jobs.asking + jobs.trainings
    supervisor, writer, pool = 1, 1, 1
    serial = writer + pool + engines + sessions + 2 * jobs.asking + jobs.trainings * jobs.workers
    by_two = supervisor + drivers
    return KEPT * gateways + serial + 2 * by_two, MOST * (gateways + serial + by_two)


def gateways_for(tokens: float, nodes: int) -> int:
    """The fewest gateways, spread evenly, that pass on so many tokens a second when one node, or on a single node one
    of them, is lost. One alone is enough for what one can do on a single node."""
    needed = max(1, math.ceil(tokens / TOKENS_PER_S_OF_A_GATEWAY))
    if nodes == 1:
        return needed + 1 if needed > 1 else 1
    gateways = max(2, needed + 1)
    while gateways - math.ceil(gateways / nodes) < needed:
        gateways += 1
    return gateways


@dataclass(frozen=True)
class Growth:
    """What some GPUs need beside them; `connections` and `most_connections` as `connections` has them."""

    nodes: int
    tokens: float
    gateways: int
    gateways_per_node: int
    cores: int
    sessions_gb: float
    connections: int
    most_connections: int


def growth(gpus: int, tokens_per_gpu: float, sessions_per_gpu: float = 1, jobs: Jobs = JOBS) -> Growth:
    """What GPUs that give so many tokens a second each need, and that many sessions of agents with work at once."""
    tokens, nodes = gpus * tokens_per_gpu, math.ceil(gpus / OF_A_NODE)
    gateways = gateways_for(tokens, nodes)
    warm = 1
    sessions = math.ceil(gpus * sessions_per_gpu) + warm
    typical, most = connections(gateways, nodes, sessions, jobs)
    cores = math.ceil(tokens / 1_000 * CPU_S_PER_1000_TOKENS)
    per_node = math.ceil(gateways / nodes)
    return Growth(nodes, tokens, gateways, per_node, cores, sessions * ACTOR_GB, typical, most)


def growth_table(tokens_per_gpu: float = 1_000) -> str:
    lines = [
        "| GPUs | nodes of 8 | tokens/s | gateways | … on a node | cores beside engines | reserved for sessions, GB | "
        "connections to PostgreSQL | … at most |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for gpus in (1, 8, 64, 256, 1_000):
        found = growth(gpus, tokens_per_gpu)
        lines.append(
            f"| {gpus:,} | {found.nodes} | {found.tokens:,.0f} | {found.gateways} | {found.gateways_per_node} | "
            f"{found.cores} | {found.sessions_gb:,.1f} | {found.connections:,} | {found.most_connections:,} |"
        )
    return "\n".join(lines)


def told(shape: Shape, context: int) -> str:
    """What one model takes."""
    lines = [f"{shape.name}: {shape.parameters / GB:.2f} billion parameters, {shape.kv_bytes / 1024:g} KiB a token"]
    for precision in PRECISIONS:
        cells = ", ".join(f"{name}: {_cell(shape, precision, gb, context)}" for name, gb in GPUS.items())
        lines.append(f"  {precision}, {weights_gb(shape, precision):.1f} GB; GPUs (tokens of KV cache): {cells}")
    trained = [f"{method} {training_gb(shape, method):.1f} GB" for method in ("lora", "qlora", "full")]
    return "\n".join([*lines, f"  trained, of all workers together and without activations: {', '.join(trained)}"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.sizing", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a model's folder, with its config.json")
    parser.add_argument("--context", type=int, default=32_768, metavar="N", help="tokens of one request (32768)")
    arguments = parser.parse_args()
    if arguments.folder is None:
        print("\n\n".join((serving_table(arguments.context), training_table(), growth_table())))
        return 0
    try:
        print(told(Shape.of(arguments.folder), arguments.context))
    except (OSError, ValueError, KeyError) as error:
        print(
            f"sizing: {arguments.folder} has no config.json of a decoder of Llama's kind ({error!r})", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
