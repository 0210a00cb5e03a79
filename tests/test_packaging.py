"""What holds the project together: pins inside ranges, imports that run one way, and a Makefile that installs once."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# A part of the package imports only from parts of a lower rank, or from its neighbours of the same rank.
RANKS = {
    "activations": 0,
    "atomic_files": 0,
    "comparison": 0,
    "observation_norm": 0,
    "version": 0,
    "functional": 0,
    "float32_buffers": 0,
    "noise_schedule": 0,
    "networks": 0,
    "batch_renorm": 0,
    "value_heads": 0,
    "entropy": 0,
    "critics": 0,
    "action_box": 1,
    "pretrained": 1,
    "samplers": 1,
    "score_targets": 1,
    "temperature": 1,
    "diffusion_policy": 2,
    "actor": 2,
    "action_selection": 2,
    "objectives": 3,
    "training": 4,
}
# The same within qsm_rl/training.
TRAINING_RANKS = {
    "errors": 0,
    "folders": 0,
    "random_state": 0,
    "ranks": 0,
    "configuration": 1,
    "environments": 2,
    "updates": 2,
    "data": 3,
    "evaluation": 3,
    "runs": 4,
    "grids": 5,
}
PACKAGE_FILES = sorted((ROOT / "qsm_rl").rglob("*.py"))


# --- versions ---------------------------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    """Every requirement of the package and of its extras, the package's own extras left out."""
    texts = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    return [requirement for text in texts if (requirement := Requirement(text)).name != PROJECT["name"]]


def pins() -> dict[str, str]:
    """The pinned version of every package in constraints.txt, by canonical name."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line]
    assert all(len(pair) == 2 for pair in pairs), "constraints.txt holds a line that is no exact pin"
    assert len({canonicalize_name(name) for name, _ in pairs}) == len(pairs), "constraints.txt pins a package twice"
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_direct_dependency_is_pinned_inside_its_range(requirement: Requirement):
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"{requirement.name} has no pin in constraints.txt"
    assert requirement.specifier.contains(pinned), f"the pin {requirement.name}=={pinned} is outside {requirement}"


@pytest.mark.parametrize("build", ["", "+cpu", "+cu130"])
def test_pin_of_torch_accepts_every_build(build: str):
    pinned = pins()["torch"]
    assert Requirement(f"torch=={pinned}").specifier.contains(f"{Version(pinned).base_version}{build}")


def test_own_extras_exist():
    texts = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    named = {extra for text in texts if Requirement(text).name == PROJECT["name"] for extra in Requirement(text).extras}
    assert named and named <= PROJECT["optional-dependencies"].keys()


def test_one_version_of_ruff_and_of_the_package_everywhere():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ruff = {need for hook in hooks for need in hook["additional_dependencies"] if need.startswith("ruff")}
    assert ruff == {f"ruff=={pins()['ruff']}"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    assert f'__version__ = "{PROJECT["version"]}"' in (ROOT / "qsm_rl/version.py").read_text()


# --- structure --------------------------------------------------------------------------------------------------------


def part_of(module: str) -> str:
    """``qsm_rl.objectives.q_score_matching`` -> ``objectives``; the package itself -> ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything ``path`` imports, at any depth of its code."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *filter(None, [node.module])])
            # `from qsm_rl import actor` imports a part, `from qsm_rl import DiffusionActor` the package above it.
            parts = {alias.name for alias in node.names} & RANKS.keys() if base == "qsm_rl" else set()
            found |= {f"qsm_rl.{part}" for part in parts}
            if len(parts) < len(node.names):
                found.add(base)
    return found


def test_every_part_has_a_rank():
    unknown = {part_of(module_name(path)) for path in PACKAGE_FILES} - RANKS.keys() - {"__init__"}
    assert not unknown, f"give these parts of qsm_rl their place in RANKS: {sorted(unknown)}"


def test_the_description_of_the_rooms_names_every_part():
    page = (ROOT / "docs" / "explanation" / "how-the-kit-is-built.md").read_text()
    rows = re.findall(r"^\| (`.+?) \|", page.partition("## The rooms")[2].partition("\n## ")[0], flags=re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted({*RANKS, *TRAINING_RANKS})


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=module_name)
def test_nothing_imports_upward(path: Path):
    part = part_of(module_name(path))
    own = {part_of(module) for module in imported_modules(path) if module.split(".")[0] == "qsm_rl"}
    if part == "__init__":
        assert "training" not in own, "qsm_rl/__init__.py imports the training side"
        return
    assert "__init__" not in own, f"{path.name} imports from the package above it; import from the module instead"
    upward = {other for other in own if RANKS[other] > RANKS[part]}
    assert not upward, f"{module_name(path)} imports upward: {sorted(upward)}"


@pytest.mark.parametrize("path", sorted((ROOT / "qsm_rl" / "training").rglob("*.py")), ids=module_name)
def test_nothing_in_training_imports_upward(path: Path):
    name = module_name(path)
    if name == "qsm_rl.training":
        return  # the public names, from all over
    room = name.split(".")[2]
    modules = [module for module in imported_modules(path) if module.startswith("qsm_rl.training")]
    assert "qsm_rl.training" not in modules, f"{name} imports from the package above it; import from the module instead"
    rooms = {module.split(".")[2] for module in modules}
    upward = {other for other in rooms if TRAINING_RANKS[other] > TRAINING_RANKS[room]}
    assert not upward, f"{name} imports upward: {sorted(upward)}"
    alike = {other for other in rooms - {room} if TRAINING_RANKS[other] == TRAINING_RANKS[room] > 0}
    assert not alike, f"{name} imports its neighbours: {sorted(alike)}"


def test_parts_do_not_import_in_circles():
    graph: dict[str, set[str]] = {}
    for path in PACKAGE_FILES:
        own = {module for module in imported_modules(path) if module.startswith("qsm_rl.")}
        graph.setdefault(part_of(module_name(path)), set()).update({part_of(module) for module in own})
    graph.pop("__init__", None)
    try:
        TopologicalSorter({part: needs - {part} for part, needs in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"the parts import in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=module_name)
def test_third_party_imports_fit_the_part(path: Path):
    part = part_of(module_name(path))
    outside = {module.split(".")[0] for module in imported_modules(path)} - set(sys.stdlib_module_names) - {"qsm_rl"}
    if RANKS.get(part) == 0:
        assert outside <= {"torch"}, f"{part} is built on torch alone, and imports {sorted(outside - {'torch'})}"
    if part != "training":
        assert not outside & {"lightning", "jsonargparse"}, f"{part} imports {sorted(outside)}: only training may"
    assert not outside & {"recipes", "tests"}


@pytest.mark.parametrize("folder", ["qsm_rl", "recipes", "tests"])
def test_every_import_is_a_declared_dependency(folder: str):
    extras = PROJECT["optional-dependencies"]
    needs = [
        *PROJECT["dependencies"],
        *extras["dmc"],
        *extras["results"],
        *extras["offline"],
        *extras["ray"],
        *extras["video"],
        *(extras["test"] if folder == "tests" else []),
    ]
    declared = {canonicalize_name(Requirement(need).name) for need in needs}
    paths = [
        path for path in (ROOT / folder).rglob("*.py") if path.parent.name != "peers"
    ]  # run in their own environment
    modules = {module.split(".")[0] for path in paths for module in imported_modules(path)}
    distributions = packages_distributions()
    for module in modules - set(sys.stdlib_module_names) - {"qsm_rl", "recipes", "tests"}:
        providers = {canonicalize_name(name) for name in distributions.get(module, [module])}
        assert providers & declared, f"{folder} imports {module}, which pyproject.toml does not declare"


def test_importing_the_package_does_not_import_lightning():
    program = (
        "import sys; from qsm_rl import DiffusionActor\n"
        "print([module for module in ('lightning', 'pytorch_lightning') if module in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [*PACKAGE_FILES, *sorted((ROOT / "recipes").glob("*.py"))], ids=lambda path: path.name)
def test_file_stays_short(path: Path):
    lines = len(path.read_text().splitlines())
    assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines; split it"


# --- the Makefile -----------------------------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
INSTALL = 'install --quiet -c constraints.txt -e ".[test]"'


def make(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # A `make test` around these tests hands its own variables down in the environment.
    inherited = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS", "VENV", "PYTHON", "WORKERS")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    command = ["make", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_make
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--config recipes/configs/quickstart.yaml"),
        (["ARGS="], "--config recipes/configs/quickstart.yaml"),
        (["ARGS=--env Hopper-v5 --seed 1"], "--env Hopper-v5 --seed 1"),
    ],
)
def test_make_train_runs_the_recipe(arguments: list[str], expected: str):
    printed = make("-n", "train", *arguments).stdout.splitlines()
    assert [line for line in printed if "recipes/" in line] == [f".venv/bin/python recipes/mujoco_qsm.py {expected}"]
    # Only the quick start ends with a line on the full run.
    assert any(line.startswith("echo 'The full run") for line in printed) == ("--config" in expected)


def test_files_that_make_train_names_exist():
    assert (ROOT / "recipes/mujoco_qsm.py").is_file() and (ROOT / "recipes/configs/quickstart.yaml").is_file()


@needs_make
def test_make_installs_once_and_again_when_a_version_changes(tmp_path: Path):
    stamp = tmp_path / ".installed-test"
    assert INSTALL in make("-n", "test", f"VENV={tmp_path}").stdout
    stamp.touch()
    assert INSTALL not in make("-n", "test", f"VENV={tmp_path}").stdout
    older = min((ROOT / name).stat().st_mtime for name in ("pyproject.toml", "constraints.txt")) - 1
    os.utime(stamp, (older, older))
    assert INSTALL in make("-n", "test", f"VENV={tmp_path}").stdout


@needs_make
@pytest.mark.parametrize("install_works", [True, False])
def test_make_leaves_a_stamp_only_after_a_complete_install(tmp_path: Path, install_works: bool):
    """A stand-in for Python records what is asked of it, makes the "environment", and lets its pip work or fail."""
    venv, log, stand_in = tmp_path / "venv", tmp_path / "log", tmp_path / "python"
    stand_in.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> {log}\n'
        f'case "$*" in\n'
        f'  "-m venv "*) mkdir -p {venv}/bin && cp "$0" {venv}/bin/python ;;\n'
        f"  *install*) exit {0 if install_works else 1} ;;\n"
        "esac\n"
    )
    stand_in.chmod(0o755)
    result = make("test", f"VENV={venv}", f"PYTHON={stand_in}")
    assert INSTALL.replace('"', "") in log.read_text()
    assert f"Installing qsm_rl[test] into {venv}" in result.stdout
    assert (result.returncode == 0) == install_works
    assert (venv / ".installed-test").exists() == install_works
    assert ("-m pytest" in log.read_text()) == install_works


@needs_make
def test_make_names_a_missing_python(tmp_path: Path):
    result = make("test", f"VENV={tmp_path / 'venv'}", "PYTHON=no-such-python")
    assert result.returncode != 0 and not (tmp_path / "venv").exists()
    assert re.search(r'"no-such-python" is not Python 3\.11 or newer.*make PYTHON=', result.stderr)
