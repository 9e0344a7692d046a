"""A run whose metrics were themselves simulated is found again: its rates, its ages, what another bound would bring."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from asyncrl.config.loading import load_config
from asyncrl.errors import UserError
from asyncrl.simulator.model import Service, SharedCores, Sizes
from asyncrl.simulator.outcome import SimulatedOutcome
from asyncrl.simulator.recorded import fit_run, read_figures
from asyncrl.simulator.run import SimulatedRun
from asyncrl.simulator.times import Constant, LogNormal
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import StoredGroup

SIZES = Sizes(generators=2, max_sequences=16, group_size=4, groups_per_step=8, max_age=2, steps=200)
SERVICE = Service(
    completion_tokens=LogNormal(40, 0.8, 200),
    decode_s=0.02,
    decode_sequence_s=0.02 / 16,
    step_s=Constant(3.0),
    snapshot_s=Constant(0.05),
    stage_s=Constant(0.2),
    pause_s=Constant(0.05),
    commit_s=Constant(0.1),
    grant_s=0.02,
)
CORES = SharedCores(4, 4, 2)


def write_run(
    folder: Path, outcome: SimulatedOutcome, lengths: list[float], engine_step_ms: dict[str, float] | None = None
) -> Path:
    """The metrics and the journal that a run with this outcome would have left, step by step alike."""
    folder.mkdir()
    interval_s = 1 / outcome.steps_per_s
    trained = outcome.tokens_per_s * interval_s
    busy_s = SIZES.generators * (1 - outcome.generator_idle_share) * interval_s
    lines = [
        {
            "kind": "step", "version": n, "interval_s": interval_s, "step_s": outcome.step_s_mean,
            "tokens_trained": trained, "tokens_generated": outcome.generated_per_busy_s * busy_s,
            "generator_busy_s": busy_s, "policy_age_mean": outcome.age_mean, "generators_alive": SIZES.generators,
            "publish_blocked_ms": 50.0, "engine_step_ms": engine_step_ms if n % 2 and engine_step_ms else {},
        }
        for n in range(1, 61)
    ]  # fmt: skip
    lines += [
        {"kind": "sync", "version": n, "total_ms": 350.0, "pause_ms": 50.0, "canary_ms": 100.0} for n in range(60)
    ]
    lines += [{"kind": "sync", "version": 9, "total_ms": 9e6, "catch_up": True, "pause_ms": 9e6, "canary_ms": 9e6}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    journal = Journal.open(folder / "journal")
    for n in range(0, len(lengths), 4):
        tokens = tuple(int(length) for length in lengths[n : n + 4])
        journal.append(StoredGroup("g", 1, n + 1, n, 0, 0, 0, 0, tokens, b""), 0.0)
    journal.make_durable()
    journal.close()
    return folder


def config_of(sizes: Sizes):
    return load_config(
        None,
        [
            f"generator.max_sequences={sizes.max_sequences}",
            f"sampling.group_size={sizes.group_size}",
            f"learner.groups_per_step={sizes.groups_per_step}",
            f"staleness.max_age={sizes.max_age}",
            f"weights.cell_size={sizes.cell_size}",
            "checkpoint.every=0",
            "eval.prompts=0",
            "model.path=/none",
        ],
    )


def some_lengths() -> list[float]:
    import random

    rng = random.Random(1)
    return [max(1, round(SERVICE.completion_tokens.draw(rng))) for _ in range(2000)]


@pytest.mark.parametrize("shared", [None, CORES])
def test_a_run_is_found_again_and_foretold_under_other_sizes(tmp_path, shared):
    true = SimulatedRun(SIZES, SERVICE, shared=shared).run()
    folder = write_run(tmp_path / "run", true, some_lengths())
    fit = fit_run(folder, config_of(SIZES), shared=shared)
    assert fit.ratio == pytest.approx(1, abs=0.04) and fit.assumes_fixed_share
    assert fit.itself.age_mean == pytest.approx(true.age_mean, rel=0.1)
    for other in (replace(SIZES, max_age=0), replace(SIZES, max_age=4), replace(SIZES, generators=4)):
        foretold = SimulatedRun(replace(other, steps=fit.sizes.steps), fit.service, shared=shared).run()
        real = SimulatedRun(other, SERVICE, shared=shared).run()
        assert foretold.tokens_per_s == pytest.approx(real.tokens_per_s, rel=0.1)
        assert foretold.age_mean == pytest.approx(real.age_mean, rel=0.1, abs=0.05)


@pytest.mark.parametrize("fixed_share", [0.1, 0.9])
def test_what_generators_measured_of_a_step_is_used_and_its_scale_is_that_of_the_run(tmp_path, fixed_share):
    """The parts in the metrics are those of a faster engine, as a quarter of the steps are faster."""
    whole_s = 0.04
    sequence_s = (1 - fixed_share) * whole_s / SIZES.max_sequences
    service = replace(SERVICE, decode_s=fixed_share * whole_s, decode_sequence_s=sequence_s, new_sequence_s=0.004)
    true = SimulatedRun(SIZES, service).run()
    told = {"fixed": 500 * service.decode_s, "sequence": 500 * sequence_s, "new_sequence": 2.0}
    fit = fit_run(write_run(tmp_path / "told", true, some_lengths(), told), config_of(SIZES), shared=None)
    assert not fit.assumes_fixed_share
    assert fit.service.decode_s == pytest.approx(service.decode_s, rel=0.05)
    assert fit.service.new_sequence_s == pytest.approx(0.004, rel=0.05)


def test_catch_ups_and_first_steps_do_not_count(tmp_path):
    true = SimulatedRun(SIZES, SERVICE).run()
    folder = write_run(tmp_path / "run", true, [10.0] * 8)
    figures = read_figures(folder)
    assert figures.steps == 48 and set(figures.pause_s) == {0.05}
    assert figures.stage_s[0] == pytest.approx(0.2) and figures.lengths == (10.0,) * 8
    assert figures.tokens_per_s == pytest.approx(true.tokens_per_s)


def test_a_step_has_its_messages_and_lengths_are_those_of_the_steps_that_count(tmp_path):
    folder = write_run(tmp_path / "run", SimulatedRun(SIZES, SERVICE).run(), [10.0, 30.0] * 4)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "step":
            time_s = {"compute": 2.5, "messages": 0.25, "data": 9.0, "snapshot": 7.0}
            saved = {"checkpoint": 0.125} if line["version"] in (20, 60) else {}
            line |= {"learner_time_s": time_s | saved, "rollouts_trained": 32, "tokens_trained": 32 * 25}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    figures = read_figures(folder)
    assert set(figures.step_s) == {2.75}
    assert figures.lengths == pytest.approx((12.5, 37.5) * 4), "the journal's mean is 20, that of the steps 25"
    assert figures.checkpoint_s == (0.125,), "the one at the end holds up no step"


def test_what_is_no_run_or_too_short_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_figures(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "step", "version": 1}) + "\n")
    with pytest.raises(UserError, match="1 steps"):
        read_figures(tmp_path)
