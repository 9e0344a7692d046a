"""Typed metrics and their sinks."""

import io
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from asyncrl.config import Config
from asyncrl.metrics import METRICS_FILE, EvalMetrics, Metrics, StepMetrics, SyncMetrics
from asyncrl.metrics.alarms import Alarms
from asyncrl.metrics.json_records import to_record
from asyncrl.metrics.sinks import ConsoleSink, JsonlSink, clock_time, read_records
from asyncrl.metrics.types import DERIVED, youngest_age
from asyncrl.metrics.wandb import WandbRun, WandbSink, flat_record, has_wandb_key, kept_id


def step(version=1, **given):
    measured = {
        "interval_s": 2.0,
        "reward_mean": 0.5,
        "reward_std": 0.1,
        "policy_age_mean": 1.5,
        "policy_age_max": 3,
    }
    return StepMetrics(version=version, **{**measured, **given})


def sync(version=1, **given):
    return SyncMetrics(version=version, **{"total_ms": 84.0, "generators_committed": 1, **given})


def evaluation(version=1, **given):
    return EvalMetrics(version=version, **{"prompts": 8, "reward_mean": 0.25, **given})


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


# -- the records


def test_rates_and_shares_follow_their_formulas():
    measured = step(
        tokens_generated=500,
        tokens_trained=400,
        tokens_filtered=100,
        rollouts_acked=40,
        rollouts_dropped=5,
        learner_idle_s=0.5,
        generator_busy_s=3.0,
        generator_idle_s=1.0,
        trained_by_grant_age={"0": {"rollouts": 3, "tokens": 30}, "2": {"rollouts": 1, "tokens": 70}},
    )
    record = to_record(measured)
    expected = {
        "tokens_generated_per_s": 250.0,
        "tokens_trained_per_s": 200.0,
        "learner_idle_share": 0.25,
        "generator_idle_share": 0.25,
        "lost_share": 0.125,
        "filtered_token_share": 0.2,
        "grant_age_mean": 0.5,
        "grant_age_token_mean": 1.4,
    }
    assert {name: record[name] for name in DERIVED} == expected


def test_what_was_not_measured_is_null_and_never_zero():
    record = to_record(step(interval_s=0.0))
    for name in ("loss", "kl_reference", "generators_alive", "learner_idle_share", "generator_idle_share"):
        assert record[name] is None


def test_lost_rollouts_are_those_failed_or_over_age_but_not_those_returned():
    measured = step(
        rollouts_acked=80, rollouts_dropped=10, rollouts_failed={"deadline": 16, "reward_error": 4, "returned": 8}
    )
    assert measured.lost_share == pytest.approx(30 / 100)
    assert step(rollouts_failed={"returned": 8}).lost_share is None


@pytest.mark.parametrize(("bucket", "youngest"), [("0", 0), ("1", 1), ("2-3", 2), ("32-63", 32), ("64+", 64)])
def test_age_buckets_are_sorted_by_their_youngest_age(bucket, youngest):
    assert youngest_age(bucket) == youngest


def test_trainer_figures_find_their_fields_and_the_rest_is_kept():
    trainer = {
        "loss": 0.25,
        "tokens_trained": 512.0,
        "reward_mean": 0.5,
        "reward_std": 0.1,
        "policy_age_mean": 1.0,
        "policy_age_max": 2.0,
        "model_inputs": 9.0,
    }
    joined = StepMetrics.of_step(trainer, version=3, interval_s=1.0, rollouts_acked=16)
    assert (joined.loss, joined.tokens_trained, joined.policy_age_max, joined.rollouts_acked) == (0.25, 512, 2, 16)
    assert isinstance(joined.tokens_trained, int) and isinstance(joined.policy_age_max, int)
    assert joined.extra == {"model_inputs": 9.0}


def test_what_the_desk_measured_wins_over_the_trainer():
    trainer = {"reward_mean": 9.0, "reward_std": 0.0, "policy_age_mean": 0.0, "policy_age_max": 0.0}
    assert StepMetrics.of_step(trainer, version=1, interval_s=1.0, reward_mean=0.5).reward_mean == 0.5


def test_figures_that_json_cannot_hold_become_null_and_are_named():
    record = to_record(step(loss=float("nan"), reward_parts={"format": float("inf"), "correct": 1.0}))
    assert record["loss"] is None
    assert record["reward_parts"] == {"format": None, "correct": 1.0}
    assert sorted(record["non_finite"]) == ["loss", "reward_parts.format"]
    record = to_record(step(age_health={"2-3": {"tokens": 8.0, "ess_share": float("nan")}}))
    assert (record["age_health"], record["non_finite"]) == (
        {"2-3": {"tokens": 8.0, "ess_share": None}},
        ["age_health.2-3.ess_share"],
    )
    json.dumps(record, allow_nan=False)


def test_numpy_scalars_are_written_as_numbers():
    record = to_record(step(loss=np.float32(0.5), reward_mean=np.float64(0.25)))
    assert (json.dumps(record["loss"]), json.dumps(record["reward_mean"])) == ("0.5", "0.25")


# -- the file


def test_lines_are_in_the_file_as_soon_as_they_are_logged(tmp_path):
    sink = JsonlSink(tmp_path / "run" / "m.jsonl")
    for version in (1, 2):
        sink.write(step(version))
        records, unreadable = read_records(sink.path)
        assert ([record["version"] for record in records], unreadable) == (list(range(1, version + 1)), 0)


@pytest.mark.parametrize("cut", [1, 5, 200])
def test_a_torn_last_line_is_repaired_at_the_next_start(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    for version in (1, 2):
        sink = JsonlSink(path)
        sink.write(step(version))
        sink.close()
    os.truncate(path, path.stat().st_size - cut)
    sink = JsonlSink(path)
    sink.write(step(3))
    versions = [json.loads(line)["version"] for line in path.read_text().splitlines()]
    # Without its line end only, the second line is still whole.
    assert versions == ([1, 2, 3] if cut == 1 else [1, 3])


def test_a_process_killed_while_writing_leaves_a_file_that_goes_on(tmp_path):
    path = tmp_path / "m.jsonl"
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from tests.metrics.test_metrics import step\n"
        "from asyncrl.metrics.sinks import JsonlSink\n"
        "from pathlib import Path\n"
        "sink = JsonlSink(Path(sys.argv[1]))\n"
        "version = 0\n"
        "while True:\n"
        "    version += 1\n"
        "    sink.write(step(version))\n"
        "    print(version, flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(path), str(Path(__file__).parents[2])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        while int(writer.stdout.readline()) < 50:
            pass
        writer.send_signal(signal.SIGKILL)
    JsonlSink(path).write(step(999))
    records, unreadable = read_records(path)
    versions = [record["version"] for record in records]
    assert unreadable == 0
    assert versions == [*range(1, len(versions)), 999] and len(versions) > 50


def test_a_full_disk_is_said_once_and_the_file_recovers(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path)
    sink.write(step(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # The kernel refuses to let the file grow: the next write is cut short, like on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        for version in (2, 3):
            sink.write(step(version))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    sink.write(step(4))
    assert [json.loads(line)["version"] for line in path.read_text().splitlines()] == [1, 4]
    assert sum("cannot be written" in message for message in caplog.messages) == 1


def test_unreadable_lines_are_counted(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"version": 1}\n[1]\n{"vers\n\n{"version": 2}\n')
    records, unreadable = read_records(path)
    assert ([record["version"] for record in records], unreadable) == ([1, 2], 2)


# -- the console


def console(total_steps=10, **given):
    clock, stream = FakeClock(), io.StringIO()
    return ConsoleSink(total_steps, stream, clock=clock, **given), clock, stream


def test_the_progress_line_shows_what_matters():
    sink, _, stream = console(total_steps=120)
    sink.write(sync(11, total_ms=84.4))
    sink.write(
        step(
            12,
            wall_s=83.0,
            tokens_generated=4620,
            tokens_trained=4500,
            learner_idle_s=0.06,
            generator_busy_s=2.0,
            generator_idle_s=0.02,
        )
    )
    line = stream.getvalue()
    for part in (
        "01:23 step  12/120",
        "reward  0.500",
        "age 1.50 max 3",
        "2,310",
        "2,250",
        "3%",
        "1%",
        "84 ms",
    ):
        assert part in line
    assert line.count("\n") == 1 and len(line) < 130


def test_alarms_stand_where_a_narrow_terminal_does_not_cut_them_off():
    sink, _, stream = console()
    sink.write(step(1, alarms=["ess_share", "masked_share"]))
    line = stream.getvalue()
    assert "ALARM ess_share,masked_share" in line[:100]
    sink.write(step(10))
    assert "ALARM" not in stream.getvalue().splitlines()[-1]


def test_a_thousand_fast_steps_do_not_flood_and_the_last_is_printed():
    sink, clock, stream = console(total_steps=1000)
    for version in range(1, 1001):
        clock.now += 0.01
        sink.write(step(version))
    sink.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 2 * 10 + 2
    assert "step    1/1000" in lines[0] and "step 1000/1000" in lines[-1]


def test_a_run_that_stops_early_still_prints_its_last_step():
    sink, _, stream = console()
    for version in (1, 2, 3):
        sink.write(step(version))
    sink.close()
    assert ["1/10" in stream.getvalue(), "2/10" in stream.getvalue(), "3/10" in stream.getvalue()] == [
        True,
        False,
        True,
    ]


def test_an_evaluation_is_always_printed_after_the_step_before_it():
    sink, _, stream = console()
    for version in (1, 2):
        sink.write(step(version))
    sink.write(evaluation(2, reward_mean=0.8125, reward_parts={"correct": 0.75}, prompts_failed=1))
    last_step, result = stream.getvalue().splitlines()[-2:]
    assert "step  2/10" in last_step
    assert "eval of version 2: reward 0.812  correct 0.750  (8 prompts, 1 failed, greedy)" in result


def test_an_evaluation_with_several_completions_says_how_and_what_the_best_come_to():
    sink, _, stream = console()
    figures = {
        "samples": 4,
        "temperature": 0.7,
        "reward_parts": {"correct": 0.25},
        "reward_parts_best": {"correct": 0.5},
    }
    sink.write(evaluation(2, **figures))
    line = stream.getvalue().splitlines()[-1]
    assert "reward 0.250  correct 0.250  pass@4:  correct 0.500  (8 prompts, 4 at temperature 0.7)" in line


def test_a_closed_stream_does_not_stop_the_run():
    sink, clock, stream = console()
    stream.close()
    for version in (1, 2):
        clock.now += 1
        sink.write(step(version))
    sink.close()


def test_a_pipe_without_reader_does_not_stop_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        sink = ConsoleSink(10, stream, clock=FakeClock())
        sink.write(evaluation())
        sink.write(evaluation())
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # so that closing the stream has somewhere to go


def test_a_terminal_gets_colour_and_anything_else_plain_text():
    main, terminal = pty.openpty()
    with open(terminal, "w") as stream:
        sink = ConsoleSink(10, stream, clock=FakeClock())
        sink.write(step(1))
        stream.flush()
        shown = os.read(main, 4096).decode()
    os.close(main)
    assert "step" in shown and shown.count("\n") == 1
    plain, _, text = console()
    plain.write(step(1))
    assert "\x1b" not in text.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(None, "--:--"), (0, "00:00"), (83.9, "01:23"), (3723, "1:02:03")])
def test_wall_time_is_shown_as_a_clock(seconds, text):
    assert clock_time(seconds) == text


# -- Weights & Biases


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_keys_are_found_in_the_environment_or_the_netrc_file(no_key, monkeypatch, tmp_path):
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_wandb_key()
    (tmp_path / "netrc").write_text("machine elsewhere login user password secret\n")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_wandb_key()


def wandb_run(folder, project="asyncrl"):
    return WandbRun(project, "test", kept_id(folder), folder, {"a": 1})


def test_a_restart_finds_the_id_of_its_run(tmp_path):
    assert kept_id(tmp_path / "run") == kept_id(tmp_path / "run") != kept_id(tmp_path)


def test_online_without_a_key_goes_offline_without_a_prompt(no_key, tmp_path, caplog):
    sink = WandbSink(wandb_run(tmp_path), online=True, close_timeout_s=60.0)
    for version in (1, 2):
        sink.write(step(version))
    sink.close()
    assert (sink.mode, sink.failed) == ("offline", False)
    assert sum("logging offline" in message for message in caplog.messages) == 1
    runs = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(runs) == 1 and runs[0].stat().st_size > 0
    assert (tmp_path / "wandb_id").read_text() in runs[0].name


def test_a_wandb_that_fails_is_said_once_and_never_raises(tmp_path, caplog):
    refused_by_wandb = wandb_run(tmp_path, project="bad/project:name")
    sink = WandbSink(refused_by_wandb, online=False, close_timeout_s=60.0)
    for version in range(3):
        sink.write(step(version))
    sink.close()
    sink.write(step(4))
    assert sink.failed
    assert sum("wandb failed" in message for message in caplog.messages) == 1


def test_a_wandb_that_hangs_costs_its_deadline_and_no_more(tmp_path, caplog):
    over = threading.Event()
    sink = WandbSink(
        wandb_run(tmp_path), online=False, close_timeout_s=0.05, send=lambda run, mode, records: over.wait(60.0)
    )
    for version in range(1200):
        sink.write(step(version))
    sink.close()
    over.set()
    assert any("did not finish within" in message for message in caplog.messages)


def test_records_are_flattened_for_wandb():
    flat = flat_record(step(4, reward_parts={"format": 1.0}, rollouts_failed={"deadline": 8}))
    assert flat["version"] == 4
    assert flat["step/reward_parts/format"] == 1.0
    assert flat["step/rollouts_failed/deadline"] == 8
    assert "step/loss" not in flat
    flat = flat_record(step(4, age_health={"2-3": {"ess_share": 0.5}}, alarms=["ess_share", "kl_behaviour"]))
    assert (flat["step/age_health/2-3/ess_share"], flat["step/alarms"]) == (0.5, 2)


# -- the facade


def config_in(folder):
    config = Config()
    config.run.dir = str(folder)
    return config


def test_wall_time_goes_on_over_a_restart_of_the_learner(tmp_path):
    clock = FakeClock()
    path = tmp_path / METRICS_FILE
    for start in (100.0, 7.0):  # the second process has another clock
        clock.now = start
        file = JsonlSink(path)
        metrics = Metrics([file], Alarms(1e-4), wall_offset_s=file.last_wall_s(), clock=clock)
        clock.now += 10.0
        metrics.log_step(step())
        metrics.log_sync(sync())
        metrics.log_eval(evaluation())
        metrics.close()
    assert [record["wall_s"] for record in read_records(path)[0]] == [10.0] * 3 + [20.0] * 3


def test_opened_from_a_configuration_it_writes_file_and_console(tmp_path):
    stream = io.StringIO()
    metrics = Metrics.open(config_in(tmp_path / "run"), 1e-4, stream)
    metrics.log_step(step())
    metrics.close()
    assert read_records(tmp_path / "run" / METRICS_FILE)[0][0]["kind"] == "step"
    assert "step   1/100" in stream.getvalue()


def test_alarms_are_written_with_the_step_and_warned_of_once(tmp_path, caplog):
    caplog.set_level("INFO", "asyncrl.metrics")
    metrics = Metrics.open(config_in(tmp_path), 1e-4, io.StringIO())
    for version, ess_share in enumerate([0.2] * 5 + [0.9] * 3, start=1):
        metrics.log_step(step(version, ess_share=ess_share))
    metrics.close()
    records, _ = read_records(tmp_path / METRICS_FILE)
    assert [record["alarms"] for record in records] == [[]] * 2 + [["ess_share"]] * 5 + [[]]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_metrics_import_no_torch():
    script = "import sys, asyncrl.metrics; sys.exit(bool({'torch', 'wandb', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
