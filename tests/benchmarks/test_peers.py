"""What the comparisons with peers rest on: the law of lengths, the batch both sides read, how they are asked."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from asyncrl.algorithms.advantages import group_relative_advantages
from benchmarks.speed import peer_environment
from benchmarks.speed.learner_vs_trl import require_agreement
from benchmarks.speed.learner_worker import groups_of
from benchmarks.speed.models import END_ID, SIZES, make_counting_model, make_model
from benchmarks.speed.peer_environment import Side, peer_python
from benchmarks.speed.peer_lengths import draw_lengths, lognormal_shares, write_batch
from benchmarks.speed.peer_task import prompt

MEAN, CAP = 12, 84


def test_lengths_follow_the_law_that_the_model_is_made_for():
    lengths = draw_lengths("lognormal", 200_000, mean=MEAN, cap=CAP, rng=np.random.default_rng(0))
    shares = lognormal_shares(mean=MEAN, cap=CAP)
    assert shares.shape == (CAP,) and shares.sum() == pytest.approx(1.0)
    drawn = np.bincount(lengths, minlength=CAP + 1)[1:] / len(lengths)
    assert np.abs(drawn - shares).max() < 0.003
    assert (draw_lengths("equal", 5, mean=MEAN, cap=CAP, rng=np.random.default_rng(0)) == MEAN).all()


def test_a_counting_model_ends_where_its_first_token_says(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shares = lognormal_shares(mean=MEAN, cap=CAP)
    folder = make_counting_model(tmp_path, "0.8M", shares)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(prompt(3, 32, SIZES["0.8M"].vocab))["input_ids"]
    assert len(ids) == 32 and ids[-1] == END_ID + 1
    counters = torch.arange(END_ID + 2, END_ID + 1 + CAP)  # the one after which 1, 2, ... tokens are left
    with torch.no_grad():
        after_prompt = torch.softmax(model(torch.tensor([ids])).logits[0, -1], dim=-1)
        inputs = torch.stack([torch.tensor([*ids, counter]) for counter in counters])
        after_counter = torch.softmax(model(inputs).logits[:, -1], dim=-1)
    of_length = after_prompt[torch.tensor([END_ID, *counters])]
    assert np.abs(of_length.numpy() - shares).max() < 0.002
    successors = torch.tensor([END_ID, *counters[:-1]])
    assert after_counter[torch.arange(len(counters)), successors].min() > 0.99


def test_a_model_of_fixed_lengths_reads_its_prompts(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path, "0.8M"))
    text = prompt(0, 16, SIZES["0.8M"].vocab)
    assert len(tokenizer(text)["input_ids"]) == 16 and tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("size", [pytest.param("0.8M"), pytest.param("10M", marks=pytest.mark.slow)])
@pytest.mark.parametrize("law", ["geometric", "lognormal"])
def test_sampled_completions_have_the_mean_length_that_was_asked_for(size, law, tmp_path):
    """A model that was asked for 64 once ended at 390: what its end token's logit came out as hung on its size."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    count = 256
    places = np.arange(1, CAP + 1)
    if law == "geometric":
        folder = make_model(tmp_path, size, mean_tokens=MEAN)
        shares = (1 - 1 / MEAN) ** (places - 1) / MEAN
        shares[-1] = 1 - shares[:-1].sum()  # what would be longer is cut
    else:
        shares = lognormal_shares(mean=MEAN, cap=CAP)
        folder = make_counting_model(tmp_path, size, shares)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = torch.tensor([tokenizer(prompt(index, 8, SIZES[size].vocab))["input_ids"] for index in range(count)])
    torch.manual_seed(0)
    with torch.no_grad():
        sampled = model.generate(prompts, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=CAP, pad_token_id=0)
    lengths = (sampled[:, prompts.shape[1] :] != 0).sum(dim=1).numpy()
    mean = float((places * shares).sum())
    deviation = float(np.sqrt((places**2 * shares).sum() - mean**2))
    assert abs(lengths.mean() - mean) < 4 * deviation / np.sqrt(count)


def test_both_sides_read_the_same_batch(tmp_path):
    lengths = draw_lengths("lognormal", 16, mean=MEAN, cap=CAP, rng=np.random.default_rng(1))
    path = tmp_path / "batch.npz"
    write_batch(path, lengths, vocab=100, prompt_tokens=5, group_size=8, rng=np.random.default_rng(2))
    groups = groups_of(path, 8)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert [rollout.num_tokens for rollout in rollouts] == lengths.tolist()
    with np.load(path) as file:
        assert (np.concatenate([rollout.token_ids for rollout in rollouts]) == file["tokens"]).all()
        assert all((file["prompts"][8 * index] == group.prompt_token_ids).all() for index, group in enumerate(groups))
        rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
        wanted = group_relative_advantages(rewards, torch.arange(16) // 8, 2)
        assert np.abs(wanted.numpy() - file["advantages"]).max() < 1e-5 and rewards.std() > 0


def test_sides_that_compute_something_else_are_no_comparison():
    same = {"loss": 0.1, "grad_norm": 2.0}
    assert "loss 0.1" in require_agreement(same, same, "float32")
    with pytest.raises(RuntimeError, match="do not compute the same: .*grad_norm 2.002 and 2"):
        require_agreement({"loss": 0.1, "grad_norm": 2.002}, same, "float32")


ECHO = "import sys\nfor line in sys.stdin:\n    print(line.strip(), flush=True)\n    sys.stderr.write('words\\n')"


def test_a_side_answers_line_by_line_and_its_last_words_are_kept(tmp_path):
    side = Side([sys.executable, "-c", ECHO], tmp_path / "log", threads=1)
    assert side.ask(step=1) == {"step": 1} and side.ask(step=2) == {"step": 2}
    side.close()
    dead = Side([sys.executable, "-c", "raise SystemExit('no such engine')"], tmp_path / "log", threads=1)
    with pytest.raises(RuntimeError, match="no such engine"):
        dead.answer()
    dead.close()


def test_an_environment_is_made_once_for_each_list_of_versions(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(peer_environment.subprocess, "run", lambda command, **_: commands.append(command) or _Done())
    python = tmp_path / "trl" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert peer_python(tmp_path) == python and any(peer_environment.LOCK in command for command in commands)
    made = len(commands)
    assert peer_python(tmp_path) == python and len(commands) == made
    stamp = tmp_path / "trl" / "installed.json"
    stamp.write_text(json.dumps([*json.loads(stamp.read_text()), "other==1"]))
    peer_python(tmp_path)
    assert len(commands) == 2 * made


def test_the_peers_run_on_exactly_what_asyncrl_runs_on():
    root = peer_environment.LOCK.parents[2]
    ours = peer_environment.pins(root / "requirements-cpu.lock")
    assert peer_environment.pins(peer_environment.LOCK) == [*ours, "trl==1.16.0"]
    assert all("==" in pin for pin in ours) and len(ours) > 100


class _Done:
    returncode = 0
