"""How vLLM is set up: the options of an engine, the environment it needs before its import, its arguments.

Nothing here imports vllm: the environment must be complete before the first import, and that takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncrl.errors import ModelError
from asyncrl.host.processes import nccl_environment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLUGIN = "asyncrl_weights"  # the name in pyproject.toml's entry points
SPARE_SEQUENCES = 8  # slots beyond max_sequences, so that canary and probe never wait for a rollout to end
MIN_BATCHED_TOKENS = 8192  # prompt tokens of one engine step; small prompts go together


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run one vLLM engine.

    kv_cache_bytes bounds the KV cache on CPUs; on GPUs gpu_memory_fraction does, unless kv_cache_bytes is set. threads
    are OpenMP threads of each worker. log_path takes all of vLLM's log; without it, errors alone go to stderr.
    """

    model_path: str
    dtype: str = "float32"
    max_model_len: int = 1024  # prompt plus completion, in tokens
    fits_context: bool = False  # whether max_model_len is known to lie within the context of the model
    max_sequences: int = 64
    tensor_parallel_size: int = 1
    kv_cache_bytes: int | None = 1 << 30
    gpu_memory_fraction: float = 0.85
    device: str = "cpu"
    enforce_eager: bool = True
    threads: int = 1
    log_path: str | None = None
    start_timeout_s: float = 600.0
    weights_timeout_s: float = 30.0  # of the forming of a weight channel
    weights_host: str = ""  # where weight channels meet
    fork: bool = True  # the engine from the daemon, where that is safe; False: never
    seed: int = 0  # of the engine's own random stream; two generators must not draw the same noise


def prepare_environment(options: EngineOptions) -> None:
    """Set what vLLM reads from the environment, before its first import and before its processes start."""
    values = {
        "VLLM_PLUGINS": PLUGIN,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO" if options.log_path else "ERROR",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(round(options.start_timeout_s)),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # a store that is gone is reported by us, in one line
        # vLLM opens sockets between its own processes; keep them off the network.
        "VLLM_HOST_IP": "127.0.0.1",
    }
    if options.fits_context:
        # The engine's own limit is one token above max_model_len, and so may be one above the model's context. No
        # token ever has that last position: the token after a full sequence is sampled, but not read again.
        values["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    if options.log_path:
        values["VLLM_LOGGING_CONFIG_PATH"] = str(_write_logging_config(Path(options.log_path)))
    if options.device == "cpu":
        values |= {
            "OMP_NUM_THREADS": str(options.threads),
            # An idle OpenMP thread that spins takes the core from the process beside it.
            "OMP_WAIT_POLICY": "PASSIVE",
            "VLLM_CPU_OMP_THREADS_BIND": worker_cpus(options, sorted(os.sched_getaffinity(0))),
            # With one worker vLLM would still give it a process of its own, and a third process on one core costs
            # more than it brings. This switch keeps the worker in the engine's process, which AsyncLLM always has.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if options.tensor_parallel_size == 1 else "1",
        }
        if options.enforce_eager:
            # All the same it compiles three operations at the first log-prob, which takes seconds and a C++ compiler.
            values["TORCH_COMPILE_DISABLE"] = "1"
    else:
        values |= nccl_environment(options.weights_timeout_s, options.weights_host)
        # The monitor of vLLM's own NCCL group ends the worker when any group of the process reports a failure.
        values["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
    os.environ.update(values)


def worker_cpus(options: EngineOptions, cpus: Sequence[int]) -> str:
    """Which of `cpus` each tensor-parallel worker is bound to, as vLLM wants it written.

    One worker stays where the daemon was pinned; vLLM's own choice takes cores by rank, for itself alone. Several wait
    for each other in every layer, without letting go of the CPU: two that share one lose a time slice (some ms) at each
    all-reduce, and the scheduler may leave them so for seconds.
    """
    num_workers, threads = options.tensor_parallel_size, options.threads
    if num_workers == 1 or len(cpus) < num_workers * threads:
        return "nobind"
    return "|".join(",".join(map(str, cpus[rank * threads :][:threads])) for rank in range(num_workers))


def engine_arguments(options: EngineOptions, weight_backend: str, worker_extension: str) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs."""
    context = options.max_model_len + 1  # scoring a sequence of full length still asks for one token
    arguments: dict[str, Any] = {
        "model": options.model_path,
        "dtype": options.dtype,
        "max_model_len": context,
        "max_num_seqs": options.max_sequences + SPARE_SEQUENCES,
        # On CPUs no prompt is ever split over two steps: with a per-request seed, vLLM 0.32 rewinds the generator of
        # a split prompt, which generators on CPUs cannot do, and the engine dies. On GPUs they can, and a long prompt
        # in one piece would stall all others for as long as it takes.
        "enable_chunked_prefill": options.device != "cpu",
        "max_num_batched_tokens": max(context, MIN_BATCHED_TOKENS),
        "tensor_parallel_size": options.tensor_parallel_size,
        "enforce_eager": options.enforce_eager,
        # Weights arrive by sync alone, so that there is one way in, and it is the verified one.
        "load_format": "dummy",
        "weight_transfer_config": {"backend": weight_backend},
        "worker_extension_cls": worker_extension,
        # Log-probs of the distribution that was sampled from, that is, after the temperature.
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,  # the rollouts of a group share their prompt
        "skip_tokenizer_init": True,  # text is decoded once, at the end, outside the engine
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "disable_log_stats": True,
        "seed": options.seed,
    }
    if options.kv_cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = options.kv_cache_bytes
    if options.device == "cpu":
        arguments["block_size"] = 32  # smaller than the CPU default of 128, which short prompts never fill
        return arguments
    arguments["gpu_memory_utilization"] = options.gpu_memory_fraction
    if options.dtype == "bfloat16":
        # Logits in float32, as the learner's: one product of bfloat16 matrices there. On CPUs vLLM casts the whole head
        # at every step for it: sampling 1.45 x slower for a canary that differs by 4 % less (a 4 M model).
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    return arguments


def stop_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: those of the generation config, the model config and the tokenizer.

    Raises:
        ModelError: there is none, so that every completion would run to its limit.
    """
    from transformers import AutoConfig, GenerationConfig

    found: set[int] = set()
    sources: list[Any] = [AutoConfig.from_pretrained(model_path).eos_token_id, tokenizer.eos_token_id]
    if (Path(model_path) / "generation_config.json").exists():
        sources.append(GenerationConfig.from_pretrained(model_path).eos_token_id)
    for source in sources:
        if source is not None:
            found.update([source] if isinstance(source, int) else source)
    if not found:
        raise ModelError(f"{model_path}: no end token; set eos_token_id in config.json or in the tokenizer")
    return sorted(found)


def follow_parent() -> None:
    """Tie a process of vLLM to the daemon: it ends when its parent is gone, and only the daemon gets the signals.

    A session of its own keeps Ctrl-C and a signal to the whole process group away from it: the daemon drains first.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    with contextlib.suppress(PermissionError):  # it leads a group already
        os.setsid()

    def wait() -> None:
        parent.join()  # returns when the pipe to the parent closes, however it ended
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="asyncrl: follow parent", daemon=True).start()


def _write_logging_config(log_path: Path) -> Path:
    log_path.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(process)d %(name)s:%(lineno)d %(message)s"}},
        "handlers": {
            "file": {"class": "logging.FileHandler", "filename": str(log_path), "formatter": "line"},
            "stderr": {"class": "logging.StreamHandler", "level": "ERROR", "formatter": "line"},
        },
        "loggers": {
            "vllm": {"handlers": ["file", "stderr"], "level": "INFO", "propagate": False},
            # One line and one false alarm (of the rotary embedding, which has no weights) at every swap.
            "vllm.v1.core.sched": {"level": "WARNING"},
            "vllm.model_executor.model_loader.reload": {"level": "ERROR"},
        },
    }
    path = log_path.with_suffix(".logging.json")
    path.write_text(json.dumps(config, indent=1))
    return path
