"""The shape of the package: who may import whom, how long a file or function may be."""

import ast
import graphlib
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "halos_jax"

# A module imports only from lower levels, or from its own subpackage.
LEVELS = (
    {"drawn", "errors", "integers", "json_text", "once"},
    {"storage"},
    {"config"},
    {"types"},
    {"sharding", "losses", "user_code", "devices", "packing"},
    {"processes", "cli", "console"},
    {"metrics", "models", "data"},
    {"sampling", "rewards", "training", "trackers"},
    {"signs"},
    {"course"},
    {"workdir"},
    {"checkpoints"},
    {"policies"},
    {"rounds"},
    {"report"},
    {"tasks"},
    {"audit"},
    {"bench"},
    {"api", "main"},
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}

# Third-party package -> the only files of the package that may import it.
CONFINED = {
    "orbax": {"checkpoints/store.py"},
    "ml_collections": {"config/settings.py", "cli/overrides.py", "cli/presets.py"},
    "transformers": {
        "models/files/hf.py",
        "models/hf/families.py",
        "models/files/export.py",
        "data/chat/loading.py",
        "data/chat/tokenizer_files.py",
        "data/toy.py",
    },
    "torch": set(),
    "pickle": set(),
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FILES = 14  # of a folder, besides its __init__


def imported_modules(tree: ast.AST, package: str) -> set[str]:
    """Return the dotted names that `tree` imports anywhere, functions and branches included.

    `from a import b` gives both "a" and "a.b", as b may be a module. Relative imports are
    resolved against `package`, the dotted package that holds the file.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*(parent if node.level else []), *filter(None, [node.module])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def find_violations(root: Path) -> list[str]:
    """Return one line for each broken rule in the package folder `root`."""
    lines, graph = [], {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        parts = [root.name, *path.with_suffix("").parts]
        package = ".".join(parts[:-1])
        module = package if path.name == "__init__.py" else ".".join(parts)
        text = file.read_text(encoding="utf-8")
        imports = imported_modules(ast.parse(text), package)
        graph[module] = imports
        lines += check_names(path, text)
        lines += check_functions(path, ast.parse(text))
        lines += check_confined(path, imports)
        lines += check_levels(path, parts[1], imports, root.name)
    return lines + check_folders(root) + check_cycles(graph)


def check_functions(path: Path, tree: ast.AST) -> list[str]:
    lines = []
    for one in ast.walk(tree):
        if isinstance(one, FUNCTIONS):
            length = one.end_lineno - one.lineno + 1
            if length > MAX_FUNCTION_LINES:
                lines.append(
                    f"{path}:{one.lineno} {one.name}: {length} lines, more than "
                    f"{MAX_FUNCTION_LINES}"
                )
    return lines


def check_folders(root: Path) -> list[str]:
    lines = []
    for folder in (root, *root.rglob("*/")):
        count = sum(file.name != "__init__.py" for file in folder.glob("*.py"))
        if count > MAX_FILES:
            lines.append(f"{folder.relative_to(root)}: {count} files, more than {MAX_FILES}")
    return lines


def check_names(path: Path, text: str) -> list[str]:
    lines = []
    for part in path.with_suffix("").parts:
        if part in FORBIDDEN_NAMES:
            lines.append(f"{path}: {part!r} names no topic")
    if len(text.splitlines()) > MAX_LINES:
        lines.append(f"{path}: {len(text.splitlines())} lines, more than {MAX_LINES}")
    return lines


def check_confined(path: Path, imports: set[str]) -> list[str]:
    roots = {name.partition(".")[0] for name in imports}
    return [
        f"{path}: imports {name}, which only {sorted(allowed)} may"
        for name, allowed in CONFINED.items()
        if name in roots and path.as_posix() not in allowed
    ]


def check_levels(path: Path, own: str, imports: set[str], root: str) -> list[str]:
    if own == "__init__":
        inner = sorted(name for name in imports if name.split(".")[0] == root)
        return [f"{path}: the package's own __init__ imports {name}" for name in inner]
    if own not in LEVEL_OF:
        return [f"{path}: {own!r} has no level; give it one in tests/test_layering.py"]
    lines = set()
    for name in imports:
        first, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        # `from halos_jax import config` yields "halos_jax" as well: nothing to check in it.
        if first != root or not other or other == own or other not in LEVEL_OF:
            continue
        if LEVEL_OF[other] >= LEVEL_OF[own]:
            lines.add(f"{path}: level {LEVEL_OF[own]} imports {other!r} of level {LEVEL_OF[other]}")
    return sorted(lines)


def check_cycles(graph: dict[str, set[str]]) -> list[str]:
    # A package and its own modules are one another's parents: only modules are nodes.
    known = {
        module: {name for name in imports if name in graph and name != module}
        for module, imports in graph.items()
    }
    packages = {
        module for module in known if any(other.startswith(f"{module}.") for other in known)
    }
    for module in known:
        known[module] -= {name for name in packages if module.startswith(f"{name}.")}
    try:
        graphlib.TopologicalSorter(known).prepare()
    except graphlib.CycleError as error:
        return [f"cyclic import: {' -> '.join(error.args[1])}"]
    return []


def test_the_package_keeps_its_layers():
    assert find_violations(REPOSITORY / PACKAGE) == []


def test_no_test_or_preset_is_too_long():
    files = [file for name in ("tests", "configs") for file in (REPOSITORY / name).rglob("*.py")]
    lengths = {
        str(file.relative_to(REPOSITORY)): len(file.read_text("utf-8").splitlines())
        for file in files
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def plant(root: Path, **files: str) -> Path:
    package = root / PACKAGE
    for name, text in files.items():
        file = package / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return package


def test_a_lawful_tree_passes(tmp_path):
    package = plant(
        tmp_path,
        config__settings="import ml_collections\n",
        sharding="from halos_jax.config import Config\nfrom halos_jax import types\n",
        models__spec="import jax\nfrom halos_jax import sharding\n",
        models__decoder="from halos_jax.models import spec\nfrom . import layers\n",
        models__layers="from halos_jax.models.spec import x\n",
        checkpoints__store="import orbax.checkpoint as ocp\n",
        main="from halos_jax.checkpoints import store\n",
    )
    assert find_violations(package) == []


def test_upward_and_sideways_imports_are_found(tmp_path):
    package = plant(
        tmp_path,
        config="from halos_jax import sharding\n",
        losses__dpo="def f():\n    import halos_jax.models.spec\n",
        data__chat="from ..models.hf import load\n",
        sampling__filters="from halos_jax.training import optim\n",
        training__step="from halos_jax import rewards\n",
        types="from halos_jax import models\n",
    )
    found = find_violations(package)
    assert [line.split(":")[0] for line in found] == [
        "config.py",
        "data/chat.py",
        "losses/dpo.py",
        "sampling/filters.py",
        "training/step.py",
        "types.py",
    ]


def test_cycles_inside_a_subpackage_are_found(tmp_path):
    package = plant(
        tmp_path,
        models__a="from halos_jax.models import b\n",
        models__b="from halos_jax.models.a import f\n",
    )
    (line,) = find_violations(package)
    assert line.startswith("cyclic import") and "models.a" in line and "models.b" in line


def test_confined_packages_names_and_lengths_are_found(tmp_path):
    package = plant(
        tmp_path,
        training__state="from orbax import checkpoint\n",
        losses__dpo="import torch\n",
        models__decoder="import transformers\nfrom ml_collections import ConfigDict\n",
        data__utils="",
        data__long="x = 1\n" * (MAX_LINES + 1),
        data__deep="def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES,
        **{f"rewards__r{number}": "" for number in range(MAX_FILES + 1)},
        extra="",
    )
    found = "\n".join(find_violations(package))
    for expected in (
        "training/state.py: imports orbax",
        "losses/dpo.py: imports torch",
        "models/decoder.py: imports ml_collections",
        "models/decoder.py: imports transformers",
        "data/utils.py: 'utils' names no topic",
        f"data/long.py: {MAX_LINES + 1} lines",
        f"data/deep.py:1 f: {MAX_FUNCTION_LINES + 1} lines",
        f"rewards: {MAX_FILES + 1} files",
        "extra.py: 'extra' has no level",
    ):
        assert expected in found
    assert len(found.splitlines()) == 9


def test_the_package_says_that_it_is_typed():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert (REPOSITORY / PACKAGE / "py.typed").read_bytes() == b""
    assert "py.typed" in project["tool"]["setuptools"]["package-data"][PACKAGE]
