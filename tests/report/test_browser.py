"""The page of a run of 200 steps in a real browser: opened, read, clicked through, on a phone and in the dark."""

from __future__ import annotations

import json

import pytest

from tests.report.browser import BROWSER, PHONE, VIEWS, WHY_NOT, browser
from tests.report.full_run import OPEN_TWO_TABLES, full_run
from tests.waits import LATE_S

pytestmark = pytest.mark.skipif(BROWSER is None, reason=WHY_NOT)

MAX_BYTES = 3_000_000
MAX_ELEMENTS = 40_000  # what a browser has to lay out before it shows anything
OPENED_S = 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def page(folder):
    return full_run(folder / "run")


@pytest.fixture(scope="module")
def window(folder):
    with browser(folder / "profile") as window:
        yield window


@pytest.fixture(autouse=True)
def nothing_is_said_or_asked_for(window, page):
    """Whatever a test does: no message in the console, no error, and no request but for the page itself."""
    window.said.clear()
    window.requests.clear()
    yield
    window.evaluate("0")  # what the browser has to say comes before its answer
    assert window.said == []
    assert set(window.requests) <= {page.as_uri()}


def selectors(window, query):
    """A selector of its own for each element that `query` finds."""
    marked = (
        f"[...document.querySelectorAll({json.dumps(query)})].map((e, i) => (e.dataset.test ??= 't' + i + e.tagName))"
    )
    return [f'[data-test="{name}"]' for name in window.evaluate(marked)]


def test_it_is_small_and_soon_open(window, page):
    assert page.stat().st_size <= MAX_BYTES
    window.open(page)
    assert window.evaluate("document.querySelectorAll('*').length") <= MAX_ELEMENTS
    assert window.opened_ms() / 1000 < OPENED_S + LATE_S


@pytest.mark.browser
def test_every_link_leads_to_what_it_names(window, page):
    window.open(page)
    links = selectors(window, "a")
    assert len(links) > 15
    for link in links:
        window.click(link)
        told = "(() => { const box = document.querySelector(location.hash).getBoundingClientRect();"
        target, top, bottom = window.evaluate(f"{told} return [location.hash, box.top, box.bottom]; }})()")
        assert target == window.evaluate(f"document.querySelector('{link}').hash")
        assert -2 <= top < 900 or 0 < bottom <= 900, f"{target} is not in the window"


def test_the_axis_is_that_of_steps_or_of_time(window, page):
    window.open(page)
    shown = "[...document.querySelectorAll('.xs text')].filter(e => e.getBoundingClientRect().width)"
    seen = f"{shown}.map(e => e.textContent)"
    by_step = window.evaluate(seen)
    window.click("#x-time")
    by_time = window.evaluate(seen)
    window.click("#x-step")
    assert window.evaluate(seen) == by_step != by_time
    assert any("200 steps" in text for text in by_step) and any("min" in text or " s" in text for text in by_time)


def test_the_mouse_reads_all_charts_at_one_place(window, page):
    window.open(page)
    newest = window.evaluate("document.querySelector('#reward .legend b').textContent")
    x, y = window.middle("#reward .drawing")
    window.move(x, y)
    assert window.evaluate("document.querySelector('#where').textContent").startswith("step 100, ")
    middle = window.evaluate("document.querySelector('#reward .legend b').textContent")
    shown = "[...document.querySelectorAll('.cursor')].every(line => getComputedStyle(line).visibility == 'visible')"
    assert middle != newest and window.evaluate(shown)
    window.move(5, 5)
    assert window.evaluate("document.querySelector('#where').textContent") == ""
    assert window.evaluate("document.querySelector('#reward .legend b').textContent") == newest


@pytest.mark.browser
def test_keys_read_every_chart(window, page):
    window.open(page)
    for drawing in selectors(window, ".drawing"):
        window.evaluate(f"document.querySelector('{drawing}').focus()")
        window.press("Home")
        first = window.evaluate(f"document.querySelector('{drawing}').getAttribute('aria-valuetext')")
        window.press("ArrowRight")
        window.press("ArrowRight")
        second = window.evaluate(f"document.querySelector('{drawing}').getAttribute('aria-valuetext')")
        assert first.startswith("step ") and second.startswith("step ") and first != second
        window.press("Escape")
        assert window.evaluate("document.querySelector('#where').textContent") == ""


@pytest.mark.browser
def test_every_table_opens_with_all_points(window, page):
    window.open(page)
    summaries = selectors(window, "summary")
    assert len(summaries) == window.evaluate("document.querySelectorAll('details').length") > 20
    rows = []
    for summary in summaries:
        window.click(summary)
        opened = f"(e => e.open && e.checkVisibility() ? e.querySelectorAll('tr').length : 0)({parent(summary)})"
        rows.append(window.evaluate(opened))
        assert rows[-1] > 1
    assert max(rows) > 200
    window.click(summaries[0])
    assert not window.evaluate(f"{parent(summaries[0])}.open")


def parent(selector):
    return f"document.querySelector('{selector}').parentElement"


def test_tokens_are_colored_by_what_is_chosen(window, page):
    window.open(page)
    colors = "[...document.querySelectorAll('#rollouts pre span')].map(e => getComputedStyle(e).backgroundColor).join()"
    seen = {}
    for name in ("mismatch", "advantage", "none", "version"):
        window.click(f"#o-{name}")
        seen[name] = window.evaluate(colors)
    assert len(set(seen.values())) == 4
    assert set(seen["none"].replace("rgba(0, 0, 0, 0)", "").split(",")) == {""}


def test_nothing_else_can_be_clicked(window, page):
    """What the tests above click is all there is."""
    window.open(page)
    controls = "a, input, button, select, textarea, summary, [tabindex], [onclick]"
    kind = "e.matches('.scroll, pre') ? 'scroller' : e.matches('.drawing') ? 'drawing' : e.name || e.tagName"
    kinds = window.evaluate(f"[...document.querySelectorAll('{controls}')].map(e => {kind})")
    assert set(kinds) == {"A", "axis", "drawing", "overlay", "scroller", "SUMMARY"}


@pytest.mark.parametrize("axis", ["x-step", pytest.param("x-time", marks=pytest.mark.browser)])
def test_a_phone_shows_it_without_scrolling_sideways(window, page, axis):
    window.open(page, **PHONE)
    window.click(f"#{axis}")
    window.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    window.frame()
    assert window.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]


@pytest.mark.browser
@pytest.mark.parametrize("view", VIEWS)
def test_every_text_can_be_told_from_what_is_behind_it(window, page, view):
    window.open(page, **VIEWS[view])
    dark = window.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == VIEWS[view].get("dark", False)
    window.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    faint = window.evaluate(FAINT_TEXTS)
    assert faint["checked"] > 1000
    assert faint["found"] == []


@pytest.mark.browser
def test_it_can_be_walked_by_keys_in_the_order_of_the_page(window, page):
    window.open(page)
    window.evaluate(OPEN_TWO_TABLES)
    focusable = window.evaluate(
        "[...document.querySelectorAll('a, input:checked, summary, [tabindex=\"0\"]')].filter(e => e.checkVisibility())"
        ".map((e, i) => e.dataset.place = String(i)).length"
    )
    noted = "places.push([Number(e.dataset.place ?? -1), getComputedStyle(e).outlineStyle])"
    window.evaluate(f"globalThis.places = []; addEventListener('focusin', ({{ target: e }}) => {noted}); 0")
    for _ in range(focusable):
        window.press("Tab")
    places = window.evaluate("places")
    assert [place for place, _ in places] == list(range(focusable))
    assert [place for place, outline in places if outline == "none"] == [], "they do not show that they have the focus"


def test_it_makes_sense_without_being_seen(window, page):
    window.open(page)
    assert window.evaluate("document.documentElement.lang") == "en" and window.evaluate("document.title")
    levels = window.evaluate("[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    tree = window.call("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in tree if not node["ignored"]]
    assert [roles.count(role) for role in ("banner", "main", "contentinfo", "navigation")] == [1, 1, 1, 1]
    named = {"link", "radio", "slider", "region", "img", "heading", "DisclosureTriangle"}
    nameless = [
        node["role"]["value"]
        for node in tree
        if not node["ignored"] and node["role"]["value"] in named and not node["name"]["value"]
    ]
    assert nameless == []
    assert window.evaluate("document.querySelectorAll('[role=group]:not([aria-label])').length") == 0


# Texts whose contrast is below 4.5 (3 where they are large), by the colors that the browser computed.
FAINT_TEXTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const rgba = (color) => {
    if (!known.has(color)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = color;
      canvas.fillRect(0, 0, 1, 1);
      known.set(color, [...canvas.getImageData(0, 0, 1, 1).data].map((part, place) => place < 3 ? part : part / 255));
    }
    return known.get(color);
  };
  const over = (top, ground) => [0, 1, 2].map((part) => top[part] * top[3] + ground[part] * (1 - top[3]));
  const light = (color) => {
    const linear = (share) => share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = color.map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    if (!element) return [255, 255, 255];
    const own = rgba(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, ground(element.parentElement));
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  let checked = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || element.closest("script, style, .hidden") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element), behind = ground(element);
    const ink = over(rgba(element instanceof SVGElement ? style.fill : style.color), behind);
    const [low, high] = [light(ink), light(behind)].sort((a, b) => a - b);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    checked += 1;
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < (large ? 3 : 4.5)) found.push([text.slice(0, 40), contrast, style.color, behind.map(Math.round)]);
  }
  return { checked, found: found.slice(0, 20) };
})()
"""
