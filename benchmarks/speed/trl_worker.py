"""TRL's GRPOTrainer, stepped from outside: runs in the peer's environment and imports nothing of asyncrl.

    python trl_worker.py SPEC.json

It trains by `GRPOTrainer.train()`, as any user of TRL does. Before each step it waits for a line on stdin, and after it
writes a line with seconds, loss and gradient norm to stdout. Given a batch, every step trains on that: the one method
that samples is replaced by one that returns it. Without one the trainer samples by its own engine.

Keys of the specification: model, threads, dtype, attention, rows (of one forward pass), completions (of one step),
group_size, max_new_tokens, lr, clip_low, clip_high, batch (file, or null), engine (transformers, continuous or vllm),
prompts (texts), output (folder), torch_compile.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the libraries print is no answer

import numpy as np  # noqa: E402 - after the output is out of the libraries' way
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

NEVER = 10**9


def say(**answer: Any) -> None:
    """One line for whoever asked."""
    ANSWERS.write(json.dumps(answer) + "\n")
    ANSWERS.flush()


class Stepped(TrainerCallback):
    """Lets one step through for each line of stdin."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self._started = self._cpu = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Waits for the word."""
        if not sys.stdin.readline():
            os._exit(0)  # whoever asked is done; Trainer.train would save and report
        self.trainer.losses, self.trainer.norm, self.trainer.completion_tokens = [], 0.0, 0
        self._started, self._cpu = time.perf_counter(), time.process_time()
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Says what the step was like."""
        say(
            seconds=time.perf_counter() - self._started,
            cpu_seconds=time.process_time() - self._cpu,
            generate_seconds=self.trainer.generate_seconds,
            loss=sum(self.trainer.losses),
            grad_norm=self.trainer.norm,
            tokens=self.trainer.completion_tokens,
        )
        return control


class Trainer(GRPOTrainer):
    """GRPOTrainer with a look at loss, norm and number of tokens, and with a fixed batch where there is one."""

    batch: dict[str, Any] | None = None
    generate_seconds = 0.0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        started = time.perf_counter()
        found = super()._generate_and_score_completions(inputs) if self.batch is None else dict(self.batch)
        self.generate_seconds = time.perf_counter() - started
        self.completion_tokens = int(found["completion_mask"].sum())
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Keeps the loss of the pass."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self.norm = float(norm)
        return norm


def fixed_batch(path: str, pad_id: int) -> dict[str, Any]:
    """What the trainer would make of the completions in the file, padded as it pads them."""
    with np.load(path) as file:
        lengths, prompts = file["lengths"], torch.from_numpy(file["prompts"].astype(np.int64))
        flat = {name: torch.from_numpy(file[name]) for name in ("tokens", "old_logprobs")}
        advantages = torch.from_numpy(file["advantages"].astype(np.float32))
    completions = torch.full((len(lengths), int(lengths.max())), pad_id)
    old = torch.zeros(completions.shape)
    mask = torch.arange(completions.shape[1])[None] < torch.from_numpy(lengths)[:, None]
    completions[mask], old[mask] = flat["tokens"].long(), flat["old_logprobs"].float()
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": mask.int(),
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": old,
    }


def parity(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group and costs nothing; that of asyncrl's side is the same."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def settings(spec: dict[str, Any]) -> GRPOConfig:
    """The trainer's arguments: nothing is logged, saved or computed twice."""
    engine = spec.get("engine", "transformers")
    more: dict[str, Any] = {}
    if engine == "continuous":
        # By itself it takes half of the machine's memory for a cache of which this needs a hundredth.
        more = {"transformers_continuous_batching_config": {"max_memory_percent": 0.1}}
    if engine == "vllm":
        more = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": spec["max_length"] + 1,
            "vllm_gpu_memory_utilization": 0.3,
            "vllm_importance_sampling_correction": False,  # it would cost one more forward pass
        }
    return GRPOConfig(
        output_dir=spec["output"],
        per_device_train_batch_size=spec["rows"],
        gradient_accumulation_steps=spec["completions"] // spec["rows"],
        num_generations=spec["group_size"],
        max_completion_length=spec["max_new_tokens"],
        max_steps=NEVER,
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        loss_type="dapo",  # mean over the tokens of the batch
        epsilon=spec["clip_low"],
        epsilon_high=spec["clip_high"],
        beta=0.0,
        optim="adamw_torch_fused",
        bf16=spec["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        torch_compile=spec.get("torch_compile", False),
        use_transformers_continuous_batching=engine == "continuous",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32", "attn_implementation": spec["attention"]},
        **more,
    )


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    stepped = Stepped()
    trainer = Trainer(
        model=spec["model"],
        reward_funcs=parity,
        args=settings(spec),
        train_dataset=Dataset.from_dict({"prompt": spec["prompts"]}),
        processing_class=tokenizer,
        callbacks=[stepped],
    )
    stepped.trainer = trainer
    if spec.get("batch"):
        Trainer.batch = fixed_batch(spec["batch"], tokenizer.pad_token_id)
    say(ready=True)
    trainer.train()


if __name__ == "__main__":
    main()
