"""The policy: a transformers causal LM with master weights in float32, its log-probs, its parameters by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from asyncrl.algorithms.logprobs import chunked_logprobs
from asyncrl.config import ModelConfig, UpdateConfig
from asyncrl.errors import ModelError
from asyncrl.host.fingerprints import model_fingerprint
from asyncrl.host.model_folder import find_model
from asyncrl.host.model_head import check_head
from asyncrl.trainer.engines.device_rows import DeviceRows, on_device
from asyncrl.trainer.engines.lora import adapters_off, is_adapter
from asyncrl.trainer.engines.stored_weights import StoredWeights, stored_model
from asyncrl.trainer.engines.trainable import (
    apply_update,
    frozen_copy,
    frozen_digests,
    named_parameters,
    patched_source,
    tensors_of,
)
from asyncrl.trainer.engines.trunk import check_rotary, completion_hidden, compute_dtype, is_packed, use_packed_rows
from asyncrl.trainer.packing import Rows, doubled_rows, plain_rows
from asyncrl.weights.bytes.patch import SyncSource

HEAD_TOLERANCE = 1e-3


def load_policy(
    model: ModelConfig,
    device: torch.device,
    *,
    update: UpdateConfig | None = None,
    seed: int = 0,
    stored: bool = False,
) -> Policy:
    """The actor that `model` names, of which `update` is trained; None = all of it.

    `seed` draws the first values of adapters. `stored` is for an engine that shards the model: see `Policy.load`.

    Raises ModelError as `Policy.load` does, and ConfigError as `apply_update` does.
    """
    policy = Policy.load(model.path, dtype=model.dtype, device=device, stored=stored)
    check_rotary(policy.model, model.max_length)
    if update is not None:
        apply_update(policy.model, update, seed)
        policy.update = update
    return policy


class Reference(Protocol):
    """A frozen policy that the KL term compares the trained one with."""

    def logprobs(
        self, rows: Rows | DeviceRows, temperature: float, *, entropies: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """See `Policy.logprobs`."""
        ...


class Policy:
    """A causal LM as the trainer uses it. Dropout is off: the policy trained is the policy that samples.

    With dtype bfloat16 the layers compute in bfloat16 under autocast; weights, logits and log-softmax stay
    float32, because rounding in the logits is what trainer and rollout engine disagree about most. On CUDA the head's
    operands are rounded to bfloat16, as the rollout engine's are, and multiplied into float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: str = "float32",
        source: Path | None = None,
        weights: StoredWeights | None = None,
    ) -> None:
        """`source` is the folder the model came from; exports copy its tokenizer.

        `weights` are those of a model without memory: whoever reads them calls `check` after that.

        Raises ModelError as `check` does.
        """
        self.model = model.eval()
        self.dtype = dtype
        self.source = source
        self.weights = weights
        self.in_one_call = False  # see `completion_hidden`
        self.update = UpdateConfig()  # what of the model is trained
        head = model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise ModelError(f"{type(model).__name__}: a head without bias is needed to compute log-probs from it")
        self.autocast = dtype  # what passes take float32 weights as; float32 where these are what they compute with
        if weights is None:
            self.check()

    @classmethod
    def load(
        cls, path: str, *, dtype: str = "float32", device: str | torch.device = "cpu", stored: bool = False
    ) -> Policy:
        """Loads a Hugging Face model folder (or cached hub name), in float32 whatever dtype it is stored in.

        With `stored` the weights stay in their files, as `Policy.weights`, if they can be read slice by slice.

        Raises ModelError when the folder is missing or incomplete, or lacks weights that the model needs.
        """
        files = find_model(path)
        check_head(files, f"model.path={path}")
        if stored and (found := stored_model(AutoModelForCausalLM, files, f"model.path={path}")):
            return cls(found[0], dtype=dtype, source=files.folder, weights=found[1])
        model = load_float32(AutoModelForCausalLM, files.folder, f"model.path={path}")
        module: torch.nn.Module = model  # transformers decorates its own `to` so that its types are lost
        module.to(torch.device(device))
        return cls(model, dtype=dtype, source=files.folder)

    def check(self) -> None:
        """Tries the model on a few tokens, and has it attend within packed rows if it computes those rightly.

        Raises ModelError when a bias, a cap or a scale after the head makes probabilities other than
        softmax(head(hidden)).
        """
        self._check_head()
        use_packed_rows(self.model, self.dtype)

    @property
    def head_weight(self) -> torch.nn.Parameter:
        """The head [V, H]. Asked for each time: in a sharded model it is whole only during a forward pass."""
        weight: torch.nn.Parameter = self.model.get_output_embeddings().weight
        return weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head_weight.device

    @property
    def vocab_size(self) -> int:
        """Rows of the head: token ids are below it."""
        return self.head_weight.shape[0]

    @property
    def architecture(self) -> str:
        """Digest of the architecture, so that a checkpoint is not loaded into another one."""
        return model_fingerprint(self.model.config.to_dict())

    @property
    def allows_shared_rows(self) -> bool:
        """Whether several completions may share a prompt in one row."""
        return is_packed(self.model)

    def freeze(self) -> Policy:
        """Makes this a reference policy, which takes no gradient from now on. Returns itself."""
        self.model.requires_grad_(False)
        return self

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """Each parameter that is trained, once, in a fixed order; tied ones are one parameter."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def named_sync_parameters(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) of all parameters under their names in a Hugging Face checkpoint, in a fixed order.

        Adapters are left out: weights that have one come as they are without it.

        A tied head is listed under its own name too, with the very tensor it shares: a rollout engine that is
        not sent `lm_head.weight` keeps the old head, and its log-probs go wrong without an error.
        """
        return tensors_of((name, value) for name, value in named_parameters(self.model) if not is_adapter(name))

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained by name, a tied one once, under its first name."""
        named = [(name, value) for name, value in named_parameters(self.model) if value.requires_grad]
        first = {id(parameter): name for name, parameter in reversed(named)}
        return {name: parameter for name, parameter in named if first[id(parameter)] == name}

    def trained_tensors(self) -> dict[str, Tensor]:
        """The tensors of `trained_parameters`."""
        return {name: parameter.data for name, parameter in self.trained_parameters().items()}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What training changes, by name and by reference, a shared tensor once, under its first name.

        Of a full update these are parameters and persistent buffers, else the parameters that are trained.
        """
        if self.update.what != "full":
            return self.trained_tensors()
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[name] = tensor.data
        return tensors

    @cached_property
    def frozen_digests(self) -> dict[str, int]:
        """Digest of each parameter that is not trained, by name. Computed once: they never change."""
        return frozen_digests(self.model)

    def sync_source(self) -> SyncSource:
        """What generators must be sent to sample from this policy."""
        if self.update.what == "full":
            return SyncSource(self.named_sync_parameters())
        return patched_source(self.model, self.update, self.frozen_digests)

    def initial_policy(self) -> Reference:
        """The policy as it is now, for good: a frozen copy of what is trained, or the same model with adapters off."""
        if self.update.what == "lora":
            return AdaptersOff(self)
        return Policy(frozen_copy(self.model), dtype=self.dtype, source=self.source)

    def logprobs(
        self, rows: Rows | DeviceRows, temperature: float, *, entropies: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Log-prob and entropy (nats) of each completion token, both float32 [N]; they carry the gradient.

        Without `entropies`, which cost a third of what log-probs do, None in their place.
        """
        return self.logprobs_from(self.hidden(rows), rows, temperature, entropies=entropies)

    def hidden(self, rows: Rows | DeviceRows) -> Tensor:
        """Final hidden state that each completion token is predicted from, [N, H]; carries the gradient."""
        with compute_dtype(self.autocast, self.device):
            return completion_hidden(self.model.base_model, rows, self.device, in_one_call=self.in_one_call)

    def logprobs_from(
        self, hidden: Tensor, rows: Rows | DeviceRows, temperature: float, *, entropies: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """`logprobs` of `rows` from their hidden states [N, H], for callers that use those twice."""
        is_half = self.dtype == "bfloat16" and self.device.type == "cuda"
        return chunked_logprobs(
            hidden,
            self.head_weight,
            on_device(rows, self.device).token_ids,
            temperature=temperature,
            entropies=entropies,
            products=torch.bfloat16 if is_half else None,
        )

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
    def score(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        """Log-probs at temperature 1 of each token after the first, float32 [L - 1] per sequence of L tokens.

        Raises ShapeError for a sequence of fewer than two tokens.
        """
        if not sequences:
            return []
        logprobs, _ = self.logprobs(plain_rows(sequences), 1.0, entropies=False)
        cuts = np.cumsum([len(tokens) - 1 for tokens in sequences])[:-1]
        return np.split(logprobs.cpu().numpy(), cuts)

    @torch.no_grad()
    def score_in_shared_rows(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        """`score` through the layout of shared rows: each sequence behind a copy of itself, which it does not see."""
        if not sequences:
            return []
        logprobs, _ = self.logprobs(doubled_rows(sequences), 1.0, entropies=False)
        cuts = np.cumsum(np.repeat([len(tokens) - 1 for tokens in sequences], 2))[:-1]
        return np.split(logprobs.cpu().numpy(), cuts)[1::2]

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
                f"{type(self.model).__name__}: log-probs are {difference:.3g} away from softmax(head(hidden)), "
                f"at most {HEAD_TOLERANCE} is allowed: the model caps or scales its logits, or its "
                "weights are broken; it cannot be trained"
            )


class AdaptersOff:
    """The policy as it was before its adapters: the same model with them off, without memory of its own."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def logprobs(
        self, rows: Rows | DeviceRows, temperature: float, *, entropies: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """See `Policy.logprobs`."""
        with adapters_off(self._policy.model):
            return self._policy.logprobs(rows, temperature, entropies=entropies)

    def score(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        """See `Policy.score`."""
        with adapters_off(self._policy.model):
            return self._policy.score(sequences)


def load_float32(auto_class: Any, folder: Path, key: str) -> PreTrainedModel:
    """A model of `auto_class` (AutoModel, ...) from a folder, weights in float32.

    Raises ModelError, which names `key` (`model.path=...`), when it cannot be loaded or lacks weights.
    """
    model: PreTrainedModel
    try:
        model, info = auto_class.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{key} cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would fill them with random numbers and only warn.
        raise ModelError(f"{key} lacks {len(missing)} weights, {missing[0]} first; copy the model again")
    return model
