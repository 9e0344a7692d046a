"""What all kinds of reward parts have in common: what they see, how arguments are checked, how a template is filled.

A kind is a frozen dataclass whose fields are its arguments in the configuration. Making one checks the values and
touches nothing; whatever depends on the machine is done by `prepare`. Standard library only: the configuration check
and every reward worker import this.
"""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit

from asyncrl.errors import ConfigError, RewardError

TYPE_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false", dict: "a mapping"}
_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


class ServerUnavailable(RewardError):
    """The server of a part gave no answer at all, which says nothing about the completion."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion as reward parts see it."""

    completion: str
    payload: dict[str, Any]
    prompt: str = ""  # as the user wrote it: the text, or of chat messages what the user says last
    num_tokens: int | None = None  # of the completion, end token included
    rendered_prompt: str = ""  # the text that the model was given, without special tokens


@dataclass(frozen=True)
class Part:
    """A part of the reward that is computed here. Subclasses define `kind` and `value`."""

    kind: ClassVar[str]
    needs_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises ConfigError, beginning with the argument's name, for a value that it cannot have."""

    def prepare(self) -> None:
        """Imports and reads what it needs of this machine. Raises ConfigError."""

    def value(self, sample: Sample) -> float:
        """The part's value. Raises RewardError when there is none: never a number in its place."""
        raise NotImplementedError


class Endpoint(Protocol):
    """Where a remote part asks (`rewards.http_endpoint`)."""

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer, decoded. Raises RewardError; ServerUnavailable or DeadlineExceeded when none came."""
        ...


@dataclass(frozen=True, kw_only=True)
class RemotePart(Part):
    """A part that a server computes. Subclasses define `fetch`; the arguments here are common to all.

    url: what requests go to, without the last path element. model: the name the server knows the model by.
    timeout_s: of one request. retries: after a refused connection, an expired one, 429 or 5xx.
    concurrency: requests at a time, per reward worker. api_key_env: environment variable that holds the key.
    """

    needs_prompt: ClassVar[bool] = True

    url: str = ""
    model: str = ""
    timeout_s: float = 3.0
    retries: int = 2
    concurrency: int = 8
    api_key_env: str = ""

    @property
    def deadline_s(self) -> float:
        """The longest one value takes, all retries and pauses included."""
        return self.timeout_s * (self.retries + 1)

    def check(self) -> None:
        """Raises ConfigError for deadlines, retries or a url that cannot work."""
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s={self.timeout_s} must be above 0")
        if self.retries < 0:
            raise ConfigError(f"retries={self.retries} must be 0 or more")
        if self.concurrency < 1:
            raise ConfigError(f"concurrency={self.concurrency} must be 1 or more")
        if self.url:
            _check_url(self.url)

    def prepare(self) -> None:
        """Reads the key. Raises ConfigError when it is wanted and not set."""
        self.api_key()

    def api_key(self) -> str:
        """The key, from the environment; empty when none is wanted. Raises ConfigError when it is not set."""
        key = os.environ.get(self.api_key_env, "") if self.api_key_env else ""
        if self.api_key_env and not key:
            raise ConfigError(f"api_key_env={self.api_key_env}: this environment variable is empty or not set here")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(f"api_key_env={self.api_key_env}: the key there has a blank or a line end in it")
        return key

    async def fetch(self, endpoint: Endpoint, sample: Sample) -> float:
        """The part's value, asked of the server. Raises RewardError or DeadlineExceeded."""
        raise NotImplementedError


def _check_url(url: str) -> None:
    malformed = ConfigError(f"url={url!r} must be http://HOST:PORT or https://HOST, and a path such as /v1")
    try:
        split = urlsplit(url)
        has_port = split.port is None or split.port > 0
    except ValueError:
        raise malformed from None
    if split.scheme not in ("http", "https") or not split.hostname or not has_port:
        raise malformed
    if split.username or split.password:
        raise ConfigError("url holds a user or a password; name the environment variable of a key in api_key_env")
    if split.query or split.fragment:
        raise ConfigError(f"url={url!r} must end with its path")


# -- arguments -------------------------------------------------------------------------------------------------------


def arguments_of(kind: type[Part]) -> dict[str, bool]:
    """Names of the arguments of a kind, in order; true for those that must be given."""
    return {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(kind)}


def wrong_type(kind: type[Part], name: str, value: Any) -> str:
    """A sentence when `value` is not what the argument `name` takes, else an empty text."""
    hint = typing.get_type_hints(kind)[name]
    hints = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    wanted = [typing.get_origin(hint) or hint for hint in hints]
    if any(_fits(value, accepted) for accepted in wanted):
        return ""
    return f"{name}={value!r} must be {TYPE_NAMES.get(wanted[0], 'a list')}"


def _fits(value: Any, wanted: type) -> bool:
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


# -- templates -------------------------------------------------------------------------------------------------------


def check_template(name: str, template: str, needed: Sequence[str] = ("completion",)) -> None:
    """Raises ConfigError when the template has no place for what it must show."""
    for place in needed:
        if f"{{{place}}}" not in template:
            places = "{prompt}, {rendered_prompt}, {completion}"
            raise ConfigError(f"{name} has no {{{place}}}; places are {places} and payload keys")


def fill(template: str, sample: Sample) -> str:
    """The template with {prompt}, {rendered_prompt}, {completion} and {KEY of the payload} in place.

    Other braces stay as they are.
    What is put in is not searched again, so a completion that spells {answer} stays without it.
    Raises RewardError for a name that the payload does not have.
    """
    known = {
        **sample.payload,
        "prompt": sample.prompt,
        "rendered_prompt": sample.rendered_prompt,
        "completion": sample.completion,
    }

    def put(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise RewardError(f"the template names {{{match[1]}}}, but there is only {', '.join(sorted(known))}")
        return str(known[match[1]])

    return _PLACE.sub(put, template)
