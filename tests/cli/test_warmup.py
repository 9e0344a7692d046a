"""The warm-up command: models that everything else can load."""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.cli.warmup import main
from tests.warm_processes import run_warm

pytestmark = pytest.mark.bits

ROOT = Path(__file__).parents[2]


def run_warmup(*arguments):
    return run_warm([sys.executable, "-m", "asyncrl.cli.warmup", *map(str, arguments)], timeout_s=240, cwd=ROOT)


@pytest.fixture
def word_problems(tmp_path):
    path = tmp_path / "train.jsonl"
    records = (
        {"question": f"Ann has {n} pens and buys {n % 7}. How many?", "answer": f"{n}+{n % 7}\n#### {n + n % 7}"}
        for n in range(80)
    )
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_help_does_not_import_torch(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["arithmetic", "--help"])
    assert ended.value.code == 0
    assert "--operations" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-c", "import sys, asyncrl.cli.warmup; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.strip() == "False"


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert main(["arithmetic", str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["arithmetic", "--digits", "0"], "digits=0 must be from 1 to 9"),
        (["gsm8k", "--data", "not/here.jsonl"], "not/here.jsonl cannot be read"),
        (["gsm8k", "--data", "not/here.jsonl", "--minutes", "0"], "--minutes 0 must be above 0"),
    ],
)
def test_mistakes_end_with_code_2_and_leave_no_folder(tmp_path, arguments, says, capsys):
    assert main([arguments[0], str(tmp_path / "model"), *arguments[1:]]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_gsm8k_model_loads_everywhere_and_keeps_text_whole(tmp_path, word_problems):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from asyncrl.host.model_folder import find_model
    from asyncrl.host.tokenizer import load_tokenizer

    folder = tmp_path / "model"
    done = run_warmup("gsm8k", folder, "--data", word_problems, "--minutes", "0.05", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "format" in done.stdout and "exact" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "train.jsonl"]

    text = "Question: Ann paid $1,234.50 for 7 caf\u00e9s.\nAnswer:\n#### 42"
    ours, auto = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert ours(text)["input_ids"] == auto(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size >= len(ours)
    assert model.config.eos_token_id == ours.eos_token_id == model.generation_config.eos_token_id
    assert find_model(str(folder)).num_parameters() > 3_000_000


def test_supervised_steps_lower_the_loss_on_given_tokens_only():
    from asyncrl.cli.supervised import SupervisedTrainer, make_model

    model = make_model(16, hidden=32, layers=1, heads=2, inner=32, tied=False, seed=0)
    trainer = SupervisedTrainer(model, lr=1e-2, warmup_steps=1)
    # The token after the first two repeats the first; the second is noise that carries no loss.
    sequences = [[3 + i, 3 + (5 * i + 1) % 12, 3 + i, 1] for i in range(12)]
    losses = [trainer.step(sequences, [2] * 12) for _ in range(80)]
    assert math.isclose(losses[0], math.log(16), rel_tol=0.1)
    assert losses[-1] < 0.1


def test_equal_seeds_give_equal_models_and_losses():
    from asyncrl.cli.supervised import SupervisedTrainer, make_model

    def losses(seed):
        trainer = SupervisedTrainer(make_model(16, 32, 1, 2, 32, True, seed), lr=1e-2, warmup_steps=1)
        return [trainer.step([[3, 4, 5], [6, 7]], [0, 0]) for _ in range(3)]

    assert losses(1) == losses(1) != losses(2)


def test_answers_are_judged_as_right_or_wrong_by_lost_carries():
    from asyncrl.cli.warmup_arithmetic import judge, possible_answers
    from asyncrl.tasks.arithmetic import Problem

    problem = Problem(85, "+", 47)
    assert possible_answers(problem) == {"132", "32", "122", "22"}
    assert possible_answers(Problem(11, "+", 22)) == {"33"}
    assert judge([problem] * 4, ["12,13=132", "12,12=22", "12,13=131", ""]) == (0.25, 0.5)


@pytest.mark.slow
def test_the_arithmetic_model_is_cheap_to_make_and_lands_in_its_window(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from asyncrl.cli.supervised import complete
    from asyncrl.cli.warmup_arithmetic import EVAL_PROBLEMS, judge
    from asyncrl.host.tokenizer import load_tokenizer
    from asyncrl.tasks.arithmetic import Arithmetic

    folder = tmp_path / "model"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([ROOT / "bin" / "warmup", "arithmetic", folder], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120, "a minute on two CPUs"
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.padding_side = "left"
    problems = Arithmetic().held_out_problems(512)
    model = AutoModelForCausalLM.from_pretrained(folder)
    # Training ended on these: where it ends differs between CPUs, and others would add an error of sampling.
    judged = problems[:EVAL_PROBLEMS]
    accuracy, _ = judge(judged, complete(model, tokenizer, [problem.text for problem in judged], 16))
    sampled, _ = judge(problems, complete(model, tokenizer, [problem.text for problem in problems], 16, 1.0))
    assert 0.2 <= accuracy <= 0.4
    assert sampled >= 0.15  # reinforcement learning needs some successes
