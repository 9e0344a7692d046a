"""The page of a run: well-formed, closed to the network and to hostile texts, small, quick, and right."""

import base64
import hashlib
import json
import re
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from asyncrl.metrics import METRICS_FILE
from asyncrl.metrics.alarms import RULES
from asyncrl.report.page.charts import CHART_OF_ALARM
from asyncrl.report.page.document import PAGE_FILE, content_of, page, write_page
from asyncrl.report.page.drawing import WIDE
from asyncrl.report.page.lanes import MAX_LANES
from asyncrl.report.page.markup import json_block, markup
from asyncrl.report.page.points import MAX_POINTS
from asyncrl.report.run_records import RunRecords
from asyncrl.report.summary import summarize
from asyncrl.report.writing import report
from tests.report.pages import Page
from tests.report.runs import evaluation, health, step, sync, whole, write_run

MAX_BYTES = 3_000_000
HOSTILE = "<img src=x onerror=alert(1)>\"'&</script><script>alert(2)</script>\x1b[31m\u202e{}\ud800"
HOSTILE_FOLDER = "<img src=x onerror=alert(1)>\"'&<script>alert(2)<!--"
HANDLERS = re.compile(r"^on", re.IGNORECASE)


@pytest.fixture
def page_of(tmp_path):
    """The page of a run that has these records, parsed."""

    def page_of(*metrics, folder="run", live=False):
        run = RunRecords(write_run(tmp_path / folder, metrics))
        return Page(page(content_of(run, summarize(run)), live=live))

    return page_of


def policy(document):
    return document.root.one("meta", http_equiv="Content-Security-Policy").attributes["content"]


def digest(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def figure(document, key):
    return document.root.one("figure", id=key)


def points_of(document, chart, curve=0):
    """Steps of one curve's points, and the figures at them."""
    found = document.data["charts"][chart]["curves"][curve]
    return document.data["grids"][found["grid"]]["step"], found["mean"]


# -- form


def test_ids_are_unique_and_every_link_leads_to_one(page_of):
    document = page_of(*whole(40, alarms=["ess_share", "lost_share"]), sync(41, members=["a"], generators_failed=1))
    ids = [element.attributes["id"] for element in document.root.all() if "id" in element.attributes]
    assert len(set(ids)) == len(ids)
    links = [link.attributes["href"] for link in document.root.all("a")]
    assert len(links) > 10
    assert {link.removeprefix("#") for link in links} <= set(ids)
    labels = {
        element.attributes["aria-labelledby"]
        for element in document.root.all()
        if "aria-labelledby" in element.attributes
    }
    assert labels <= set(ids)


def test_it_can_be_read_without_seeing_it(page_of):
    root = page_of(*whole(40)).root
    assert root.one("html").attributes["lang"] == "en"
    assert [len(root.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    drawings = root.all("svg", of="drawing")
    assert len(drawings) == len(root.all("figure")) > 8
    assert all(drawing.attributes["role"] == "img" and drawing.attributes["aria-label"] for drawing in drawings)
    reward = figure(page_of(*whole(40)), "reward").one("svg", of="drawing").attributes["aria-label"]
    assert "training: first 0.01, last 0.4, least 0.01, largest 0.4; held-out: first 0.25, last 0.875" in reward
    assert all(cell.attributes.get("scope") in ("row", "col") for cell in root.all("th"))
    assert all(choice.parent.tag == "label" for choice in root.all("input"))
    assert len(root.all("details")) == len(drawings)
    scrollers = [*root.all("div", of="scroll"), *root.all("pre")]
    assert scrollers and all(box.attributes.get("tabindex") == "0" for box in scrollers), "keys scroll them"
    assert all(box.attributes.get("role") == "group" and box.attributes["aria-label"] for box in scrollers)


def luminance(color):
    parts = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first, second):
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colors_can_be_told_from_their_ground_in_light_and_dark(page_of):
    style = page_of().root.one("style").text
    themes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
        for name in ("ink", "quiet", "accent", "alarm"):
            assert contrast(colors[name], colors["ground"]) >= 4.5, name
        assert contrast(colors["quiet"], colors["raised"]) >= 4.5
        assert contrast(colors["ink"], colors["alarm-ground"]) >= 4.5
        lines = [f"{kind}{number}" for kind in "ca" for number in range(8)]
        assert {name for name in lines if contrast(colors[name], colors["ground"]) < 3.0} == set()


# -- closed


def test_nothing_is_loaded_and_nothing_runs_but_its_own_script(page_of):
    document = page_of(*whole(20))
    style, script = document.root.one("style").text, document.root.all("script")[-1].text
    rules = dict(rule.strip().split(" ", 1) for rule in policy(document).split(";"))
    assert rules == {
        "default-src": "'none'",
        "style-src": digest(style),
        "script-src": digest(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    for element in document.root.all():
        assert element.tag not in {"link", "img", "iframe", "object", "base", "form", "use", "image", "foreignobject"}
        assert not {"src", "style", "srcset", "action", "xlink:href"} & set(element.attributes), element
        assert element.attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|@font-face", style)
    assert not re.search(r"https?:|//[\w.]+/|eval\(|document\.write|new Function", script)


def test_a_live_page_may_ask_its_own_server_and_nobody_else(page_of):
    rules = dict(rule.strip().split(" ", 1) for rule in policy(page_of(*whole(5), live=True)).split(";"))
    assert (rules["connect-src"], rules["default-src"]) == ("'self'", "'none'")


def test_no_text_of_a_run_becomes_markup(page_of):
    failed = {HOSTILE: 3}
    figures = {
        "reward_parts": {HOSTILE: 1.0, "other": 0.5},
        "alarms": [HOSTILE, "ess_share"],
        "rollouts_failed": failed,
    }
    records = [step(version, **figures) for version in range(1, 5)]
    document = page_of(*records, sync(4, members=[HOSTILE, "b"], generators_failed=1), folder=HOSTILE_FOLDER)
    assert not document.root.all("img")
    assert len(document.root.all("script")) == 2, "the data and the page's own"
    for element in document.root.all():
        assert not any(HANDLERS.match(name) for name in element.attributes), element
    assert HOSTILE_FOLDER in document.root.one("h1").text
    shown = markup("{}", HOSTILE)
    text = document.root.text
    for place in (figure(document, "parts"), figure(document, "rounds"), document.root.one("section", id="losses")):
        assert "<img src=x" in place.text and "alert(2)" in place.text, shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


def test_no_text_ends_the_block_of_data():
    block = json_block("data", {"</script><!--": "<b>&\u2028"})
    assert block.count("<") == 2
    assert json.loads(block[block.index(">") + 1 : block.rindex("<")]) == {"</script><!--": "<b>&\u2028"}


def test_templates_escape_and_markup_stays():
    assert markup("<b>{}</b>{}", "<i>", markup("<i>{}</i>", "&")) == "<b>&lt;i&gt;</b><i>&amp;</i>"


def test_the_file_is_for_its_user_alone_and_written_in_one_move(tmp_path):
    run = RunRecords(write_run(tmp_path / "run", [step(1)]))
    path = write_page(tmp_path / PAGE_FILE, content_of(run, summarize(run)))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [PAGE_FILE]


# -- runs of all kinds


@pytest.mark.parametrize(
    "metrics",
    [[], [step(1)], [evaluation(0, 0.5)], [sync(0, members=["a"])], [step(1, wall_s=None, age_health={})]],
    ids=["none", "one step", "evaluation", "sync", "step of an older version"],
)
def test_a_run_that_hardly_began_has_a_page(page_of, metrics):
    document = page_of(*metrics)
    assert set(document.data["charts"]) <= {element.attributes["id"] for element in document.root.all("figure")}


def test_figures_that_are_nan_are_gaps_and_are_named(page_of):
    nan = float("nan")
    rewards = [0.1, nan, 0.3]
    records = [step(version, reward_mean=reward, ess_share=nan) for version, reward in enumerate(rewards, start=1)]
    document = page_of(*records)
    assert points_of(document, "reward") == ([1, 2, 3], [0.1, None, 0.3])
    line = figure(document, "reward").one("svg", of="by-step").one("path").attributes["d"]
    assert line.count("M") == 2
    losses = document.root.one("section", id="losses").text
    assert "lines in which ess_share was NaN" in losses and "lines in which reward_mean was NaN" in losses


def test_a_version_trained_again_is_shown_once_and_its_restart_marked(page_of):
    first = [step(version, wall_s=2.0 * version) for version in range(1, 9)]
    again = [step(version, wall_s=20.0 + version, reward_mean=0.9) for version in range(5, 11)]
    document = page_of(*first, *again)
    steps, rewards = points_of(document, "reward")
    assert steps == list(range(1, 11))
    assert rewards == [0.01, 0.02, 0.03, 0.04, *[0.9] * 6]
    times = document.data["grids"][0]["time"]
    assert all(before <= after for before, after in pairwise(times))
    (mark,) = figure(document, "reward").one("svg", of="by-step").all("path", of="mark")
    assert mark.attributes["d"] == f"M{WIDE // 2},0V1000"
    assert "restart that trained again from version 4" in document.root.one("section", id="losses").text


def test_steps_that_are_not_trained_again_yet_are_left_out(page_of):
    document = page_of(*(step(version) for version in (1, 2, 3, 4, 2)))
    assert points_of(document, "reward")[0] == [1, 2]


def test_a_chart_of_what_was_never_measured_is_left_out(page_of):
    charts = page_of(*whole(5)).data["charts"]
    assert {"reward", "age", "ess", "throughput", "idle", "sync_time"} <= set(charts)
    assert not {"critic", "kl_reference", "entropy", "parts"} & set(charts)


def test_figures_by_age_have_a_line_each_and_one_over_all(page_of):
    ages = {"0": health(10, ess_share=0.9), "2-3": health(5, ess_share=0.5), "64+": health(1, ess_share=0.1)}
    document = page_of(*(step(version, age_health=ages) for version in range(1, 4)))
    labels = [entry.one("span").text for entry in figure(document, "ess").one("ul").all("li")]
    assert labels == ["age 0", "age 2-3", "age 64+", "all ages", "alarm ess_share below 30 %"]
    assert points_of(document, "ess", 2)[1] == [0.1] * 3


def test_the_time_of_both_sides_is_told_by_activity_or_by_idle_shares_where_there_is_no_more(page_of):
    document = page_of(*whole(4))
    labels = [entry.text for entry in figure(document, "learner_time").one("ul").all("li")]
    assert labels == ["compute 70 %", "data 15 %", "snapshot 15 %", "messages 0.05 %"]
    assert len(figure(document, "generator_time").one("svg", of="by-time").all("path", of="layer")) == 3
    document = page_of(*whole(4, learner_time_s={}, generator_time_s={}), folder="older")
    assert "training is the bottleneck" in document.root.one("section", id="figures").text
    assert not {"learner_time", "generator_time"} & set(document.data["charts"])


def test_of_several_completions_of_a_prompt_the_best_is_shown_beside_the_mean(page_of):
    best = {"reward_best_mean": 0.75, "reward_parts_best": {"correct": 0.75}}
    document = page_of(step(1), replace(evaluation(0, 0.25), **best), replace(evaluation(1, 0.5), **best))
    assert points_of(document, "reward", 2) == ([0, 1], [0.75, 0.75])
    labels = [entry.one("span").text for entry in figure(document, "eval_parts").one("ul").all("li")]
    assert labels == ["correct", "correct, best"]
    assert [points_of(document, "eval_parts", curve)[1] for curve in (0, 1)] == [[0.25, 0.5], [0.75, 0.75]]


# -- alarms


def test_lengths_as_granted_stand_beside_those_of_each_batch(page_of):
    by_age = {"0": {"rollouts": 3, "tokens": 30}, "1": {"rollouts": 1, "tokens": 50}}
    grants = {"came_in_by_grant_age": by_age, "trained_by_grant_age": by_age, "completion_tokens_mean": 20.0}
    document = page_of(*[step(version, **grants) for version in range(1, 9)])
    legend = [entry.text for entry in figure(document, "granted").one("ul", of="legend").all("li")]
    assert len(legend) == 3 and legend[1].startswith("granted at this step")
    assert points_of(document, "granted", 1) == ([*range(1, 9)], [*[20.0] * 7, None]), "of step 8 some are out"
    assert points_of(document, "grant_age", 0)[1][0] == 0.25 and points_of(document, "grant_age", 1)[1][0] == 0.625
    assert "Length, granted · trained" in document.root.one("dl", of="tiles").text
    assert page_of(*whole(5), folder="older").root.all("figure", id="granted") == []


def test_every_alarm_has_a_chart():
    assert {rule.figure for rule in RULES} == set(CHART_OF_ALARM)


def test_alarms_come_first_with_what_helps_and_those_that_are_on_before_others(page_of):
    on = {2: ["ess_share"], 3: ["ess_share"], 6: ["ess_share"], 7: ["clip_fraction"]}
    document = page_of(
        *(step(version, ess_share=0.9 - version / 10, alarms=on.get(version, [])) for version in range(1, 8))
    )
    sections = document.root.one("main").all("section")
    assert sections[0].attributes["id"] == "alarms"
    assert sections[0].one("h2").text == "1 alarm still on, 1 before"
    now, before = sections[0].all("article")
    assert now.one("h3").text == "clip_fraction above 0.3" and "still on: since step 7; on in 1 step" in now.text
    assert "Likely cause: the policy moved away from the one that sampled (drift 0.02 nats" in now.text
    assert "by age 0: 0.1, 1: 0.1" in now.text and "What helps: lower staleness.max_age or learner.lr; " in now.text
    assert "algorithm.masks=[second_moment]" in before.text
    assert "over: the last time in steps 6 to 6; on in 3 steps, 2 times; least 0.2, last 0.2" in before.text
    assert before.one("a").attributes["href"] == "#ess"


def test_a_run_without_alarms_begins_with_its_figures(page_of):
    main = page_of(*whole(10)).root.one("main")
    assert main.all("section")[0].attributes["id"] == "figures"
    texts = [tile.text for tile in main.all("div", of="tile")]
    assert texts[0].startswith("Reward0.01 → 0.1")
    assert texts[1].startswith("Evaluation0.25 → 0.875")
    assert "25% · 10%" in "".join(texts)
    assert "bounded by generators: the learner waited 15% of its time for data" in "".join(texts)
    assert "Nothing was lost" in main.one("section", id="losses").text


def test_times_with_an_alarm_are_shaded_on_its_chart_and_on_no_other(page_of):
    on = {2, 3, 6}
    document = page_of(*(step(version, alarms=["ess_share"] if version in on else []) for version in range(1, 9)))
    spans = figure(document, "ess").one("svg", of="by-step").all("rect", of="alarm")
    places = [(int(span.attributes["x"]), int(span.attributes["width"])) for span in spans]
    assert places == [(WIDE * 2 // 8, WIDE // 8), (WIDE * 6 // 8, 4)]
    assert not figure(document, "reward").one("svg", of="by-step").all("rect")


@pytest.mark.parametrize(("clipped", "is_drawn"), [(0.02, False), (0.2, True)])
def test_a_limit_far_above_a_healthy_run_stays_out_of_the_chart(page_of, clipped, is_drawn):
    ages = {"0": health(10, clip_fraction=clipped)}
    document = page_of(*(step(version, clip_fraction=clipped, age_health=ages) for version in (1, 2)))
    clip = figure(document, "clip")
    assert bool(clip.all("line", of="limit")) is is_drawn
    assert "alarm clip_fraction above 30 %" in clip.text


# -- weight sync


def lanes_of(document):
    return [text.text for text in figure(document, "rounds").one("svg", of="ys").all("text")]


def test_each_generator_has_a_lane_and_failures_stand_out(page_of):
    records = [sync(version, members=["g-10", "g-9"], generators_committed=2) for version in range(1, 5)]
    failed = sync(5, members=["g-9"], generators_committed=0, generators_failed=1, wall_s=11.0, total_ms=3000.0)
    partly = sync(6, members=["g-9", "g-10"], generators_committed=1, generators_failed=1)
    document = page_of(*records, failed, partly)
    assert lanes_of(document) == ["g-9", "g-10"]
    rounds = figure(document, "rounds")
    by_time = rounds.one("svg", of="by-time")
    (bar,) = by_time.all("path", of="end3")
    assert bar.attributes["d"] == f"M{round(WIDE * 8 / 12)},50H{round(WIDE * 11 / 12)}", "as long as it took"
    assert len(by_time.all("path", of="end2")) == 2
    assert "g-9 2 of 6, g-10 1 of 5" in rounds.one("svg", of="drawing").attributes["aria-label"]


def test_of_a_large_fleet_those_with_failures_have_lanes_and_the_rest_one(page_of):
    names = [f"g-{number}" for number in range(300)]
    rounds = [sync(version, members=names, generators_committed=300) for version in range(1, 4)]
    failed = sync(4, members=["g-277"], generators_committed=0, generators_failed=1)
    document = page_of(*rounds, failed)
    assert len(lanes_of(document)) == MAX_LANES
    assert (lanes_of(document)[0], lanes_of(document)[-1]) == ("g-277", f"{300 - MAX_LANES + 1} others")


# -- size and time


def test_200_steps_cost_a_fraction_of_a_second_and_little_space(tmp_path, capsys):
    ages = {name: health(10, ess_share=0.5) for name in ("0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64+")}
    parts = {f"part {number}": 0.5 for number in range(16)}
    write_run(tmp_path, whole(200, age_health=ages, reward_parts=parts, entropy=0.3, grad_norm=1.0))
    took_s = []
    for _ in range(3):
        began = time.process_time()
        path = report(tmp_path)
        took_s.append(time.process_time() - began)
    assert path.stat().st_size < MAX_BYTES
    assert min(took_s) < 0.3
    assert Page(path.read_text(encoding="utf-8")).data["step"] == 200


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_long_run_stays_as_small_and_loses_no_spike(tmp_path, capsys, count):
    spike = count // 2 + 4321
    figures = '"reward_mean":0.5,"policy_age_mean":1.5,"policy_age_max":3,"ess_share":0.9,"clip_fraction":0.01'
    ages = ",".join(
        f'"{age}":{{"tokens":5,"ess_share":0.9,"clip_fraction":0.1,"ratio_max":2}}' for age in ("0", "1", "2-3")
    )
    with (tmp_path / METRICS_FILE).open("w") as file:
        for version in range(1, count + 1):
            norm = 1e6 if version == spike else 1.0
            file.write(
                f'{{"kind":"step","version":{version},"wall_s":{version / 2},"grad_norm":{norm},{figures},'
                f'"age_health":{{{ages}}}}}\n'
            )
            if version % 4 == 0:
                members = '["a","b","c","d"]'
                file.write(
                    f'{{"kind":"sync","version":{version},"wall_s":{version / 2},"total_ms":900,"members":{members},'
                    f'"generators_committed":4}}\n'
                )
    path = report(tmp_path)
    assert path.stat().st_size < MAX_BYTES
    document = Page(path.read_text(encoding="utf-8"))
    assert max(len(grid["step"]) for grid in document.data["grids"]) == MAX_POINTS
    curve = document.data["charts"]["grad_norm"]["curves"][0]
    (place,) = [place for place, high in enumerate(curve["high"]) if high == 1e6]
    assert document.data["grids"][curve["grid"]]["step"][place] == pytest.approx(spike, abs=count / MAX_POINTS)
    assert "1,000,000" in figure(document, "grad_norm").one("details").text
