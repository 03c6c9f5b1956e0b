"""The house holds: imports go one way, and what only one package may know stays in it.

Every module of `src/awqkit` is read with `ast`, so an import inside a function counts like one at the top.
`problems(module, source)` is the whole check; the last tests show that it can fail.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "awqkit"

# From the top down. A unit imports from lower levels and from itself, never sideways or up.
LEVELS = (
    ("__main__", "__init__"),
    ("cli",),
    ("api",),
    ("pipeline", "evaluation", "report"),
    ("methods", "model", "formats", "checkpoint", "calibration", "demo"),
    ("numerics",),
    ("kernels",),
    ("recipe", "options", "decisions", "events"),
    ("errors", "imports"),
)
LEVEL_OF = {unit: depth for depth, units in enumerate(LEVELS) for unit in units}

# Units that may see less than their level allows.
SEES_ONLY = {
    "cli": {"cli", "api", "recipe", "options", "events", "errors", "imports"},
    "numerics": {"numerics", "kernels"},
    "kernels": {"kernels"},
}
# Packages from outside that one unit keeps to itself.
KEPT_BY = {"transformers": "model", "safetensors": "checkpoint", "rich": "cli", "triton": "kernels"}
# And parts of packages that one module does.
KEPT_BY_MODULE = {"torch.distributed": "awqkit.pipeline.ranks"}
PURE_MODULES = {"torch", "math", "dataclasses", "functools", "collections", "contextlib", "typing", "__future__"}
FAST_BODIES = {"triton", "importlib"}  # what a kernel's body for another device is written in, and asked for
VAGUE_WORDS = {"utils", "util", "common", "misc", "manager"}


def problems(module: str, source: str) -> list[str]:
    """What breaks the rules in `source`, the text of `module` (a dotted name: "awqkit.numerics.grid")."""
    unit = unit_of(module)
    tree = ast.parse(source)
    found = [problem for target in imported(module, tree) if (problem := import_problem(unit, target))]
    found += [
        f"{part} is {owner}'s alone" for part, owner in KEPT_BY_MODULE.items() if module != owner and names(part, tree)
    ]
    if unit != "cli":
        found += [f"print() on line {node.lineno} outside cli" for node in ast.walk(tree) if is_print(node)]
    named = [module.split(".")[-1]] + [node.name for node in tree.body if hasattr(node, "name")]
    found += [f"the name {name} says nothing" for name in named if VAGUE_WORDS & words(name)]
    return [f"{module}: {problem}" for problem in found]


def import_problem(unit: str, target: str) -> str | None:
    """Why `unit` must not import the module `target`, or None."""
    top = target.split(".")[0]
    if top != "awqkit":
        if KEPT_BY.get(top, unit) != unit:
            return f"imports {top}, which only {KEPT_BY[top]} may"
        if unit == "kernels" and top in FAST_BODIES:
            return None
        if unit in ("numerics", "kernels") and top not in PURE_MODULES:
            return f"imports {target}; {unit} is torch and arithmetic alone"
        return None
    other = unit_of(target)
    if other == unit:
        return None
    if other not in LEVEL_OF or unit not in LEVEL_OF:
        return f"imports {target}: give {other if other not in LEVEL_OF else unit} a level in this test"
    if LEVEL_OF[other] <= LEVEL_OF[unit]:
        return f"imports {target}, which is not below {unit}"
    if other not in SEES_ONLY.get(unit, {other}):
        return f"imports {target}; {unit} sees only {', '.join(sorted(SEES_ONLY[unit]))}"
    return None


def imported(module: str, tree: ast.Module) -> Iterator[str]:
    """The full names of all modules that `tree` imports, however and wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            if base == "awqkit":  # `from awqkit import errors`: the unit is in the names
                names = {alias.name for alias in node.names} - {"__version__"}  # a constant, free to all
                yield from (f"awqkit.{name}" if name in LEVEL_OF else base for name in sorted(names))
            else:
                yield base
        elif isinstance(node, ast.Call) and called(node) in ("__import__", "import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)
            else:
                yield "awqkit"  # a computed name could be anything: refused below the top


def names(part: str, tree: ast.Module) -> bool:
    """Whether `tree` imports or names a part of a package, "torch.distributed" for one."""
    package, _, last = part.rpartition(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(f"{alias.name}.".startswith(f"{part}.") for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{part}."):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == package and last in {each.name for each in node.names}:
            return True
        if isinstance(node, ast.Attribute) and ast.unparse(node) == part:
            return True
    return False


def absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that `from X import` names, relative imports resolved from `module`."""
    if not node.level:
        return node.module or ""
    # A package's own name ends in ".__init__" here, so one level up is always the last part dropped.
    parents = module.split(".")[: -node.level]
    return ".".join([*parents, *filter(None, [node.module])])


def unit_of(module: str) -> str:
    """The part of the house that a module belongs to: "awqkit.numerics.grid" is of "numerics"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def called(node: ast.Call) -> str | None:
    """The last name of what is called: `importlib.import_module(...)` is "import_module"."""
    return getattr(node.func, "id", getattr(node.func, "attr", None))


def is_print(node: ast.AST) -> bool:
    """Whether this is a call of the builtin print."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def words(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}


def modules() -> dict[str, str]:
    """Dotted name -> source of every module of the package; a package's own file ends in ".__init__"."""
    return {
        ".".join(["awqkit", *path.relative_to(PACKAGE).with_suffix("").parts]): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def test_the_package_keeps_its_own_rules() -> None:
    sources = modules()
    assert len(sources) > 15, f"{PACKAGE} was not read"
    broken = [problem for module, source in sources.items() for problem in problems(module, source)]
    assert not broken, "\n" + "\n".join(broken)


def test_every_part_of_the_package_has_a_level() -> None:
    units = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert units <= set(LEVEL_OF)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("awqkit.numerics.grid", "from awqkit.methods.fold import search"),  # up
        ("awqkit.model.block", "import awqkit.formats.awq"),  # sideways
        ("awqkit.recipe", "from awqkit.options import RunOptions"),  # sideways, single files
        ("awqkit.pipeline.run", "from awqkit import api"),  # up, through the root
        ("awqkit.pipeline.run", "import awqkit"),  # the root itself
        ("awqkit.methods.linear", "from ..model import block"),  # relative, sideways
        ("awqkit.methods.__init__", "from ..model import block"),
        ("awqkit.methods.linear", "def f():\n    from awqkit.model import block"),  # lazily
        ("awqkit.methods.linear", "import importlib\nimportlib.import_module('awqkit.model.block')"),
        ("awqkit.methods.linear", "import importlib\nimportlib.import_module(name)"),
        ("awqkit.kernels.matmul", "from awqkit.numerics.grid import Grid"),
        ("awqkit.kernels.matmul", "from awqkit.errors import AwqkitError"),
        ("awqkit.numerics.clip", "import numpy"),
        ("awqkit.numerics.clip", "import logging"),
        ("awqkit.numerics.clip", "import triton"),
        ("awqkit.kernels.matmul", "import numpy"),
        ("awqkit.cli.quantize", "from awqkit.pipeline.run import run"),
        ("awqkit.api.load", "from transformers import AutoModelForCausalLM"),
        ("awqkit.evaluation.load", "def f():\n    import transformers.models"),
        ("awqkit.formats.awq", "from safetensors.torch import save_file"),
        ("awqkit.report.report", "import rich.console"),
        ("awqkit.api.quantize", "def f():\n    print('done')"),
        ("awqkit.model.io_utils", ""),
        ("awqkit.model.block", "class BlockManager: pass"),
        ("awqkit.model.block", "def misc_things(): pass"),
        ("awqkit.pipeline.run", "import torch.distributed as dist"),
        ("awqkit.pipeline.run", "from torch import distributed"),
        ("awqkit.pipeline.run", "from torch.distributed import barrier"),
        ("awqkit.pipeline.run", "import torch\ntorch.distributed.barrier()"),
        ("awqkit.attic.block", "from awqkit.errors import AwqkitError"),  # a part without a level
    ],
)
def test_a_broken_rule_is_found(module: str, source: str) -> None:
    assert len(problems(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("awqkit.numerics.clip", "import math\nimport torch\nfrom awqkit.numerics.grid import Grid"),
        ("awqkit.numerics.clip", "from .grid import Grid\nfrom awqkit.kernels import matmul"),
        ("awqkit.kernels.matmul", "import torch\nimport triton.language as tl"),
        ("awqkit.model.transformers_bridge", "def f():\n    import transformers"),
        ("awqkit.methods.__init__", "from .linear import quantize_linear"),
        ("awqkit.pipeline.ranks", "import torch.distributed as dist"),
        ("awqkit.cli.console", "from rich.console import Console\nprint()"),
        ("awqkit.cli.main", "from awqkit import __version__, api, errors"),
        ("awqkit.__init__", "from awqkit.api import quantize"),
        ("awqkit.checkpoint.reader", "from contextlib import contextmanager\nimport safetensors"),
    ],
)
def test_what_the_rules_allow_is_not_reported(module: str, source: str) -> None:
    assert problems(module, source) == []
