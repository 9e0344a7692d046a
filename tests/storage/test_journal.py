"""The journal: what was made durable is there after any crash, and what is damaged is counted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from asyncrl.errors import JournalError
from asyncrl.storage.journal import DURABLE_AFTER_BYTES, DURABLE_AFTER_S, Journal
from asyncrl.storage.records import (
    GroupFiltered,
    GroupsDropped,
    MessageSeen,
    PromptGivenUp,
    StepTaken,
    StoredGroup,
)
from asyncrl.storage.run_epoch import next_run_epoch, run_epoch_of
from asyncrl.storage.segment import FRAME_BYTES, HEADER_BYTES, encode, read_salt
from tests.replay.replay_making import make_group

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def write(folder, records, **options):
    """Writes records, makes them durable together and returns their locations."""
    journal = Journal.open(folder, **options)
    locations = [journal.append(record, now=0.0) for record in records]
    journal.make_durable()
    journal.close()
    return locations


def read(folder):
    """(records, torn bytes, damage) of a journal on disk."""
    journal = Journal.open(folder)
    records = [entry.record for entry in journal.read_all()]
    found = (records, journal.torn_bytes, journal.damage)
    journal.close()
    return found


def segments(folder):
    return sorted(Path(folder).glob("*.segment"))


EVERY_KIND = [
    make_group(0, num_tokens=(3, 700), body=bytes(range(256))),
    StepTaken(7, ((0, 0), (5, 1001))),
    MessageSeen("host-3", 4, 99),
    GroupsDropped(((3, 0),)),
    PromptGivenUp(12),
    GroupFiltered("host-3", 4, 100, 13, 2001),
]


# -- reading what was written -----------------------------------------------------------------------------------


def test_every_kind_of_record_comes_back_as_it_was(tmp_path):
    locations = write(tmp_path, EVERY_KIND)
    assert read(tmp_path) == (EVERY_KIND, 0, [])
    journal = Journal.open(tmp_path)
    assert [journal.read_all().read_at(location) for location in locations] == EVERY_KIND
    assert [entry.location for entry in journal.read_all()] == locations


def test_records_of_several_runs_of_the_learner_follow_each_other(tmp_path):
    write(tmp_path, EVERY_KIND[:2])
    write(tmp_path, EVERY_KIND[2:])
    assert read(tmp_path)[0] == EVERY_KIND


def test_nothing_is_on_disk_before_it_is_made_durable(tmp_path):
    journal = Journal.open(tmp_path)
    journal.append(make_group(0), now=0.0)
    assert journal.pending_bytes > 0 and list(journal.read_all()) == []
    journal.make_durable()
    assert journal.pending_bytes == 0 and len(list(journal.read_all())) == 1


def test_making_durable_is_due_soon_after_the_first_record_and_at_once_when_much_is_pending(tmp_path):
    journal = Journal.open(tmp_path)
    assert journal.durable_due == float("inf")
    journal.append(make_group(0), now=100.0)
    journal.append(make_group(1), now=100.01)
    assert journal.durable_due == 100.0 + DURABLE_AFTER_S
    journal.append(make_group(2, body=bytes(DURABLE_AFTER_BYTES)), now=100.015)
    assert journal.durable_due <= 100.015
    journal.make_durable()
    assert journal.durable_due == float("inf")


def test_segments_rotate_and_a_record_larger_than_a_segment_gets_its_own(tmp_path):
    groups = [make_group(n, body=bytes([n]) * size) for n, size in enumerate([400, 400, 400, 5000, 10])]
    write(tmp_path, groups, segment_bytes=1000)
    assert [path.name for path in segments(tmp_path)] == [f"0000000{n}.segment" for n in (1, 2, 3, 4)]
    assert read(tmp_path) == (groups, 0, [])


# -- damage -----------------------------------------------------------------------------------------------------


def small_log(folder):
    """Four records and the byte offset at which each of them ends."""
    groups = [make_group(n, body=bytes([n]) * 3, num_tokens=()) for n in range(4)]
    write(folder, groups)
    ends = [HEADER_BYTES]
    for group in groups:
        ends.append(ends[-1] + len(encode(group, salt=0)))
    return groups, ends


def test_a_tail_torn_at_any_byte_loses_only_the_record_it_tore(tmp_path):
    groups, ends = small_log(tmp_path / "whole")
    data = segments(tmp_path / "whole")[0].read_bytes()
    assert len(data) == ends[-1]
    folder = tmp_path / "torn"
    folder.mkdir()
    path = folder / "00000001.segment"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        whole = sum(end <= length for end in ends[1:])
        torn = length - ends[whole] if length >= ends[0] else length
        records, torn_bytes, damage = read(folder)
        assert (records, torn_bytes, damage) == (groups[:whole], torn, [])
        assert path.stat().st_size == ends[whole]
        assert read(folder)[1] == 0, "the torn end is gone after the first open"


def test_after_a_torn_tail_new_records_are_found(tmp_path):
    groups, _ = small_log(tmp_path)
    path = segments(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1])
    write(tmp_path, [make_group(9)])
    assert read(tmp_path) == ([*groups[:3], make_group(9)], 0, [])


def test_a_flipped_byte_anywhere_in_a_middle_record_costs_that_record_only_and_is_reported(tmp_path):
    groups, ends = small_log(tmp_path)
    path = segments(tmp_path)[0]
    data = path.read_bytes()
    for offset in range(ends[1], ends[2]):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0x40]) + data[offset + 1 :])
        records, torn_bytes, damage = read(tmp_path)
        assert records == [groups[0], *groups[2:]] and torn_bytes == 0
        assert damage == [((1, ends[1]), ends[2] - ends[1])]


def test_a_hole_over_several_records_is_reported_as_one(tmp_path):
    groups, ends = small_log(tmp_path)
    path = segments(tmp_path)[0]
    data = path.read_bytes()
    path.write_bytes(data[: ends[0] + 3] + bytes(ends[3] - ends[0] - 3) + data[ends[3] :])
    assert read(tmp_path) == (groups[3:], 0, [((1, ends[0]), ends[3] - ends[0])])


def test_damage_at_the_end_of_a_closed_segment_is_no_torn_tail(tmp_path):
    groups = [make_group(n, body=bytes(500)) for n in range(3)]
    write(tmp_path, groups, segment_bytes=600)
    first = segments(tmp_path)[0]
    first.write_bytes(first.read_bytes()[:-1] + b"\xff")
    records, torn_bytes, damage = read(tmp_path)
    assert records == groups[1:] and torn_bytes == 0
    assert damage == [((1, HEADER_BYTES), len(encode(groups[0], salt=0)))]


def test_a_journal_record_inside_a_rollout_is_never_taken_for_a_record(tmp_path):
    hidden = encode(make_group(666), salt=0)
    groups = [make_group(0, body=hidden * 3), make_group(1)]
    [location, _] = write(tmp_path, groups)
    path = segments(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[location.offset + FRAME_BYTES + 2] ^= 1
    path.write_bytes(data)
    records, _, damage = read(tmp_path)
    assert records == groups[1:] and len(damage) == 1


def test_reading_a_damaged_record_by_its_place_fails_by_name(tmp_path):
    [location] = write(tmp_path, [make_group(0)])
    path = segments(tmp_path)[0]
    journal = Journal.open(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(JournalError, match=f"no whole record at byte {location.offset} of .*00000001.segment"):
        journal.read_all().read_at(location)
    with pytest.raises(JournalError, match="No such file"):
        journal.read_all().read_at(location._replace(segment=8))


def test_a_record_of_another_release_stops_the_start_and_is_not_skipped(tmp_path):
    small_log(tmp_path)
    payload = b"future"
    checked = len(payload).to_bytes(4, "little") + bytes([77])
    salt = read_salt(segments(tmp_path)[0].read_bytes())
    crc = zlib.crc32(payload, zlib.crc32(checked, salt)).to_bytes(4, "little")
    whole = encode(PromptGivenUp(1), salt)[:4] + checked[:4] + crc + checked[4:] + payload
    with segments(tmp_path)[0].open("ab") as file:
        file.write(whole)
    with pytest.raises(JournalError, match="unknown kind 77"):
        Journal.open(tmp_path)
    segments(tmp_path)[0].write_bytes(b"something else altogether, for sure")
    with pytest.raises(JournalError, match="begins with b'something else alt'"):
        Journal.open(tmp_path)


# -- deleting ---------------------------------------------------------------------------------------------------


def journal_of_steps(folder, num_steps):
    """One group per segment, each trained at once: step v trains ordinal v."""
    journal = Journal.open(folder, segment_bytes=250)
    for version in range(num_steps):
        journal.append(make_group(version, body=bytes(150)), now=0.0)
        journal.append(StepTaken(version, ((version, 0),)), now=0.0)
    journal.make_durable()
    return journal


def test_segments_are_deleted_when_a_checkpoint_covers_all_that_is_in_them(tmp_path):
    journal = journal_of_steps(tmp_path, 6)
    assert len(segments(tmp_path)) == 6
    assert journal.delete_before(0) == 0
    assert journal.delete_before(3) == 2, "the segment with the step that made the checkpoint stays"
    assert [path.stem for path in segments(tmp_path)] == ["00000003", "00000004", "00000005", "00000006"]
    assert journal.delete_before(3) == 0
    assert journal.delete_before(6) == 3
    journal.close()
    assert [record.ordinal for record in read(tmp_path)[0] if isinstance(record, StoredGroup)] == [5]


def test_a_segment_with_a_group_that_waits_in_the_buffer_stays(tmp_path):
    journal = Journal.open(tmp_path, segment_bytes=250)
    journal.append(make_group(100, body=bytes(150)), now=0.0)
    for version in range(3):
        journal.append(make_group(version, body=bytes(150)), now=0.0)
        journal.append(StepTaken(version, ((version, 0),)), now=0.0)
    journal.make_durable()
    assert journal.delete_before(3) == 0
    journal.append(StepTaken(3, ((100, 0),)), now=0.0)
    journal.make_durable()
    assert journal.delete_before(3) == 0, "a restart from version 3 trains it again"
    assert journal.delete_before(4) == 3


def test_a_dropped_group_keeps_no_segment(tmp_path):
    journal = Journal.open(tmp_path, segment_bytes=250)
    journal.append(make_group(100, body=bytes(150)), now=0.0)
    journal.append(make_group(0, body=bytes(150)), now=0.0)
    journal.append(GroupsDropped(((100, 0),)), now=0.0)
    journal.append(make_group(1, body=bytes(150)), now=0.0)
    journal.append(StepTaken(0, ((0, 0), (1, 0))), now=0.0)
    journal.make_durable()
    assert journal.delete_before(1) == 2


def test_what_may_be_deleted_is_known_again_after_a_restart(tmp_path):
    journal_of_steps(tmp_path, 6).close()
    journal = Journal.open(tmp_path, segment_bytes=250)
    assert journal.delete_before(5) == 4


def test_a_step_taken_anew_makes_the_groups_of_the_old_one_wait_again(tmp_path):
    journal = journal_of_steps(tmp_path, 3)
    journal.append(make_group(50, body=bytes(150)), now=0.0)
    journal.append(StepTaken(1, ((50, 0),)), now=0.0)
    journal.append(make_group(51, body=bytes(150)), now=0.0)
    journal.append(StepTaken(2, ((51, 0),)), now=0.0)
    journal.append(StepTaken(3, ((1, 0),)), now=0.0)
    journal.make_durable()
    assert journal.delete_before(3) == 1, "ordinal 1 was trained at version 3 and ordinal 2 not yet"
    assert journal.delete_before(4) == 1
    assert Path(segments(tmp_path)[0]).stem == "00000003"


# -- one learner at a time --------------------------------------------------------------------------------------


def run_python(code, *args, **options):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *code, *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_a_second_learner_on_the_same_run_is_refused_and_told_the_pid_of_the_first(tmp_path):
    writer = run_python([HERE / "journal_writer.py"], tmp_path, 1)
    try:
        assert writer.stdout.readline() == b"ready\n"
        with pytest.raises(JournalError, match=f"learner with pid {writer.pid}; stop that one"):
            Journal.open(tmp_path)
    finally:
        writer.kill()
        writer.communicate(timeout=10)
    Journal.open(tmp_path).close()


def test_the_run_epoch_rises_by_one_at_each_start_and_survives(tmp_path):
    assert run_epoch_of(tmp_path / "new" / "run") == 0
    assert [next_run_epoch(tmp_path / "new" / "run") for _ in range(3)] == [1, 2, 3]
    assert run_epoch_of(tmp_path / "new" / "run") == 3
    assert (tmp_path / "new" / "run" / "run_epoch").read_text() == "3\n"


def test_a_damaged_run_epoch_is_not_guessed(tmp_path):
    (tmp_path / "run_epoch").write_text("")
    with pytest.raises(JournalError, match="holds '', not a number"):
        next_run_epoch(tmp_path)


# -- crashes and full disks -------------------------------------------------------------------------------------


def test_nothing_acknowledged_is_lost_when_the_learner_is_killed_at_any_moment(tmp_path):
    rng = random.Random(0)
    acknowledged, lasts = 0, []
    for life in range(1, 26):
        writer = run_python([HERE / "journal_writer.py"], tmp_path, life)
        assert writer.stdout.readline() == b"ready\n", writer.communicate(timeout=10)
        # Killed when a given number of acknowledgements was read: the writer is by then somewhere in the next ones.
        acks = [writer.stdout.readline() for _ in range(rng.randint(0, 40))]
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate(timeout=10)
        acks += rest.splitlines(keepends=True)
        complete = [int(line) for line in acks if line.endswith(b"\n")]
        lasts.append(complete[-1] if complete else life * 1_000_000 - 1)
        acknowledged += lasts[-1] - life * 1_000_000 + 1
    records, _, damage = read(tmp_path)
    assert damage == []
    ordinals = [record.ordinal for record in records]
    assert ordinals == sorted(set(ordinals))
    for life, last in enumerate(lasts, start=1):
        start = life * 1_000_000
        recovered = [ordinal for ordinal in ordinals if start <= ordinal < start + 1_000_000]
        assert recovered == list(range(start, start + len(recovered))) and len(recovered) > last - start
    assert acknowledged > 500


def write_until_full(folder):
    """Appends 10 kB groups until the disk refuses. Returns how many were durable, and checks what the journal says."""
    journal = Journal.open(folder)
    durable = 0
    refused = pytest.raises(JournalError, match=r"cannot write \d+ bytes .*nothing of it was acknowledged")
    with refused:  # which of the appends fails depends on the disk
        while True:
            journal.append(make_group(durable, body=bytes(10_000)), now=0.0)
            journal.make_durable()
            durable += 1
    with pytest.raises(JournalError, match="takes no more records: an earlier write failed"):
        journal.append(make_group(999), now=0.0)
    with pytest.raises(JournalError, match="takes no more records"):
        journal.make_durable()
    journal.close()
    return durable


def test_a_full_disk_acknowledges_nothing_more_and_the_journal_resumes_where_it_was(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", tmp_path], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        durable = write_until_full(tmp_path / "journal")
        assert 10 < durable < 26
        records, torn_bytes, damage = read(tmp_path / "journal")
        assert ([record.ordinal for record in records], torn_bytes, damage) == (list(range(durable)), 0, [])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_file_that_may_not_grow_is_handled_as_a_full_disk(tmp_path):
    # In a process of its own: the limit is one-way. Python ignores SIGXFSZ, so the write fails with EFBIG.
    code = (
        "import sys, test_journal as t, resource;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "print(t.write_until_full(sys.argv[1]))"
    )
    child = run_python(["-c", code], tmp_path / "journal")
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0, err.decode()
    durable = int(out)
    assert durable == 9
    assert [record.ordinal for record in read(tmp_path / "journal")[0]] == list(range(durable))


def test_a_failed_write_is_final_because_trying_again_could_lie(tmp_path):
    failing = []

    def flush(fd):
        if failing:
            raise failing.pop()
        os.fdatasync(fd)

    journal = Journal.open(tmp_path, flush=flush)
    journal.append(make_group(0), now=0.0)
    journal.make_durable()
    journal.append(make_group(1), now=0.0)
    failing.append(OSError(5, "Input/output error"))
    with pytest.raises(JournalError, match="Input/output error"):
        journal.make_durable()
    with pytest.raises(JournalError, match="takes no more records"):
        journal.make_durable()
    journal.close()
    assert read(tmp_path) == ([make_group(0)], 0, [])


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=r"cannot open the journal .*file/journal"):
        Journal.open(tmp_path / "file" / "journal")
