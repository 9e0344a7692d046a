"""Records of every kind of source, and what is said of those that cannot be read."""

import json
import sys

import pytest

from asyncrl.errors import TaskError
from asyncrl.tasks.data.records import MAX_LEFT_OUT, Unreadable, is_local, open_table, usable

RECORDS = [{"question": f"{number}?", "answer": number, "more": [number]} for number in range(5)]


def as_lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_lines(folder):
    (folder / "data.jsonl").write_text(as_lines(RECORDS))
    return folder / "data.jsonl"


def write_list(folder):
    (folder / "data.json").write_text(json.dumps(RECORDS, indent=1))
    return folder / "data.json"


def write_lines_named_json(folder):
    (folder / "data.json").write_text(as_lines(RECORDS))
    return folder / "data.json"


def write_parquet(folder):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), folder / "data.parquet")
    return folder / "data.parquet"


def write_folder(folder):
    (folder / "shards").mkdir()
    (folder / "shards" / "b.jsonl").write_text(as_lines(RECORDS[3:]))
    (folder / "shards" / "a.jsonl").write_text(as_lines(RECORDS[:3]))
    (folder / "shards" / "README.txt").write_text("not data")
    return folder / "shards"


def write_saved(folder):
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "saved")
    return folder / "saved"


def write_saved_splits(folder):
    import datasets

    splits = {"train": datasets.Dataset.from_list(RECORDS), "test": datasets.Dataset.from_list(RECORDS[:1])}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return folder / "saved"


WRITERS = [
    write_lines,
    write_list,
    write_lines_named_json,
    write_parquet,
    write_folder,
    write_saved,
    write_saved_splits,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_source_gives_its_columns_and_records_and_no_more_than_is_asked_for(tmp_path, write):
    table = open_table(str(write(tmp_path)))
    assert set(table.columns) == {"question", "answer", "more"}
    assert [record for _, record in table.rows(None)] == RECORDS
    few = list(table.rows({"answer"}))
    assert [record for _, record in few] == [{"answer": number} for number in range(5)]
    assert len({where for where, _ in few}) == 5
    assert all(where.startswith(str(tmp_path)) for where, _ in few)


def test_a_split_of_a_saved_data_set_is_chosen_and_others_are_listed(tmp_path):
    path = str(write_saved_splits(tmp_path))
    assert [record for _, record in open_table(path, split="test").rows(None)] == RECORDS[:1]
    with pytest.raises(TaskError, match="has no split 'dev'; it has train, test"):
        open_table(path, split="dev")


@pytest.mark.parametrize(
    ("write", "arguments", "says"),
    [
        (write_saved, {"split": "test"}, "was saved as one data set without splits"),
        (write_lines, {"split": "test"}, "the split 'test' is for data sets, and .*data.jsonl is a file"),
        (write_lines, {"subset": "main"}, r"task\.args\.subset=main is for data sets of the hub"),
        (lambda folder: folder, {}, "holds no file that ends with .parquet, .jsonl or .json"),
        (lambda folder: folder / "none.jsonl", {}, r"none\.jsonl cannot be read .*give a JSON Lines file"),
        (lambda folder: folder / "none.parquet", {}, r"none\.parquet cannot be read as parquet"),
    ],
)
def test_each_source_that_cannot_be_read_is_named(tmp_path, write, arguments, says):
    with pytest.raises(TaskError, match=says):
        open_table(str(write(tmp_path)), **arguments)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data.json", b'[{"a": 1},', "begins as a list of records and is not JSON"),
        ("data.parquet", b"PAR2", r"data\.parquet cannot be read as parquet"),
    ],
)
def test_a_file_that_is_broken_as_a_whole_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=says):
        open_table(str(tmp_path / name))


@pytest.mark.parametrize(
    ("package", "name", "says"),
    [
        ("pyarrow", "data.parquet", "needs the package `pyarrow`: pip install pyarrow"),
        ("datasets", "owner/data", "needs the package `datasets`: pip install datasets, or give a file"),
    ],
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package, name, says):
    path = str(write_parquet(tmp_path)) if name.endswith(".parquet") else name
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TaskError, match=says):
        open_table(path)


def test_a_data_set_of_the_hub_is_asked_for_by_subset_and_split_and_one_that_does_not_come_is_named(monkeypatch):
    import datasets

    asked = []

    def hub(name, subset, *, split):
        asked.append((name, subset, split))
        if name == "owner/none":
            raise ConnectionError("offline")
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    table = open_table("owner/data", "main")
    assert (table.name, set(table.columns)) == ("owner/data, split train", {"question", "answer", "more"})
    assert list(table.rows({"answer"}))[1] == ("owner/data, split train, record 1", {"answer": 1})
    with pytest.raises(TaskError, match="data set 'owner/none', split 'dev', cannot be .*Error: offline"):
        open_table("owner/none", split="dev")
    assert asked == [("owner/data", "main", "train"), ("owner/none", None, "dev")]


def test_names_of_files_are_told_from_names_of_the_hub(tmp_path):
    assert is_local("not/there.jsonl") and is_local(str(tmp_path))
    assert not is_local("openai/gsm8k")


def usable_numbers(values):
    def number(record):
        if record["n"] < 0:
            raise TaskError(f"has {record['n']}")
        return record["n"]

    rows = [
        (f"record {n}", Unreadable(value) if isinstance(value, str) else {"n": value}) for n, value in enumerate(values)
    ]
    return usable("data", rows, number)


def test_records_that_cannot_be_used_are_left_out_by_place_and_reason():
    made, left_out = usable_numbers([0, -1, 2, "is not JSON", 4])
    assert made == [0, 2, 4]
    assert left_out == ["record 1 has -1", "record 3 is not JSON"]


def test_too_many_of_them_are_an_error_and_the_first_three_are_named():
    few = [-1] * MAX_LEFT_OUT
    assert len(usable_numbers([*few, 1])[1]) == MAX_LEFT_OUT
    assert len(usable_numbers([*few, -1, *[1] * (3 * MAX_LEFT_OUT + 3)])[1]) == MAX_LEFT_OUT + 1
    with pytest.raises(TaskError, match=r"17 of 67 records of data cannot be used: record 0 has -1; .*; \.\.\."):
        usable_numbers([*few, -1, *[1] * (3 * MAX_LEFT_OUT + 2)])
    with pytest.raises(TaskError, match="1 of 1 records"):
        usable_numbers([-1])
    with pytest.raises(TaskError, match="data holds no records"):
        usable_numbers([])
