"""Imports go one way. The sources are walked; nothing here is imported but by a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gns", "theory", "experiments", "notebooks", "tests")
# package → what it must not import
FORBIDDEN = {
    "gns": {"theory", "experiments", "notebooks", "tests"},
    "theory": {"gns", "experiments", "notebooks", "tests", "torch"},
    "experiments": {"notebooks", "tests"},
    "notebooks": {"tests"},
}
# along the data flow of gns; a module may import from its own line or from lines above it
FLOW = [
    ("gns.rules", "gns.reasons", "gns._version"),
    ("gns.metrics", "gns.capture.spread"),
    ("gns.reducers",),
    ("gns.capture.gather",),
    ("gns.capture.passage",),
    ("gns.taps", "gns.boundary", "gns.examples", "gns.capture.host", "gns.sums", "gns.coverage"),
    ("gns.capture.gradients", "gns.capture.plan"),
    ("gns.capture.weights",),
    ("gns.capture.selfcheck",),
    ("gns.capture.openstep",),
    ("gns.capture.underway",),
    ("gns.capture.collect",),
]
# the packages of gns; one may import from those above it
LAYERS = (
    "rules",
    "statistics",
    "capture",
    "probing",
    "curvature",
    "advising",
    "finetuning",
    "report",
    "integrations",
    "commands",
)
DOWNSTREAM = (
    "estimate",
    "geometry",
    "monitor",
    "advice",
    "records",
    "report",
    "cli",
    "commands",
    "finetune",
    "finetuning",
    "integrations",
    "advising",
    "probing",
    "frozen",
    "hessian",
    "curvature",
)
PURE = (  # no torch in them
    "gns.boundary",
    "gns.sums",
    "gns.estimate",
    "gns.statistics.live",
    "gns.statistics.views",
    "gns.advice",
    "gns.coverage",
    "gns.advising.throughput",
    "gns.advising.capacity",
)


def typing_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Every statement, also inside functions, but for those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.stmt) and typing_only(child):
            continue
        if isinstance(child, ast.stmt):
            yield child
        yield from statements(child)


def imported(source: str, module: str, *, package: bool = False) -> set[str]:
    """Absolute names of all modules that a source imports; for `from a import b` both a and a.b."""
    found = set()
    home = module.split(".") if package else module.split(".")[:-1]
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = home[: len(home) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def cells(path: Path) -> str:
    """The code of a notebook, without its magics."""
    import json

    sources = [
        "".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"
    ]
    lines = "\n".join(sources).splitlines()
    return "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def modules(package: str) -> dict[str, set[str]]:
    """Module → what it imports."""
    out = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        out[name] = imported(path.read_text(), name, package=is_package)
    for path in sorted((ROOT / package).rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            out[str(path.relative_to(ROOT))] = imported(cells(path), "notebook")
    return out


def back_edges(found: dict[str, set[str]], forbidden: set[str]) -> list[str]:
    return [
        f"{m} imports {i}"
        for m, names in found.items()
        for i in sorted(names)
        if i.split(".")[0] in forbidden
    ]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package):
    assert not back_edges(modules(package), FORBIDDEN[package])


def test_the_walk_finds_modules():
    found = modules("gns")
    assert {"gns", "gns.sums", "gns.rules", "gns.rules.linear"} <= found.keys()
    assert "gns.sums" in found["gns.estimate"]
    assert "gns.rules.base" in found["gns.rules"]
    assert len(modules("theory")) > 5


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import gns.sums as s", "gns.sums"),
        ("from gns import estimate", "gns.estimate"),
        ("def f():\n    from gns.report import x", "gns.report"),
        ("try:\n    import torch\nexcept ImportError: pass", "torch"),
        ("from . import sums", "theory.sums"),
        ("from .sums import x", "theory.sums"),
        ("class A:\n    import tests", "tests"),
    ],
)
def test_control_the_walk_sees_every_kind_of_import(source, expected):
    assert expected in imported(source, "theory.module")
    planted = {"theory.module": imported(source, "theory.module")}
    assert back_edges(planted, {expected.split(".")[0]})


def test_imports_for_typing_alone_are_no_edges():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nimport os"
    assert imported(source, "m") == {"typing", "typing.TYPE_CHECKING", "os"}


def rank(module: str) -> int | None:
    for i, line in enumerate(FLOW):
        if any(module == name or module.startswith(f"{name}.") for name in line):
            return i
    return None


def against_the_flow(found: dict[str, set[str]]) -> list[str]:
    wrong = []
    for module, names in found.items():
        here = rank(module)
        if here is None:
            continue
        for name in names:
            there = rank(name)
            downstream = (
                name.split(".")[:1] == ["gns"] and name.split(".")[1:2] and name.split(".")[1] in DOWNSTREAM
            )
            if downstream or (there is not None and there > here):
                wrong.append(f"{module} imports {name}")
    return wrong


def test_no_back_edge_along_the_data_flow():
    found = modules("gns")
    for line in FLOW:
        for name in line:
            assert name in found, f"{name} has gone: correct FLOW in this file"
    for name in DOWNSTREAM:
        assert f"gns.{name}" in found, f"gns.{name} has gone: correct DOWNSTREAM in this file"
    assert not against_the_flow(found)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("gns.taps", "gns.estimate"),
        ("gns.rules.linear", "gns.reducers"),
        ("gns.reducers", "gns.report.text"),
        ("gns.sums", "gns.monitor"),
        ("gns.sums", "gns.advising.ranges"),
        ("gns.taps", "gns.curvature.result"),
        ("gns.boundary", "gns.capture.collect"),
    ],
)
def test_control_a_planted_back_edge_is_found(module, name):
    assert against_the_flow({module: {name}}) == [f"{module} imports {name}"]


def upwards(found: dict[str, set[str]]) -> list[str]:
    """Imports of one package of gns from a package that lies below it in LAYERS."""
    layers = {f"gns.{name}": i for i, name in enumerate(LAYERS)}

    def layer(module: str) -> int | None:
        return layers.get(".".join(module.split(".")[:2]))

    edges = [(m, name) for m, names in found.items() for name in sorted(names)]
    placed = [(m, name) for m, name in edges if layer(m) is not None and layer(name) is not None]
    return [f"{m} imports {name}" for m, name in placed if layer(m) < layer(name)]


def test_packages_of_gns_are_layers():
    found = modules("gns")
    packages = {m.split(".")[1] for m in found if m.count(".") > 1}
    assert packages == set(LAYERS), "a package came or went: correct LAYERS in this file"
    assert not upwards(found)


def test_control_an_import_from_a_lower_layer_is_found():
    planted = {
        "gns.statistics.sets": {"gns.estimate", "gns.probing.result"},
        "gns.cli": {"gns.commands.probe"},
    }
    assert upwards(planted) == ["gns.statistics.sets imports gns.probing.result"]


def cycle(found: dict[str, set[str]]) -> list[str]:
    """Give one cycle among modules, lazy imports included, or []."""
    edges = {
        m: {n for n in names if n in found and n != m and not m.startswith(f"{n}.")}
        for m, names in found.items()
    }

    def visit(module: str, path: tuple[str, ...]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for after in sorted(edges[module]):
            if around := visit(after, (*path, module)):
                return around
        done.add(module)
        return []

    done: set[str] = set()
    return next((c for m in sorted(edges) if (c := visit(m, ()))), [])


def test_gns_has_no_cycle():
    assert not cycle(modules("gns"))


def test_control_a_planted_cycle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert not cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_name_no_torch(module):
    assert not [
        name for name in modules("gns")[module] if name.split(".")[0] in ("torch", "transformers", "peft")
    ]


def fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = ("torch", "transformers", "peft", "scipy", "matplotlib", "numpy")


def test_importing_gns_does_no_work():
    loaded = f"print([m for m in {HEAVY!r} if m in sys.modules])"
    assert fresh(f"import sys, gns; dir(gns); gns.__version__; {loaded}") == "[]"


def test_importing_theory_loads_no_torch():
    assert fresh("import sys, theory; print('torch' in sys.modules or 'gns' in sys.modules)") == "False"


def test_the_estimate_needs_no_torch():
    code = "import sys; from gns import StepSums; from gns.estimate import estimate; "
    code += "estimate([StepSums(0, 4, 2.0, 1.0)] * 3); print('torch' in sys.modules)"
    assert fresh(code) == "False"


def test_every_public_name_loads():
    assert (
        fresh("import gns; [getattr(gns, name) for name in gns.__all__]; print(len(gns.__all__) >= 9)")
        == "True"
    )
    unknown = "import gns\ntry: gns.nothing\nexcept AttributeError as e: print('it has Advice' in str(e))"
    assert fresh(unknown) == "True"


def test_a_name_is_never_that_of_a_submodule():
    """DESIGN §2: `gns.advise` is a function, `gns.advice` its module; never one name for both."""
    code = "import gns, pkgutil; subs = {m.name for m in pkgutil.iter_modules(gns.__path__)}; "
    assert fresh(code + "print(sorted(subs & set(gns.__all__)))") == "[]"
