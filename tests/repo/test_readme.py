"""What README.md and docs/ tell a reader to type or to open: commands parse, files, keys and make targets exist."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from megaroute import cli
from megaroute.config.checks import check_config
from megaroute.config.load import load_config
from megaroute.config.root import Config

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
DOCUMENTS = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = ("megaroute/", "tests/", "tools/", "docs/", "pretrain_configs/", "slurm/")
# A file that a run writes looks like a key of the section `metrics`.
KEY = re.compile(rf"({'|'.join(Config.model_fields)})(\.\w+)+(?<!\.jsonl)")
MADE_BY_THE_READER = dict.fromkeys(
    ("mine.yaml", "run.yaml", "imported/dense/config.yaml", "imported/routed/config.yaml"),
    "pretrain_configs/debug/cpu.yaml",
)


def blocks(document: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(document.read_text()) if language in languages]


def inline(document: Path) -> list[str]:
    """Texts in backticks outside of code blocks."""
    return INLINE.findall(BLOCK.sub("", document.read_text()))


def command_lines() -> Iterator[list[str]]:
    """Words of every command that the documents show, without comments and redirections."""
    for document in DOCUMENTS:
        lines = [line for block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()]
        lines += [text for text in inline(document) if text.startswith(("make ", "python ", "srun ", "megaroute "))]
        for line in lines:
            words = shlex.split(line, comments=True)
            if words:
                yield words[: words.index(">")] if ">" in words else words


def commands(*names: str) -> list[list[str]]:
    """Commands whose first words are one of `names`; `srun` in front is left out."""
    found = [words[1:] if words[0] == "srun" else words for words in command_lines()]
    return [words for words in found if words[0] in names]


def joined(words: list[str]) -> str:
    return " ".join(words)


@pytest.mark.parametrize("words", commands("megaroute"), ids=joined)
def test_megaroute_command_parses_and_its_configuration_loads(words):
    if len(words) == 2:  # the name of a command in running text
        assert f"\n    {words[1]} " in cli._parser().format_help()
        return
    arguments = cli._parse(words[1:])
    if hasattr(arguments, "config"):
        file = MADE_BY_THE_READER.get(str(arguments.config), arguments.config)
        check_config(load_config(REPOSITORY / file, arguments.overrides))


@pytest.mark.parametrize("words", commands("python"), ids=joined)
def test_tool_command_parses(words, monkeypatch):
    path = REPOSITORY / words[1]
    monkeypatch.syspath_prepend(path.parent)  # as the interpreter does for a script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.parse_arguments(words[2:])


@pytest.mark.parametrize("words", commands("make"), ids=joined)
def test_make_target_and_variables_exist(words):
    makefile = (REPOSITORY / "Makefile").read_text()
    for word in words[1:]:
        name, assignment, value = word.partition("=")
        pattern = rf"^{name} \?=" if assignment else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"Makefile has no {word}"
        if words[1] == "demo" and name == "ARGS":
            load_config(REPOSITORY / "pretrain_configs/debug/demo.yaml", value.split())


def test_there_are_commands_of_each_kind():
    assert len(commands("megaroute")) >= 8
    assert len(commands("python")) >= 2
    assert {"demo", "test"} <= {words[1] for words in commands("make")}


def test_the_readers_configuration_works_from_the_root_of_the_repository(tmp_path):
    (text,) = blocks(README, "yaml")
    tree = yaml.safe_load(text)
    tree["extends"] = str(REPOSITORY / tree["extends"])
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "mine.yaml")
    check_config(config)
    prepared = joined([joined(words) for words in commands("python")])
    for path in (config.data.train, config.data.valid, config.data.tokenizer):
        assert str(path) in prepared
    assert f"--vocab-size {config.model.vocab_size} " in prepared


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_exist(document):
    links = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    missing = [link for link in links if not (document.parent / link.partition("#")[0]).exists()]
    paths = [text for text in inline(document) if text.startswith(FOLDERS)]
    missing += [path for path in paths if not (REPOSITORY / path).exists()]
    assert missing == []


def is_key(dotted: str) -> bool:
    section: object = Config
    for name in dotted.split("."):
        if not (isinstance(section, type) and issubclass(section, BaseModel)) or name not in section.model_fields:
            return False
        section = section.model_fields[name].annotation
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_configuration_keys_exist(document):
    keys = [text.partition("=")[0] for text in inline(document) if KEY.fullmatch(text.partition("=")[0])]
    assert [key for key in keys if not is_key(key)] == []


def test_readme_names_keys_and_a_wrong_one_would_be_noticed():
    assert sum(bool(KEY.fullmatch(text)) for text in inline(README)) >= 8
    assert is_key("routing.controller.gain")
    assert not is_key("routing.controller.gian")
    assert not is_key("routing.density.gain")


def test_folders_of_the_readme_are_those_of_the_package():
    (tree,) = [text for text in blocks(README, "") if text.startswith("megaroute/\n")]
    named = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    assert named == {path.parent.name for path in (REPOSITORY / "megaroute").glob("*/__init__.py")}


def test_no_mark_is_left_to_be_filled_in():
    for document in DOCUMENTS:
        assert not re.search(r"TODO|TBD|FIXME|XXX", document.read_text())
