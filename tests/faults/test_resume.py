"""What decides a run: compared when a generator says hello and when a run is started again, and never lost silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncrl.config import Config
from asyncrl.desk.opening.restoring import make_sessions
from asyncrl.errors import JournalError
from asyncrl.generator.assembly import _session
from asyncrl.generator.identity import claim_identity
from asyncrl.link.codec import decode
from asyncrl.link.messages import Refusal, Welcome
from asyncrl.storage.journal import Journal
from asyncrl.storage.segment import HEADER_BYTES, encode, read_salt
from asyncrl.tasks.fingerprint import shared_settings
from tests.golden.stored import read_json
from tests.replay.replay_making import make_group

TASK = """
from helper_of_own_task import bonus
from asyncrl.tasks.base import Example


class Own:
    train_size = 8

    def train_example(self, index):
        return Example(f"{index} is", {"answer": str(index)})

    def eval_examples(self, count):
        return [Example("9 is", {"answer": "9"})][:count]

    def reward(self, completion, payload):
        return {"exact": float(payload["answer"] in completion) + bonus()}
"""
HELPER = "def bonus():\n    return 0.5\n"
FUNCTION = "def short(completion, payload):\n    return 1.0\n"


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a task of one's own, a module it imports, and a reward function."""
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "own_task.py").write_text(TASK)
    (folder / "helper_of_own_task.py").write_text(HELPER)
    (folder / "own_rewards.py").write_text(FUNCTION)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def configure(tied_model_dir: Path, tmp_path: Path) -> Any:
    """Makes configurations of one run; `section__key=value` changes a key."""

    def make(**changes: Any) -> Config:
        config = Config()
        config.run.name, config.run.dir = "faults", str(tmp_path / "run")
        config.run.steps, config.learner.groups_per_step, config.sampling.group_size = 6, 2, 4
        config.model.path, config.model.max_length, config.sampling.max_new_tokens = str(tied_model_dir), 64, 12
        config.task.path = "own_task:Own"
        config.reward.parts = {"short": {"kind": "rule", "path": "own_rewards:short"}}
        for name, value in changes.items():
            section, key = name.split("__")
            setattr(getattr(config, section), key, value)
        return config

    return make


def answer_to(generator: Config, learner: Config, folder: Path) -> Refusal | Welcome:
    """What the learner answers to the hello of a generator that is started with another configuration."""
    identity = claim_identity(folder, "g1")
    identity.lock.close()
    session = _session(generator, identity)
    [frame] = session.due(float("inf"))
    hello = decode(frame, max_bytes=2**20)
    return make_sessions(learner, 1).hello(b"g1", hello, version=0, now=0.0).reply


# -- W8: generator and learner


def test_W8_equal_configurations_are_admitted_wherever_they_differ_in_what_decides_nothing(
    configure, task_folder, tmp_path
):
    other = configure(generator__max_sequences=5, learner__lr=0.5, run__dir=str(tmp_path / "elsewhere"))
    assert isinstance(answer_to(other, configure(), tmp_path), Welcome)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("reward__weights", {"digits": 100}, '{"digits": 100}'),
        ("reward__weights", {"exact": 1.5}, '{"exact": 1.5}'),
        ("reward__parts", {}, "{}"),
        ("task__args", {"size": 3}, '{"size": 3}'),
        ("model__max_length", 65, "65"),
        ("model__dtype", "bfloat16", '"bfloat16"'),
    ],
)
def test_W8_a_key_that_decides_rewards_or_prompts_and_differs_is_refused_with_both_values(
    key, value, shown, configure, task_folder, tmp_path
):
    name = key.replace("__", ".")
    learner, generator = configure(**{key: value}), configure()
    refusal = answer_to(generator, learner, tmp_path)
    assert isinstance(refusal, Refusal) and name in refusal.reason
    assert f"{name}: {shown}" in refusal.expected and f"{name}: " in refusal.got and shown not in refusal.got
    assert isinstance(answer_to(learner, generator, tmp_path), Refusal)
    assert isinstance(answer_to(learner, learner, tmp_path), Welcome)


@pytest.mark.parametrize("module", ["own_task", "helper_of_own_task", "own_rewards"])
def test_W8_an_edited_source_file_of_task_or_reward_is_refused_with_both_digests(
    module, configure, task_folder, tmp_path
):
    config = configure()
    sessions = make_sessions(config, 1)
    before = dict(shared_settings(config))[f"file {module} (source)"]
    file = task_folder / f"{module}.py"
    file.write_text(file.read_text().replace("0.5", "0.6").replace("1.0", "2.0").replace("is", "=="))
    identity = claim_identity(tmp_path, "g1")
    [frame] = _session(config, identity).due(float("inf"))
    refusal = sessions.hello(b"g1", decode(frame, max_bytes=2**20), version=0, now=0.0).reply
    assert isinstance(refusal, Refusal)
    assert module in refusal.reason and before in refusal.expected and before not in refusal.got


def test_W8_a_long_value_is_compared_too(configure, task_folder, tmp_path):
    one = configure(task__args={"words": ["a"] * 5000})
    two = configure(task__args={"words": ["a"] * 4999 + ["b"]})
    refusal = answer_to(one, two, tmp_path)
    assert isinstance(refusal, Refusal) and "task.args: 25" in refusal.expected and "sha256" in refusal.got


# -- R4: the journal


def make_journal(folder: Path, num_groups: int = 4, **options: Any) -> list[Any]:
    """A journal whose groups were acknowledged one by one; what is in it."""
    groups = [make_group(number, body=bytes([number]) * 50) for number in range(num_groups)]
    journal = Journal.open(folder, **options)
    for group in groups:
        journal.append(group, now=0.0)
        journal.make_durable()
    journal.close()
    return groups


def open_journal(folder: Path) -> tuple[list[Any], Journal]:
    """What is in a journal, and the journal as `open` found it, closed again."""
    journal = Journal.open(folder)
    records = [entry.record for entry in journal.read_all()]
    journal.close()
    return records, journal


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_R4_no_bit_of_a_segments_header_takes_its_records_along_and_each_flip_is_said(tmp_path):
    groups = make_journal(tmp_path)
    path = tmp_path / "00000001.segment"
    whole = path.read_bytes()
    for bit in range(8 * HEADER_BYTES):
        path.write_bytes(flipped(whole, bit))
        records, journal = open_journal(tmp_path)
        assert records == groups and journal.damage and journal.torn_bytes == 0, bit
        assert path.read_bytes() == flipped(whole, bit), "nothing was cut off"


def test_R4_a_header_that_is_damaged_twice_stops_the_start_and_changes_nothing(tmp_path):
    make_journal(tmp_path)
    path = tmp_path / "00000001.segment"
    data = path.read_bytes()
    path.write_bytes(data[:20] + bytes(40) + data[60:])
    before = path.read_bytes()
    with pytest.raises(JournalError, match="has a damaged header.*restore it"):
        Journal.open(tmp_path)
    assert path.read_bytes() == before


def test_R4_a_flipped_salt_of_the_first_format_is_damage_and_its_bytes_stay(tmp_path):
    stored = read_json("records.json")["segments_of_format_1"]
    [(name, data)] = stored.items()
    path = tmp_path / name
    for bit in range(8 * 18, 8 * 22):
        path.write_bytes(flipped(bytes.fromhex(data), bit))
        (tmp_path / "00000002.segment").unlink(missing_ok=True)
        (tmp_path / "end").unlink(missing_ok=True)
        _, journal = open_journal(tmp_path)
        assert journal.damage and journal.torn_bytes == 0
        assert path.read_bytes() == flipped(bytes.fromhex(data), bit)


def test_R4_a_cut_of_what_was_acknowledged_is_damage_at_any_byte_and_what_is_cut_off_is_kept(tmp_path):
    groups = make_journal(tmp_path)
    path = tmp_path / "00000001.segment"
    whole, end = path.read_bytes(), (tmp_path / "end").read_bytes()
    for length in range(len(whole)):
        for file in tmp_path.iterdir():
            file.unlink()
        path.write_bytes(whole[:length])
        (tmp_path / "end").write_bytes(end)
        records, journal = open_journal(tmp_path)
        assert records == groups[: len(records)] and len(records) < len(groups)
        assert journal.missing, f"a file of {length} bytes that had {len(whole)}"
        kept = b"".join(file.read_bytes() for file in tmp_path.glob("*.cut"))
        left = path.read_bytes() if path.exists() else b""
        assert left.startswith(whole[:length]) or left + kept == whole[:length]


def test_R4_a_flipped_bit_in_the_last_acknowledged_record_is_no_torn_tail(tmp_path):
    groups = make_journal(tmp_path)
    path = tmp_path / "00000001.segment"
    whole, end = path.read_bytes(), (tmp_path / "end").read_bytes()
    start = len(whole) - len(encode(groups[-1], salt=0))
    for bit in range(8 * start, 8 * len(whole), 3):
        for file in tmp_path.iterdir():
            file.unlink()
        path.write_bytes(flipped(whole, bit))
        (tmp_path / "end").write_bytes(end)
        records, journal = open_journal(tmp_path)
        assert records == groups[:-1] and journal.torn_bytes == 0 and journal.damage
        kept = [file.read_bytes() for file in tmp_path.glob("*.cut")]
        assert path.read_bytes() + b"".join(kept) == flipped(whole, bit)


def test_R4_an_unfinished_group_commit_is_torn_is_no_damage_and_is_kept_aside(tmp_path):
    groups = make_journal(tmp_path)
    path = tmp_path / "00000001.segment"
    more = encode(make_group(9, body=bytes(300)), read_salt(path.read_bytes()))
    with path.open("ab") as file:
        file.write(more + more[:-7])
    records, journal = open_journal(tmp_path)
    assert records == [*groups, make_group(9, body=bytes(300))]
    assert (journal.torn_bytes, journal.damage, journal.missing) == (len(more) - 7, [], [])
    [kept] = tmp_path.glob("*.cut")
    assert kept.read_bytes() == more[:-7] and kept.stat().st_mode & 0o777 == 0o600
    assert open_journal(tmp_path)[1].torn_bytes == 0


@pytest.mark.parametrize("gone", [2, 3, 5])
def test_R4_a_segment_that_is_gone_is_said(gone, tmp_path):
    make_journal(tmp_path, num_groups=5, segment_bytes=100)
    (tmp_path / f"0000000{gone}.segment").unlink()
    records, journal = open_journal(tmp_path)
    assert len(records) == 4 and [place.segment for place, _ in journal.missing] == [gone]
    assert not (tmp_path / f"0000000{gone}.segment").exists(), "its number is not used again"


def test_R4_a_closed_segment_that_was_cut_is_said(tmp_path):
    make_journal(tmp_path, num_groups=3, segment_bytes=100)
    path = tmp_path / "00000002.segment"
    path.write_bytes(path.read_bytes()[:HEADER_BYTES])
    records, journal = open_journal(tmp_path)
    assert len(records) == 2 and journal.missing[0].location == (2, HEADER_BYTES)


def test_R4_a_renamed_segment_is_refused(tmp_path):
    make_journal(tmp_path, num_groups=3, segment_bytes=100)
    (tmp_path / "00000003.segment").rename(tmp_path / "00000004.segment")
    with pytest.raises(JournalError, match="says that it is segment 3"):
        Journal.open(tmp_path)


def test_R4_a_start_that_may_yet_be_refused_changes_nothing(tmp_path):
    make_journal(tmp_path)
    path = tmp_path / "00000001.segment"
    path.write_bytes(path.read_bytes()[:-5])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != "lock"}
    journal = Journal.open(tmp_path, untouched=True)
    assert journal.missing and list(journal.read_all())
    journal.close()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != "lock"} == before
