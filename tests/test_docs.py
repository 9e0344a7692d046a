"""What the documents name exists: links, headings, files, modules.

A page that names a file that moved away sends its reader into the void. Every check is a function from a page to a list
of complaints; it runs over all pages, and over bad samples, so that a check that lost its teeth is noticed.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import asyncrl

ROOT = Path(__file__).resolve().parents[1]
README_MAX_LINES = 170

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w./:-])((?:[\w-]+/)+[\w-]+\.py)\b")
COMMAND = re.compile(r"(?<![\w./-])(bin/[\w-]+)")
CONFIGURATION = re.compile(r"(?<![\w./-])(configs/[\w-]+\.yaml)\b")
MODULE = re.compile(r"(?<![\w./-])((?:asyncrl|benchmarks|tests)(?:\.\w+)+)(?::(\w+))?")
OLD_NAME = re.compile(r"`[^`]*`\s+(?:is|are)\s+(?=`)")
YOURS = {"configs/my.yaml"}  # stands for a file of the reader's


@dataclass(frozen=True)
class Page:
    """A document: its place relative to the root of the project, and its text."""

    path: str
    text: str

    @property
    def folder(self) -> Path:
        return (ROOT / self.path).parent


def newest_section(changelog: str) -> str:
    """The first section of a changelog, without the old names in "`OLD` is `NEW`"; older sections name what is gone."""
    return OLD_NAME.sub("", "\n## ".join(changelog.split("\n## ")[:2]))


def pages() -> Iterator[Page]:
    places = [ROOT / "README.md", *sorted((ROOT / "asyncrl").rglob("README.md")), ROOT / "benchmarks" / "README.md"]
    places += sorted((ROOT / ".github").glob("*.md"))
    yield from (Page(str(place.relative_to(ROOT)), place.read_text(encoding="utf-8")) for place in places)
    yield Page("CHANGELOG.md", newest_section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def dead_links(page: Page) -> list[str]:
    complaints = []
    for target in LINK.findall(page.text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.folder / name).resolve() if name else ROOT / page.path
        if not place.exists():
            complaints.append(f"{target}: there is no {name}")
        elif anchor and anchor not in anchors(place.read_text(encoding="utf-8") if name else page.text):
            complaints.append(f"{target}: {name or 'this page'} has no heading of that name")
    return complaints


def missing_files(page: Page) -> list[str]:
    """Files of the project, named from the root, from asyncrl/ or an area of it, or from the folder of the page."""
    named = {*FILE.findall(page.text), *COMMAND.findall(page.text), *CONFIGURATION.findall(page.text)} - YOURS
    homes = (ROOT, ROOT / "asyncrl", page.folder, *(ROOT / "asyncrl").iterdir())
    return [
        f"{name}: there is no such file"
        for name in sorted(named)
        if "NAME" not in name and not any((home / name).exists() for home in homes)  # NAME is the reader's to choose
    ]


def missing_modules(page: Page) -> list[str]:
    complaints = []
    for dotted, member in MODULE.findall(page.text):
        name = dotted.rstrip(".")
        if name.endswith(".NAME"):  # stands for any module of a package
            name = name.removesuffix(".NAME")
        if not (source_of(name) or is_member(*name.rpartition(".")[::2])):
            complaints.append(f"{name}: there is no such module")
        elif member and not is_member(name, member):
            complaints.append(f"{name}:{member}: the module has no {member}")
    return complaints


def source_of(module: str) -> Path | None:
    """The file of a module or package of this project."""
    place = ROOT.joinpath(*module.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def is_member(module: str, name: str) -> bool:
    """Whether a module defines or imports `name`."""
    source = source_of(module)
    return source is not None and re.search(rf"\b{name}\b", source.read_text(encoding="utf-8")) is not None


CHECKS: list[Callable[[Page], list[str]]] = [dead_links, missing_files, missing_modules]

BAD_SAMPLES = [
    (dead_links, "see [it](asyncrl/nowhere.md)"),
    (dead_links, "![picture](benchmarks/results/nothing.png)"),
    (dead_links, "see [it](#no-such-heading)"),
    (dead_links, "see [it](CHANGELOG.md#no-such-heading)"),
    (missing_files, "the rule in `asyncrl/replay/nowhere.py`"),
    (missing_files, "run bin/nothing"),
    (missing_files, "asyncrl-learner configs/nothing.yaml"),
    (missing_modules, "python -m benchmarks.nothing --all"),
    (missing_modules, "`asyncrl.metrics.nothing`"),
    (missing_modules, "task.path=asyncrl.tasks.arithmetic:Nothing"),
]

GOOD_SAMPLE = """# A heading, with `code`

[here](#a-heading-with-code), [there](CHANGELOG.md), [far](https://example.org/a.py), a file asyncrl/errors.py, one of
asyncrl/: metrics/types.py, commands: bin/test, .venv/bin/asyncrl-learner configs/quickstart.yaml or configs/my.yaml,
`python -m asyncrl.metrics.glossary`, task.path=asyncrl.tasks.arithmetic:Arithmetic, asyncrl.metrics.types.DERIVED
"""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("page", list(pages()), ids=lambda page: page.path)
def test_what_a_page_names_exists(page, check):
    assert check(page) == []


@pytest.mark.parametrize(("check", "text"), BAD_SAMPLES)
def test_each_check_refuses_its_bad_sample(check, text):
    assert check(Page("README.md", text))


def test_no_check_refuses_what_is_there():
    page = Page("README.md", GOOD_SAMPLE)
    assert [complaint for check in CHECKS for complaint in check(page)] == []


def test_of_the_changelog_the_newest_section_and_its_new_names_count():
    changelog = "# Changelog\n\n## 2\n\n`python -m asyncrl.old` is\n`python -m asyncrl.new`\n\n## 1\n\n`asyncrl.gone`\n"
    assert newest_section(changelog) == "# Changelog\n\n## 2\n\n`python -m asyncrl.new`\n"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_MAX_LINES


def glossary_words() -> list[str]:
    """The words that the glossary explains, each once."""
    text = (ROOT / "asyncrl" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", text.partition("## Glossary")[2], re.MULTILINE)
    return [word for row in rows[1:] for word in row.split(", ")]


def unused_words(words: list[str], text: str) -> list[str]:
    """The words that stand nowhere in `text`, be it as words, as names or in the plural."""
    folded = re.sub(r"[\s_-]+", " ", text.lower())
    return [word for word in words if re.sub(r"[\s_-]+", " ", word.lower()) not in folded]


def test_each_word_of_the_glossary_stands_there_once_and_is_used():
    words = glossary_words()
    assert len(words) > 40 and len(words) == len(set(words))
    package = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "asyncrl").rglob("*.py"))
    assert unused_words(words, package) == []
    assert unused_words(["policy version", "flux capacitor"], package) == ["flux capacitor"]


def test_the_modules_that_the_package_offers_exist():
    names = re.findall(r"`?(asyncrl(?:\.\w+)+)", asyncrl.__doc__)
    assert len(names) >= 8
    assert [name for name in names if not (source_of(name) or is_member(*name.rpartition(".")[::2]))] == []
