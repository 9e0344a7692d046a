"""The summary and the last lines of a run, and both files at its end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.errors import UserError
from asyncrl.metrics import METRICS_FILE
from asyncrl.report.page.document import PAGE_FILE
from asyncrl.report.run_records import RunRecords
from asyncrl.report.summary import SUMMARY_FILE, summary_lines, write_summary
from asyncrl.report.writing import report
from tests.report.runs import evaluation, health, step, sync, write_run

PROMISED = [
    "reward_first",
    "reward_last",
    "eval_first",
    "eval_last",
    "steps",
    "tokens_generated",
    "tokens_trained",
    "policy_age_mean",
    "policy_age_max",
    "rollouts_acked",
    "rollouts_trained",
    "rollouts_dropped",
    "sync_count",
    "sync_pause_ms_median",
    "sync_total_ms_median",
    "canary_max_abs_diff",
    "canary_mean_abs_diff",
    "ess_share_min",
    "ess_share_median",
    "gap_engine_median",
    "gap_drift_median",
    "learner_idle_share",
    "generator_idle_share",
    "wall_s",
]


@pytest.fixture
def write(tmp_path):
    def write(*metrics):
        return write_run(tmp_path, metrics)

    return write


@pytest.fixture
def whole_run(write):
    metrics = [evaluation(0, 0.25)]
    for version in range(1, 101):
        metrics += [step(version), sync(version)]
    return write(*metrics, evaluation(100, 0.875))


def test_the_summary_holds_every_promised_figure(whole_run):
    summary = write_summary(RunRecords(whole_run)).to_json()
    assert set(PROMISED) <= set(summary)
    assert all(summary[name] is not None for name in PROMISED)
    assert json.loads((whole_run / SUMMARY_FILE).read_text()) == summary


def test_totals_means_and_medians_agree_with_a_count_by_hand(whole_run):
    summary = write_summary(RunRecords(whole_run)).to_json()
    expected = {
        "steps": 100,
        "reward_first": pytest.approx(sum(range(1, 11)) / 1000),
        "reward_last": pytest.approx(sum(range(91, 101)) / 1000),
        "eval_first": 0.25,
        "eval_last": 0.875,
        "eval_parts_last": {"correct": 0.875},
        "tokens_generated": 100_000,
        "tokens_trained": 80_000,
        "tokens_generated_per_s": pytest.approx(500.0),
        "policy_age_mean": pytest.approx(1.0),
        "policy_age_max": 2,
        "rollouts_acked": 1600,
        "sync_count": 100,
        "sync_total_ms_median": 80.0,
        "learner_time_s": pytest.approx({"compute": 140.0, "data": 30.0, "snapshot": 29.9, "messages": 0.1}),
        "generator_time_share": {"decode": 0.5, "leases": 0.25, "swap": 0.25},
        "overlapped_s": {"transfer": 25.0},
        "learner_idle_share": pytest.approx(0.1),
        "generator_idle_share": pytest.approx(0.25),
        "wall_s": 200.0,
    }
    assert {name: summary[name] for name in expected} == expected


def test_filtered_groups_are_added_up_and_their_share_is_of_all_tokens(write):
    folder = write(step(1, groups_filtered=3, tokens_filtered=400, tokens_trained=800), step(2, tokens_trained=800))
    summary = write_summary(RunRecords(folder)).to_json()
    assert (summary["groups_filtered"], summary["filtered_token_share"]) == (3, pytest.approx(0.2))


def test_policy_age_is_weighted_by_tokens(write):
    folder = write(step(1, policy_age_mean=0.0, tokens_trained=300), step(2, policy_age_mean=4.0, tokens_trained=100))
    assert write_summary(RunRecords(folder)).to_json()["policy_age_mean"] == pytest.approx(1.0)


def test_a_version_trained_again_after_a_crash_counts_once_but_its_increments_add_up(write):
    before = [step(1), step(2, reward_mean=0.1, rollouts_dropped=8)]
    again = [step(2, reward_mean=0.3, tokens_generated=0, rollouts_acked=0), step(3)]
    summary = write_summary(RunRecords(write(*before, *again))).to_json()
    assert (summary["steps"], summary["tokens_trained"], summary["rollouts_trained"]) == (3, 2400, 48)
    assert (summary["tokens_generated"], summary["rollouts_acked"], summary["rollouts_dropped"]) == (
        3000,
        48,
        8,
    )


def test_failed_syncs_are_counted_apart_from_the_times(write):
    metrics = [
        sync(1),
        sync(2, total_ms=30_000.0, pause_ms=None, generators_committed=0, generators_failed=1),
    ]
    summary = write_summary(RunRecords(write(step(1), *metrics))).to_json()
    assert (summary["sync_count"], summary["sync_failed"], summary["sync_total_ms_median"]) == (1, 1, 80.0)


def test_what_syncs_took_of_training_and_network_is_in_the_summary(write):
    timed = [
        sync(
            version, snapshot_ms=4.0 + version, verify_ms=2.0, canary_ms=7.0, transfer_gb_per_s=version, retries=version
        )
        for version in (1, 2, 3)
    ]
    run_summary = write_summary(RunRecords(write(step(1), *timed)))
    summary = run_summary.to_json()
    expected = {"snapshot_ms": 6.0, "verify_ms": 2.0, "canary_ms": 7.0, "gb_per_s": 2.0}
    assert {name: summary[f"sync_{name}_median"] for name in expected} == expected
    assert summary["sync_retries"] == 6
    lines = summary_lines(run_summary, "run", Path("run/report.html"))
    assert any("generation paused 10 ms and training 6.0 ms" in line for line in lines)


def test_failures_are_counted_by_reason(write):
    lines = [
        step(1, rollouts_failed={"deadline": 8}),
        step(2, rollouts_failed={"deadline": 8, "reward_error": 8}),
    ]
    assert write_summary(RunRecords(write(*lines))).to_json()["rollouts_failed"] == {"deadline": 16, "reward_error": 8}


def test_what_was_never_measured_is_null(write):
    summary = write_summary(RunRecords(write(sync(0, canary_max_abs_diff=None)))).to_json()
    for name in ("reward_first", "eval_last", "policy_age_max", "canary_max_abs_diff", "learner_idle_share"):
        assert summary[name] is None
    assert summary["steps"] == 0


def test_off_policy_health_is_summed_up_over_steps_and_by_age(write):
    lines = [
        step(1, ess_share=0.9, gap_drift=0.01, age_health={"0": health(100, ess_share=1.0)}),
        step(2, ess_share=0.2, gap_drift=0.02, alarms=["ess_share"], age_health={"0": health(300, ess_share=0.6)}),
        step(3, ess_share=0.3, gap_drift=0.06, alarms=["ess_share", "kl_behaviour"], age_health={}),
    ]
    lines[1].age_health["2-3"] = health(50, ratio_max=9.0)
    summary = write_summary(RunRecords(write(*lines))).to_json()
    assert (summary["ess_share_min"], summary["ess_share_median"], summary["gap_drift_median"]) == (0.2, 0.3, 0.02)
    assert summary["alarms"] == {"ess_share": 2, "kl_behaviour": 1}
    young, old = summary["age_health"]["0"], summary["age_health"]["2-3"]
    assert (young["tokens"], old["tokens"], old["ratio_max"]) == (400, 50, 9.0)
    assert young["ess_share"] == pytest.approx(0.7)  # (100 * 1.0 + 300 * 0.6) / 400
    assert "ess_share" not in old, "never measured there"


def test_a_step_trained_again_counts_its_alarm_once(write):
    summary = write_summary(RunRecords(write(step(1, alarms=["ess_share"]), step(1, alarms=["ess_share"])))).to_json()
    assert summary["alarms"] == {"ess_share": 1}


def test_a_run_from_before_time_was_told_by_activity_is_summed_up(write):
    folder = write(step(1, learner_time_s={}, generator_time_s={}, overlapped_s={}))
    run_summary = write_summary(RunRecords(folder))
    summary = run_summary.to_json()
    assert (summary["learner_time_share"], summary["bounded_by"]) == ({}, None)
    assert "learner      -" in summary_lines(run_summary, "run", "picture")


def test_a_torn_line_does_not_spoil_the_summary(whole_run):
    with (whole_run / METRICS_FILE).open("a") as file:
        file.write('{"kind": "step", "ver')
    summary = write_summary(RunRecords(whole_run)).to_json()
    assert (summary["steps"], summary["unreadable_lines"]) == (100, 1)


@pytest.mark.parametrize(
    "metrics", [[], [step(1)], [evaluation(0, 0.5)], [sync(1)]], ids=["none", "step", "eval", "sync"]
)
def test_a_run_that_hardly_began_can_be_reported(write, metrics):
    folder = write(*metrics)
    assert report(folder) == folder / PAGE_FILE


def test_the_last_lines_show_rewards_throughput_idle_shares_and_the_page(whole_run, capsys):
    report(whole_run)
    text = capsys.readouterr().out
    for part in (
        "100 steps in 03:20",
        "first 0.250   last 0.875",
        "generated 500   trained 400",
        "learner 10%   generator 25%",
        "learner      compute 70%   data 15%   snapshot 15%\n",
        "generators   decode 50%   leases 25%   swap 25%\n",
        "bounded by   generators: the learner waited 15% of its time for data; engines sampled for 50% of theirs\n",
        "80 ms, of it generation paused 10 ms",
        "ESS median 0.90   min 0.90   gap engine 1.0e-03   drift 2.0e-02 nats",
        "alarms       none",
        str(whole_run / PAGE_FILE),
        str(whole_run / SUMMARY_FILE),
    ):
        assert part in text
    assert text.splitlines()[-1].endswith(PAGE_FILE)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: there is no such file"):
        report(tmp_path)


def test_both_files_are_written_without_what_is_slow_to_import(whole_run):
    """No numpy either: a run that a signal ends does not wait for its report."""
    script = (
        "import sys; from asyncrl.report.writing import report; report(sys.argv[1]); "
        "sys.exit(' '.join({'torch', 'numpy', 'matplotlib', 'wandb', 'rich'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, whole_run], capture_output=True, text=True, timeout=60, env={})
    assert (done.returncode, done.stderr) == (0, "")
    assert (whole_run / PAGE_FILE).is_file() and (whole_run / SUMMARY_FILE).is_file()
