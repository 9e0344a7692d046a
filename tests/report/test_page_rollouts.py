"""What the model said, on the page of its run: the right rollouts, colored token by token, harmless."""

import re

import pytest

from asyncrl.report.page.document import content_of, page
from asyncrl.report.page.rollouts import MAX_TOKENS
from asyncrl.report.rollouts.choice import Why
from asyncrl.report.rollouts.files import ROLLOUTS_FOLDER, file_of
from asyncrl.report.run_records import RunRecords
from asyncrl.report.summary import summarize
from asyncrl.types import LeaseKind
from tests.report.pages import Page
from tests.report.rollouts.making import HOSTILE, make_record
from tests.report.runs import step, write_run


@pytest.fixture
def page_with(tmp_path):
    """The page of a run with these rollouts, by step."""

    def page_with(records, kind=LeaseKind.TRAIN):
        folder = write_run(tmp_path, [step(1)])
        (folder / ROLLOUTS_FOLDER).mkdir(exist_ok=True)
        for record in records:
            with file_of(folder / ROLLOUTS_FOLDER, record.kind, record.version).path.open("ab") as file:
                file.write(record.to_line())
        run = RunRecords(folder)
        return Page(page(content_of(run, summarize(run))))

    return page_with


def articles(document):
    return document.root.one("section", id="rollouts").all("article")


def test_a_run_without_rollouts_has_no_such_section(page_with):
    assert not page_with([]).root.all("section", id="rollouts")


def test_best_and_worst_of_the_newest_and_the_first_step_and_of_the_newest_evaluation_are_shown(page_with):
    records = [
        make_record(ordinal, version=version, reward=ordinal / 10) for version in (1, 20, 40) for ordinal in range(8)
    ]
    records += [make_record(3, kind=LeaseKind.EVAL, version=version, why=Why.EVALUATED) for version in (0, 40)]
    titles = [article.one("h3").text for article in articles(page_with(records))]
    assert len(titles) == 5 + 1 + 5
    assert [title.split(",")[0] for title in titles] == [*["step 40"] * 5, "evaluation of version 40", *["step 1"] * 5]
    assert [title.split("prompt ")[1].split(",")[0] for title in titles[:4]] == ["7", "6", "0", "1"]


def test_each_token_has_classes_for_its_version_its_mismatch_and_its_advantage(page_with):
    (article,) = articles(page_with([make_record()]))
    prompt, completion = article.all("pre")
    assert [(box.attributes["aria-label"], box.attributes["tabindex"]) for box in (prompt, completion)] == [
        ("prompt", "0"),
        ("completion", "0"),
    ]
    assert prompt.text == "1+1="
    assert completion.text == "abc<end>"
    # Versions 3, 4, 4, 4; the trainer's log-probs are -1 + i/4, the engine's -1 - i/8; the advantage is 0.5.
    assert [(span.text, span.attributes["class"]) for span in completion.all("span")] == [
        ("a", "v0 p2"),
        ("b", "v1 m2 p2"),
        ("c", "v1 m3 p2"),
        ("<end>", "v1 m4 p2"),
    ]
    assert "reward 1 (exact 1); advantage +0.5; 4 tokens, ended by itself" in article.text
    assert [chip.text.strip() for chip in article.one("p").all("span")] == ["3", "4"]


def test_tokens_in_a_row_that_look_the_same_are_one_piece_and_long_completions_are_cut(page_with):
    count = MAX_TOKENS + 7
    record = make_record(num_tokens=count, token_texts=["x"] * count, old_logprobs=None, advantage=None)
    (article,) = articles(page_with([record]))
    completion = article.all("pre")[1]
    assert [len(span.text) for span in completion.all("span")] == [1, MAX_TOKENS - 1]
    assert completion.one("i").text == " … and 7 more tokens"


def test_what_a_model_says_acts_on_nothing(page_with):
    said = f"<script>alert(1)</script>{HOSTILE}\nline two"
    texts = [said, "<img src=x onerror=alert(2)>", "", ""]
    document = page_with([make_record(prompt=said, completion=said, token_texts=texts)])
    assert not document.root.all("img") and len(document.root.all("script")) == 2
    (article,) = articles(document)
    prompt, completion = article.all("pre")
    assert prompt.text.startswith("<script>alert(1)</script>ok\\x1b[2J") and prompt.text.endswith("\nline two")
    assert "<img src=x onerror=alert(2)>" in completion.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", document.root.text)


def test_lines_that_cannot_be_read_are_counted(page_with, tmp_path):
    page_with([make_record(version=5)])
    with (tmp_path / ROLLOUTS_FOLDER / "step_5.jsonl").open("a") as file:
        file.write("{}\n")
    assert "1 lines of step_5.jsonl cannot be read" in page_with([]).root.one("section", id="rollouts").text
