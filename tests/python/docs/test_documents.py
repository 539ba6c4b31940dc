"""README.md and docs/ say what is so: links, files, commands, options and keys exist, and generated
tables are up to date."""

import functools
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from helpers import configuration_tables, documents, templates_table
from helpers.configuration_meanings import MEANINGS
from helpers.documents import DOCS, README, ROOT

from ktrt.chat.commands import COMMANDS
from ktrt.config import load_config
from ktrt.config.load import names_key
from ktrt.prompt.template.table import TEMPLATES
from ktrt.session import Adapters, Session

VERBS = ("chat", "serve", "audit", "doctor", "bench", "pack", "export")
DOCUMENTS = documents.documents()
GUIDES = documents.guides()
MOST_LINES = 200


def test_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= MOST_LINES


def test_readme_links_every_document() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", README.read_text("utf-8")))
    assert linked == {f"docs/{path.name}" for path in DOCS.glob("*.md")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", documents.prose(document)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(path), target


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", documents.prose(document), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize(
    "document", [*GUIDES, ROOT / "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_named_files_exist(document: Path) -> None:
    folders = {"bench", "csrc", "docs", "examples", "ktrt", "tests", "tools"}
    texts = [*documents.inline_code(document), *documents.commands(document)]
    for word in {word for text in texts for word in text.split()}:
        name = word.strip("'\"")
        if name.split("/")[0] in folders and re.fullmatch(r"[\w.-]+(/[\w.*-]+)+/?", name):
            assert list(ROOT.glob(name.rstrip("/"))), name


def test_named_members_of_a_session_exist() -> None:
    """`session.adapters.off()` and `session.chat(…)`, in text and in Python blocks."""
    made = set(re.findall(r"self\.([a-z]\w*)\b", inspect.getsource(Session.__init__)))
    texts = [path.read_text("utf-8") for path in DOCUMENTS]
    names = {each for text in texts for each in re.findall(r"\bsession((?:\.\w+)+)", text)}
    for _, name, *inner in (each.split(".") for each in names):
        assert name in made or hasattr(Session, name), name
        if name == "adapters" and inner:
            assert hasattr(Adapters, inner[0]) or inner[0] in vars(Adapters()), inner
        assert not (name == "model" and inner and inner[0].startswith("kt")), inner
    assert len(names) > 10


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for command in documents.commands(document):
        if command.startswith("make "):
            assert command.split()[1] in targets, command


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_their_options_exist(document: Path) -> None:
    for command in documents.commands(document):
        words = documents.words(command)
        if words[:2] == ["python", "-m"]:
            assert "." in words[2] or words[2] in ("venv", "pytest"), command
        check_options(command, words)


# Shown because ktrt refuses it.
WRONG_KEYS = {"kt_num_thread"}


def check_options(command: str, words: list[str]) -> None:
    if words[:1] == ["ktrt"] and len(words) > 1:
        verb, rest = words[1], words[2:]
    elif words[:2] == ["python", "-m"] and words[2].startswith("ktrt."):
        verb, rest = words[2].removeprefix("ktrt."), words[3:]
    elif words[:1] == ["tools/demo"]:
        verb, rest = "chat", words[1:]
    elif len(words) > 1 and words[0] == "python" and words[1].startswith("bench/"):
        check_bench(command, words[1], words[2:])
        return
    else:
        return
    if verb == "VERB":
        return
    assert verb in VERBS, command
    for word in rest:
        word = word.strip("[],…")
        if re.match(r"--?[a-zA-Z]", word):
            name = word.partition("=")[0]
            known = name in options(verb) or names_key(f"{name.lstrip('-').replace('-', '_')}=")
            assert known, f"{command}: {word}"
        elif re.match(r"[a-z]\w*=", word) and word != "key=value":
            assert names_key(word) or word.partition("=")[0] in WRONG_KEYS, f"{command}: {word}"


@functools.cache
def options(verb: str) -> frozenset[str]:
    """The options that ``python -m ktrt.VERB --help`` lists."""
    result = subprocess.run(
        [sys.executable, "-m", f"ktrt.{verb}", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return frozenset(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", result.stdout))


def check_bench(command: str, script: str, rest: list[str]) -> None:
    # A script's options may be in a module next to it.
    text = "".join(path.read_text("utf-8") for path in (ROOT / script).parent.glob("*.py"))
    for word in rest:
        if word.strip("[]").startswith("--"):
            assert f'"{word.strip("[]")}"' in text, command


def test_ci_runs_the_command_that_readme_names() -> None:
    commands = documents.commands(README)
    assert "tools/test" in commands
    assert "tools/test" in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1]


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_loads_except_for_its_paths(document: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for block in documents.blocks(document, "yaml"):
        (tmp_path / "config.yaml").write_text(block.text, "utf-8")
        given = yaml.safe_load(block.text)
        changes: dict[str, object] = {key: str(tmp_path) for key in given if key.endswith("_path")}
        if "adapters" in given:
            changes["adapters"] = dict.fromkeys(given["adapters"], str(tmp_path))
        config = load_config(tmp_path / "config.yaml", changes)
        assert config.model.model_name_or_path == tmp_path


class TestGeneratedTables:
    @pytest.mark.parametrize("name", configuration_tables.tables())
    def test_configuration(self, name: str) -> None:
        expected = configuration_tables.tables()[name]
        assert configuration_tables.current(name) == expected, "run: make docs"

    def test_every_meaning_has_its_key(self) -> None:
        keys = {
            each.name for part in configuration_tables.SECTIONS.values() for each in fields(part)
        }
        assert set(MEANINGS) == keys

    def test_templates(self) -> None:
        block = templates_table.table_block()
        assert {*TEMPLATES} == set(re.findall(r"`([^`]+)` \(", block))
        assert templates_table.current_block() == block, "run: make docs"


def test_numbers_of_templates_and_families() -> None:
    text = README.read_text("utf-8")
    assert f"LLaMA-Factory's {len(TEMPLATES)} names" in text
    models = documents.generated(DOCS / "models.md", "<!-- families", "<!-- families: end -->")
    rows = [row for row in models.splitlines() if "refused" not in row]
    types = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert f"{len(types)} model types" in text
    layouts = (DOCS / "adapters.md").read_text("utf-8").partition("| layout |")[2]
    rows = layouts.partition("\n\n")[0].splitlines()[2:]
    assert f"{len(rows)} layouts" in text


def test_every_command_of_the_chat_is_listed() -> None:
    text = (DOCS / "chat.md").read_text("utf-8")
    table = text.partition("## Commands")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\| (.*?) \| ", table, re.MULTILINE)
    assert set(re.findall(r"`/(\w+)", " ".join(first_cells))) == set(COMMANDS)


def test_internals_lists_the_packages() -> None:
    text = (DOCS / "internals.md").read_text("utf-8")
    table = text.partition("## Packages")[2].partition("\n## ")[0]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
              for name in re.findall(r"`(\w+)`", row)}  # fmt: skip
    assert listed == {path.parent.name for path in (ROOT / "ktrt").glob("*/__init__.py")}
