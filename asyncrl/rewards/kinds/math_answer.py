r"""The kind `math`: compares mathematical answers by the package math-verify. 0.5, 1/2 and \frac{1}{2} are the same."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from asyncrl.errors import ConfigError, RewardError
from asyncrl.rewards.base import Part, Sample


@dataclass(frozen=True)
class MathAnswer(Part):
    """1 when the completion's final expression equals payload[key], else 0.

    A completion without an expression is wrong. It is a failed reward when the reference answer is no expression, or
    when the comparison breaks on one. math-verify's own time limits are off: the reward worker's deadline bounds it.
    """

    kind: ClassVar[str] = "math"

    key: str = "answer"

    def prepare(self) -> None:
        """Imports math-verify. Raises ConfigError when it is not installed."""
        try:
            import math_verify  # noqa: F401 - takes seconds, so at the start and not in the first reward
        except ImportError as error:
            raise ConfigError(f"needs the package math-verify, install it ({error})") from None
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

    def value(self, sample: Sample) -> float:
        """1.0 when the last expression equals the gold answer, else 0.0. Raises RewardError without a gold answer."""
        from math_verify import verify

        if self.key not in sample.payload:
            raise RewardError(f"the payload has no {self.key}, but {', '.join(sorted(sample.payload)) or 'nothing'}")
        gold = _expressions(_as_latex(str(sample.payload[self.key])))
        if not gold:
            raise RewardError(f"payload[{self.key!r}]={sample.payload[self.key]!r:.200} is no mathematical expression")
        found = _expressions(sample.completion)
        return float(bool(found) and verify(gold, found, timeout_seconds=None, raise_on_error=True))


def _as_latex(answer: str) -> str:
    # Outside of $ $, math-verify takes the last number of a text, which is not all of \sqrt{2}+1.
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"


def _expressions(text: str) -> list[Any]:
    from math_verify import parse

    expressions: list[Any] = parse(text, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
    return expressions
