"""Idioms that stay out of comments, docstrings, messages and documents.

    python tests/python/test_english.py [PATH …]     # all findings and their numbers

Checked are all texts of ktrt, csrc, bench, tools and examples, the comments and docstrings of
tests, and whole documents and build files. The changelog keeps the words of its time.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Idiom:
    """A way of writing to keep out, and words to use instead."""

    name: str
    pattern: re.Pattern[str]
    better: str
    starts: bool = False  # applies to the first words of a docstring or a comment only


def anywhere(name: str, pattern: str, better: str) -> Idiom:
    words = pattern.replace(" ", r"\s+")
    return Idiom(name, re.compile(rf"\b{words}\b", re.IGNORECASE), better)


def at_start(name: str, better: str) -> Idiom:
    words = name.replace(" ", r"\s+")
    return Idiom(f"{name} …", re.compile(rf"\s*{words}\b"), better, starts=True)


IDIOMS = [
    at_start("Of", 'begin with a verb ("Returns the bytes of …") or with the noun'),
    at_start("Those", 'begin with a verb ("Yields the layers that …") or with the noun'),
    at_start("That of", "name the thing"),
    at_start("What", 'begin with a verb ("Lists …", "Describes …") or with the noun'),
    anywhere("those of", "those of", 'repeat the noun: "the weights of the base", "the base\'s"'),
    anywhere(
        "so many",
        "so (many|much)(?! (that|as))",
        '"up to n", "n", "that many", or name the number',
    ),
    anywhere(
        "of its own",
        "of (its|his|her|their|our|your|one's) own",
        '"its own …", "a separate …", or nothing',
    ),
    anywhere(
        "what is … to", r"what( [\w']+){0,8} (is|are) to", 'name the thing: "the bytes to read"'
    ),
    anywhere("behind", "behind", '"after", "following"; of what remains: "leaves", "left over"'),
    anywhere("beside", "beside", '"next to", "with", "in addition to", "compared with"'),
    anywhere("anew", "anew", '"again"'),
    anywhere("otherwise than", "otherwise than", '"differently from", "other than"'),
]

CODE = ("ktrt", "csrc", "bench", "tools", "examples")
DOCUMENTS = {".md", ".cmake", ".txt", ".toml", ".yaml", ".yml"}
FOREIGN = ("tests/data", "tests/golden", "examples/demo/corpus", "examples/demo/model")
KEPT = {"CHANGELOG.md", "examples/demo/heldout.txt", "tests/python/test_english.py"}


@dataclass(frozen=True)
class Text:
    line: int
    words: str
    opens: bool  # its first word is the first of a comment or a docstring


def texts(path: Path, *, messages: bool) -> list[Text]:
    """A file's texts; strings that are no docstrings are included with ``messages``."""
    content = path.read_text("utf-8")
    if path.suffix in {".py", ".pyi"}:
        return [*python_comments(content), *python_strings(content, messages=messages)]
    if path.suffix in {".h", ".cc"}:
        return list(cpp_texts(content, messages=messages))
    marks = r"^[ >\t]+" if path.suffix == ".md" else r"^[ \t]*#+"
    return [Text(1, re.sub(marks, "", content, flags=re.MULTILINE), opens=False)]


def python_comments(content: str) -> Iterator[Text]:
    """Comments; those on consecutive lines in the same column are one text."""
    first, column, lines = 0, 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, at = token.start
        words = token.string.removeprefix("#")
        if lines and line == first + len(lines) and at == column:
            lines.append(words)
            continue
        if lines:
            yield Text(first, "\n".join(lines), opens=True)
        first, column, lines = line, at, [words]
    if lines:
        yield Text(first, "\n".join(lines), opens=True)


def python_strings(content: str, *, messages: bool) -> Iterator[Text]:
    tree = ast.parse(content)
    scopes = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = {
        id(each.body[0].value)
        for each in ast.walk(tree)
        if isinstance(each, scopes) and each.body and isinstance(each.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            document = id(node) in docstrings
            if document or messages:
                yield Text(node.lineno, node.value, opens=document)


CPP_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<string>"(?:\\.|[^"\\\n])*")|'(?:\\.|[^'\\\n])'""",
    re.DOTALL,
)


def cpp_texts(content: str, *, messages: bool) -> Iterator[Text]:
    """Comments and strings; neighbours with only spaces between them are one text."""
    kind, begin, end, words = "", 0, 0, ""
    for match in [*CPP_TOKEN.finditer(content), None]:
        if match and not match.lastgroup:
            continue
        if match and match.lastgroup == kind and not (gap := content[end : match.start()]).strip():
            words += gap + match[0].strip('/*"')
            end = match.end()
            continue
        if kind == "comment" or (kind and messages):
            line = content.count("\n", 0, begin) + 1
            yield Text(line, words, opens=kind == "comment")
        if match:
            kind, begin, end = str(match.lastgroup), match.start(), match.end()
            words = match[0].strip('/*"')


def findings_of(text: Text) -> Iterator[tuple[int, Idiom, str]]:
    """(line, idiom, words found)."""
    for idiom in IDIOMS:
        if idiom.starts:
            found = [idiom.pattern.match(text.words)] if text.opens else []
        else:
            found = list(idiom.pattern.finditer(text.words))
        for match in filter(None, found):
            line = text.line + text.words.count("\n", 0, match.start())
            yield line, idiom, " ".join(match[0].split())


def files() -> list[str]:
    """The files that are checked, as paths in the checkout."""
    places = [*CODE, "tests", "docs", "cmake"]
    found = [path for place in places for path in (ROOT / place).rglob("*") if path.is_file()]
    found += [path for path in ROOT.glob("*") if path.is_file()]
    names = sorted(str(path.relative_to(ROOT)) for path in found)
    return [name for name in names if is_text(name)]


def is_text(name: str) -> bool:
    if name in KEPT or name.startswith(tuple(f"{folder}/" for folder in FOREIGN)):
        return False
    suffix = Path(name).suffix
    return suffix in {".py", ".pyi", ".h", ".cc"} | DOCUMENTS or name.endswith("Makefile")


def findings(name: str) -> list[tuple[str, Idiom]]:
    """Messages of file, line, idiom and better words, with the idiom."""
    messages = name.startswith(tuple(f"{folder}/" for folder in CODE))
    return [
        (f'{name}:{line}: "{words}": {idiom.better}', idiom)
        for text in texts(ROOT / name, messages=messages)
        for line, idiom, words in findings_of(text)
    ]


def test_no_idioms() -> None:
    found = [message for name in files() for message, _ in findings(name)]
    assert not found, "write it in plain words:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("suffix", "content", "expected"),
    [
        (".py", '"""Of the base."""\n', [(1, "Of …")]),
        (".py", 'def f():\n    """Sums.\n\n    Rows behind\n    it."""\n', [(4, "behind")]),
        (".py", "x = 1  # beside\n# those\n# of it\n", [(1, "beside"), (2, "those of")]),
        (".py", 'x = f"{1} has none of its own"\n', [(1, "of its own")]),
        (".py", "# What is read\n", [(1, "What …")]),
        (".py", '"""Reads what each of the rows is to hold."""\n', [(1, "what is … to")]),
        (".py", "behind = 1\nx = 'So many that it is slow, besides; of others'\n", []),
        (".py", "x = 'Of it', 'What is it?'\n", []),
        (".py", "# It counts. What follows is plain, and so are those that go.\n", []),
        (
            ".cc",
            'int a;  // so\n        // many rows\nf("//", "so much");\n',
            [(1, "so many"), (3, "so many")],
        ),
        (".h", "/* Those\n   of W */ int behind = 1'000'000;\n", [(1, "Those …"), (1, "those of")]),
        (".md", "# Of speed\n\n> read beside\n", [(3, "beside")]),
        (".yaml", "# one of its\n# own\n", [(1, "of its own")]),
    ],
)
def test_idioms_are_found(
    tmp_path: Path, suffix: str, content: str, expected: list[tuple[int, str]]
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(content, "utf-8")
    found = [each for text in texts(path, messages=True) for each in findings_of(text)]
    assert sorted((line, idiom.name) for line, idiom, _ in found) == sorted(expected)


def test_strings_of_tests_are_data(tmp_path: Path) -> None:
    for name, content in [("a.py", "x = 'behind'\n"), ("a.cc", 'f("behind");\n')]:
        (tmp_path / name).write_text(content)
        assert texts(tmp_path / name, messages=False) == []


def test_files_are_found() -> None:
    assert {"ktrt/_core.pyi", "csrc/README.md", "README.md", "Makefile"} <= set(files())


def main(paths: Sequence[str]) -> None:
    chosen = [n for n in files() if not paths or any(Path(n).is_relative_to(p) for p in paths)]
    found = [(name, *each) for name in chosen for each in findings(name)]
    for _, message, _ in found:
        print(message)
    print()
    for label, count in [
        *Counter(idiom.name for _, _, idiom in found).most_common(),
        *Counter("/".join(name.split("/")[:2]) for name, _, _ in found).most_common(),
    ]:
        print(f"{count:5}  {label}")


if __name__ == "__main__":
    main(sys.argv[1:])
