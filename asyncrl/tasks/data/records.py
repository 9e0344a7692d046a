"""Records from JSON Lines, .json, parquet, folders of them, saved data sets and the hub.

A record that cannot be used is left out, by its place and the reason; too many of them are an error. Columns that
nobody needs are not kept.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from asyncrl.errors import TaskError

_T = TypeVar("_T")

Record = dict[str, Any]
Row = tuple[str, object]  # place, and the record, or an Unreadable in its stead

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
MAX_LEFT_OUT = 16  # records that cannot be used: more than this, and more than a quarter of all, is an error
MAX_LEFT_OUT_SHARE = 0.25
_SAVED = ("dataset_dict.json", "dataset_info.json")  # what `save_to_disk` writes


class Unreadable(str):
    """Why there is no record at a place."""


@dataclass(frozen=True, slots=True)
class Table:
    """The records of one source. `rows` gives them with the columns that are asked for alone; None asks for all."""

    name: str
    columns: tuple[str, ...]
    rows: Callable[[Collection[str] | None], Iterator[Row]]


def is_local(path: str) -> bool:
    """Whether a path is a file or folder of this machine, be it there or not; else it names a data set of the hub."""
    return path.endswith(FILE_SUFFIXES) or Path(path).expanduser().exists()


def open_table(path: str, subset: str = "", split: str = "") -> Table:
    """The records of a file, of a folder, or of a data set of the hub (subset and split are for data sets).

    Raises TaskError naming what cannot be read, and what to do about it.
    """
    if not is_local(path):
        return _hub_table(path, subset, split or "train")
    place = Path(path).expanduser()
    if subset:
        raise TaskError(f"task.args.subset={subset} is for data sets of the hub, and {path} is a file or folder")
    if place.is_dir() and any((place / name).is_file() for name in _SAVED):
        return _saved_table(path, place, split)
    if split:
        raise TaskError(f"the split {split!r} is for data sets, and {path} is a file or folder of records")
    if not place.is_dir():
        return _file_table(path, place)
    for suffix in (".parquet", ".jsonl", ".json"):
        if files := sorted(place.glob(f"*{suffix}")):
            return _joined(path, [_file_table(str(Path(path) / file.name), file) for file in files])
    raise TaskError(f"{path} holds no file that ends with .parquet, .jsonl or .json, and no saved data set")


def usable(source: str, rows: Iterable[Row], make: Callable[[object], _T]) -> tuple[list[_T], list[str]]:
    """What `make` makes of the records, and those that cannot be used by place and reason.

    `make` raises TaskError with the reason. Raises TaskError when there are no records, when none can be used, or when
    those left out are more than MAX_LEFT_OUT and more than MAX_LEFT_OUT_SHARE of all.
    """
    made: list[_T] = []
    left_out: list[str] = []
    for where, record in rows:
        if isinstance(record, Unreadable):
            left_out.append(f"{where} {record}")
            continue
        try:
            made.append(make(record))
        except TaskError as error:
            left_out.append(f"{where} {error}")
    if not made and not left_out:
        raise TaskError(f"{source} holds no records")
    if not made or len(left_out) > max(MAX_LEFT_OUT, MAX_LEFT_OUT_SHARE * (len(made) + len(left_out))):
        raise TaskError(
            f"{len(left_out)} of {len(made) + len(left_out)} records of {source} cannot be used: "
            f"{'; '.join(left_out[:3])}{'; ...' if len(left_out) > 3 else ''}"
        )
    return made, left_out


# -- files -------------------------------------------------------------------------------------------------------------


def _file_table(name: str, file: Path) -> Table:
    return _parquet_table(name, file) if file.suffix == ".parquet" else _json_table(name, file)


def _joined(name: str, tables: list[Table]) -> Table:
    """Several files of one data set, one after the other."""
    columns = tuple(dict.fromkeys(chain.from_iterable(table.columns for table in tables)))

    def rows(wanted: Collection[str] | None) -> Iterator[Row]:
        for table in tables:
            kept = None if wanted is None else [column for column in wanted if column in table.columns]
            yield from table.rows(kept)

    return Table(name, columns, rows)


def _json_table(name: str, file: Path) -> Table:
    try:
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise TaskError(
            f"{name} cannot be read ({error}); give a JSON Lines file, a .json file with a list, a .parquet file, or a "
            "data set"
        ) from None
    is_list = file.suffix == ".json" and content.lstrip().startswith(b"[")
    found = list(_of_list(name, content) if is_list else _of_lines(name, content))
    columns = dict.fromkeys(chain.from_iterable(record for _, record in found if isinstance(record, dict)))

    def rows(wanted: Collection[str] | None) -> Iterator[Row]:
        for where, record in found:
            if wanted is not None and isinstance(record, dict):
                record = {key: record[key] for key in wanted if key in record}
            yield where, record

    return Table(name, tuple(columns), rows)


def _of_lines(name: str, content: bytes) -> Iterator[Row]:
    # At "\n" alone: JSON texts may hold all else that Unicode calls a line end.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield f"{name}, line {number}", _parsed(line)


def _of_list(name: str, content: bytes) -> Iterator[Row]:
    try:
        records = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{name} begins as a list of records and is not JSON: {error}") from None
    for number, record in enumerate(records):
        yield f"{name}, record {number}", record


def _parsed(line: bytes) -> object:
    """What a line holds, or why that cannot be read."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Unreadable(f"cannot be read: not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        return Unreadable(f"is not JSON: {error}")


def _parquet_table(name: str, file: Path) -> Table:
    try:
        from pyarrow import parquet
    except ImportError:
        raise TaskError(
            f"{name}: reading parquet needs the package `pyarrow`: pip install pyarrow, or give a JSON Lines file"
        ) from None
    try:
        opened = parquet.ParquetFile(file)
        columns = tuple(str(column) for column in opened.schema_arrow.names)
    except (OSError, ValueError) as error:  # what pyarrow raises is one of these
        raise TaskError(f"{name} cannot be read as parquet ({error})") from None

    def rows(wanted: Collection[str] | None) -> Iterator[Row]:
        number = 0
        for batch in opened.iter_batches(columns=None if wanted is None else list(wanted)):
            for record in batch.to_pylist():
                yield f"{name}, record {number}", record
                number += 1

    return Table(name, columns, rows)


# -- data sets ---------------------------------------------------------------------------------------------------------


def _datasets(name: str) -> Any:
    """The package. Raises TaskError where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise TaskError(
            f"{name} is not a file of records ({', '.join(FILE_SUFFIXES)}), and reading a Hugging Face data set needs "
            "the package `datasets`: pip install datasets, or give a file"
        ) from None
    return datasets


def _saved_table(name: str, folder: Path, split: str) -> Table:
    """What `save_to_disk` wrote: one data set, or several by the names of their splits."""
    try:
        loaded = _datasets(name).load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise TaskError(f"{name} cannot be read as a saved data set ({type(error).__name__}: {error})") from None
    if not isinstance(loaded, dict):
        if split:
            raise TaskError(f"the split {split!r} was asked for, and {name} was saved as one data set without splits")
        return _data_set_table(name, loaded)
    split = split or "train"
    if split not in loaded:
        raise TaskError(f"{name} has no split {split!r}; it has {', '.join(loaded)}")
    return _data_set_table(f"{name}, split {split}", loaded[split])


def _hub_table(name: str, subset: str, split: str) -> Table:
    datasets = _datasets(name)
    try:
        loaded = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:
        of_subset = f", subset {subset!r}" if subset else ""
        raise TaskError(
            f"data set {name!r}{of_subset}, split {split!r}, cannot be loaded ({type(error).__name__}: {error}); "
            "give the path of a file, or a subset and split that this data set has"
        ) from error
    return _data_set_table(f"{name}, split {split}", loaded)


def _data_set_table(name: str, loaded: Any) -> Table:
    def rows(wanted: Collection[str] | None) -> Iterator[Row]:
        records = loaded if wanted is None else loaded.select_columns(list(wanted))
        for number, record in enumerate(records):
            yield f"{name}, record {number}", record

    return Table(name, tuple(loaded.column_names), rows)
