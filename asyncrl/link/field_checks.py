"""How the fields of messages, and the records inside them, are checked and laid out; worked out once per class.

    annotation                    on the wire
    ----------------------------  ------------------------------------------------------------------------
    int, bool, str, bytes         the same
    float, FloatOrNaN               a number; only a FloatOrNaN and the values of a dict may be NaN or infinite
    a StrEnum                     its value
    PayloadValue                  any plain value
    X | None                      X or nil
    list[X], tuple[X, ...]        an array
    tuple[X, Y]                   an array of exactly these
    dict[str, X]                  a map
    a NamedTuple                  an array of its fields
    a dataclass                   a map of its fields, under their names or under `field(metadata={KEY: name})`
    Annotated[X, rule]            the same as X, if it keeps the rule (`link.schema.field_rules`)

In a NamedTuple or a dataclass, a field `X | None = None` that is None is left out, and nil is not taken for it: each
record has one encoding. All other fields must be there, and no others.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgpack

from asyncrl.errors import ProtocolError
from asyncrl.link.schema.field_rules import AtMost, BrokenRule, Fields, Printed, Rule
from asyncrl.link.schema.message_base import Message
from asyncrl.link.wire_types import JSON_LIKE, KEY, MAY_BE_NAN, PayloadValue

R = TypeVar("R")

# NamedTuples that were decoded, by plan and bytes; they do not change, so that one may stand in many messages.
_KNOWN: dict[tuple[int, bytes], Any] = {}
_MAX_KNOWN = 32_768
_MAX_KNOWN_BYTES = 48
_MAX_KNOWN_FIELDS = 4
# The same of whole arrays of them, and of byte strings: their items, by what those are and by the array's bytes.
_KNOWN_ARRAYS: dict[tuple[str, bytes], tuple[Any, ...]] = {}
_MAX_KNOWN_ARRAYS = 4_096
_MAX_KNOWN_ARRAY_BYTES = 4_096
_MAX_LASTING_BYTES = 64  # of a byte string


class Mismatch(Exception):
    """What is wrong with a value, in words that follow its name; `where` is its place inside the field."""

    def __init__(self, says: str) -> None:
        super().__init__(says)
        self.says = says
        self.where = ""


Convert = Callable[[Any], Any]  # checks a value and returns it in its other form, or raises Mismatch


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """The two directions of one annotation: Python values to plain ones, and back.

    lasting names values that never change, so that an array of them need not be converted twice; else it is empty.
    """

    to_wire: Convert
    from_wire: Convert
    lasting: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedField:
    """One field: its name in Python, its key in a map, and how its values are converted."""

    name: str
    key: str
    form: Form
    left_out: bool = False  # when it is None


@dataclasses.dataclass(frozen=True)
class RecordPlan:
    """How one class is checked and built. The first `required` fields have no default."""

    cls: type[Any]
    fields: tuple[PlannedField, ...]
    required: int

    @property
    def name(self) -> str:
        """The name that errors use."""
        return self.cls.__name__


_MESSAGE_PLANS: dict[type[Message], RecordPlan] = {}


def plan_of(cls: type[Message]) -> RecordPlan:
    """The plan of a message class."""
    if cls not in _MESSAGE_PLANS:
        _MESSAGE_PLANS[cls] = _message_plan(cls)
    return _MESSAGE_PLANS[cls]


def to_plain(record: Any) -> Any:
    """A dataclass as a dict of plain values, a NamedTuple as a list of them.

    Raises ProtocolError when a field has the wrong type.
    """
    return _whole(type(record), _form(type(record)).to_wire, record)


def from_plain(cls: type[R], value: Any) -> R:
    """The dataclass or NamedTuple `cls` that `to_plain` turned into `value`. Raises ProtocolError."""
    record: R = _whole(cls, _form(cls).from_wire, value)
    return record


def _whole(cls: type[Any], convert: Convert, value: Any) -> Any:
    try:
        return convert(value)
    except Mismatch as bad:
        raise ProtocolError(f"{cls.__name__}{bad.where} {bad.says}; both daemons must run one version") from None


def shown(value: Any) -> str:
    """A value for an error message, never long."""
    if isinstance(value, (list, dict, bytes, memoryview)):
        return f"{type(value).__name__} of length {len(value)}"
    return f"{value!r:.60}"


# -- the form of an annotation ----------------------------------------------------------------------------------------


def _form(hint: Any) -> Form:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _ruled_form(args[0], args[1:])
    if origin in (types.UnionType, typing.Union):
        (inner,) = (_form(arg) for arg in args if arg is not types.NoneType)
        return _both(inner, _optional)
    if origin is list:
        return _array_form(_form(args[0]), list)
    if origin is tuple and args[-1] is Ellipsis:
        return _array_form(_form(args[0]), tuple)
    if origin is tuple:
        forms = [_form(arg) for arg in args]
        return Form(
            functools.partial(_fixed, [form.to_wire for form in forms], tuple, list),
            functools.partial(_fixed, [form.from_wire for form in forms], list, tuple),
        )
    if origin is dict:
        key, value = _form(args[0]), _form(args[1])
        return Form(
            functools.partial(_dict, key.to_wire, value.to_wire),
            functools.partial(_dict, key.from_wire, value.from_wire),
        )
    assert isinstance(hint, type), f"no check for the annotation {hint}"
    return _class_form(hint)


def _ruled_form(hint: Any, marks: tuple[Any, ...]) -> Form:
    """The form of an annotation with marks: a kind of value of its own, a rule, or the rules of a record's fields."""
    (mark,) = marks
    if isinstance(mark, str):
        return Form(_MARKED[mark], _MARKED[mark])
    if isinstance(mark, Fields):
        return _record_form(_array_plan(hint, mark))
    form = _form(hint)
    if isinstance(mark, Printed):
        return Form(_after(form.to_wire, mark.sent), _after(form.from_wire, mark.received))
    first = isinstance(mark, AtMost)  # a list is measured before its items are looked at
    lasting = f"bytes, {mark}" if hint is bytes and first and mark.most <= _MAX_LASTING_BYTES else ""
    return Form(_kept(mark, form.to_wire, first), _kept(mark, form.from_wire, first), lasting)


def _class_form(cls: type[Any]) -> Form:
    if cls in _SCALARS:
        return Form(_SCALARS[cls], _SCALARS[cls])
    if issubclass(cls, enum.StrEnum):
        return Form(functools.partial(_value_of, cls), functools.partial(_member, cls))
    if issubclass(cls, tuple):
        return _record_form(_array_plan(cls))
    assert dataclasses.is_dataclass(cls), f"no check for the class {cls}"
    plan = _map_plan(cls)
    return Form(functools.partial(_record_to_map, plan), functools.partial(_map_to_record, plan))


def _record_form(plan: RecordPlan) -> Form:
    return Form(
        functools.partial(_record_to_array, plan), functools.partial(_array_to_record, plan), f"plan {id(plan)}"
    )


def _after(convert: Convert, rule: Callable[[str], str]) -> Convert:
    """`convert`, then `rule`, which gives another text."""

    def checked(value: Any) -> Any:
        text = convert(value)
        try:
            return rule(text)
        except BrokenRule as broken:
            raise _must_be(broken.rule, shown(text)) from None

    return checked


def _kept(rule: Rule, convert: Convert, first: bool) -> Convert:
    """`convert` for values that keep `rule`, which is looked at `first` or afterwards."""
    assert not isinstance(rule, Printed)
    check: Callable[[Any], None] = rule.check

    def checked(value: Any) -> Any:
        try:
            if first and isinstance(value, _MEASURED):
                check(value)
                return convert(value)
            converted = convert(value)
            check(converted)
        except BrokenRule as broken:
            raise _must_be(broken.rule, shown(value)) from None
        return converted

    return checked


def _both(inner: Form, check: Callable[[Convert, Any], Any]) -> Form:
    return Form(functools.partial(check, inner.to_wire), functools.partial(check, inner.from_wire))


def _array_form(inner: Form, cls: type[Any]) -> Form:
    """The form of a list or a tuple: both are arrays on the wire, which msgpack reads as lists."""
    from_wire = functools.partial(_array, inner.from_wire, list, cls)
    if inner.lasting:
        from_wire = functools.partial(_known_array, inner.lasting, from_wire, cls)
    return Form(functools.partial(_array, inner.to_wire, cls, list), from_wire)


def _message_plan(cls: type[Message]) -> RecordPlan:
    """The plan of a message: the array of all its fields, of which an older peer leaves out the last ones."""
    hints, fields = _hints(cls), dataclasses.fields(cls)
    missing = dataclasses.MISSING
    required = sum(field.default is missing and field.default_factory is missing for field in fields)
    return RecordPlan(cls, tuple(PlannedField(f.name, f.name, _form(hints[f.name])) for f in fields), required)


@functools.cache
def _array_plan(cls: Any, rules: Fields | None = None) -> RecordPlan:
    """The plan of a NamedTuple. Only its last field may be left out: fields behind it would move up."""
    hints = _hints(cls) | dict(rules.hints if rules is not None else ())
    fields = tuple(_nested_field(hints[name], name, name, name in cls._field_defaults) for name in cls._fields)
    required = sum(not field.left_out for field in fields)
    assert not any(field.left_out for field in fields[:-1]), f"{cls.__name__}: only the last field may be optional"
    return RecordPlan(cls, fields, required)


@functools.cache
def _map_plan(cls: Any) -> RecordPlan:
    """The plan of a dataclass."""
    hints = _hints(cls)
    fields = tuple(
        _nested_field(hints[field.name], field.name, field.metadata.get(KEY, field.name), field.default is None)
        for field in dataclasses.fields(cls)
    )
    return RecordPlan(cls, fields, required=sum(not field.left_out for field in fields))


def _hints(cls: type[Any]) -> dict[str, Any]:
    # PayloadValue names itself, and the names are looked up in the module of `cls`.
    return typing.get_type_hints(cls, localns={"PayloadValue": PayloadValue}, include_extras=True)


def _nested_field(hint: Any, name: str, key: str, left_out: bool) -> PlannedField:
    if left_out:
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    return PlannedField(name, key, _form(hint), left_out)


# -- checks -----------------------------------------------------------------------------------------------------------


def _must_be(rule: str, got: str) -> Mismatch:
    return Mismatch(f"is {got}, must be {rule}")


def _int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _must_be("an integer", shown(value))


def _number(value: Any) -> float:
    if isinstance(value, float):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # msgpack integers have 64 bits at most: no overflow
    raise _must_be("a number", shown(value))


def _finite(value: Any) -> float:
    number = _number(value)
    if math.isfinite(number):
        return number
    raise _must_be("a finite number", shown(value))


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise _must_be("true or false", shown(value))


def _str(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise _must_be("a string", shown(value))


def _bytes(value: Any) -> bytes | memoryview:
    if isinstance(value, (bytes, memoryview)):
        return value
    raise _must_be("bytes", shown(value))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return _each(_plain, enumerate(value), [None] * len(value))
    if isinstance(value, dict):
        return _dict(_str, _plain, value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise _must_be("a string, number, boolean, bytes, None, or a list or dict of these", shown(value))


_SCALARS: dict[type[Any], Convert] = {int: _int, float: _finite, bool: _bool, str: _str, bytes: _bytes}
_MEASURED = (list, tuple, dict, str, bytes, memoryview)
_MARKED: dict[str, Convert] = {MAY_BE_NAN: _number, JSON_LIKE: _plain}


def _member(cls: type[enum.StrEnum], value: Any) -> enum.StrEnum:
    try:
        return cls(_str(value))
    except ValueError:
        raise _must_be(f"one of {', '.join(cls)}", shown(value)) from None


def _value_of(cls: type[enum.StrEnum], member: Any) -> str:
    value: str = _member(cls, member).value
    return value


def _optional(convert: Convert, value: Any) -> Any:
    return None if value is None else convert(value)


def _array(convert: Convert, given: type[Any], wanted: type[Any], value: Any) -> Any:
    if not isinstance(value, given):
        raise _must_be(f"a {given.__name__}", shown(value))
    items = _each(convert, enumerate(value), [None] * len(value))
    return items if wanted is list else wanted(items)


def _known_array(lasting: str, convert: Convert, wanted: type[Any], value: Any) -> Any:
    """A list or a tuple. The items of one that came before are not checked again, see `_array_to_record`."""
    if not isinstance(value, list) or not value:
        return convert(value)
    key = lasting, msgpack.packb(value)
    items = _KNOWN_ARRAYS.get(key)
    if items is None:
        items = tuple(convert(value))
        if len(key[1]) <= _MAX_KNOWN_ARRAY_BYTES and _is_fixed(items):
            if len(_KNOWN_ARRAYS) >= _MAX_KNOWN_ARRAYS:
                _KNOWN_ARRAYS.clear()
            _KNOWN_ARRAYS[key] = items
    return wanted(items)


def _is_fixed(items: tuple[Any, ...]) -> bool:
    """Whether nothing in it can change: then it has a hash."""
    try:
        hash(items)
    except TypeError:
        return False
    return True


def _fixed(converts: list[Convert], given: type[Any], wanted: type[Any], value: Any) -> Any:
    if not isinstance(value, given) or len(value) != len(converts):
        raise _must_be(f"a {given.__name__} of {len(converts)}", shown(value))
    return wanted(_at(f"[{place}]", convert, value[place]) for place, convert in enumerate(converts))


def _dict(convert_key: Convert, convert: Convert, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _must_be("a map", shown(value))
    for name in value:
        if not isinstance(name, str):
            raise _must_be("a map with string keys", shown(name))
        convert_key(name)
    checked: dict[str, Any] = _each(convert, value.items(), {})
    return checked


def _each(convert: Convert, items: Iterable[tuple[Any, Any]], checked: Any) -> Any:
    for place, item in items:
        try:
            checked[place] = convert(item)
        except Mismatch as bad:
            bad.where = f"[{place!r:.40}]{bad.where}"
            raise
    return checked


def _at(where: str, convert: Convert, value: Any) -> Any:
    try:
        return convert(value)
    except Mismatch as bad:
        bad.where = where + bad.where
        raise


# -- records ----------------------------------------------------------------------------------------------------------


def _record_to_array(plan: RecordPlan, record: Any) -> list[Any]:
    if not isinstance(record, plan.cls):
        raise _must_be(f"a {plan.name}", shown(record))
    fields = plan.fields[: plan.required] if record[-1] is None else plan.fields
    return [_at(f".{field.name}", field.form.to_wire, getattr(record, field.name)) for field in fields]


def _array_to_record(plan: RecordPlan, value: Any) -> Any:
    """A NamedTuple. One that came before is not checked again: a beat names the same leases second after second."""
    if not isinstance(value, list) or len(value) > _MAX_KNOWN_FIELDS:
        return _checked_record(plan, value)
    # Packed, because Python calls 1, 1.0 and True equal.
    key = id(plan), msgpack.packb(value)
    record = _KNOWN.get(key)
    if record is None:
        record = _checked_record(plan, value)
        if len(key[1]) <= _MAX_KNOWN_BYTES and not any(isinstance(item, list | dict) for item in record):
            if len(_KNOWN) >= _MAX_KNOWN:
                _KNOWN.clear()
            _KNOWN[key] = record
    return record


def _checked_record(plan: RecordPlan, value: Any) -> Any:
    if not isinstance(value, list) or not plan.required <= len(value) <= len(plan.fields):
        raise _must_be(f"an array of {', '.join(field.name for field in plan.fields)}", shown(value))
    # strict=False: the last field may be left out.
    pairs = zip(plan.fields, value, strict=False)
    return _built(plan.cls, [_at(f".{field.name}", field.form.from_wire, item) for field, item in pairs], {})


def _record_to_map(plan: RecordPlan, record: Any) -> dict[str, Any]:
    if not isinstance(record, plan.cls):
        raise _must_be(f"a {plan.name}", shown(record))
    return {
        field.key: _at(f".{field.name}", field.form.to_wire, value)
        for field in plan.fields
        if (value := getattr(record, field.name)) is not None or not field.left_out
    }


def _map_to_record(plan: RecordPlan, value: Any) -> Any:
    if not isinstance(value, dict):
        raise _must_be("a map", shown(value))
    values = {
        field.name: _at(f".{field.name}", field.form.from_wire, value[field.key])
        for field in plan.fields
        if field.key in value
    }
    absent = [field.key for field in plan.fields if field.key not in value and not field.left_out]
    if absent or len(values) < len(value):
        keys = f"{', '.join(field.key + ('?' if field.left_out else '') for field in plan.fields)}"
        raise _must_be(f"a map with the keys {keys}", f"a map with the keys {', '.join(map(str, value)):.200}")
    return _built(plan.cls, [], values)


def _built(cls: type[Any], args: list[Any], named: dict[str, Any]) -> Any:
    """The record; its constructor checks what the types leave open."""
    try:
        return cls(*args, **named)
    except ProtocolError as error:
        raise Mismatch(f"is wrong: {error}") from None
