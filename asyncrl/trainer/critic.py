"""The critic: a value for each completion token, from a trunk of its own or from the actor's hidden states.

The value of a token is that of the state before it, read off where its log-prob is read off.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from asyncrl.config import Config
from asyncrl.host.model_folder import find_model
from asyncrl.trainer.engines.device_rows import DeviceRows
from asyncrl.trainer.engines.policy import Policy, load_float32
from asyncrl.trainer.engines.stored_weights import StoredWeights, stored_model
from asyncrl.trainer.engines.trunk import completion_hidden, compute_dtype, use_packed_rows
from asyncrl.trainer.packing import Rows


def load_critic(config: Config, policy: Policy, *, stored: bool = False) -> Critic | None:
    """The value model that `config` asks for; None without algorithm.advantage=gae.

    With `stored` it is on the CPU, and the weights of a trunk of its own stay in their files; see `Policy.load`.

    Raises ModelError when the folder of an own trunk cannot be loaded.
    """
    if config.algorithm.advantage != "gae":
        return None
    dtype, device = config.model.dtype, torch.device("cpu") if stored else policy.device
    if config.critic.trunk == "shared":
        return Critic(None, policy.head_weight.shape[1], dtype=dtype, device=device)
    path = config.critic.path or config.model.path
    files, key = find_model(path, "critic.path"), f"critic.path={path}"
    if stored and (found := stored_model(AutoModel, files, key)):
        trunk, weights = found
        return Critic(trunk.eval(), trunk.config.hidden_size, dtype=dtype, device=device, weights=weights)
    trunk = load_float32(AutoModel, files.folder, key).eval()
    return Critic(trunk, trunk.config.hidden_size, dtype=dtype, device=device)


class Critic(nn.Module):
    """A linear head on hidden states. It starts at 0: until it has learnt something, advantages are returns.

    Names of its parameters (`head.*`, `trunk.*`) are those in checkpoints.
    """

    def __init__(
        self,
        trunk: PreTrainedModel | None,
        hidden_size: int,
        *,
        dtype: str,
        device: torch.device,
        weights: StoredWeights | None = None,
    ) -> None:
        """`trunk` None: the head sits on the actor's hidden states (shared trunk).

        `weights` are those of a trunk without memory: whoever reads them calls `check` after that.
        """
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.autocast = dtype  # as in `Policy`, and so is the next one
        self.in_one_call = False
        self.dtype = dtype
        self.weights = weights
        if weights is not None:
            self.head.to(device)
            return
        self.to(device)
        self.check()

    def check(self) -> None:
        """Has a trunk of its own attend within packed rows if it computes those rightly."""
        if self.trunk is not None:
            use_packed_rows(self.trunk, self.dtype)

    @property
    def is_shared(self) -> bool:
        """Whether the trunk is the actor's."""
        return self.trunk is None

    def values(self, rows: Rows | DeviceRows, actor_hidden: Tensor | None = None) -> Tensor:
        """Value of the state before each completion token, [N], float32 as the head is; carries the gradient.

        actor_hidden  [N, H] from `Policy.hidden`; needed by a shared trunk only
        """
        if self.trunk is None:
            assert actor_hidden is not None, "a shared trunk needs the actor's hidden states"
            hidden = actor_hidden
        else:
            device = self.head.weight.device
            with compute_dtype(self.autocast, device):
                hidden = completion_hidden(self.trunk, rows, device, in_one_call=self.in_one_call)
        values: Tensor = self.head(hidden.to(self.head.weight.dtype))
        return values.squeeze(-1)
