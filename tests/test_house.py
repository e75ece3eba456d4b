"""The layers of the package: its imports point strictly downwards, and scripts stand alone."""

import ast
import configparser
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MODULES = Path("src", "rq_hf", "metrics", "modules")  # which only the optional library evaluate imports
SCRIPT_FOLDERS = ("examples", "benchmarks", "docs")
OUTSIDE = (*SCRIPT_FOLDERS, "tests")
GROUND = {"argument_checks", "files", "images", "model_cards", "text", "untrusted_files"}
# The modules and packages in src/rq_hf, and which others they may import; and the module beside it.
MAY_IMPORT = {
    **dict.fromkeys(GROUND, {"argument_checks"}),
    "argument_checks": set(),
    "models": GROUND,
    "metrics": GROUND,
    "pipelines": GROUND | {"models"},
    "semantic_ids": GROUND | {"models"},
    "data": GROUND | {"models"},
    "evaluation": GROUND | {"models", "pipelines", "data", "metrics"},
    "training": GROUND | {"models", "pipelines", "data", "metrics", "semantic_ids"},
    "convert": GROUND | {"models", "pipelines"},
    "_registration": {"models", "pipelines", "convert"},
    "__init__": {"models", "pipelines", "semantic_ids", "convert", "_registration"},
    "export_onnx": GROUND | {"models", "pipelines", "rq_hf_cli"},
    "model_info": GROUND | {"models", "pipelines", "convert"},
    "rq_hf_cli": GROUND | {"__init__", "models", "pipelines", "convert", "model_info"},
    "__main__": {"rq_hf_cli"},
}


class Import(NamedTuple):
    place: str  # file and line
    module: str  # absolute
    names: tuple[str, ...]  # imported from it
    executed: bool  # when the importing module is imported


def imports(path: Path, root: Path) -> Iterator[Import]:
    """All imports in a file, also those inside functions."""
    label = path.relative_to(root)

    def visit(node, executed):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(f"{label}:{node.lineno}", alias.name, (), executed)
        elif isinstance(node, ast.ImportFrom):
            parents = label.parts[1 : -node.level] if node.level else ()  # without src
            module = ".".join([*parents, *filter(None, [node.module])])
            yield Import(f"{label}:{node.lineno}", module, tuple(alias.name for alias in node.names), executed)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            executed = False
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            executed = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, executed)

    return visit(ast.parse(path.read_text(encoding="utf-8")), True)


def package(root: Path) -> dict[str, Path]:
    """The files of the package by the absolute names of their modules."""
    files = sorted((root / "src").rglob("*.py"))
    return {
        ".".join(path.relative_to(root / "src").with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


def targets(found: Import, modules: dict[str, Path]) -> list[str]:
    """The modules of the package that an import names."""
    submodules = {f"{found.module}.{name}" for name in found.names} & modules.keys()
    only_submodules = submodules and len(submodules) == len(found.names)
    return sorted(submodules | ({found.module} & modules.keys() if not only_submodules else set()))


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__" if module == "rq_hf" else module


def wrong_directions(root: Path) -> list[str]:
    modules, violations = package(root), []
    for importer, path in modules.items():
        if layer(importer) not in MAY_IMPORT:
            violations.append(f"{path.relative_to(root)}: {layer(importer)} has no place in MAY_IMPORT")
            continue
        allowed = MAY_IMPORT[layer(importer)]
        for found in imports(path, root):
            for target in targets(found, modules):
                if layer(target) not in allowed | {layer(importer)}:
                    accepted = ", ".join(sorted(allowed)) or "nothing of rq_hf"
                    violations.append(f"{found.place}: {layer(importer)} imports {target}, but may import {accepted}")
    return violations


def circles(root: Path) -> list[str]:
    modules = package(root)
    edges = {
        importer: {
            target: found.place
            for found in imports(path, root)
            for target in targets(found, modules)
            if found.executed and target != importer
        }
        for importer, path in modules.items()
    }
    violations, finished = [], set()

    def follow(module, trail):
        if module in trail:
            circle = [*trail[trail.index(module) :], module]
            violations.append("; ".join(f"{edges[a][b]}: {a} imports {b}" for a, b in zip(circle, circle[1:])))
        elif module not in finished:
            for target in edges[module]:
                follow(target, [*trail, module])
            finished.add(module)

    for module in modules:
        follow(module, [])
    return violations


def is_library(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and not any(Path(spec.origin or "").is_relative_to(ROOT / top) for top in OUTSIDE)


def is_script(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body) or any(
        isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in body
    )


def imported_scripts(root: Path) -> list[str]:
    files = sorted(path for folder in SCRIPT_FOLDERS for path in (root / folder).rglob("*.py"))
    scripts, violations = [path for path in files if is_script(path)], []
    for path in files:
        for found in imports(path, root):
            name = found.module.split(".")[0]
            violations += [
                f"{found.place}: imports the script {script.relative_to(root)}"
                for script in scripts
                if script.stem == name and (script.parent == path.parent or not is_library(name))
            ]
    return violations


def imports_from_outside(root: Path) -> list[str]:
    """Imports of tests, examples and benchmarks in the package, by folder or by the name of a file."""
    outside = {path.stem for top in OUTSIDE for path in (root / top).rglob("*.py")}
    return [
        f"{found.place}: imports {found.module}, which is not in the package"
        for path in package(root).values()
        for found in imports(path, root)
        if (name := found.module.split(".")[0]) in OUTSIDE or (name in outside and not is_library(name))
    ]


def imports_of_extras(root: Path) -> list[str]:
    """Imports of optional libraries that run before a script could print its help."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    extras = {
        re.match(r"\w*", line)[0] for value in config["options.extras_require"].values() for line in value.split()
    }
    files = [*package(root).values(), *(path for top in SCRIPT_FOLDERS for path in (root / top).rglob("*.py"))]
    return [
        f"{found.place}: imports {found.module}, which is optional, at the top"
        for path in files
        for found in imports(path, root)
        if found.executed
        and found.module.split(".")[0] in extras - {"rq_hf"}
        and not path.is_relative_to(root / MODULES)
    ]


CHECKS = [wrong_directions, circles, imported_scripts, imports_from_outside, imports_of_extras]


@pytest.mark.parametrize("check", CHECKS)
def test_house(check):
    violations = check(ROOT)
    assert not violations, "\n" + "\n".join(violations)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("house")
    for path in (path for top in ("src", *OUTSIDE) for path in (ROOT / top).rglob("*.py")):
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to(ROOT))
    return root


@pytest.mark.parametrize(
    "check, file, line, violation",
    [
        (wrong_directions, "src/rq_hf/images.py", "from . import text", "images imports rq_hf.text, but"),
        (wrong_directions, "src/rq_hf/models/codes.py", "import rq_hf.training", "models imports rq_hf.training, but"),
        (
            wrong_directions,
            "src/rq_hf/metrics/lpips.py",
            "from ..models.codes import x",
            "metrics imports rq_hf.models.",
        ),
        (
            wrong_directions,
            "src/rq_hf/pipelines/__init__.py",
            "def f(): from .. import data",
            "pipelines imports rq_hf.d",
        ),
        (wrong_directions, "src/rq_hf/data/loading.py", "from .. import EMOJI_MODEL", "data imports rq_hf, but"),
        (
            circles,
            "src/rq_hf/models/presets.py",
            "from .rq_vae import RQVAEModel",
            "rq_hf.models.presets imports rq_hf.",
        ),
        (imported_scripts, "examples/train_t2i.py", "from demo import PROMPTS", "imports the script examples/demo.py"),
        (
            imported_scripts,
            "examples/emoji/export.py",
            "import evaluate",
            "imports the script examples/emoji/evaluate.py",
        ),
        (imports_from_outside, "src/rq_hf/text.py", "from tiny import tiny_vae", "imports tiny, which is not"),
        (imports_from_outside, "src/rq_hf/files.py", "import examples.demo", "imports examples.demo, which is not"),
        (imports_of_extras, "examples/demo.py", "from peft import LoraConfig", "imports peft, which is optional"),
    ],
)
def test_violations_are_found_and_named(copy, check, file, line, violation):
    path = copy / file
    content = path.read_text()
    path.write_text(f"{line}\n{content}")
    found = check(copy)
    path.write_text(content)
    assert any(f"{file}:1: {violation}" in text for text in found), found


def test_allowed_imports_are_not_violations(copy):
    path = copy / "src/rq_hf/models/presets.py"
    content = path.read_text()
    path.write_text(
        "import accelerate\nfrom ..files import atomic_folder\n\n"
        f"def f():\n    import peft\n    from .rq_vae import x\n{content}"
    )
    found = [
        text for check in (wrong_directions, circles, imports_from_outside, imports_of_extras) for text in check(copy)
    ]
    path.write_text(content)
    assert found == []
