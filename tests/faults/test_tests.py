"""The tests themselves: none may hang on the kernels, the speed or the cores of the machine where it was written."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.waits import LATE_S

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
CLOCKS = ("time.monotonic", "time.perf_counter", "time.time")
ELAPSED = re.compile(r"(elapsed|took|outlived)\w*_s$")  # names that hold a measured duration


def measures_time(node: ast.expr) -> bool:
    """Whether an expression is a measured duration of the wall clock."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        return any(
            isinstance(part, ast.Call)
            and ast.unparse(part.func) in ("time.monotonic", "time.perf_counter", "time.time")
            for part in (node.left, node.right)
        )
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        name = str(node.slice.value)
    return bool(ELAPSED.search(name))


def impatient_bounds(source: str) -> list[int]:
    """Lines that assert that something took less than so many seconds, fewer than a busy machine may add."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Compare):
            continue
        terms = [node.left, *node.comparators]
        for left, operator, right in zip(terms, node.ops, terms[1:], strict=False):
            is_bound = isinstance(operator, ast.Lt | ast.LtE) and measures_time(left)
            if is_bound and isinstance(right, ast.Constant) and right.value < LATE_S:
                lines.append(node.lineno)
    return lines


def test_T1_no_test_expects_a_busy_machine_to_be_on_time():
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in TESTS.rglob("test_*.py")
        for line in impatient_bounds(path.read_text())
    }
    assert not found, f"add tests.waits.LATE_S to these bounds: {sorted(found)}"


@pytest.mark.parametrize(
    "source",
    [
        "assert time.monotonic() - started < 5.0",
        "assert time.perf_counter() - started < 5.0",
        "assert 0.9 < elapsed_s < 1",
        "assert story.trainer_outlived_the_desk_s <= 5.0",
        "assert report['elapsed_s'] < 2.0",
    ],
)
def test_T1_the_rule_sees_a_bound_that_is_too_tight(source):
    assert impatient_bounds(source) == [1]
    assert impatient_bounds(source + " + LATE_S") == []


def test_T1_checks_run_the_numeric_tests_with_the_kernels_of_other_cpus():
    text = (ROOT / ".ci" / "run").read_text()
    runs = dict(re.findall(r'^numeric_tests (\w+) "(.+)"$', text, re.MULTILINE))
    assert runs == {"default": "numeric", "avx2": "(numeric or bits)"}
    assert "ATEN_CPU_CAPABILITY=$1" in text and 'bin/test -m "$2 and not slow" $files' in text


def test_T1_tests_of_tensor_code_are_marked_for_the_kernels_of_other_cpus():
    """All but those that compare with a tolerance of their own kind: engines and servers in processes of their own."""
    folders = ("algorithms", "golden", "trainer")
    unmarked = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (TESTS / folder).rglob("test_*.py")
        if re.search(r"assert_close|assert_near|\bnear\(", path.read_text())
        and not re.search(r"pytest\.mark\.(numeric|bits)", path.read_text())
    }
    assert not unmarked
