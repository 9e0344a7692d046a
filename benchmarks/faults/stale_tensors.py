"""Whether a tensor that a swap leaves one optimizer step old is found, and what looking costs.

    python -m benchmarks.faults.stale_tensors [--quick] [--tries N] [--kinds llama ...]

Tiny models of five kinds in the real vLLM, in float32 and in bfloat16. The learner's model makes steps of AdamW on the
loss of random tokens (lr 1e-5, masters in float32), each is staged, verified and swapped as in a run, and one thing
that the engine computes with (a parameter or a packed matrix) is put back to what it was before the swap, by
`stale_worker`. A try counts if the old bits are other ones than the new. In every fourth try the swap is a reload.

The bar: found and named in every try, no alarm in honest swaps. Passed: exit code 0.

    --cost   besides, what the comparison takes of a 10 M model in float32, in CPU time of the worker's thread, against
             a step of training on a batch of 64 sequences of 128 tokens in this process; the bar is 0.01.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import common

KINDS = ("llama", "qwen2", "qwen3", "gemma3", "phi3", "qwen3_moe")
DTYPES = ("float32", "bfloat16")
TRIES, HONEST = 50, 20  # of each kind and dtype
LEARNING_RATE = 1e-5
VOCAB, LENGTH = 96, 64
WORKER = "benchmarks.faults.stale_worker.StaleWorker"
COST_BATCH = (64, 128)
COST_BAR = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kind, few tries")
    parser.add_argument("--tries", type=int, help=f"of each kind and dtype (default {TRIES}; 6 with --quick)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="default: all")
    parser.add_argument("--cost", action="store_true", help="measure the cost, too")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    tries = options.tries or (6 if options.quick else TRIES)
    honest = min(tries, HONEST)
    rows = []
    for kind in options.kinds or (KINDS[:1] if options.quick else KINDS):
        for dtype in DTYPES:
            rows.append(asyncio.run(_measure(kind, dtype, tries, honest)))
            print(rows[-1], flush=True)
    record: dict[str, Any] = {"benchmark": "stale_tensors", "date": time.strftime("%Y-%m-%d")}
    record |= {"machine": common.machine(), "rows": rows}
    if options.cost:
        record["cost"] = asyncio.run(_cost())
        print(record["cost"])
    path = options.results / f"stale_tensors{'.quick' if options.quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    total = {name: sum(row[name] for row in rows) for name in ("tries", "found", "honest", "false_alarms")}
    passed = total["found"] == total["tries"] > 0 and not total["false_alarms"]
    passed &= not any(row["not_compared"] for row in rows)
    passed &= not options.cost or record["cost"]["share"] <= COST_BAR
    print(f"{total['found']} of {total['tries']} stale tensors found and named")
    print(f"{total['false_alarms']} false alarms in {total['honest']} honest swaps")
    print(f"{'PASS' if passed else 'FAIL'}; written to {path}")
    return 0 if passed else 1


class Rig:
    """A real engine in processes of its own, and the learner's end of its weight channels."""

    def __init__(self, folder: Path, model: Any, dtype: str) -> None:
        import torch

        from asyncrl.generator.engines.vllm.engine import VLLMEngine
        from asyncrl.generator.engines.vllm.options import EngineOptions
        from asyncrl.trainer.engines.policy import Policy
        from asyncrl.weights.bytes.snapshot import SnapshotBuffer

        self.model = model
        options = EngineOptions(
            str(folder), dtype=dtype, max_model_len=LENGTH, max_sequences=4, kv_cache_bytes=64 * 2**20,
            log_path=str(folder / "vllm.log"),
        )  # fmt: skip
        self.engine = VLLMEngine(options, worker_extension=WORKER)
        named = Policy(model).named_sync_parameters()
        self._buffer = SnapshotBuffer(named, 1 << 20, torch.bfloat16 if dtype == "bfloat16" else None)
        self._version = -1
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self._random = torch.Generator().manual_seed(0)

    def step(self, rows: int = 4, length: int = 24) -> None:
        """One optimizer step on random tokens."""
        import torch

        tokens = torch.randint(2, self.model.config.vocab_size, (rows, length), generator=self._random)
        self.model.zero_grad()
        self.model(tokens, labels=tokens).loss.backward()
        self._optimizer.step()

    async def sync(self, *, stale: int | None = None, reload: bool = False) -> tuple[str, Any]:
        """(what was left old, the report of the only worker) of one sync of the model as it is."""
        from asyncrl.link.weight_records import ChannelSpec
        from asyncrl.weights.channels.channel import WeightChannel

        self._version += 1
        self._buffer.snapshot()
        manifest = self._buffer.manifest(self._version)
        channel = WeightChannel.host(ChannelSpec("127.0.0.1", 0, f"stale/{self._version}", 0, 2, "gloo", 20.0))
        root = asyncio.create_task(asyncio.to_thread(channel.join))
        await self.engine.join_channel(channel.spec.for_rank(1), 20.0)
        await root
        sender = threading.Thread(target=channel.broadcast, args=(list(self._buffer.buckets()), 20.0), daemon=True)
        sender.start()
        await self.engine.stage_weights(manifest, 20.0)
        await asyncio.to_thread(channel.close)
        sender.join(5.0)
        if reload:
            self.engine.taint("so that the next swap is a reload")
        if stale is not None:
            await self.engine._rpc("stale_next", 5.0, stale)
        await self.engine.swap_weights(self._version, 20.0)
        report = await self.engine.check_weights(self._version, 20.0)
        (told,) = await self.engine._rpc("stale_told", 5.0)
        return told, report


async def _measure(kind: str, dtype: str, tries: int, honest: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rig = Rig(folder, make_model(kind, folder), dtype)
        await rig.engine.start()
        row: dict[str, Any] = {"kind": kind, "dtype": dtype, "tries": 0, "found": 0, "honest": 0, "false_alarms": 0}
        row |= {"places": [], "not_compared": [], "missed": [], "check_ms": []}
        try:
            index = 0
            while row["honest"] < honest or row["tries"] < tries:
                rig.step()
                reload = index % 4 == 3
                if row["honest"] < honest and index % 3 == 0:
                    _, report = await rig.sync(reload=reload)
                    row["honest"] += 1
                    row["false_alarms"] += bool(report.in_use[0].differing)
                else:
                    told, report = await rig.sync(stale=row["tries"] + index, reload=reload)
                    found = told in report.in_use[0].differing
                    row["tries"] += bool(told)
                    row["found"] += found
                    row["places"] = sorted({*row["places"], *([told] if told else [])})
                    row["missed"] += [told] if told and not found else []
                    rig.engine.taint("it was found")  # as the learner would have it
                row["not_compared"] = report.in_use[0].not_compared
                row["check_ms"].append(round(report.timings_ms["check_ms"], 2))
                index += 1
        finally:
            await rig.engine.close()
    row["check_ms"] = sorted(row["check_ms"])[len(row["check_ms"]) // 2]
    return row


async def _cost() -> dict[str, float]:
    """Medians over five syncs and three steps."""
    import torch

    from benchmarks.speed.models import make_model as make_sized

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        from transformers import AutoModelForCausalLM

        folder = make_sized(Path(name) / "model", "10M")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rig = Rig(folder, model, "float32")
        await rig.engine.start()
        check_ms, step_ms = [], []
        try:
            for index in range(6):
                rig.step()
                _, report = await rig.sync()
                if index:
                    check_ms.append(report.timings_ms["check_ms"])
        finally:
            await rig.engine.close()
        for _ in range(3):
            started = time.thread_time()
            rig.step(*COST_BATCH)
            step_ms.append((time.thread_time() - started) * 1e3)
    check, step = sorted(check_ms)[len(check_ms) // 2], sorted(step_ms)[1]
    return {"check_ms": check, "step_ms": step, "share": check / step, "bar": COST_BAR}


def make_model(kind: str, folder: Path) -> Any:
    """A tiny random model with a tokenizer, in `folder`."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3", "phi3": "Phi3",
             "qwen3_moe": "Qwen3Moe"}  # fmt: skip
    values: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
        "tie_word_embeddings": kind in ("qwen2", "gemma3"), "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "qwen3_moe":
        values |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config_class = getattr(transformers, f"{names[kind]}{'TextConfig' if kind == 'gemma3' else 'Config'}")
    model_class = getattr(transformers, f"{names[kind]}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(config_class(**values)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(("norm" in name) + 0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    characters = ["<pad>", "<end>", *(chr(33 + number) for number in range(VOCAB - 2))]
    vocabulary = {text: number for number, text in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
