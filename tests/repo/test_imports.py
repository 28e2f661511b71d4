"""Imports point one way, only the platform names the device, and the command starts without torch."""

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "megaroute"
LEVELS = [
    {"common"},
    {"config"},
    {"platform", "launch", "routing", "data"},
    {"parallel"},
    {"model"},
    {"optim", "checkpoint", "metrics"},
    {"training"},
    {"export"},
    {"evaluation"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))

NAMES_THE_DEVICE = {"platform", "launch/devices.py"}
CHOICES_OF_THE_USER = {"config/training.py"}  # run.device takes "cuda" as a value
NO_TORCH = ("common", "config", "launch")


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_modules(path: Path) -> Iterator[str]:
    """Every module a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Code that travels with exported weights must find its neighbours in whatever folder it is.
            assert node.level == 0 or path.parent.name == "hf", f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_parts(path: Path) -> set[str]:
    parts = {name.split(".")[1] for name in imported_modules(path) if name.startswith("megaroute.")}
    return parts & set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = part_of(path)
    if own == "__init__":
        assert imported_parts(path) == set()
        return
    wrong = {part for part in imported_parts(path) - {own} if LEVEL[part] >= LEVEL[own]}
    if own == "__main__":
        wrong -= {"cli"}
    assert not wrong, f"{own} must not import {sorted(wrong)}"


@pytest.mark.parametrize("part", NO_TORCH)
def test_light_parts_do_not_import_torch_anywhere(part):
    for path in (PACKAGE / part).rglob("*.py"):
        heavy = {name.split(".")[0] for name in imported_modules(path)} & {"torch", "megatron", "deepspeed"}
        assert not heavy, f"{path} imports {heavy}"


def device_names(path: Path) -> Iterator[tuple[int, str]]:
    """Where a file says cuda as a name, an attribute or a string of one word; texts for people may say it."""
    for node in ast.walk(ast.parse(path.read_text())):
        found = ""
        if isinstance(node, ast.Name):
            found = node.id
        elif isinstance(node, ast.Attribute):
            found = node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found = node.value
        if found == "cuda" or found.startswith(("cuda:", "cuda.", "torch.cuda")):
            yield node.lineno, found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_platform_names_the_device(path):
    relative = str(path.relative_to(PACKAGE))
    if part_of(path) in NAMES_THE_DEVICE or relative in NAMES_THE_DEVICE | CHOICES_OF_THE_USER:
        return
    assert list(device_names(path)) == []


def run_python(code: str) -> tuple[str, float]:
    """Output of a Python process, and the seconds of processor time it took, which other processes do not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


LOADED = "import json, sys; print(json.dumps(sorted({'torch', 'megatron', 'deepspeed'} & set(sys.modules))))"
HELP = """
import contextlib
from megaroute.cli import main
with contextlib.suppress(SystemExit):
    main(['launch', '--help'])
"""
SHOW = "from megaroute.cli import main\nmain(['config', 'show', 'pretrain_configs/debug/cpu-tp2-pp2.yaml'])"
DRY_RUN = "from megaroute.cli import main\nmain(['launch', 'pretrain_configs/debug/cpu.yaml', '--dry-run'])"


@pytest.mark.parametrize("code", ["import megaroute", HELP, SHOW, DRY_RUN], ids=["import", "help", "show", "dry-run"])
def test_command_starts_without_torch_in_under_a_second(code):
    output, seconds = run_python(f"{code}\n{LOADED}")
    assert json.loads(output.splitlines()[-1]) == []
    assert seconds < 1
