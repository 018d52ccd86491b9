"""A language model as a Serve deployment: vLLM behind ray.serve.llm, with adapters loaded at their first request.

This is the one file that imports modules which Ray does not document as public: adapters that are not in a cloud bucket
need a LoraModelLoader of our own, and ray.serve.llm exports neither that class nor what it returns; the engine's errors
are of a class of which ray.serve.llm exports only a subclass; and on CPU its engine takes no executor but that of
several processes.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ray.llm._internal.common.models import global_id_manager
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.llm._internal.serve.utils.lora_serve_utils import LoraModelLoader
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, LoraConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm.exceptions import VLLMClientError

from serve_apps import placement
from serve_apps.grammar_guard import GrammarGuard
from serve_apps.prefix_router import PrefixRouter
from serve_apps.replica_ports import listen_inside
from stack import engines
from stack.api.wire import Wire, describe
from stack.artifacts import Artifacts
from stack.channel import Sender, Target
from stack.config import LanguageModel, artifacts_url, home
from stack.errors import BadInput, StackError
from stack.models import Ended, Endpoint, Failure
from stack.post_training import adapter_of_model, linear_modules

listen_inside()


def build(args: dict[str, Any]) -> Application:
    """The application of one model: its entry in the config, and where its adapters lie."""
    return application_of(args, LLM, engine_cls=LocalEngine)


def application_of(args: dict[str, Any], server: type["LLM"], **options: Any) -> Application:
    """The application of one model that this class serves, which takes these options besides."""
    try:
        application = ModelApplication.model_validate(args)
    except ValidationError as error:
        raise BadInput(f"args of a model's application: {describe(error)}") from error
    loader = partial(AdapterLoader, artifacts_url(application.artifacts))
    return build_llm_deployment(
        engine_config(application.model), deployment_cls=server, bind_kwargs=dict(options, model_downloader=loader)
    )


class ModelApplication(Wire):
    """The args of a model's application."""

    model: LanguageModel
    artifacts: str = "artifacts"


def engine_config(model: LanguageModel) -> LLMConfig:
    """How ray.serve.llm sets up the engines of a model. Of that, nothing is read yet but the names of its layers."""
    return LLMConfig(
        model_loading_config=dict(model_id=model.id, model_source=str(model.folder)),
        accelerator_type=model.accelerator_type,
        placement_group_config=dict(bundles=engines.bundles(model), strategy=engines.strategy(model)),
        engine_kwargs=_engine_arguments(model),
        lora_config=LoraConfig(max_num_adapters_per_replica=model.adapters) if model.adapters else None,
        runtime_env=dict(env_vars=engines.environment(model)),
        deployment_config=_deployment(model),
        # Answers go out as they come: whoever sends them puts together what is ready at once.
        experimental_configs=dict(stream_batching_interval_ms=0),
    )


def _engine_arguments(model: LanguageModel) -> dict[str, Any]:
    """vLLM's arguments."""
    arguments = dict(
        # Weights in files that can hold code are not read.
        dict(load_format="safetensors") | model.engine,
        dtype=model.dtype,
        max_model_len=model.context,
        tensor_parallel_size=model.tensor_parallel,
        pipeline_parallel_size=model.pipeline_parallel,
        # Only the gateway asks, and no field of its requests sets a template.
        trust_request_chat_template=True,
        # A small model would fill JSON with blanks until the token limit. vLLM has this for named backends only.
        structured_outputs_config=dict(backend="xgrammar", disable_any_whitespace=True)
        | model.engine.get("structured_outputs_config", {}),
    )
    if not model.gpus:
        # Where a prompt with a `seed` is read in parts, vLLM sets back its random numbers, of which the engine dies on
        # CPU: torch's generator has no offset there (vllm/v1/worker/gpu_model_runner.py, `_bookkeeping_sync`).
        arguments.setdefault("enable_chunked_prefill", False)
    if model.quantization:
        arguments["quantization"] = model.quantization
    if model.adapters:
        rank = _supported_rank(model.adapter_rank)
        arguments |= dict(enable_lora=True, max_loras=model.adapters, max_lora_rank=rank)
        # No adapter is one of the output layer. Were it open to them, vLLM would die of the logprobs of a prompt.
        if modules := linear_modules(model):
            arguments.setdefault("lora_target_modules", sorted(modules))
    return arguments


def _deployment(model: LanguageModel) -> dict[str, Any]:
    """Ray Serve's options of the deployment: how many replicas, and how many requests of each."""
    options: dict[str, Any] = dict(
        ray_actor_options=dict(num_cpus=0),  # its bundles say on which nodes: `get_deployment_options`
        max_ongoing_requests=model.max_ongoing_requests,
        max_queued_requests=model.max_queued_requests,
        # A replica that is stopped, as there are too many or its model is removed, first ends the requests that it has.
        graceful_shutdown_timeout_s=model.request_timeout_s,
    )
    if model.min_replicas == model.most_replicas:
        options["num_replicas"] = model.min_replicas
    else:
        options["autoscaling_config"] = dict(
            min_replicas=model.min_replicas,
            max_replicas=model.most_replicas,
            target_ongoing_requests=model.target_ongoing_requests,
            upscale_delay_s=model.upscale_delay_s,
            downscale_delay_s=model.downscale_delay_s,
        )
    if model.prefix_routing:
        slack = max(1, model.target_ongoing_requests // 2)
        options["request_router_config"] = RequestRouterConfig(
            request_router_class=PrefixRouter,  # type: ignore[arg-type]
            request_router_kwargs=dict(slack=slack),
        )
    return options


class LLM(LLMServer):
    """ray.serve.llm's server, asked with dicts and answering with bytes, so that no caller has to import vLLM."""

    async def __init__(self, llm_config: LLMConfig, **options: Any) -> None:  # type: ignore[misc]  # as its base has it
        self._sender = Sender()
        self._guard = GrammarGuard(Path(llm_config.model_loading_config.model_source))
        await super().__init__(llm_config, **options)
        # It takes seconds, for which the first request with a constraint would have to wait.
        await self._guard.start()

    @classmethod
    def get_deployment_options(cls, llm_config: LLMConfig) -> dict[str, Any]:
        return placement.of_bundles(super().get_deployment_options(llm_config))

    @classmethod
    async def here(cls, model: LanguageModel, artifacts: str) -> "LLM":
        """A server in this process, whose engine has started: for a job that has an engine of its own.

        `artifacts` is the address at which adapters lie. Raises RuntimeError and TimeoutError where the engine does not
        start, and ValueError for arguments that it does not take.
        """
        server = cls.__new__(cls)
        # As Ray Serve does it. Called itself, the class would give back what is to be awaited, which Python refuses.
        await server.__init__(engine_config(model), engine_cls=LocalEngine)  # type: ignore[misc]
        server._adapters = AdapterLoader(artifacts)
        return server

    def close(self) -> None:
        """Ends the process that tries grammars, of a server `here` whose engine has died."""
        self._guard.close()

    async def load_adapter(self, id: str) -> None:
        """Loads the adapter `base:job_uuid`, as Ray Serve's multiplexing does in its replicas. To be called once.

        Raises BadInput where the engine does not take it, and what the artifacts raise.
        """
        found = await self._adapters.load_model_from_config(id, self._llm_config)
        try:
            await self.engine.resolve_lora(found)
        except ValueError as error:
            raise BadInput(str(error), param="model") from error

    async def answer(self, endpoint: Endpoint, body: dict[str, Any]) -> bytes | Failure:
        """The whole answer to an OpenAI request, or why it is refused."""
        async with aclosing(self._items(endpoint, body)) as items:
            async for item in items:
                return item
        return Failure(500, "the engine gave no answer")

    async def stream(self, endpoint: Endpoint, body: dict[str, Any], target: Target) -> Ended:
        """Sends the events of an OpenAI request's answer to whoever asked, as the engine has them, until their end."""
        sent = 0
        outlet = await self._sender.open(target)
        async with aclosing(self._items(endpoint, body)) as items:
            async for item in items:
                if isinstance(item, Failure):
                    return Ended(sent, item)
                await outlet.send(item)
                sent += len(item)
        return Ended(sent)

    async def _items(self, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes | Failure]:
        try:
            self._require_no_logprobs_of_prompts(body)
            await self._guard.check_body(body)
            request = _REQUESTS[endpoint].validate_python(body)
            answers = await (self.chat(request) if endpoint == "chat" else self.completions(request))
        except ValidationError as error:
            yield Failure(400, describe(error))
            return
        except (VLLMClientError, ValueError) as error:  # the latter for a picture that cannot be decoded, for one
            yield Failure(400, str(error))
            return
        except StackError as error:
            yield Failure(error.status, error.message, error.param)
            return
        async with aclosing(answers):
            async for answer in answers:
                for item in _as_items(answer):
                    yield item

    def _require_no_logprobs_of_prompts(self, body: dict[str, Any]) -> None:
        """Raises BadInput for logprobs of a prompt where adapters of any layer are served: vLLM's engine dies of them.

        So it is where the names of the layers are not known (_engine_arguments).
        """
        has_any = self._llm_config.lora_config is not None
        if not has_any or self._llm_config.engine_kwargs.get("lora_target_modules"):
            return
        if body.get("prompt_logprobs") is not None or (body.get("echo") and body.get("logprobs") is not None):
            raise BadInput(
                "the logprobs of a prompt (echo with logprobs) cannot be had of a model that serves adapters; leave "
                "out one of the two, or serve the model with adapters: 0",
                param="echo",
            )


class LocalEngine(VLLMEngine):  # type: ignore[misc]  # Ray does not type it
    """vLLM's engine. On CPU a worker that is alone works in the engine's own process.

    As a process of its own it would keep a second core busy, on which the engine does nothing but look whether the
    worker is done; and there is more to do on a machine that serves and trains.
    """

    def __init__(self, llm_config: LLMConfig) -> None:
        super().__init__(llm_config)
        self._loading = asyncio.Lock()

    async def resolve_lora(self, disk_lora_model: DiskMultiplexConfig) -> None:
        # vLLM refuses to load what it has: of the first requests, which come together, all but one would fail.
        async with self._loading:
            await super().resolve_lora(disk_lora_model)

    def _start_async_llm_engine(self, arguments: Any, config: Any, placement_group: Any) -> Any:
        if config.device_config.device_type == "cpu" and config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = "uni"
            # Ray gives its workers as many threads as they reserve CPUs. One core is left for everything else.
            os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) - 1))
        return super()._start_async_llm_engine(arguments, config, placement_group)


_REQUESTS: dict[Endpoint, TypeAdapter[Any]] = {
    "chat": TypeAdapter(ChatCompletionRequest),
    "completions": TypeAdapter(CompletionRequest),
}


def _as_items(answer: Any) -> list[bytes | Failure]:
    """An answer of ray.serve.llm (server-sent events in a list, a response or an error object) as we send it on."""
    if isinstance(answer, list):
        if all(isinstance(event, str) for event in answer):
            return ["".join(answer).encode()]
        return [item for one in answer for item in _as_items(one)]
    if isinstance(answer, str):
        return [answer.encode()]
    if isinstance(answer, ErrorResponse):
        return [Failure(answer.error.code, answer.error.message, answer.error.param)]
    return [answer.model_dump_json().encode()]


class AdapterLoader(LoraModelLoader):  # type: ignore[misc]  # Ray does not type it
    """Finds the adapter `base:job_uuid` among the artifacts. Serve keeps those used last and forgets the others."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(**options)
        self._artifacts = Artifacts(url, cache=home() / "cache")

    async def load_model_from_config(self, lora_model_id: str, llm_config: LLMConfig) -> DiskMultiplexConfig:
        artifact = adapter_of_model(llm_config.model_id, lora_model_id)
        folder = await asyncio.to_thread(self._artifacts.local, artifact)
        return DiskMultiplexConfig(
            model_id=lora_model_id,
            max_total_tokens=None,
            local_path=str(folder),
            lora_assigned_int_id=global_id_manager.next(),
        )


def _supported_rank(rank: int) -> int:
    """vLLM takes only certain greatest ranks: the next one that holds `rank`."""
    return next(supported for supported in (8, 16, 32, 64, 128, 256, 320, 512) if supported >= rank)
