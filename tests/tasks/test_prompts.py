"""The tokenizer without torch, and the order of training."""

import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from asyncrl.errors import ModelError, TaskError
from asyncrl.host.tokenizer import load_tokenizer
from asyncrl.tasks.base import Example
from asyncrl.tasks.prompts import LeftOut, Prompt, PromptSource

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A model folder with a character tokenizer of !..~ and empty weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokens = ["<pad>", "<end>"] + [chr(code) for code in range(33, 127)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 100}')
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(str(tokenizer_folder))


class Texts:
    """A task made of the given prompts."""

    def __init__(self, prompts, evals=()):
        self.prompts = prompts
        self.evals = list(evals)
        self.train_size = len(prompts)

    def train_example(self, index):
        return Example(self.prompts[index], {"index": index})

    def eval_examples(self, count):
        return [Example(prompt, {}) for prompt in self.evals[:count]]

    def reward(self, completion, payload):
        return {"exact": 0.0}


class Endless(Texts):
    def __init__(self, width):
        self.width = width
        self.train_size = None

    def train_example(self, index):
        return Example("x" * self.width(index), {"index": index})


def indices(source, ordinals):
    return [source.train(ordinal).payload["index"] for ordinal in ordinals]


def test_every_epoch_takes_each_example_once_in_a_new_order(tokenizer):
    source = PromptSource(Texts([f"q{i}" for i in range(50)]), tokenizer, seed=3, max_prompt_tokens=10)
    epochs = [indices(source, range(50 * epoch, 50 * (epoch + 1))) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_any_ordinal_can_be_asked_for_at_any_time(tokenizer):
    task = Texts([f"q{i}" for i in range(20)])
    straight = indices(PromptSource(task, tokenizer, 1, 10), range(60))
    resumed = PromptSource(task, tokenizer, 1, 10)
    assert indices(resumed, reversed(range(60))) == straight[::-1]
    assert indices(PromptSource(task, tokenizer, 2, 10), range(60)) != straight


def test_an_endless_task_is_taken_in_its_own_order(tokenizer):
    source = PromptSource(Endless(lambda index: 3), tokenizer, 0, 10)
    assert indices(source, [0, 7, 10**12]) == [0, 7, 10**12]


def test_token_ids_are_those_of_the_tokenizer(tokenizer):
    prompt = PromptSource(Texts(["a+b"]), tokenizer, 0, 10).train(0)
    assert prompt.token_ids.dtype == np.dtype("<i4")
    assert tokenizer.decode(prompt.token_ids) == "a+b"


def test_a_prompt_that_is_too_long_is_left_out_and_never_cut(tokenizer):
    prompts = ["x" * 11 if index == 4 else "x" * 10 for index in range(8)]
    source = PromptSource(Texts(prompts), tokenizer, 0, 10)
    made = [source.make(ordinal) for ordinal in range(16)]
    assert Counter(prompt.payload["index"] for prompt in made if isinstance(prompt, Prompt)) == dict.fromkeys(
        [0, 1, 2, 3, 5, 6, 7], 2
    )
    (left_out, again) = [found for found in made if isinstance(found, LeftOut)]
    assert left_out == again and (left_out.index, left_out.too_long) == (4, True)
    assert left_out.reason == "11 tokens, over the limit of 10 (model.max_length - sampling.max_new_tokens)"
    endless = PromptSource(Endless(lambda index: 11 if index == 4 else 1), tokenizer, 0, 10)
    assert [isinstance(endless.make(ordinal), Prompt) for ordinal in (3, 4, 5)] == [True, False, True]


def test_if_nothing_fits_the_limit_is_named(tokenizer):
    source = PromptSource(Texts(["x" * 11], evals=["y" * 11]), tokenizer, 0, 10)
    with pytest.raises(TaskError, match=r"example 0 is left out: 11 tokens, over the limit of 10 \(model\.max_length"):
        source.train(0)
    with pytest.raises(TaskError, match="none of the 1 held-out examples fits into 10 tokens"):
        source.evals(5)


def test_held_out_prompts_that_are_too_long_are_left_out(tokenizer):
    source = PromptSource(Texts(["a"], evals=["x" * 10, "y" * 11, "z"]), tokenizer, 0, 10)
    assert [tokenizer.decode(prompt.token_ids) for prompt in source.evals(3)] == ["x" * 10, "z"]


def test_no_room_for_a_prompt_and_no_examples_are_refused(tokenizer):
    with pytest.raises(TaskError, match=r"model\.max_length must be larger than sampling\.max_new_tokens"):
        PromptSource(Texts(["a"]), tokenizer, 0, 0)
    with pytest.raises(TaskError, match="train_size=0"):
        PromptSource(Texts([]), tokenizer, 0, 10)


def test_chat_messages_go_through_the_template(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    source = PromptSource(Texts([[{"role": "user", "content": "hi"}]]), tokenizer, 0, 20)
    with pytest.raises(TaskError, match="no chat template"):
        source.train(0)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert tokenizer.decode(source.train(0).token_ids) == "<user>hi<a>"


def test_loading_and_tokenizing_does_not_import_torch(tokenizer_folder):
    program = (
        "import sys\nfrom asyncrl.tasks.prompts import PromptSource\n"
        "from asyncrl.host.tokenizer import load_tokenizer\n"
        "from asyncrl.tasks.arithmetic import Arithmetic\n"
        f"tokenizer = load_tokenizer({str(tokenizer_folder)!r})\n"
        f"tokenizer.chat_template = {CHAT_TEMPLATE!r}\n"
        "tokenizer.apply_chat_template([{'role': 'u', 'content': 'x'}], tokenize=True)\n"
        "print(len(PromptSource(Arithmetic(), tokenizer, 0, 10).train(0).token_ids), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["6", "False"], done.stderr


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.json"), r"has no tokenizer\.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer cannot be loaded"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{}"), "has no eos_token"),
        (shutil.rmtree, "there is no such folder"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(tokenizer_folder, tmp_path, break_it, says):
    copy = tmp_path / "copy"
    shutil.copytree(tokenizer_folder, copy)
    break_it(copy)
    with pytest.raises(ModelError, match=says):
        load_tokenizer(str(copy))


class Leaky:
    """Trains on what it is evaluated on."""

    train_size = 8

    def train_example(self, index):
        return Example(f"{index}+1=")

    def eval_examples(self, count):
        return [Example(f"{index}+1=") for index in range(count)]

    def reward(self, completion, payload):
        return {"exact": 0.0}


def test_a_task_that_trains_on_what_it_holds_out_is_told_so_at_each_doubling(tokenizer, caplog):
    source = PromptSource(Leaky(), tokenizer, 0, 64)
    assert len(source.evals(5)) == 5
    for ordinal in range(16):  # two epochs: an example counts once
        source.train(ordinal)
    said = [record.getMessage() for record in caplog.records if "asks what held-out example" in record.getMessage()]
    assert len(said) == 3
    assert all(f"({count} such examples so far)" in text for count, text in zip((1, 2, 4), said, strict=True))
