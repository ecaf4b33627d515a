"""A server on a real socket over a real store, and an engine of a few lines behind the Engine protocol.

The engine continues every prompt with the same sequence of tokens, from a place that prompt and seed choose, so that answers are known,
and it can be told to fail, wait or stop at any event, which a real one cannot.
"""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn

from model_store.store import Store
from quantizers.errors import PrecisError
from server.app import create_app
from server.engine.interface import (
    Finished,
    MemoryInfo,
    Request,
    ResidentInfo,
    Started,
    StepStats,
    Token,
    TokenLogprob,
    VariantKey,
    VariantSpec,
)
from server.jobs import JobRunner
from server.settings import Settings
from server.text.tokenizer import Tokenizer

SCRIPT = "The quick brown fox — «über» 鳥が飛ぶ 👩‍🚀🎉 e\u0301a\u0308 jumps.\n\tfinally() { return 42; } "
CONTEXT = 256
VOCABULARY = 49152
SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass
class ScriptedEngine:
    """See above. `events` are the token ids that follow one another; `seen` and `closed` tell what was asked and what was ended."""

    script: list[int]
    resident: dict[VariantKey, ResidentInfo] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)
    specs: list[VariantSpec] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)  # requests whose iterator was closed before its end
    refuse: PrecisError | None = None  # raised instead of Started
    fail_after: int | None = None  # tokens, then `failure`
    failure: Exception = field(default_factory=lambda: PrecisError("the engine broke"))
    token_seconds: float = 0.0
    start_seconds: float = 0.0
    eos_after: int | None = None  # tokens, unless ignore_eos
    likelihood: dict[int | None, float] = field(default_factory=dict)  # seed -> log-probability of every token, else -1
    begin_at: int | None = None  # where in the script every answer begins, else as above
    at_once: int = 0
    most_at_once: int = 0
    alive: bool = True
    restarts: int = 0

    async def start(self) -> None: ...

    async def stop(self, grace_seconds: float) -> None: ...

    def start_of(self, request: Request) -> int:
        if self.begin_at is not None:
            return self.begin_at
        return (sum(request.prompt_token_ids) + (request.sampling.seed or 0)) % len(self.script)

    async def generate(self, request: Request) -> AsyncGenerator[Started | Token | Finished, None]:
        self.seen.append(request)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        ended = False
        try:
            await asyncio.sleep(self.start_seconds)
            if self.refuse is not None:
                raise self.refuse
            yield self._started(request)
            sampling, at, count = request.sampling, self.start_of(request), 0
            reason = "length"
            while count < sampling.max_tokens:
                if self.fail_after == count:
                    raise self.failure
                if self.eos_after == count and not sampling.ignore_eos:
                    reason = "stop"
                    break
                await asyncio.sleep(self.token_seconds)
                token_id = self.script[(at + count) % len(self.script)]
                value = self.likelihood.get(sampling.seed, -1.0)
                logprob = None if sampling.logprobs is None else self._logprob(token_id, sampling.logprobs, value)
                yield Token(token_id=token_id, logprob=logprob)
                count += 1
            ended = True
            yield Finished(reason=reason, prompt_tokens=len(request.prompt_token_ids), cached_tokens=1, completion_tokens=count)
        finally:
            self.at_once -= 1
            if not ended:
                self.closed.append(request.id)

    def _started(self, request: Request) -> Started:
        top, logprobs = request.sampling.prompt_logprobs, None
        if top is not None:
            logprobs = (None, *(self._logprob(token_id, top) for token_id in request.prompt_token_ids[1:]))
        return Started(prompt_tokens=len(request.prompt_token_ids), prompt_logprobs=logprobs)

    def _logprob(self, token_id: int, top: int, value: float = -1.0) -> TokenLogprob:
        best = tuple((other, value - rank) for rank, other in enumerate([token_id, *range(100, 120)][:top]))
        return TokenLogprob(token_id=token_id, logprob=value, top=best)

    async def load(self, spec: VariantSpec) -> ResidentInfo:
        self.specs.append(spec)
        await asyncio.sleep(0.01)
        self.resident[spec.key] = ResidentInfo(
            key=spec.key,
            device="cpu",
            max_model_len=CONTEXT,
            vocab_size=VOCABULARY,
            dtype="bf16",
            kv_dtype="bf16",
            kernels={"reference": 210},
            predicted_bytes=1000,
            bytes={"weights": 700, "shared_weights": 200, "kv_cache": 90, "workspace": 10},
            bytes_by_dtype={"bf16": 1000},
            load_seconds=0.01,
        )
        return self.resident[spec.key]

    async def unload(self, key: VariantKey) -> None:
        del self.resident[key]

    def residents(self) -> dict[VariantKey, ResidentInfo]:
        return dict(self.resident)

    def stats(self) -> StepStats | None:
        if not self.resident:
            return None
        names = [str(key) for key in self.resident]
        memory = MemoryInfo(
            device="cpu",
            total_bytes=8000,
            used_bytes=3000,
            free_bytes=5000,
            budget_bytes=4000,
            reserved_bytes=1000,
            shared_bytes=200,
            residents=tuple(self.resident.values()),
        )
        return StepStats(running=dict.fromkeys(names, 1), waiting={}, kv_cache_usage=dict.fromkeys(names, 0.5), memory=memory)


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    engine: ScriptedEngine
    store: Store
    tokenizer: Tokenizer
    openai: openai.OpenAI
    http: httpx2.Client

    def script_text(self, prompt: str, count: int, seed: int = 0) -> str:
        """What the engine continues `prompt` with, decoded at once: the text that every way of asking must give."""
        at = sum(self.tokenizer.encode_now(prompt)) + seed
        return self.tokenizer.decode([self.engine.script[(at + step) % len(self.engine.script)] for step in range(count)])

    def wait_for(self, fact: Callable[[], Any], seconds: float = 3.0) -> None:
        """Until `fact` is true; the test fails where it does not become so."""
        deadline = time.monotonic() + seconds
        while not fact():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)


@pytest.fixture(scope="session")
def demo_store(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that holds the demo checkpoint under the name `demo`."""
    with Store(tmp_path_factory.mktemp("data")) as store:
        store.checkpoints.import_folder("demo", demo)
        yield store


@pytest.fixture(scope="session")
def demo_tokenizer(demo: Path) -> Tokenizer:
    return Tokenizer(demo)


@pytest.fixture(scope="session")
def tiny(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the demo's family and tokenizer with one narrow layer: a few megabytes, random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    config = AutoConfig.from_pretrained(demo)
    for name, value in {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}.items():
        setattr(config, name, value)
    config.num_key_value_heads, config.head_dim = 1, 32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in SMALL_FILES:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes((demo / name).read_bytes())
    config.save_pretrained(folder)
    return folder


Serve = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def serve(demo_store: Store, demo_tokenizer: Tokenizer) -> Serve:
    """`with serve(allow_hub=True) as server:` runs one with these settings."""

    @contextmanager
    def run(*, preload: Sequence[str] = (), **settings: Any) -> Iterator[Running]:
        chosen = Settings(data_dir=demo_store.data_dir, **settings)
        engine = ScriptedEngine(demo_tokenizer.encode_now(SCRIPT))
        app = create_app(chosen, demo_store, engine, JobRunner(chosen, demo_store), preload=preload)
        # With its protocol named: asyncio turns off Nagle only on such sockets, and 40 ms of delay an answer would hide everything else.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.005)
            with httpx2.Client(base_url=url, timeout=20) as http:
                yield Running(url, engine, demo_store, demo_tokenizer, client, http)
        finally:
            client.close()
            server.should_exit = True
            thread.join(10)
            listener.close()

    return run


@pytest.fixture(scope="session")
def shared_server(serve: Serve) -> Iterator[Running]:
    with serve() as running:
        yield running


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    """The server with the usual settings, its engine as new."""
    engine, fresh = shared_server.engine, ScriptedEngine(shared_server.engine.script)
    engine.__dict__.update(fresh.__dict__)
    return shared_server
