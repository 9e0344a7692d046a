"""Values as they were written: what YAML 1.1 would turn into something else, by the type that the key is declared with.

YAML has no types from outside: it reads `off` as false, `1.10` as 1.1, `2024_01_01` as a number, `7e12345` as infinity,
`010` as 8 and `1:30` as 90. Here the declared type decides:

    text, list of texts             each scalar as it was written, quotes taken off
    integer, number, lists of them  decimal: 010 is 10; 1:30 is no number
    mapping (task.args)             names of entries as written; the values are YAML's, for nobody declared them
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable

import yaml

from asyncrl.config.keys import Key

TEXT = "tag:yaml.org,2002:str"
MERGE = "tag:yaml.org,2002:merge"
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_LEADING_ZEROS = re.compile(r"([-+]?)0[0_]*([0-9][0-9_]*)")

FindKey = Callable[[str], Key | None]


def compose(text: str) -> yaml.Node | None:
    """The nodes of a YAML text; None of an empty one. Raises yaml.YAMLError."""
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    return node


def by_declared_types(text: str, key_set_by: FindKey) -> str:
    """The same YAML with every scalar of a declared key tagged so that its type is the key's.

    text        a mapping of sections, or anything else, which is returned as it is
    key_set_by  dotted name -> the key of that name, or the open mapping that it is inside of

    Raises yaml.YAMLError.
    """
    node = compose(text)
    return text if node is None else _serialized(_retagged(node, "", key_set_by))


def value_by_declared_type(text: str, key: Key | None) -> str:
    """The YAML of `{value: TEXT}`, which sets `key` or an entry of it on the command line, as `by_declared_types`.

    key is None for a name that is no key. Raises yaml.YAMLError.
    """
    value = compose(text)
    if value is None:
        value = yaml.ScalarNode("tag:yaml.org,2002:null", "")
    name = yaml.ScalarNode(TEXT, "value")
    return _serialized(
        yaml.MappingNode("tag:yaml.org,2002:map", [(name, value if key is None else _declared(value, key))])
    )


def text_as_written(text: str) -> str:
    """A text on the command line: quotes of YAML are taken off, and all else stays, down to `#` and `: `."""
    stripped = text.strip()
    if stripped[:1] not in ("'", '"'):
        return text
    try:
        node = compose(stripped)
    except yaml.YAMLError:
        return text
    return str(node.value) if isinstance(node, yaml.ScalarNode) else text


def _retagged(node: yaml.Node, prefix: str, key_set_by: FindKey) -> yaml.Node:
    """A copy of the sections above keys; nodes may be shared by aliases, and are never changed in place."""
    key = key_set_by(prefix)
    if key is not None:
        return _declared(node, key)
    # Keys have two words: what is nested deeper is unknown, and reported as that.
    if not isinstance(node, yaml.MappingNode) or prefix.count(".") > 0:
        return node
    entries = []
    for name, child in node.value:
        if name.tag == MERGE:
            inner = prefix
        else:
            inner = f"{prefix}.{name.value}" if prefix else str(name.value)
        entries.append((name, _retagged(child, inner, key_set_by)))
    return yaml.MappingNode(node.tag, entries, node.start_mark, node.end_mark, node.flow_style)


def _declared(node: yaml.Node, key: Key) -> yaml.Node:
    """The value of a key, or of an entry of an open mapping."""
    if isinstance(node, yaml.MappingNode) and key.is_open:
        entries = [(name if name.tag == MERGE else _as_text(name), child) for name, child in node.value]
        return yaml.MappingNode(node.tag, entries, node.start_mark, node.end_mark, node.flow_style)
    element = (typing.get_args(key.type) or (key.type,))[0]
    if isinstance(node, yaml.SequenceNode) and typing.get_origin(key.type) is list:
        elements = [_scalar(child, element) for child in node.value]
        return yaml.SequenceNode(node.tag, elements, node.start_mark, node.end_mark, node.flow_style)
    return _scalar(node, key.type)


def _scalar(node: yaml.Node, declared: object) -> yaml.Node:
    if not isinstance(node, yaml.ScalarNode):
        return node
    if declared is str:
        return _as_text(node)
    if declared in (int, float) and node.tag in NUMBERS:
        if ":" in node.value:
            return _as_text(node)
        if parts := _LEADING_ZEROS.fullmatch(node.value):
            return yaml.ScalarNode(NUMBERS[0], parts[1] + parts[2], node.start_mark, node.end_mark)
    return node


def _as_text(node: yaml.Node) -> yaml.Node:
    if not isinstance(node, yaml.ScalarNode):
        return node
    # Quoted, because the next reader may take other plain words for numbers than this writer does.
    return yaml.ScalarNode(TEXT, node.value, node.start_mark, node.end_mark, node.style or '"')


def _serialized(node: yaml.Node) -> str:
    return yaml.serialize(node, Dumper=yaml.SafeDumper, width=2**31, allow_unicode=True)
