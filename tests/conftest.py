"""What tests share: tiny random models, and one real vLLM engine per session.

Nothing heavy is imported before a test asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from asyncrl.host.processes import shorten_name_lookups

if TYPE_CHECKING:
    import psutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
shorten_name_lookups()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A script that starts the tests in the background has it ignored, and the daemons would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take long: workers that share the suite begin with them, so that none is left with one at the end.
LONGEST_FIRST = (
    "trainer/ranks",
    "e2e",
    "benchmarks",
    "simulation",
    "faults",
    "generator",
    "trainer",
    "rewards",
    "weights",
    ".",
)

VOCAB_SIZE = 100  # not a multiple of 64: vLLM pads the embedding, and padding must not matter
END_TOKEN = 1
MAX_LENGTH = 192


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of LONGEST_FIRST; the tests of each, and the other files, as they were collected."""
    root = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        folder = item.path.parent.relative_to(root).as_posix() + "/"
        return next((i for i, name in enumerate(LONGEST_FIRST) if folder.startswith(name + "/")), len(LONGEST_FIRST))

    items.sort(key=place)


def make_tiny_model(folder: Path, *, tied: bool, seed: int = 0) -> Path:
    """A random Qwen2 (tied) or Llama (untied) model of some 100,000 parameters with a character tokenizer.

    Weights are large enough that its distributions are far from uniform: stale weights show.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    config_class, model_class = (Qwen2Config, Qwen2ForCausalLM) if tied else (LlamaConfig, LlamaForCausalLM)
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=END_TOKEN,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = model_class(config).float()
    randomize(model, seed)
    model.save_pretrained(folder)
    tokens = ["<pad>", "<end>"] + [chr(33 + i) for i in range(VOCAB_SIZE - 2)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return folder


def randomize(model: Any, seed: int) -> None:
    """New weights in place; equal seeds give equal weights."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.copy_(mean + 0.15 * torch.randn(parameter.shape, generator=generator))


def reference_logprobs(model: Any, token_ids: list[int], temperature: float = 1.0) -> Any:
    """Log-probs of tokens 1.. given those before, by transformers in one full forward pass: float32 [L-1]."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1].double() / temperature
    chosen = torch.tensor(token_ids[1:])[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0].float().numpy()


@dataclass
class EngineUnderTest:
    """A real engine, the loop it lives in, and a learner's model beside it.

    has_begun tells whether a request is inside the engine, beyond our own queue. processes gives the engine's own.
    """

    engine: Any
    model: Any
    runner: asyncio.Runner
    has_begun: Callable[[], bool]
    processes: Callable[[], list[psutil.Process]]
    num_workers: int = 1
    next_version: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def healthy(self) -> EngineUnderTest:
        """Itself, with a sync first if a test has left it without a version."""
        if self.engine.version is None:
            self.run(self.sync())
        return self

    async def until_begun(self) -> None:
        """Returns once a request is inside the engine."""
        while not self.has_begun():
            await asyncio.sleep(0.001)

    async def open_channel(self, version: int, timeout_s: float = 20.0) -> Any:
        """A weight channel with the learner's end in this process and the engine's workers as its other members."""
        from asyncrl.link.weight_records import ChannelSpec
        from asyncrl.weights.channels.channel import WeightChannel

        spec = ChannelSpec("127.0.0.1", 0, f"test/{version}", 0, 1 + self.num_workers, "gloo", timeout_s)
        channel = WeightChannel.host(spec)
        root = asyncio.create_task(asyncio.to_thread(channel.join))
        await self.engine.join_channel(channel.spec.for_rank(1), timeout_s)
        await root
        return channel

    async def stage(self, *, only: Any = None, tamper: Any = None, buffer: Any = None) -> int:
        """Stage the model's weights as the next version, or those of `buffer`, a SnapshotBuffer.

        `tamper` may change the manifest on its way.
        """
        from asyncrl.weights.bytes.snapshot import SnapshotBuffer

        version, self.next_version = self.next_version, self.next_version + 1
        if buffer is None:
            named = [(n, p) for n, p in self.model.named_parameters(remove_duplicate=False) if not only or only(n)]
            buffer = SnapshotBuffer(named, bucket_bytes=64 * 1024)
        buffer.snapshot()
        manifest = buffer.manifest(version)
        channel = await self.open_channel(version)
        sender = threading.Thread(target=_send, args=(channel, buffer), daemon=True)
        sender.start()
        try:
            await self.engine.stage_weights(tamper(manifest) if tamper else manifest, 20.0)
        finally:
            await asyncio.to_thread(channel.close)
            sender.join(5.0)
        return version

    async def stage_next(self, seed: int) -> int:
        """Stage new random weights; the model has them at once, the engine after a swap."""
        randomize(self.model, seed)
        return await self.stage()

    async def sync(self, buffer: Any = None) -> int:
        """A weight sync: afterwards the engine samples from the model's weights, or from those of `buffer`."""
        version = await self.stage(buffer=buffer)
        self.notes["swap"] = await self.engine.swap_weights(version, 20.0)
        self.notes["check"] = await self.engine.check_weights(version, 20.0)
        assert not any(found.differing or found.not_compared for found in self.notes["check"].in_use)
        return version

    async def generate(self, prompt: list[int], **changes: Any) -> Any:
        """Completions of one prompt."""
        from asyncrl.generator.engines.base import GenerationRequest

        self.notes["requests"] = self.notes.get("requests", 0) + 1
        values = {"num_rollouts": 2, "max_new_tokens": 8, "temperature": 1.0, "seeds": None} | changes
        values.setdefault("request_id", f"request-{self.notes['requests']}")
        return await self.engine.generate(GenerationRequest(prompt_token_ids=prompt, **values))


def _send(channel: Any, buffer: Any) -> None:
    from asyncrl.errors import ChannelError

    with contextlib.suppress(ChannelError):  # the test looks at the receiving end
        channel.broadcast(list(buffer.buckets()), 20.0)


@pytest.fixture(scope="session")
def tied_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True)


@pytest.fixture(scope="session")
def untied_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "untied", tied=False)


def start_engine(
    model_dir: Path,
    log_path: Path,
    *,
    tensor_parallel_size: int = 1,
    worker_extension: str | None = None,
    fits_context: bool = False,
) -> EngineUnderTest:
    """A started vLLM engine without weights; `worker_extension` puts another class into its workers."""
    import torch
    from transformers import AutoModelForCausalLM

    from asyncrl.generator.engines.vllm.engine import VLLMEngine
    from asyncrl.generator.engines.vllm.options import EngineOptions

    runner = asyncio.Runner()
    options = EngineOptions(
        str(model_dir),
        max_model_len=MAX_LENGTH,
        fits_context=fits_context,
        max_sequences=16,
        tensor_parallel_size=tensor_parallel_size,
        kv_cache_bytes=64 * 2**20,
        device=os.environ.get("ASYNCRL_TEST_DEVICE", "cpu"),  # set by benchmarks.gpu.check
        log_path=str(log_path),
        start_timeout_s=240.0,
    )
    engine = VLLMEngine(options, worker_extension=worker_extension)
    runner.run(engine.start())
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def has_begun() -> bool:
        return bool(engine._llm.output_processor.has_unfinished_requests())

    def processes() -> list[psutil.Process]:
        import psutil

        manager = engine._llm.engine_core.resources.engine_manager
        return [psutil.Process(process.pid) for process in manager.processes]

    return EngineUnderTest(engine, model, runner, has_begun, processes, num_workers=tensor_parallel_size)


@pytest.fixture(scope="session")
def tied_engine(tied_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The session's engine (tied embeddings). It starts without a version: call `sync` first."""
    under_test = start_engine(tied_model_dir, tmp_path_factory.mktemp("engine") / "vllm.log")
    yield under_test
    under_test.run(under_test.engine.close())
    under_test.runner.close()


@pytest.fixture
def engine(tied_engine: EngineUnderTest) -> EngineUnderTest:
    """The session's engine, healthy and at its newest weights, whatever the test before did."""
    return tied_engine.healthy()


@pytest.fixture
def untied_engine(untied_model_dir: Path, tmp_path: Path) -> Any:
    """An engine of its own, for a test that ends it."""
    under_test = start_engine(untied_model_dir, tmp_path / "vllm.log")
    yield under_test
    under_test.run(under_test.engine.close())
    under_test.runner.close()
