"""Predictions for made-up runs whose answer is known by hand, and what is never advised."""

from __future__ import annotations

import json
from itertools import chain, count, repeat
from pathlib import Path

import pytest

from asyncrl.config.loading import load_config, to_yaml
from asyncrl.errors import ConfigError
from asyncrl.simulator.advice import LOOKING_SHARE, WITHIN_S, Advisor
from asyncrl.simulator.advice import advise as advise_within
from asyncrl.simulator.step_costs import step_costs, step_growth

SETTINGS = (
    "model.path=/none",
    "learner.device=cuda",  # nothing is shared
    "generator.device=cuda",
    "generator.max_sequences=64",
    "sampling.group_size=4",
    "learner.groups_per_step=8",
    "learner.micro_batch_tokens=1024",
    "model.max_length=512",
    "sampling.max_new_tokens=64",
    "staleness.max_age=2",
    "eval.prompts=0",
    "checkpoint.every=0",
)
TOKENS = 8 * 4  # of a step: without a journal a completion has one token


def passes(count: int, inputs_each: list[int], pass_s: float, input_s: float) -> dict[str, float]:
    """The sums over so many passes of each of these sizes, on a line."""
    seconds = [pass_s + input_s * inputs for inputs in inputs_each]
    return {
        "passes": count * len(inputs_each),
        "pass_inputs": count * sum(inputs_each),
        "pass_inputs_squared": count * sum(inputs**2 for inputs in inputs_each),
        "pass_s": count * sum(seconds),
        "pass_inputs_s": count * sum(inputs * s for inputs, s in zip(inputs_each, seconds, strict=True)),
    }


def write_run(folder: Path, *settings: str, steps: int = 30, **step) -> Path:
    """A run each of whose steps is alike; by default the learner takes all of the time."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(load_config(None, [*SETTINGS, *settings])))
    line = {
        "kind": "step", "interval_s": 3.0, "step_s": 3.0, "tokens_trained": TOKENS, "tokens_generated": TOKENS,
        "generator_busy_s": 0.3, "generator_idle_s": 2.7, "policy_age_mean": 1.5, "generators_alive": 1,
        "learner_time_s": {"compute": 3.0}, "extra": {}, **step,
    }  # fmt: skip
    lines = [json.dumps({**line, "version": n}) for n in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def advise(run):
    """With all the time that it wants, on whatever machine."""
    return advise_within(run, within_s=600.0)


def fit_rounds(run):
    """How often the fit of a run asks whether to go on."""
    asked = []
    Advisor(run, go_on=lambda: asked.append(None) is None)
    return len(asked)


def ratio(advisor: Advisor, *settings: str, generators: int | None = None) -> float:
    return advisor.predict(settings, generators=generators).tokens_per_s / advisor.measured


def test_half_as_many_passes_save_what_a_pass_takes_without_inputs(tmp_path):
    """Passes of 1024 and 512 inputs, 10 a step: 0.2 s each and 1 ms for 10 inputs, 0.232 s beside them."""
    sums = passes(5, [1024, 512], 0.2, 1e-4)
    run = write_run(tmp_path, extra=sums, step_s=3.0)
    costs = step_costs([{"step_s": 3.0, "extra": sums}], load_config(run / "config.yaml"))
    assert costs.pass_s == pytest.approx(0.2) and costs.input_s == pytest.approx(1e-4)
    assert costs.rest_s == pytest.approx(3.0 - 10 * 0.2 - 7680 * 1e-4)
    advisor = Advisor(run)
    assert advisor.fit.ratio == pytest.approx(1, abs=0.02)
    halved = 3.0 - 10 * 0.2 * (1 - (7680 / 2048 + 0.5) / (7680 / 1024 + 0.5))
    assert ratio(advisor, "learner.micro_batch_tokens=2048") == pytest.approx(3.0 / halved, rel=0.01)
    assert ratio(advisor, "learner.epochs=2") == pytest.approx(0.5, rel=0.1)
    assert ratio(advisor, "staleness.max_age=4") == pytest.approx(1, abs=0.01)
    assert ratio(advisor, generators=2) == pytest.approx(1, abs=0.01)


def test_passes_of_one_size_tell_no_line_and_widen_the_interval(tmp_path):
    run = write_run(tmp_path, extra=passes(10, [1024], 0.2, 1e-4))
    foretold = Advisor(run).predict(["learner.micro_batch_tokens=2048"])
    exact = passes(10, [1024], 0.2, 1e-4)["pass_s"]
    fewer = 3.0 / (3.0 - exact * (1 - (5 + 0.5) / (10 + 0.5)))  # all of a pass is there without inputs
    advised = advise(run).changes[0]
    assert advised.setting.startswith("learner.micro_batch_tokens=")
    assert foretold.low == pytest.approx(0.75 * TOKENS / 3, rel=0.02)
    assert foretold.high == pytest.approx(1.25 * fewer * TOKENS / 3, rel=0.02)
    assert advised.low <= TOKENS / 3 and "cannot be told" in advised.in_words(TOKENS / 3)


def test_without_sums_of_passes_a_step_grows_with_its_tokens():
    before = load_config(None, SETTINGS)
    assert step_costs([{"step_s": 1.0, "extra": {}}], before) is None
    after = load_config(None, [*SETTINGS, "sampling.group_size=8", "learner.epochs=2"])
    assert step_growth(None, before, after) == 4


def test_twice_the_generators_where_these_bound_the_run(tmp_path):
    run = write_run(
        tmp_path,
        "staleness.max_age=9",
        step_s=0.05,
        generator_busy_s=3.0,
        generator_idle_s=0.0,
        learner_time_s={"compute": 0.05, "data": 2.9},
    )
    advisor = Advisor(run)
    assert ratio(advisor, generators=2) == pytest.approx(2, rel=0.1)
    advice = advise(run)
    assert "--generators 2" in [change.setting for change in advice.changes[:2]]
    assert all(change.gain >= 0.05 for change in advice.changes) and len(advice.changes) <= 3


def test_a_second_generator_on_shared_cores_is_never_advised(tmp_path):
    """How the two would slow each other is not told by one run."""
    bound = {
        "step_s": 0.05, "generator_busy_s": 3.0, "generator_idle_s": 0.0,
        "learner_time_s": {"compute": 0.05, "data": 2.9},
    }  # fmt: skip
    on_cpu = ("learner.device=cpu", "generator.device=cpu", "staleness.max_age=9")
    advice = advise(write_run(tmp_path / "shared", *on_cpu, **bound))
    assert not any("--generators" in change.setting for change in advice.changes)
    assert advice.note == "" or "nothing is predicted" not in advice.note, advice.note


def test_a_checkpoint_each_step_takes_what_training_stood_still_for(tmp_path):
    """Each 4 s: 3 s of step and 1 s of checkpoint, of which 0.2 s are written beside."""
    run = write_run(
        tmp_path, "checkpoint.every=1", interval_s=4.0, generator_busy_s=0.4,
        learner_time_s={"compute": 3.0, "checkpoint": 1.0}, overlapped_s={"checkpoint": 1.2},
    )  # fmt: skip
    advisor = Advisor(run)
    assert advisor.fit.ratio == pytest.approx(1, abs=0.02)
    assert ratio(advisor, "checkpoint.every=4") == pytest.approx(4 / 3.25, rel=0.03)
    first = advise(run).changes[0]
    assert first.setting == "checkpoint.every=4" and "up to 4 steps" in first.cost
    assert first.low <= first.tokens_per_s <= first.high
    assert first.tokens_per_s == pytest.approx((1 + first.gain) * TOKENS / 4.0)


def test_nothing_is_advised_to_a_learner_that_never_waits(tmp_path):
    advice = advise(write_run(tmp_path))
    assert advice.changes == () and advice.note == "" and advice.lines() == []


def test_what_the_configuration_forbids_is_not_advised(tmp_path):
    """A synchronous run gains by asynchrony, but without a correction none is allowed."""
    halves = {"step_s": 1.5, "generator_busy_s": 1.5, "learner_time_s": {"compute": 1.5, "data": 1.5}}
    free = write_run(tmp_path / "free", "staleness.max_age=0", **halves, policy_age_mean=0.0)
    assert any("max_age" in change.setting for change in advise(free).changes)
    uncorrected = ("staleness.max_age=0", "algorithm.correction=none", "algorithm.proximal=behaviour")
    bound = write_run(tmp_path / "bound", *uncorrected, **halves, policy_age_mean=0.0)
    with pytest.raises(ConfigError, match="max_age"):
        Advisor(bound).predict(["staleness.max_age=1"])
    assert not any("max_age" in change.setting for change in advise(bound).changes)


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_too_short_a_run_is_told_nothing_but_that(tmp_path, steps):
    advice = advise(write_run(tmp_path, steps=steps))
    assert advice.changes == () and f"{steps} steps" in advice.note


def test_a_run_without_generators_or_without_a_folder_is_told_nothing(tmp_path):
    idle = advise(write_run(tmp_path / "idle", generator_busy_s=0.0, tokens_generated=0))
    assert idle.changes == () and "cannot be simulated" in idle.note
    nothing = advise(tmp_path / "nothing")
    assert nothing.changes == () and "config.yaml" in nothing.note


def test_a_run_that_its_simulation_does_not_resemble_is_told_nothing(tmp_path):
    """Both sides idle for most of the time, for a reason that no line tells."""
    advice = advise(write_run(tmp_path, interval_s=30.0))
    assert advice.changes == () and advice.note.startswith("nothing is predicted: simulated")


def test_no_change_is_looked_at_when_time_is_up(tmp_path):
    """The clock is read once at first, then before each further round of the fit and before each change."""
    run = write_run(tmp_path, "checkpoint.every=1")
    rounds = fit_rounds(run)
    ticks = count(0.0, 4.0)
    advice = advise_within(run, within_s=(4.0 * (rounds + 3) - 1.0) / LOOKING_SHARE, clock=lambda: next(ticks))
    assert advice.note.startswith("2 of 9 changes were thought over")


def test_the_fit_ends_with_the_time_too_and_with_whoever_waits(tmp_path):
    """A run on a slow machine is not held up by the simulation of itself."""
    run = write_run(tmp_path, "checkpoint.every=1")
    asked = []
    Advisor(run, go_on=lambda: bool(asked.append(None)))
    assert len(asked) == 1 and fit_rounds(run) >= 1, "asked before the second simulation, which is not made"
    advice = advise_within(run, go_on=lambda: False)
    assert advice.changes == () and advice.note == f"0 of 9 changes were thought over in {WITHIN_S:g} s"


def test_what_was_found_is_not_simulated_further_once_all_the_time_is_up(tmp_path):
    run = write_run(
        tmp_path, "checkpoint.every=1", interval_s=4.0, generator_busy_s=0.4,
        learner_time_s={"compute": 3.0, "checkpoint": 1.0}, overlapped_s={"checkpoint": 1.2},
    )  # fmt: skip
    found = len(advise(run).changes)
    times = chain([0.0], repeat(1.0, fit_rounds(run) + 9), repeat(WITHIN_S + 1.0))
    late = advise_within(run, clock=lambda: next(times))
    assert found and late.changes == () and late.note.startswith(f"0 of {found} changes that would gain are told")
