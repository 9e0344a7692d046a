"""The kind `reward_model`: the score of a sequence-classification model, asked of a server.

The server is vLLM with a classification or reward model (`/classify`, or `/score` for one that compares two texts), or
`asyncrl.rewards.model_server`, which speaks the same `/classify`; with `path` instead of `url`, every generator
starts one of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from asyncrl.errors import ConfigError, RewardError
from asyncrl.rewards.base import Endpoint, RemotePart, Sample, check_template, fill


@dataclass(frozen=True, kw_only=True)
class RewardModel(RemotePart):
    """The model's raw score, or with `activation` its probability.

    path: folder of a Hugging Face model, for which the generator starts a server; device, threads and batch_size are
    that server's. template: the text to score. user: in place of template, the user's message of a conversation in the
    reward model's own chat template, in which the completion is the answer. label: index of the score that counts,
    where the model gives more than one. endpoint: classify; or score, where `user` is the query and the completion the
    document. activation: ask for the probability and not for the raw score.
    """

    kind: ClassVar[str] = "reward_model"

    path: str = ""
    template: str = "{prompt}{completion}"
    user: str = ""
    endpoint: str = "classify"
    label: int | None = None
    activation: bool = False
    device: str = "auto"
    threads: int = 1
    batch_size: int = 16

    def check(self) -> None:
        """Raises ConfigError for arguments that contradict each other."""
        super().check()
        if bool(self.url) == bool(self.path):
            raise ConfigError("needs either url, of a server that runs, or path, of a model to start one for; not both")
        if self.endpoint not in ("classify", "score"):
            raise ConfigError(f"endpoint={self.endpoint!r} must be classify or score")
        if self.endpoint == "score" and (self.path or not self.user):
            raise ConfigError("endpoint=score needs url, and user for the query, for example user='{prompt}'")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device={self.device!r} must be auto, cpu or cuda")
        for name, value in (("threads", self.threads), ("batch_size", self.batch_size)):
            if value < 1:
                raise ConfigError(f"{name}={value} must be 1 or more")
        if self.label is not None and self.label < 0:
            raise ConfigError(f"label={self.label} must be 0 or more")
        if not self.user:
            check_template("template", self.template)

    def prepare(self) -> None:
        """Raises ConfigError when there is no model at `path`, or no key for the server."""
        super().prepare()
        if self.path and not (Path(self.path) / "config.json").is_file():
            raise ConfigError(f"path={self.path} is no folder with a Hugging Face model (no config.json)")

    async def fetch(self, endpoint: Endpoint, sample: Sample) -> float:
        """The model's raw score of one completion. Raises RewardError when the server gives none."""
        body: dict[str, Any] = {"use_activation": self.activation}
        if self.model:
            body["model"] = self.model
        if self.endpoint == "score":
            body |= {"queries": fill(self.user, sample), "documents": sample.completion}
            return _finite(_first(await endpoint.post("/score", body)).get("score"))
        if self.user:
            turns = (("user", fill(self.user, sample)), ("assistant", sample.completion))
            body["messages"] = [{"role": role, "content": content} for role, content in turns]
            body["add_generation_prompt"] = False
        else:
            body["input"] = fill(self.template, sample)
        return self._chosen(_first(await endpoint.post("/classify", body)).get("probs"))

    def _chosen(self, scores: Any) -> float:
        if not isinstance(scores, list) or not scores:
            raise RewardError(f"the reward model's server answered no scores, but {scores!r:.200}")
        if self.label is None and len(scores) > 1:
            raise RewardError(f"the reward model gives {len(scores)} scores; say which one is the reward with label=N")
        if (self.label or 0) >= len(scores):
            raise RewardError(f"label={self.label}, but the reward model gives {len(scores)} scores, counted from 0")
        return _finite(scores[self.label or 0])


def _first(answer: Any) -> dict[str, Any]:
    try:
        (item,) = answer["data"]
    except (KeyError, TypeError, ValueError):
        item = None
    if not isinstance(item, dict):
        raise RewardError(f"the reward model's server gave no score: {answer!r:.200}")
    return item


def _finite(score: Any) -> float:
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise RewardError(f"the reward model's score is no finite number: {score!r:.200}")
    return float(score)
