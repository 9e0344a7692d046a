"""The policy: a transformers causal LM with master weights in float32, its log-probs, its parameters by
name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from asyncrl.algorithms.logprobs import chunked_logprobs
from asyncrl.config import ModelConfig
from asyncrl.errors import ModelError, ShapeError
from asyncrl.fingerprints import model_fingerprint
from asyncrl.model_files import find_model
from asyncrl.replay.packing import MicroBatch

HEAD_TOLERANCE = 1e-3


def load_policy(model: ModelConfig, device: torch.device, *, with_reference: bool = False) -> Policy:
    """The actor that `model` names, and with it, if wanted, a frozen copy as the reference policy.

    Raises ModelError, see `Policy.load`.
    """
    policy = Policy.load(model.path, dtype=model.dtype, device=device)
    if with_reference:
        policy.reference = Policy.load(model.path, dtype=model.dtype, device=device).freeze()
    return policy


class Policy:
    """A causal LM as the learner uses it. Dropout is off: the policy trained is the policy that samples.

    With dtype bfloat16 the layers compute in bfloat16 under autocast; weights, head and log-softmax stay
    float32, because rounding in the logits is what trainer and rollout engine disagree about most.
    """

    def __init__(self, model: PreTrainedModel, *, dtype: str = "float32", source: Path | None = None) -> None:
        """`source` is the folder the model came from; exports copy its tokenizer.

        Raises ModelError when the log-probs are not softmax(head(hidden)): a bias, a cap or a scale behind
        the head.
        """
        self.model = model.eval()
        self.dtype = dtype
        self.source = source
        self.reference: Policy | None = None  # the frozen policy that the KL term holds on to
        head = model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise ModelError(f"{type(model).__name__}: a head without bias is needed to compute log-probs from it")
        self.head_weight: torch.nn.Parameter = head.weight
        if self.device.type == "cuda" and dtype == "bfloat16":
            # The float32 head would run without tensor cores; TF32 keeps 10 bits of mantissa, bfloat16 has 7.
            torch.set_float32_matmul_precision("high")
        self._check_head()

    @classmethod
    def load(cls, path: str, *, dtype: str = "float32", device: str | torch.device = "cpu") -> Policy:
        """Loads a Hugging Face model folder (or cached hub name); weights in float32 whatever they are stored
        in.

        Raises ModelError when the folder is missing or incomplete, or lacks weights that the model needs.
        """
        folder = find_model(path).folder
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"model.path={path} cannot be loaded: {error}") from error
        missing = sorted(info["missing_keys"])
        if missing:
            # transformers would fill them with random numbers and only warn.
            raise ModelError(
                f"model.path={path} lacks {len(missing)} weights, {missing[0]} first; copy the model again"
            )
        return cls(model.to(device), dtype=dtype, source=folder)

    @classmethod
    def from_config(cls, folder: str | Path, *, seed: int = 0) -> Policy:
        """A float32 policy with fresh weights on the CPU, from a folder's config.json."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="sdpa")
        return cls(model.float(), source=Path(folder))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        return self.head_weight.shape[0]

    @property
    def architecture(self) -> str:
        """Digest of the architecture, so that a checkpoint is not loaded into another one."""
        return model_fingerprint(self.model.config.to_dict())

    @property
    def allows_shared_rows(self) -> bool:
        """Whether several completions may share a prompt in one row. Sliding windows count positions in a
        row.
        """
        config = self.model.config
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        return layers == {"full_attention"}

    def freeze(self) -> Policy:
        """Takes no gradients from now on: a reference policy. Returns itself."""
        self.model.requires_grad_(False)
        return self

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """Each parameter once, in a fixed order; tied ones are one parameter."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def named_sync_parameters(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) of all parameters under their names in a Hugging Face checkpoint, in a fixed order.

        A tied head is listed under its own name too, with the very tensor it shares: a rollout engine that is
        not sent `lm_head.weight` keeps the old head, and its log-probs go wrong without an error.
        """
        state = self.model.state_dict(keep_vars=True)
        named = [(name, value.data) for name, value in state.items() if isinstance(value, torch.nn.Parameter)]
        names = {name for name, _ in named}
        for tied, original in (self.model.all_tied_weights_keys or {}).items():
            if tied not in names:
                named.append((tied, dict(named)[original]))
        return named

    def logprobs(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy of each completion token of a micro-batch, float32 [N]; carries the
        gradient.
        """
        inputs: dict[str, Any] = {"input_ids": self._tensor(batch.input_ids)}
        if batch.segment_ids is not None:
            assert batch.position_ids is not None
            inputs["position_ids"] = self._tensor(batch.position_ids)
            inputs["attention_mask"] = shared_prompt_mask(self._tensor(batch.segment_ids))
        return self._head(inputs, self._tensor(batch.predictor), self._tensor(batch.token_ids), temperature)

    @torch.no_grad()
    def sample_sequences(self, count: int, length: int, seed: int) -> list[np.ndarray]:
        """`count` sequences of `length` tokens (int32) that this policy finds likely: the canary.

        The first token of each is random, the others are sampled. Sequences of random tokens would have log-probs of
        -30 and below, whose rounding errors grow with the logits until they pass for a difference in weights.
        """
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, self.vocab_size, (count, 1), generator=generator)
        past = None
        for _ in range(length - 1):
            outputs = self.model(input_ids=tokens[:, -1:].to(self.device), past_key_values=past, use_cache=True)
            past = outputs.past_key_values
            probabilities = torch.softmax(outputs.logits[:, -1].float().cpu(), dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        return list(tokens.numpy().astype(np.int32))

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs at temperature 1 of each token after the first, float32 [L - 1] per sequence of L tokens.

        Raises ShapeError for a sequence of fewer than two tokens.
        """
        lengths = [len(tokens) for tokens in sequences]
        if not lengths:
            return []
        if min(lengths) < 2:
            raise ShapeError(f"sequences to score need at least 2 tokens; got lengths {lengths}")
        width = max(lengths)
        tokens = np.zeros((len(sequences), width), dtype=np.int64)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = sequence
        inside = np.arange(1, width)[None, :] < np.array(lengths)[:, None]
        predictor = np.flatnonzero(inside)
        inputs = {"input_ids": self._tensor(tokens[:, :-1])}
        logprobs, _ = self._head(inputs, self._tensor(predictor), self._tensor(tokens[:, 1:][inside]), 1.0)
        cuts = np.cumsum(np.array(lengths) - 1)[:-1]
        return np.split(logprobs.cpu().numpy(), cuts)

    def _head(
        self, inputs: dict[str, Any], predictor: Tensor, token_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        # Rows are padded on the right, where causal attention never looks: without a mask and with the
        # default positions transformers takes SDPA's is_causal path.
        hidden = self._hidden_states(inputs)
        hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, predictor)
        return chunked_logprobs(hidden, self.head_weight, token_ids, temperature=temperature)

    def _hidden_states(self, inputs: dict[str, Any]) -> Tensor:
        with self._compute_dtype():
            return self.model.base_model(**inputs, use_cache=False).last_hidden_state

    def _compute_dtype(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Compares the model's own logits with head(hidden) on a few tokens, in float32."""
        tokens = torch.arange(8, device=self.device).remainder(self.vocab_size)[None]
        own = torch.log_softmax(self.model(tokens, use_cache=False).logits.float(), dim=-1)
        hidden = self.model.base_model(tokens, use_cache=False).last_hidden_state
        ours = torch.log_softmax(torch.nn.functional.linear(hidden, self.head_weight).float(), dim=-1)
        difference = float((own - ours).abs().max())
        if not difference <= HEAD_TOLERANCE:  # NaN fails too
            raise ModelError(
                f"{type(self.model).__name__}: log-probs are {difference:.3g} away from softmax(head(hidden)),"
                f" at most {HEAD_TOLERANCE} is allowed: the model caps or scales its logits, or its"
                " weights are broken; it cannot be trained"
            )


def shared_prompt_mask(segment_ids: Tensor) -> Tensor:
    """Who sees whom in shared rows: bool [B, 1, L, L], True where query (third axis) may look at key (last
    axis).

    A token sees the prompt (segment 0) and its own segment, never the future. segment_ids [B, L], -1 on
    padding.

    Example: segments (0, 1, 2) -> ((1, 0, 0), (1, 1, 0), (1, 0, 1)).
    """
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]
