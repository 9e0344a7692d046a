"""Rollouts on a terminal: what colours say, what is said without them, and that no model writes to the terminal."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest

from asyncrl.report.rollouts.shown import BAR, Colour, harmless, printable_in, shown
from asyncrl.types import LeaseKind
from tests.report.rollouts.making import HOSTILE, make_record

OURS = re.compile(r"\x1b\[(?:0|1|2|38;5;16;48;5;\d+)m")


def text_of(*records, colour=Colour.VERSION, with_colours=False):
    return "\n".join(shown(records, colour, with_colours=with_colours))


def painted(text):
    """(background, text) of each painted token of the completion."""
    body = text.split("completion\n")[1]
    return re.findall(r"\x1b\[38;5;16;48;5;(\d+)m(.*?)\x1b\[0m", body)


@pytest.mark.parametrize("colour", list(Colour))
def test_without_colours_there_is_no_escape_code_and_all_figures(colour):
    text = text_of(make_record(), colour=colour)
    assert "\x1b" not in text
    assert "step 5  prompt 7  rollout 2  best  reward 1 (exact 1)  advantage +0.5" in text
    assert "4 tokens, ended by itself  versions of tokens [0, 1) 3, [1, 4) 4  attempt 1  generator gen-a" in text
    assert 'mismatch mean 0.562, largest 1.12 nats at token 3 "<end>"' in text
    assert f"prompt\n{BAR}1+1=\ncompletion\n{BAR}abc<end>\n" in text
    assert 'payload {"answer": "42"}' in text


def test_versions_have_colours_of_their_own_and_a_legend():
    text = text_of(make_record(), with_colours=True)
    first, *others = painted(text)
    assert first[1] == "a" and [text for _, text in others] == ["b", "c", "<end>"]
    assert len({background for background, _ in others}) == 1 and others[0][0] != first[0]
    legend = text.splitlines()[0]
    assert re.findall(r"48;5;(\d+)m (\d) ", legend) == [(first[0], "3"), (others[0][0], "4")]


def test_one_version_has_one_colour_in_all_rollouts_that_are_shown():
    text = text_of(make_record(1), make_record(2), with_colours=True)
    completions = [part.split("payload")[0] for part in text.split("completion\n")[1:]]
    assert len(set(completions)) == 1


def test_the_larger_the_mismatch_the_stronger_the_colour():
    mismatches = np.array([0.0, 0.05, 0.3, -2.0], dtype=np.float32)
    record = make_record()
    record = make_record(old_logprobs=np.array(record.behaviour_logprobs, np.float32) + mismatches)
    text = text_of(record, colour=Colour.MISMATCH, with_colours=True)
    assert [text for _, text in painted(text)] == ["b", "c", "<end>"]
    assert len({background for background, _ in painted(text)}) == 3
    assert "nats" in text.splitlines()[0]


def test_advantages_differ_by_sign():
    record = make_record(token_advantages=np.array([1.0, -1.0, 0.0, 1.0]))
    tokens = painted(text_of(record, colour=Colour.ADVANTAGE, with_colours=True))
    assert [text for _, text in tokens] == ["a", "b", "<end>"]
    assert tokens[0][0] == tokens[2][0] != tokens[1][0]


@pytest.mark.parametrize("colour", [Colour.MISMATCH, Colour.ADVANTAGE])
def test_what_is_not_known_is_plain(colour):
    record = make_record(kind=LeaseKind.EVAL, old_logprobs=None, advantage=None)
    text = text_of(record, colour=colour, with_colours=True)
    assert painted(text) == []
    assert "evaluation of version 5" in text and "mismatch" not in text.split("evaluation")[1]


def test_a_rollout_without_a_pass_says_why():
    assert "no log-probs of the trainer" in text_of(make_record(old_logprobs=None))


def test_without_text_the_tokens_are_shown_and_without_pieces_the_text():
    text = text_of(make_record(prompt=None, completion=None, token_texts=None))
    assert f"{BAR}(no text) 5 6" in text and f"{BAR}(no text) 2 3 4 5" in text
    assert f"completion\n{BAR}abc\n" in text_of(make_record(token_texts=None), with_colours=True)


@pytest.mark.parametrize("with_colours", [False, True])
def test_nothing_that_a_model_says_reaches_the_terminal_as_a_control(with_colours):
    record = make_record(
        prompt=HOSTILE,
        completion=HOSTILE,
        token_texts=[HOSTILE, "\x1b", "[31m", "\u202e"],
        generator=HOSTILE + "\n",
        payload={HOSTILE: HOSTILE},
    )
    object.__setattr__(record, "reward_parts", {HOSTILE + "\n": 1.0})
    for colour in Colour:
        lines = list(shown([record], colour, with_colours=with_colours))
        left = [OURS.sub("", line) for line in lines]
        assert all(unicodedata.category(char)[0] != "C" for line in left for char in line), left
        assert with_colours or left == lines


def test_no_line_of_a_completion_can_pass_for_one_of_ours():
    forged = "x\nstep 9  prompt 1  reward 1\npayload {}\rstep 8"
    record = make_record(completion=forged, token_texts=[forged, "", "", ""])
    lines = list(shown([record], Colour.NONE, with_colours=True))
    bare = [OURS.sub("", line) for line in lines]
    assert [line for line in bare if line.startswith(("step", "payload"))] == [bare[0], 'payload {"answer": "42"}']
    assert f"{BAR}step 9  prompt 1  reward 1" in bare
    assert f"{BAR}payload {{}}\\rstep 8" in bare


def test_a_colour_ends_with_its_line():
    record = make_record(token_texts=["a\nb", "", "\n\n", "c"])
    for line in text_of(record, with_colours=True).splitlines():
        assert line.count("\x1b[38") == line.count("\x1b[0m") or line.startswith(("\x1b[1m", "\x1b[2m"))


@pytest.mark.parametrize("text", ["naïve 東京 🙂", "tab\there", "שלום", "a\u200db", "no\u00a0break"])
def test_letters_of_all_scripts_stay_as_they_are(text):
    assert harmless(text) == text


def test_what_a_stream_cannot_express_is_escaped():
    assert printable_in("ascii")("é🙂") == "\\xe9\\U0001f642"
    assert printable_in(None)("é") == "\\xe9"
    assert printable_in("utf-8")("é🙂") == "é🙂"
