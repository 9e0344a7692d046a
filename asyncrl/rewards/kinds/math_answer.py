r"""The kind `math`: compares mathematical answers by the package math-verify. 0.5, 1/2 and \frac{1}{2} are the same."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from asyncrl.errors import ConfigError, RewardError
from asyncrl.rewards.base import Part, Sample
from asyncrl.rewards.kinds.answer_texts import last_answer, last_literal, literal_of, plain_signs, without_literals


@dataclass(frozen=True)
class MathAnswer(Part):
    r"""1 when the completion's final expression equals payload[key], else 0.

    The final expression is what stands in the last \boxed{}, or in the last ones where only commas and the like are
    between them; without a box it is the last expression of the text. A date, or a number with several points, equals
    the same one alone, and is no arithmetic. Signs of currencies, and thousands' separators, say nothing.

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
        answer = plain_signs(str(sample.payload[self.key]))
        completion = plain_signs(sample.completion)
        if (literal := literal_of(answer)) is not None:
            return float(last_literal(completion) == literal)
        gold = _expressions(answer if "$" in answer or "\\boxed" in answer else f"${answer}$")
        if not gold:
            raise RewardError(f"payload[{self.key!r}]={sample.payload[self.key]!r:.200} is no mathematical expression")
        found = _expressions(without_literals(completion))
        return float(bool(found) and verify(gold, found, timeout_seconds=None, raise_on_error=True))


def _expressions(text: str) -> list[Any]:
    """What stands in the last box, or without one is the last expression of the text."""
    from math_verify import parse

    # Outside of $ $, math-verify takes the last number of a text, which is not all of \sqrt{2}+1.
    expressions: list[Any] = parse(
        last_answer(text), fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True
    )
    return expressions
