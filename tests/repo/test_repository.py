"""Files of the repository: their size, what they may not name, and metadata that must agree."""

import configparser
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

import megaroute

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = sorted(
    path for folder in ("megaroute", "tools", "tests") for path in (REPOSITORY / folder).rglob("*.py") if path.is_file()
)
IGNORED = {".git", ".venv", "__pycache__", "runs", "build", "dist", ".hypothesis", ".mypy_cache", ".ruff_cache"}
MACHINE_PATHS = re.compile(r"(?<![\w./-])/(?:work|opt|home|root|mnt|scratch|Users)/[\w.-]+")


def repository_files() -> list[Path]:
    """Files that git tracks or would track; all but the ignored folders where there is no git."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        names = [name for name in listed.stdout.split("\0") if name]
        return [path for path in (REPOSITORY / name for name in names) if path.is_file()]
    found = (path for path in REPOSITORY.rglob("*") if path.is_file())
    return [path for path in found if not IGNORED & set(path.relative_to(REPOSITORY).parts)]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_file_is_short(path):
    assert len(path.read_text().splitlines()) < 400


def test_no_file_names_a_place_on_somebodys_machine():
    named = []
    for path in repository_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        named += [f"{path.relative_to(REPOSITORY)}: {match.group()}" for match in MACHINE_PATHS.finditer(text)]
    assert named == []


def test_version_comes_from_the_package(setup_cfg):
    assert setup_cfg["metadata"]["version"] == "attr: megaroute.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", megaroute.__version__)


def test_megatron_version_is_the_one_the_cpu_port_is_written_for(setup_cfg):
    port = (REPOSITORY / "megaroute" / "platform" / "megatron_cpu.py").read_text()
    version = re.search(r'MEGATRON_VERSION = "(.*)"', port)
    assert version is not None
    assert f"megatron-core=={version.group(1)}" in setup_cfg["options"]["install_requires"].split()


def test_every_package_has_its_init_file():
    folders = {path.parent for path in (REPOSITORY / "megaroute").rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_package_data_exists(setup_cfg):
    for package, patterns in setup_cfg["options.package_data"].items():
        folder = REPOSITORY.joinpath(*package.split("."))
        for pattern in patterns.split():
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"


def test_installed_requirements_are_within_bounds(setup_cfg):
    requirements = pytest.importorskip("packaging.requirements")
    for line in setup_cfg["options"]["install_requires"].strip().splitlines():
        requirement = requirements.Requirement(line)
        assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), line


def test_makefile_reads_torch_from_setup_cfg(setup_cfg):
    shown = subprocess.run(
        ["make", "-n", "-W", "setup.cfg", "setup"], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    torch = next(line for line in setup_cfg["options"]["install_requires"].split() if line.startswith("torch"))
    assert f"'{torch}'" in shown.stdout


SHELL = [".ci/run", *(str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "slurm").rglob("*.*")))]


@pytest.mark.parametrize("file", SHELL)
def test_shell_script_parses(file):
    subprocess.run(["bash", "-n", file], check=True, cwd=REPOSITORY)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", file], check=True, cwd=REPOSITORY)
