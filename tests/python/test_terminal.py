"""Tests of ktrt.terminal without a terminal; those with one are in test_chat."""

import io
import signal
from collections.abc import Iterator

import pytest

from ktrt.errors import KtrtError
from ktrt.terminal import Terminal


def make(stdin: bytes = b"") -> tuple[Terminal, io.StringIO, io.StringIO]:
    stdout, stderr = io.StringIO(), io.StringIO()
    return Terminal(io.BytesIO(stdin), stdout, stderr), stdout, stderr


def read_all(stdin: bytes) -> list[str]:
    terminal, _, _ = make(stdin)
    lines = []
    while (line := terminal.read()) is not None:
        lines.append(line.rstrip("\r\n"))
    return lines


@pytest.mark.parametrize(
    ("stdin", "lines"),
    [
        (b"", []),
        ("你好\nexit\n".encode(), ["你好", "exit"]),
        ("你好\r\n最后".encode(), ["你好", "最后"]),
        ("\ufeff你好\n".encode(), ["你好"]),
        (b"\n\na\n", ["", "", "a"]),
    ],
)
def test_piped_lines_are_utf8(stdin: bytes, lines: list[str]) -> None:
    assert read_all(stdin) == lines


@pytest.mark.parametrize("line", ["你好\n".encode("gbk"), "你好\n".encode("utf-16")])
def test_other_encodings_are_an_error_that_says_where(line: bytes) -> None:
    terminal, _, _ = make(b"ok\n" + line)
    assert terminal.read() == "ok\n"
    with pytest.raises(KtrtError, match=r"line 2: not UTF-8 text \(byte 1 is 0x"):
        terminal.read()


def test_answer_prints_pieces_as_they_come() -> None:
    terminal, stdout, _ = make()
    printed = []

    def pieces() -> Iterator[str]:
        for piece in ("你", "好", "！"):
            printed.append(stdout.getvalue())
            yield piece

    assert terminal.answer(pieces()) == "你好！"
    assert printed == ["Assistant: ", "Assistant: 你", "Assistant: 你好"]
    assert stdout.getvalue() == "Assistant: 你好！\n"


def test_a_failing_answer_ends_its_line() -> None:
    terminal, stdout, _ = make()

    def pieces() -> Iterator[str]:
        yield "half"
        raise KtrtError("x")

    with pytest.raises(KtrtError):
        terminal.answer(pieces())
    assert stdout.getvalue() == "Assistant: half\n"


def test_ctrl_c_is_not_swallowed_when_piped() -> None:
    terminal, _, _ = make()

    def pieces() -> Iterator[str]:
        yield "half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        terminal.answer(pieces())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_counts_even_where_python_drops_its_exception() -> None:
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def pieces() -> Iterator[str]:
        yield "half"
        Finalised()  # its KeyboardInterrupt is "ignored in __del__"
        yield " an answer"
        raise AssertionError("went on")

    terminal, stdout, _ = make()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        terminal.answer(pieces())
    assert stdout.getvalue() == "Assistant: half an answer\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_error() -> None:
    terminal, stdout, stderr = make()
    terminal.error("what failed")
    assert stderr.getvalue() == "error: what failed\n"
    assert stdout.getvalue() == ""
    try:
        raise KtrtError("deep")
    except KtrtError as error:
        terminal.error("again", trace=error)
    assert "Traceback" in stderr.getvalue()
    assert stderr.getvalue().endswith("error: again\n")
