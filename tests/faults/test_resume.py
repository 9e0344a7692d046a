"""What decides a run: compared when a generator says hello and when a run is started again, and never lost silently."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from asyncrl.config import Config
from asyncrl.config.declaration import IfChanged
from asyncrl.config.declaration import key as declared_key
from asyncrl.config.keys import keys
from asyncrl.desk.batches import BatchDealer
from asyncrl.desk.daemon import run_learner
from asyncrl.desk.opening.changes import RULES
from asyncrl.desk.opening.restoring import make_sessions
from asyncrl.desk.opening.run_folder import OpenedRun, open_run
from asyncrl.desk.opening.run_record import RECORD_FILE, write_finished, write_record
from asyncrl.desk.opening.saved_state import SavedDesk
from asyncrl.desk.run_state import PolicyVersions
from asyncrl.errors import CheckpointError, ConfigError, JournalError
from asyncrl.generator.assembly import _session
from asyncrl.generator.identity import claim_identity
from asyncrl.host.log_files import limit_log
from asyncrl.link.codec import decode
from asyncrl.link.generator_session import GeneratorSession
from asyncrl.link.messages import PROTOCOL_VERSION, Ack, Hello, LeaseFailed, Refusal, Welcome
from asyncrl.link.wire_types import FailureReason
from asyncrl.metrics import newest_version
from asyncrl.replay.lease_records import SavedLeases
from asyncrl.storage.checkpoint_files import WEIGHTS_ONLY, write_checkpoint
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import StepTaken
from asyncrl.storage.room import GIB, DiskRoom
from asyncrl.storage.run_epoch import run_epoch_of
from asyncrl.storage.segment import HEADER_BYTES, encode, read_salt
from asyncrl.tasks.fingerprint import shared_settings
from asyncrl.types import Frontier, LeaseKind
from tests.desk.desk_parts import make_parts
from tests.golden.stored import ROOT, read_json
from tests.replay.replay_making import make_group
from tests.waits import LATE_S

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
WEIGHTS = "model.safetensors"
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


# -- W9, R20: what a run is started again with


def start(config: Config) -> OpenedRun:
    """Does what a learner does with its run folder before it serves, and lets go of the folder."""
    run = open_run(config)
    run.begin(Path(config.run.dir), 0.0)
    write_record(Path(config.run.dir), config, run.record)
    run.journal.close()
    return run


def run_to(config: Config, version: int, *, checkpoint: int = 0, finished: bool = False) -> None:
    """A run folder whose journal holds the steps up to `version`, with a checkpoint of one of them."""
    run_dir = Path(config.run.dir)
    run = open_run(config)
    run.begin(run_dir, 0.0)
    write_record(run_dir, config, run.record)
    size = config.learner.groups_per_step
    for step in range(run.saved.reached, version):
        ordinals = range(step * size, (step + 1) * size)
        for ordinal in ordinals:
            run.journal.append(make_group(ordinal, version=step), 0.0)
        run.journal.append(StepTaken(step, tuple((ordinal, 0) for ordinal in ordinals)), 0.0)
    run.journal.make_durable()
    run.journal.close()
    if checkpoint:
        save(config, checkpoint)
    if finished:
        write_finished(run_dir, config, version)


def save(config: Config, version: int) -> None:
    settled = Frontier(version * config.learner.groups_per_step)
    desk = SavedDesk(SavedLeases(settled.watermark, 0, settled, [], 0, {}))
    write_checkpoint(
        Path(config.run.dir) / "checkpoints",
        version,
        lambda folder: (folder / WEIGHTS).write_bytes(b"weights %d" % version) and None,
        run_epoch=1,
        desk_state=desk.encode(),
        extra={"architecture": "a"},
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the lock, which names the process that looked last."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


REFUSED_CHANGES = [
    ("run__seed", 5, "run.seed: 0 before, 5 now"),
    ("task__args", {"size": 3}, 'task.args: {} before, {"size": 3} now'),
    ("task__path", "own_task:Other", "task.path"),
    ("sampling__group_size", 8, "sampling.group_size: 4 before, 8 now"),
    ("sampling__temperature", 0.5, "sampling.temperature"),
    ("algorithm__name", "rloo", "algorithm.name"),
    ("algorithm__loss", "gspo", "algorithm.loss"),
    ("reward__weights", {"exact": 2.0}, "reward.weights"),
    ("reward__parts", {}, "reward.parts"),
    ("model__dtype", "bfloat16", "model.dtype"),
    ("learner__groups_per_step", 8, "learner.groups_per_step: 2 before, 8 now (pacing counts"),
    ("learner__groups_per_step", 1, "learner.groups_per_step"),
    ("staleness__max_age", 1, "staleness.max_age: 4 before, 1 now (acknowledged groups"),
    ("run__steps", 2, "run.steps: 6 before, 2 now (the run is at version 3 already)"),
    ("update__what", "lora", "update.what"),
]
ACCEPTED_CHANGES = [
    ("learner__lr", 0.5, "learner.lr: 1e-06 before, 0.5 now"),
    ("learner__micro_batch_tokens", 128, "learner.micro_batch_tokens"),
    ("generator__max_sequences", 4, "generator.max_sequences"),
    ("run__steps", 9, "run.steps"),
    ("run__steps", 3, "run.steps"),
    ("staleness__max_age", 6, "staleness.max_age"),
    ("checkpoint__every", 1, "checkpoint.every"),
]


@pytest.mark.parametrize(("key", "value", "shown"), REFUSED_CHANGES)
def test_W9_a_key_that_makes_it_another_run_is_refused_and_nothing_is_written(
    key, value, shown, configure, task_folder
):
    run_to(configure(), 3)
    before = files_of(Path(configure().run.dir))
    with pytest.raises(ConfigError) as refused:
        open_run(configure(**{key: value}))
    assert shown in str(refused.value) and "checkpoint.resume=fork" in str(refused.value)
    assert refused.value.exit_code == 2
    assert files_of(Path(configure().run.dir)) == before
    assert start(configure()).saved.reached == 3, "with the old value it goes on"


@pytest.mark.parametrize(("key", "value", "shown"), ACCEPTED_CHANGES)
def test_W9_a_harmless_key_is_listed_and_accepted(key, value, shown, configure, task_folder, caplog):
    run_to(configure(), 3)
    with caplog.at_level("INFO"):
        assert start(configure(**{key: value})).saved.reached == 3
    assert shown in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        start(configure(**{key: value}))
    assert "other values" not in caplog.text, "said once"


@pytest.mark.parametrize("file", ["own_task.py", "helper_of_own_task.py", "own_rewards.py"])
def test_W9_an_edited_task_or_reward_is_refused(file, configure, task_folder):
    run_to(configure(), 3)
    (task_folder / file).write_text((task_folder / file).read_text() + "\n\nMORE = 1\n")
    with pytest.raises(ConfigError, match=rf"file {file[:-3]} \(source\)"):
        open_run(configure())


def test_W9_another_data_file_under_the_same_name_is_refused(configure, task_folder):
    data = task_folder / "data.jsonl"
    data.write_text("one")
    run_to(configure(task__args={"path": str(data)}), 3)
    data.write_text("two")
    with pytest.raises(ConfigError, match=r"data.jsonl \(task.args\)"):
        open_run(configure(task__args={"path": str(data)}))


def test_W9_of_a_data_folder_the_data_counts_and_not_what_the_task_keeps_there(configure, task_folder):
    data = task_folder / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("one")
    run_to(configure(task__args={"path": str(data)}), 3)
    (data / "cache.lock").write_text("made while it ran")
    run_to(configure(task__args={"path": str(data)}), 3)
    (data / "train.jsonl").write_text("two")
    with pytest.raises(ConfigError, match=r"data \(task.args\)"):
        open_run(configure(task__args={"path": str(data)}))


def test_W9_a_file_that_the_task_writes_does_not_make_another_run(configure, task_folder):
    notes = task_folder / "scored"
    run_to(configure(task__args={"path": str(notes)}), 3)
    notes.write_text("made while it ran")
    assert start(configure(task__args={"path": str(notes)})).saved.reached == 3


def test_W9_another_model_under_the_same_path_is_refused(configure, task_folder, tied_model_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tied_model_dir, model)
    run_to(configure(model__path=str(model)), 3)
    shutil.copytree(tied_model_dir, tmp_path / "moved")
    assert start(configure(model__path=str(tmp_path / "moved"))).saved.reached == 3, (
        "the same model elsewhere is the same"
    )
    weights = model / "model.safetensors"
    weights.write_bytes(flipped(weights.read_bytes(), 8 * (weights.stat().st_size - 1)))
    with pytest.raises(ConfigError, match="file weights of the model"):
        open_run(configure(model__path=str(model)))


def test_W9_a_run_of_a_release_that_wrote_config_yaml_alone_is_compared_with_that(configure, task_folder):
    run_to(configure(), 3)
    (Path(configure().run.dir) / RECORD_FILE).unlink()
    with pytest.raises(ConfigError, match=r"run.seed: 0 before, 5 now"):
        open_run(configure(run__seed=5))
    assert start(configure()).saved.reached == 3
    assert (Path(configure().run.dir) / RECORD_FILE).exists()


def test_W9_a_finished_run_is_not_overwritten_by_a_refused_start(configure, task_folder):
    run_to(configure(), 6, checkpoint=6, finished=True)
    before = files_of(Path(configure().run.dir))
    with pytest.raises(ConfigError, match="run.seed"):
        open_run(configure(run__seed=5))
    assert files_of(Path(configure().run.dir)) == before


def test_W9_every_key_says_what_a_change_of_it_means_and_those_that_are_ruled_have_a_rule():
    assert {key.name for key in keys() if key.if_changed is IfChanged.RULED} == RULES.keys()
    assert all(isinstance(key.if_changed, IfChanged) for key in keys())
    assert all(key.if_changed is IfChanged.REFUSED for key in keys() if key.shared)
    with pytest.raises(TypeError, match="if_changed"):
        declared_key(1, "A new key that does not choose.")


def test_W9_a_fork_is_a_new_run_from_the_newest_weights_and_the_old_one_is_kept(configure, task_folder, caplog):
    run_to(configure(), 3, checkpoint=3)
    run_dir = Path(configure().run.dir)
    before = files_of(run_dir)
    forked = configure(run__seed=5, checkpoint__resume="fork")
    run = start(forked)
    assert "run.seed: 0 before, 5 now" in caplog.text and "earlier" in caplog.text
    assert (run.saved.version, run.saved.reached, run.saved.plan.num_records) == (0, 0, 0)
    assert run.saved.manifest is not None and run.saved.manifest.extra[WEIGHTS_ONLY]
    assert (run.saved.manifest.path / WEIGHTS).read_bytes() == b"weights 3"
    assert files_of(run_dir / "earlier" / "1") == before
    assert run_epoch_of(run_dir) == 1
    run_to(forked, 2)
    assert start(forked).saved.reached == 2, "started again with the same words it goes on"
    assert not (run_dir / "earlier" / "2").exists()
    assert start(configure(run__seed=5)).record.forked_from
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint of it is left"):
        open_run(configure(run__seed=5))


@pytest.mark.parametrize("renames", range(5))
def test_W9_a_fork_that_is_killed_half_way_is_completed_or_refused(renames, configure, task_folder, monkeypatch):
    run_to(configure(), 3, checkpoint=3)
    forked = configure(run__seed=5, checkpoint__resume="fork")
    real, done = os.rename, []

    def rename(old: Path, new: Path) -> None:
        if "earlier" in str(new) or "forked" in str(old):
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(new)
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        open_run(forked)
    monkeypatch.undo()
    os.chdir(task_folder)
    run = start(forked)
    assert run.saved.reached == 0 and run.saved.manifest is not None
    assert (run.saved.manifest.path / WEIGHTS).read_bytes() == b"weights 3"


def test_R20_a_run_that_cannot_be_paced_on_is_refused_before_it_waits(configure, task_folder):
    run_to(configure(learner__groups_per_step=32), 3)
    for size in (8, 128):
        with pytest.raises(ConfigError, match=rf"learner.groups_per_step: 32 before, {size} now \(pacing counts"):
            open_run(configure(learner__groups_per_step=size))


# -- R5, R4: what is there of a run


def damage(file: Path) -> None:
    file.write_bytes(flipped(file.read_bytes(), 8 * (file.stat().st_size // 2)))


@pytest.mark.parametrize("name", [WEIGHTS, "desk_state.bin", "MANIFEST.json"])
def test_R5_a_run_whose_checkpoints_are_all_unreadable_does_not_start_over(name, configure, task_folder):
    run_to(configure(), 3, checkpoint=2)
    save(configure(), 3)
    run_dir = Path(configure().run.dir)
    for folder in (run_dir / "checkpoints").glob("step_*"):
        damage(folder / name)
    before = files_of(run_dir)
    with pytest.raises(
        CheckpointError, match=r"none of the checkpoints .*step_3, step_2.*checkpoint.resume=fresh"
    ) as error:
        open_run(configure())
    assert error.value.exit_code == 6 and files_of(run_dir) == before
    with pytest.raises(CheckpointError, match="needs a checkpoint to begin from"):
        open_run(configure(checkpoint__resume="fork"))
    run = start(configure(checkpoint__resume="fresh"))
    assert (run.saved.manifest, run.saved.reached) == (None, 0)
    assert files_of(run_dir / "earlier" / "1") == before
    assert start(configure(checkpoint__resume="fresh")).saved.reached == 0
    assert not (run_dir / "earlier" / "2").exists()


def test_R5_one_readable_checkpoint_is_enough(configure, task_folder):
    run_to(configure(), 3, checkpoint=2)
    save(configure(), 3)
    damage(Path(configure().run.dir) / "checkpoints" / "step_3" / WEIGHTS)
    saved = start(configure()).saved
    assert (saved.version, saved.reached) == (2, 3)


def test_R5_fresh_and_fork_go_on_with_a_run_that_can_be_gone_on_with(configure, task_folder):
    run_to(configure(), 3, checkpoint=2)
    for word in ("fresh", "fork", "auto"):
        assert start(configure(checkpoint__resume=word)).saved.reached == 3
    with pytest.raises(ConfigError, match="checkpoint.resume=never"):
        open_run(configure(checkpoint__resume="never"))


def test_R5_a_missing_folder_of_checkpoints_is_no_new_run(configure, task_folder):
    run_to(configure(), 3, checkpoint=3)
    run_dir = Path(configure().run.dir)
    shutil.rmtree(run_dir / "checkpoints")
    assert start(configure()).saved.reached == 3, "the journal is whole: it holds every step"
    segment = run_dir / "journal" / "00000001.segment"
    segment.rename(run_dir / "gone")
    with pytest.raises(CheckpointError, match="goes on from a checkpoint, and there is none"):
        start(configure())


def test_R4_a_journal_that_ends_before_the_checkpoint_is_refused(configure, task_folder):
    run_to(configure(), 3, checkpoint=3)
    run_dir = Path(configure().run.dir)
    shutil.rmtree(run_dir / "journal")
    with pytest.raises(JournalError, match="ends at version 0, before the checkpoint of version 3") as error:
        open_run(configure())
    assert error.value.exit_code == 6
    run = start(configure(checkpoint__resume="fork"))
    assert run.saved.manifest is not None and run.saved.version == 0


# -- R13: counts of starts


@pytest.mark.parametrize("text", ["", "1\n", "0", "garbage", "-3", "9" * 40, "\x00\x00"])
def test_R13_a_run_epoch_that_is_old_or_damaged_is_said_and_repaired(text, configure, task_folder, caplog):
    run_to(configure(), 1)
    for _ in range(4):
        start(configure())
    run_dir = Path(configure().run.dir)
    assert run_epoch_of(run_dir) == 5
    (run_dir / "run_epoch").write_text(text)
    run = open_run(configure())
    assert run.begin(run_dir, 0.0) == 6
    run.journal.close()
    assert "the count goes on from there" in caplog.text
    (run_dir / "run_epoch").unlink()
    run = open_run(configure())
    assert run.begin(run_dir, 0.0) == 7
    run.journal.close()


def test_R13_checkpoints_know_the_run_epoch_too(configure, task_folder):
    run_to(configure(), 3)
    run_dir = Path(configure().run.dir)
    write_checkpoint(
        run_dir / "checkpoints",
        3,
        lambda folder: None,
        run_epoch=8,
        desk_state=SavedDesk(SavedLeases(6, 0, Frontier(6), [], 0, {})).encode(),
    )
    run = open_run(configure())
    assert run.begin(run_dir, 0.0) == 9
    run.journal.close()


# -- R11: a finished run


def test_R11_a_finished_run_is_finished_until_it_gets_more_steps(configure, task_folder):
    run_to(configure(), 6, checkpoint=6, finished=True)
    for steps, finished in ((6, True), (7, False)):
        run = open_run(configure(run__steps=steps))
        assert run.is_finished(steps) == finished
        run.journal.close()
    run_to(configure(run__steps=8), 7)
    run = open_run(configure(run__steps=8))
    assert not run.is_finished(8)
    run.journal.close()


def test_R11_a_run_that_was_stopped_is_not_finished(configure, task_folder):
    run_to(configure(), 6, checkpoint=6)
    run = open_run(configure())
    assert not run.is_finished(6)
    run.journal.close()


def test_R11_a_finished_run_that_is_started_again_ends_at_once(configure, task_folder, caplog):
    run_to(configure(), 6, checkpoint=6, finished=True)
    before = files_of(Path(configure().run.dir))
    with caplog.at_level("INFO"):
        assert run_learner(configure()) == 0
    assert "is finished: all its 6 steps are trained" in caplog.text
    assert files_of(Path(configure().run.dir)) == before


def start_generator(folder: Path) -> int:
    identity = claim_identity(folder, "g")
    identity.lock.close()
    return identity.incarnation


def test_R13_an_incarnation_file_that_is_empty_or_changed_is_refused_with_the_remedy(tmp_path):
    assert [start_generator(tmp_path) for _ in range(3)] == [1, 2, 3]
    path = tmp_path / "g.incarnation"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(ConfigError, match="write the highest incarnation"):
            start_generator(tmp_path)
    for text in ("", "\n", "garbage", "-1", "9" * 30, whole[:-5].decode()):
        path.write_text(text)
        with pytest.raises(ConfigError, match="write the highest incarnation"):
            start_generator(tmp_path)
    path.write_bytes(whole)
    assert start_generator(tmp_path) == 4


def test_R13_the_number_that_earlier_releases_and_people_write_counts_on(tmp_path):
    (tmp_path / "g.incarnation").write_text("41\n")
    assert [start_generator(tmp_path) for _ in range(2)] == [42, 43]


def test_R13_an_incarnation_that_fell_back_is_refused_by_the_learner(configure, task_folder, tmp_path):
    config = configure()
    sessions = make_sessions(config, 1)

    def hello() -> Refusal | Welcome:
        identity = claim_identity(tmp_path, "g")
        identity.lock.close()
        [frame] = _session(config, identity).due(float("inf"))
        return sessions.hello(os.urandom(4), decode(frame, max_bytes=2**20), version=0, now=0.0).reply

    assert isinstance(hello(), Welcome)
    backup = (tmp_path / "g.incarnation").read_bytes()
    assert isinstance(hello(), Welcome)
    (tmp_path / "g.incarnation").write_bytes(backup)
    refusal = hello()
    assert isinstance(refusal, Refusal) and refusal.code == "fenced"


# -- R15, R16, R21: what stays on disk


def test_R15_run_folders_are_for_their_user_alone(configure, task_folder, tmp_path):
    start(configure())
    assert Path(configure().run.dir).stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o077 for file in Path(configure().run.dir).glob("*.json")} == {0}
    claim_identity(tmp_path / "other" / "generators", "g").lock.close()
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o700
    quickstart = (ROOT / "bin" / "quickstart").read_text()
    assert quickstart.index("umask 077") < quickstart.index('mkdir -p "$RUN"')


def test_R16_the_newest_step_is_read_from_the_end_of_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert newest_version(path, "step") == 0
    line = json.dumps({"kind": "sync", "version": 9, "filler": "x" * 1000}).encode() + b"\n"
    step = json.dumps({"kind": "step", "version": 7}).encode() + b"\n"
    for content, newest in (
        (b"", 0),
        (line * 3, 0),
        (step, 7),
        (step[:-1], 7),
        (step + line * 200, 7),
        (line + step + step[:-5], 7),
        (b"no json\n" + step + b"no json\n", 7),
    ):
        path.write_bytes(content)
        assert newest_version(path, "step") == newest
    with path.open("wb") as file:
        file.truncate(2**35)  # 32 GiB that are not there
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + step + line * 10)
    started = time.monotonic()
    assert newest_version(path, "step") == 7
    assert time.monotonic() - started < 1.0 + LATE_S  # 32 GiB read whole would take a minute


def test_R16_a_log_that_grows_is_kept_within_its_size_while_another_process_writes_it(tmp_path):
    path = tmp_path / "trainer.log"
    with path.open("ab", buffering=0) as writer:
        for number in range(1000):
            writer.write(b"%06d\n" % number)
            limit_log(path, max_bytes=700)
        assert path.stat().st_size <= 707 and (tmp_path / "trainer.log.1").stat().st_size <= 707
        kept = (tmp_path / "trainer.log.1").read_bytes() + path.read_bytes()
        assert kept.endswith(b"000999\n") and len(kept) > 707 and b"\0" not in kept
    assert not limit_log(tmp_path / "nothing.log")


def test_R21_keep_counts_checkpoints_that_verify(configure, task_folder):
    root = Path(configure().run.dir) / "checkpoints"
    for version in (1, 2, 3):
        save(configure(), version)
    assert sorted(path.name for path in root.glob("step_*")) == ["step_2", "step_3"]
    damage(root / "step_3" / WEIGHTS)
    save(configure(), 4)
    assert {"step_2", "step_4"} <= {path.name for path in root.glob("step_*")}, "the good one is not deleted"
    save(configure(), 5)
    assert sorted(path.name for path in root.glob("step_*")) == ["step_4", "step_5"]
    damage(root / "step_5" / WEIGHTS)
    damage(root / "step_4" / WEIGHTS)
    save(configure(), 6)
    assert sorted(path.name for path in root.glob("step_*")) == ["step_4", "step_5", "step_6"]


# -- R18, R16: the disk has limits


class Disk:
    """A disk whose free space a test sets."""

    free = 10 * GIB

    def measure(self, folder: Path) -> int:
        assert folder.is_dir()
        return self.free


def test_R18_below_the_floor_there_is_one_alarm_a_minute_and_with_room_it_goes_on(tmp_path, caplog):
    journal, disk = Journal.open(tmp_path), Disk()
    room = DiskRoom(journal, max_bytes=GIB, min_free_bytes=GIB, measure=disk.measure)
    assert room.has_room(0.0)
    disk.free = GIB - 1
    assert room.has_room(0.5), "it looks once a second"
    assert not any(room.has_room(1.0 + second) for second in range(59))
    [said] = [record.getMessage() for record in caplog.records]
    assert "run.min_free_gib=1" in said and "no leases and no credit" in said
    assert not room.has_room(61.0) and len(caplog.records) == 2
    disk.free = GIB
    assert room.has_room(62.0)
    journal.close()


def test_R18_a_journal_at_its_limit_takes_no_more(tmp_path, caplog):
    journal = Journal.open(tmp_path)
    room = DiskRoom(journal, max_bytes=1000, min_free_bytes=0, measure=Disk().measure)
    assert room.has_room(0.0)
    journal.append(make_group(0, body=bytes(1000)), 0.0)
    assert not room.has_room(1.0) and "run.journal_max_gib" in caplog.text
    journal.close()


def test_R18_without_room_no_training_lease_and_no_credit_but_training_and_evaluation_go_on(tmp_path):
    parts = make_parts(tmp_path)
    session = parts.connect()
    parts.leases.paused = parts.sessions.paused = True
    assert parts.leases.grant("g1", 0, 4, 0, 0.0) == [] and not parts.leases.may_grant(0)
    assert parts.sessions.ack(session).credit_bytes == 0
    parts.leases.start_eval(0, 3, 60.0, 0.0)
    assert parts.leases.may_grant(0)
    leases = parts.leases.grant("g1", 0, 8, 0, 0.0)
    assert {lease.key.kind for lease in leases} == {LeaseKind.EVAL} and len(leases) == 3
    parts.leases.paused = parts.sessions.paused = False
    assert parts.leases.grant("g1", 0, 4, 0, 0.0) and parts.sessions.ack(session).credit_bytes > 0
    parts.journal.close()


def test_R18_without_credit_a_generator_sends_what_evaluations_wait_for_and_keeps_the_rest():
    hello = Hello(PROTOCOL_VERSION, "g", 1, 0, "m", "t", "k", 1, 1)
    session = GeneratorSession(hello, run_name="r", outbox_bytes=2**20, max_frame_bytes=2**20, now=0.0)
    session.receive(Welcome(1, "r", 0, 2**20, 0, 1.0, 2**20), 0.0)
    session.receive(Ack(1, 0, [], 0), 0.0)
    kinds = [LeaseKind.TRAIN, LeaseKind.EVAL, LeaseKind.TRAIN, LeaseKind.EVAL]
    for ordinal, kind in enumerate(kinds):
        session.put(
            lambda seq, epoch, k=kind, n=ordinal: LeaseFailed(seq, epoch, k, n, 0, FailureReason.ENGINE, ""), 0.0
        )
    sent = [decode(frame, max_bytes=2**20) for frame in session.due(1.0)]
    assert [message.seq for message in sent] == [2, 4]
    session.receive(Ack(1, 0, [2, 4], 2**20), 1.0)
    assert [decode(frame, max_bytes=2**20).seq for frame in session.due(1.0)] == [1, 3]


def test_R16_a_journal_without_checkpoints_in_between_asks_for_one_when_it_has_grown(tmp_path):
    journal = Journal.open(tmp_path, segment_bytes=2**16)
    dealer = BatchDealer(journal, PolicyVersions(), checkpoint_every=0, last_step=1000, checkpoint_bytes=100_000)
    saved = []
    for version in range(200):
        journal.append(make_group(version, body=bytes(10_000)), 0.0)
        journal.append(StepTaken(version, ((version, 0),)), 0.0)
        journal.make_durable()
        if dealer._saves(version + 1):
            saved.append(version + 1)
            journal.delete_before(([0, *saved])[-2])
        assert journal.num_bytes < 400_000
    assert 15 < len(saved) < 25
    journal.close()
