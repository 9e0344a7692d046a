"""The borders of the project: who may import what, what is never called, how large a module may grow.

Every rule is a function from a module to a list of complaints. One test runs all rules over the package; another feeds
each rule a bad sample, so that a rule that lost its teeth is noticed.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Dependencies point inwards: a module imports its own area and areas of lower floors, never a neighbour.
FLOORS = [
    {"errors", "types"},
    {"host", "algorithms"},
    {"config"},
    {"link", "metrics", "storage", "tasks"},
    {"gateway", "replay", "report", "rewards", "weights"},
    {"desk", "trainer", "generator", "simulator"},
    {"cli"},
]
PURE = {"algorithms"}  # these know the nouns and nothing else, not even the configuration

# Libraries that one area keeps to itself.
OWNED_LIBRARIES = {"vllm": "asyncrl.generator.", "zmq": "asyncrl.link."}

# Modules that may import torch when they are imported. All others must not, directly or through anything they import:
# `--help`, `--dry-run` and the desk process start in a tenth of a second and survive the trainer's memory troubles.
TORCH_AREAS = ("asyncrl.algorithms.", "asyncrl.generator.", "asyncrl.trainer.", "asyncrl.weights.")
TORCH_MODULES = (
    "asyncrl.cli.supervised",  # the warm-up, imported once its arguments are parsed
    "asyncrl.cli.warmup_",
    "asyncrl.rewards.model_server",  # a process of its own
)
NO_TORCH = ("asyncrl.trainer.packing", "asyncrl.trainer.plan", "asyncrl.weights.plan.")
HEAVY_LIBRARIES = ["torch", "vllm", "transformers"]

# Programs beside the package, which nothing type-checks: what they import must be there.
PROGRAMS = ("benchmarks", "tests")

# Ways to run code that came as data. The collectives of Python objects are pickle under another name.
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_NAMES = {"recv_pyobj", "send_pyobj", "unsafe_load", "full_load"} | {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
}
UNSAFE_BUILTINS = {"eval", "exec"}
UNSAFE_FUNCTIONS = {"torch.load", "yaml.load"}  # under their full names only, so that their arguments can be seen
HARMLESS_IMPORTS = {"pickle.UnpicklingError"}  # what torch.load(weights_only=True) raises on a bad file

MAX_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_MODULES_IN_A_FOLDER = 16
TOP_LEVEL_FOLDERS = {".ci", ".github", "asyncrl", "benchmarks", "bin", "configs", "tests"}


@dataclass(frozen=True)
class Module:
    """One module: its dotted name and its text."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def area(self) -> str:
        return area_of(self.name)

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and dotted name of everything imported, at any depth and also by a constant name at run time."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parents = self.name.split(".")[: -node.level] if node.level else []
                base = [*parents, *(node.module.split(".") if node.module else [])]
                yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
            elif isinstance(node, ast.Call) and called_name(node) in {"import_module", "__import__"}:
                yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))

    def calls(self) -> Iterator[ast.Call]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.Call))


def area_of(dotted: str) -> str:
    """`asyncrl.storage.journal` belongs to `replay`, `asyncrl` itself to the empty area."""
    return (dotted.split(".") + [""])[1]


def floor(area: str) -> int:
    """The floor an area lives on; that of the package itself is the lowest."""
    if area in {"", "__version__"}:
        return -1
    return next((number for number, areas in enumerate(FLOORS) if area in areas), len(FLOORS))


def called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def called_on(call: ast.Call) -> str:
    return getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""


def keyword_is(call: ast.Call, name: str, value: object) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def imports_only_inwards(module: Module) -> list[str]:
    complaints = []
    for line, name in module.imports():
        if name.split(".")[0] != "asyncrl":
            continue
        target = area_of(name)
        nouns = {"errors", "types"}
        inwards = floor(target) < floor(module.area) and (module.area not in PURE or target in nouns)
        if target != module.area and not inwards and not {target, module.area} <= nouns:
            complaints.append(f"line {line}: {module.area} must not import {name}")
    return complaints


def keeps_libraries_where_they_belong(module: Module) -> list[str]:
    return [
        f"line {line}: {name} is imported only in {OWNED_LIBRARIES[library]}*"
        for line, name in module.imports()
        if (library := name.split(".")[0]) in OWNED_LIBRARIES and not module.name.startswith(OWNED_LIBRARIES[library])
    ]


def runs_no_data_as_code(module: Module) -> list[str]:
    complaints = [
        f"line {line}: imports {name}"
        for line, name in module.imports()
        if name not in HARMLESS_IMPORTS
        and (name.split(".")[0] in UNSAFE_MODULES or name in {"torch.load", "yaml.load"})
    ]
    for node in ast.walk(module.tree):
        used = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if used in UNSAFE_NAMES:
            complaints.append(f"line {node.lineno}: uses {used}")
    for call in module.calls():
        on, name = called_on(call), called_name(call)
        if isinstance(call.func, ast.Name) and name in UNSAFE_BUILTINS:
            complaints.append(f"line {call.lineno}: calls {name}")
        elif (on, name) == ("yaml", "load"):
            complaints.append(f"line {call.lineno}: calls yaml.load; use yaml.safe_load")
        elif (on, name) == ("torch", "load") and not keyword_is(call, "weights_only", True):
            complaints.append(f"line {call.lineno}: calls torch.load without weights_only=True")
        elif any(k.arg == "allow_pickle" for k in call.keywords) and not keyword_is(call, "allow_pickle", False):
            complaints.append(f"line {call.lineno}: allows pickle in {on}.{name}")
    return complaints


def is_short_enough(module: Module) -> list[str]:
    lines = module.text.count("\n")
    return [f"{lines} lines, at most {MAX_LINES}: divide it"] if lines > MAX_LINES else []


def has_a_docstring(module: Module) -> list[str]:
    return [] if ast.get_docstring(module.tree) else ["no module docstring"]


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def has_short_functions(module: Module) -> list[str]:
    lengths = {node: (node.end_lineno or 0) - node.lineno + 1 for node in functions_of(module.tree)}
    return [
        f"line {node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
        for node, length in lengths.items()
        if length > MAX_FUNCTION_LINES
    ]


def public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public classes and functions of a module, and the public methods of its public classes."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        yield node
        if isinstance(node, ast.ClassDef):
            methods = (part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))
            yield from (method for method in methods if not method.name.startswith("_"))


def documents_what_is_public(module: Module) -> list[str]:
    return [
        f"line {node.lineno}: {node.name} has no docstring"
        for node in public_definitions(module.tree)
        if not ast.get_docstring(node)
    ]


def names_the_types_on_the_wire(module: Module) -> list[str]:
    if module.name not in {"asyncrl.link.messages", "asyncrl.link.trainer_messages"}:
        return []
    used = (node for node in ast.walk(module.tree) if isinstance(node, ast.Name) and node.id == "Any")
    return [f"line {node.lineno}: Any in a message" for node in used]


def assigns_few_names_at_once(module: Module) -> list[str]:
    """`a, b, c = x, y, z` hides which name gets what."""
    return [
        f"line {node.lineno}: {len(node.value.elts)} values assigned in parallel, at most 2"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)
        if len(node.value.elts) > 2
    ]


RULES: list[Callable[[Module], list[str]]] = [
    imports_only_inwards,
    keeps_libraries_where_they_belong,
    runs_no_data_as_code,
    is_short_enough,
    has_short_functions,
    has_a_docstring,
    documents_what_is_public,
    names_the_types_on_the_wire,
    assigns_few_names_at_once,
]

BAD_SAMPLES = [
    (imports_only_inwards, "asyncrl.types", "from asyncrl import config"),
    (imports_only_inwards, "asyncrl.config", "import asyncrl.link.codec"),
    (imports_only_inwards, "asyncrl.algorithms.kl", "from asyncrl.config import Config"),
    (imports_only_inwards, "asyncrl.storage.journal", "def f():\n    from asyncrl.link import codec"),
    (imports_only_inwards, "asyncrl.desk.desk", "from asyncrl.generator.engines.base import Engine"),
    (imports_only_inwards, "asyncrl.desk.desk", "from ..generator import engine"),
    (
        imports_only_inwards,
        "asyncrl.generator.daemon",
        "importlib.import_module('asyncrl.cli.common')",
    ),
    (keeps_libraries_where_they_belong, "asyncrl.trainer.rank", "def f():\n    from vllm import LLM"),
    (keeps_libraries_where_they_belong, "asyncrl.generator.daemon", "import zmq.asyncio"),
    (runs_no_data_as_code, "asyncrl.x", "import pickle"),
    (runs_no_data_as_code, "asyncrl.x", "from pickle import loads, UnpicklingError"),
    (runs_no_data_as_code, "asyncrl.x", "def f(s):\n    return s.recv_pyobj()"),
    (runs_no_data_as_code, "asyncrl.x", "dist.broadcast_object_list([1])"),
    (runs_no_data_as_code, "asyncrl.x", "eval('1')"),
    (runs_no_data_as_code, "asyncrl.x", "yaml.load(f, Loader=yaml.Loader)"),
    (runs_no_data_as_code, "asyncrl.x", "torch.load(p)"),
    (runs_no_data_as_code, "asyncrl.x", "torch.load(p, weights_only=False)"),
    (runs_no_data_as_code, "asyncrl.x", "from torch import load"),
    (runs_no_data_as_code, "asyncrl.x", "np.load(p, allow_pickle=True)"),
    (is_short_enough, "asyncrl.x", '"""Long."""\n' + "x = 1\n" * MAX_LINES),
    (has_short_functions, "asyncrl.x", "class C:\n  def f(self):\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    (documents_what_is_public, "asyncrl.x", "def f():\n    pass"),
    (documents_what_is_public, "asyncrl.x", 'class C:\n    """C."""\n    async def f(self):\n        pass'),
    (names_the_types_on_the_wire, "asyncrl.link.messages", "class M:\n    field: dict[str, Any]"),
    (assigns_few_names_at_once, "asyncrl.x", "a, b, c = 1, 2, 3"),
    (has_a_docstring, "asyncrl.x", "x = 1"),
    (has_a_docstring, "asyncrl.x", ""),
]

GOOD_SAMPLES = [
    ("asyncrl.cli.learner", "from asyncrl import __version__\nfrom asyncrl.desk import daemon"),
    ("asyncrl.trainer.rank", "from pickle import UnpicklingError\nmodel.eval()\ntorch.load(p, weights_only=True)"),
    ("asyncrl.generator.engines.vllm.plugin", "import vllm\nfrom . import engine\nfrom asyncrl.link import codec"),
    ("asyncrl.config_loading", "import yaml\nfrom asyncrl import config\nyaml.safe_load(f)"),
]


def package_modules() -> list[Module]:
    modules = []
    for path in sorted((ROOT / "asyncrl").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules.append(Module(name, path.read_text()))
    return modules


PACKAGE = package_modules()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_of_the_package(rule):
    complaints = {module.name: found for module in PACKAGE if (found := rule(module))}
    assert not complaints, json.dumps(complaints, indent=2)


@pytest.mark.parametrize(("rule", "name", "text"), BAD_SAMPLES)
def test_each_rule_refuses_its_bad_sample(rule, name, text):
    assert rule(Module(name, text))


@pytest.mark.parametrize(("name", "text"), GOOD_SAMPLES)
def test_no_rule_refuses_what_is_allowed(name, text):
    module = Module(name, '"""Good."""\n' + text)
    assert [complaint for rule in RULES for complaint in rule(module)] == []


def test_programs_outside_the_package_run_no_data_as_code_either():
    scripts = [path for folder in ("benchmarks", "configs") for path in (ROOT / folder).rglob("*.py")]
    complaints = {str(path): found for path in scripts if (found := runs_no_data_as_code(Module("", path.read_text())))}
    assert not complaints, json.dumps(complaints, indent=2)


def names_of(root: Path, module: str) -> set[str] | None:
    """What a module of the repository has at its top, and what its folder holds; None: there is no such module."""
    place = root.joinpath(*module.split("."))
    path = place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__init__.py"
    names = {entry.stem for entry in place.iterdir()} if place.is_dir() else set()
    if not path.exists():
        return names or None
    todo: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        else:
            names |= {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
            todo += ast.iter_child_nodes(node)
    return names


def missing_imports(root: Path, text: str) -> list[str]:
    """`module: name` of what a program imports of the repository and what is not there."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("asyncrl", *PROGRAMS):
            names = names_of(root, node.module or "")
            found += [f"{node.module}: {a.name}" for a in node.names if names is None or a.name not in names]
    return found


def test_what_programs_import_of_the_repository_is_there():
    """Nothing type-checks them, and some benchmarks are started by hand alone."""
    paths = [path for folder in PROGRAMS for path in (ROOT / folder).rglob("*.py")]
    assert not {str(path): found for path in paths if (found := missing_imports(ROOT, path.read_text()))}
    gone = "from asyncrl.types import Lease, Lost\nfrom asyncrl.lost import Lease\nfrom os import path"
    assert missing_imports(ROOT, gone) == ["asyncrl.types: Lost", "asyncrl.lost: Lease"]


def duplicate_classes(modules: list[Module]) -> dict[str, list[str]]:
    """Class name → the modules that define it, where there are several."""
    found: dict[str, list[str]] = {}
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module.name)
    return {name: where for name, where in found.items() if len(where) > 1}


def test_no_class_name_has_two_meanings():
    assert duplicate_classes(PACKAGE) == {}
    assert duplicate_classes([Module("a", "class C: ..."), Module("b", "class C: ...")]) == {"C": ["a", "b"]}


def import_circles(modules: list[Module]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others; imports inside functions count too."""
    names = {module.name for module in modules}
    graph = {module.name: {name for _, full in module.imports() if (name := owner(full, names))} for module in modules}
    sorter: TopologicalSorter[str] = TopologicalSorter({name: graph[name] - {name} for name in graph})
    try:
        sorter.prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


def owner(dotted: str, names: set[str]) -> str:
    """The module that `dotted`, a module or a name in one, belongs to; empty for other packages."""
    while dotted and dotted not in names:
        dotted = dotted.rpartition(".")[0]
    return dotted


def test_no_module_imports_itself_through_others():
    assert import_circles(PACKAGE) == []
    circle = [Module("asyncrl.a", "import asyncrl.b"), Module("asyncrl.b", "def f():\n    from asyncrl import a")]
    assert import_circles(circle)


def crowded_folders(root: Path) -> dict[str, int]:
    """Folder → its modules, `__init__` not counted, where there are too many to read at a glance."""
    counts = Counter(str(path.parent.relative_to(root)) for path in root.rglob("*.py") if path.name != "__init__.py")
    return {folder: count for folder, count in counts.items() if count > MAX_MODULES_IN_A_FOLDER}


def test_no_folder_is_crowded(tmp_path):
    assert crowded_folders(ROOT / "asyncrl") == {}
    for number in range(MAX_MODULES_IN_A_FOLDER + 1):
        (tmp_path / f"m{number}.py").touch()
    assert crowded_folders(tmp_path) == {".": MAX_MODULES_IN_A_FOLDER + 1}


PROBE = """
import importlib, json, sys
modules, heavy = json.loads(sys.argv[1])
brought = {}
for module in modules:
    before = set(sys.modules)
    importlib.import_module(module)
    if new := sorted(set(heavy) & (set(sys.modules) - before)):
        brought[module] = new
print(json.dumps(brought))
"""


def is_light(name: str) -> bool:
    """Whether a module must come without torch. Packages themselves are light: whoever imports a part imports them."""
    return name.startswith(NO_TORCH) or f"{name}." in TORCH_AREAS or not name.startswith(TORCH_AREAS + TORCH_MODULES)


def heavy_libraries_brought_in(modules: list[str], heavy: list[str], folder: Path = ROOT) -> dict[str, list[str]]:
    """Imports `modules` one after another in a fresh interpreter; says which of them first brought a heavy library."""
    arguments = [sys.executable, "-c", PROBE, json.dumps([modules, heavy])]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_desk_and_the_command_line_import_without_torch():
    light = [module.name for module in PACKAGE if is_light(module.name)]
    assert {"asyncrl.cli.learner", "asyncrl.trainer.packing", "asyncrl.trainer.plan"} <= set(light)
    assert heavy_libraries_brought_in(light, HEAVY_LIBRARIES) == {}


def test_the_weight_plane_imports_without_an_engine_and_its_plan_without_torch():
    plane = [module.name for module in PACKAGE if f"{module.name}.".startswith("asyncrl.weights.")]
    plan = [name for name in plane if f"{name}.".startswith("asyncrl.weights.plan.")]
    assert "asyncrl.weights.receiver" in plane
    assert "asyncrl.weights.plan.round" in plan
    assert heavy_libraries_brought_in(plane, ["vllm"]) == {}
    assert heavy_libraries_brought_in(plan, HEAVY_LIBRARIES) == {}


def test_a_heavy_import_is_seen_through_another_module(tmp_path):
    (tmp_path / "front.py").write_text("import middle")
    (tmp_path / "middle.py").write_text("import heavyweight")
    (tmp_path / "heavyweight.py").write_text("")
    assert heavy_libraries_brought_in(["json", "front"], ["heavyweight"], tmp_path) == {"front": ["heavyweight"]}


def third_party_imports(modules: list[Module]) -> dict[str, str]:
    """Library → one module that imports it, the standard library and asyncrl left out."""
    found = {}
    for module in modules:
        for _, name in module.imports():
            library = name.split(".")[0]
            if library not in sys.stdlib_module_names and library != "asyncrl":
                found[library] = module.name
    return found


def test_every_imported_library_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + extras["cuda"] + extras["reasoning-gym"]
    declared = {re.split(r"[^A-Za-z0-9_-]", requirement)[0].lower() for requirement in requirements}
    distribution_of = {"zmq": "pyzmq", "yaml": "pyyaml", "math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}
    imported = third_party_imports(PACKAGE)
    assert "torch" in imported
    assert {lib: by for lib, by in imported.items() if distribution_of.get(lib, lib) not in declared} == {}


def folders_of(root: Path) -> set[str]:
    ignored = [line.rstrip("/") for line in (root / ".gitignore").read_text().split() if line.endswith("/")]
    folders = {path.name for path in root.iterdir() if path.is_dir() and path.name != ".git"}
    return {name for name in folders if not any(fnmatch(name, pattern) for pattern in ignored)}


def test_the_top_level_holds_only_the_known_folders():
    assert folders_of(ROOT) == TOP_LEVEL_FOLDERS


def test_an_ignored_folder_does_not_count_but_a_new_one_does(tmp_path):
    (tmp_path / ".gitignore").write_text("runs/\n*.egg-info/\n")
    for name in (".git", "runs", "asyncrl.egg-info", "scripts"):
        (tmp_path / name).mkdir()
    assert folders_of(tmp_path) == {"scripts"}
