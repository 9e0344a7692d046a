"""Types of message fields that say more than the types of Python; `link.field_checks` knows what each admits."""

from __future__ import annotations

from typing import Annotated, TypeAlias

MAY_BE_NAN, JSON_LIKE = "may be NaN", "JSON-like"
KEY = "key"  # in `field(metadata={KEY: name})`: what the field is called on the wire, where that is not its name here

# A float field refuses NaN and infinity. This one takes them: what it carries is judged by its reader, by name.
AnyFloat = Annotated[float, MAY_BE_NAN]

# What a task gives its reward along with a prompt: it travels as it is, and nobody on the way looks into it.
PayloadValue: TypeAlias = Annotated[
    None | bool | int | float | str | bytes | list["PayloadValue"] | dict[str, "PayloadValue"], JSON_LIKE
]
Payload: TypeAlias = dict[str, PayloadValue]
