"""The line through an engine's steps: found again among slow steps and pauses, not made up where steps cannot tell."""

import asyncio
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from asyncrl.generator.engines.step_times import StepTimes, quantile_line
from asyncrl.generator.engines.vllm.outputs import time_steps

FIXED_S, SEQUENCE_S, PROMPT_TOKEN_S, PROMPT = 2e-3, 3e-5, 1e-5, 8


def make_steps(times: StepTimes, sizes, chance, *, slow_share=0.0):
    """Steps with so many sequences, a fifth of them new; some take up to three times as long as they need."""
    at = 0.0
    for sequences in sizes:
        new = min(int(sequences) - 1, int(chance.poisson(sequences / 5)))
        needed_s = FIXED_S + SEQUENCE_S * sequences + PROMPT_TOKEN_S * PROMPT * new
        slow = 1 + 2 * chance.random() * (chance.random() < slow_share)
        at += needed_s * (1 + 0.05 * abs(chance.standard_normal())) * slow
        times.ended(at, int(sequences), PROMPT * new, continued=int(sequences) - new)


@pytest.mark.parametrize("slow_share", [0.0, 0.5])
def test_the_line_is_found_again_also_where_the_engine_is_nearly_always_full(slow_share):
    chance = np.random.default_rng(0)
    full = chance.integers(120, 129, 3000)
    sizes = np.where(chance.random(3000) < 0.05, chance.integers(1, 129, 3000), full)
    times = StepTimes()
    make_steps(times, sizes, chance, slow_share=slow_share)
    line = times.fit_ms()
    assert line == pytest.approx({"fixed": 2.0, "sequence": 0.03, "new_sequence": 0.08}, rel=0.15)
    whole = line["fixed"] + 128 * line["sequence"]
    assert line["fixed"] / whole == pytest.approx(FIXED_S / (FIXED_S + 128 * SEQUENCE_S), rel=0.06)


def test_steps_that_are_all_alike_cannot_tell_the_parts_apart():
    chance = np.random.default_rng(1)
    times = StepTimes()
    make_steps(times, chance.integers(100, 129, 3000), chance)
    assert times.fit_ms() == {}


def test_nothing_is_said_of_a_few_steps_and_the_line_follows_the_engine():
    chance = np.random.default_rng(2)
    times = StepTimes()
    make_steps(times, chance.integers(1, 33, 60), chance)
    assert times.fit_ms() == {}
    make_steps(times, chance.integers(1, 33, 3000), chance)
    assert times.fit_ms()["fixed"] == pytest.approx(2.0, rel=0.1)
    at = 0.0
    for sequences in chance.integers(1, 33, 6000):
        at += 3 * (FIXED_S + SEQUENCE_S * sequences)
        times.ended(at, int(sequences), 0, continued=int(sequences))
    assert times.fit_ms() == pytest.approx({"fixed": 6.0, "sequence": 0.09, "new_sequence": 0.0}, rel=0.01)


def test_pauses_and_steps_that_may_follow_one_do_not_count():
    times = StepTimes()
    at = 0.0
    for number in range(200):
        sequences = 1 + number % 8
        at += 100.0 * (number % 2)  # a pause that is told of, then one after which all sequences are new
        if number % 4 == 1:
            times.interrupted()
        times.ended(at, sequences, 8, continued=sequences if number % 4 == 1 else 0)
        for _ in range(2):
            at += FIXED_S + SEQUENCE_S * sequences
            times.ended(at, sequences, 0, continued=sequences)
    assert times.fit_ms() == pytest.approx({"fixed": 2.0, "sequence": 0.03, "new_sequence": 0.0}, rel=0.01)


@pytest.mark.parametrize("told", [True, False])
def test_steps_behind_pauses_alone_say_nothing(told):
    """Told of the pause, or by sequences of which none had a token before."""
    times = StepTimes()
    for number in range(500):
        sequences = 1 + number % 32
        if told:
            times.interrupted()
        times.ended(number + 0.01 * sequences, sequences, 8, continued=sequences if told else 0)
    assert times.fit_ms() == {}


def output(new_tokens=None):
    stats = None if new_tokens is None else SimpleNamespace(num_computed_tokens=new_tokens)
    return SimpleNamespace(prefill_stats=stats)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_step_without_outputs_for_all_requests_may_have_computed_a_part_of_a_prompt(chunked):
    """That is so with chunked prefill, which vLLM has on GPUs alone: so the engine is a stand-in here."""
    times, steps = StepTimes(), deque()

    async def get_output_async():
        return steps.popleft()

    llm = SimpleNamespace(
        engine_core=SimpleNamespace(get_output_async=get_output_async),
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(enable_chunked_prefill=chunked)),
        output_processor=SimpleNamespace(request_states=dict.fromkeys(range(33))),
    )
    time_steps(llm, times)
    at = 0.0
    for number in range(500):
        sequences = 1 + number % 32  # of 33
        at += FIXED_S + SEQUENCE_S * sequences
        steps.append(SimpleNamespace(outputs=[output() for _ in range(sequences)], timestamp=at))
        assert asyncio.run(llm.engine_core.get_output_async()).timestamp == at
    known = {} if chunked else pytest.approx({"fixed": 2.0, "sequence": 0.03, "new_sequence": 0.0}, rel=0.01)
    assert times.fit_ms() == known


def test_no_term_of_a_line_is_below_zero():
    chance = np.random.default_rng(3)
    falling = chance.uniform(1, 2, 500)
    columns = np.column_stack([np.ones(500), falling, np.zeros(500)])
    line = quantile_line(columns, 5 - 2 * falling + 0.01 * chance.random(500), 0.5)
    assert (line >= 0).all() and line[1] == line[2] == 0
    assert np.mean(columns @ line > 5 - 2 * falling) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.9])
def test_the_line_is_the_best_of_all_lines_through_two_points(quantile):
    """One of those is the best of all; distances count as shares of the line that was found."""
    chance = np.random.default_rng(4)
    columns = np.column_stack([np.ones(70), chance.uniform(1, 100, 70)])
    figures = (columns @ np.array([3.0, 0.1])) * (1 + chance.exponential(0.2, 70))
    found = quantile_line(columns, figures, quantile)

    def loss(line):
        off = (figures - columns @ line) / (columns @ found)
        return np.where(off > 0, quantile * off, (quantile - 1) * off).sum()

    lines = [np.linalg.solve(columns[[i, j]], figures[[i, j]]) for i in range(70) for j in range(i)]
    assert loss(found) <= 1.01 * min(map(loss, lines))
    assert np.mean(figures < columns @ found) == pytest.approx(quantile, abs=0.03)
