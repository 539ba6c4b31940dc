"""Tests of ktrt.chat.terminal without a terminal; test_chat_terminal has one."""

import io
import signal
from collections.abc import Iterator

import pytest

from ktrt.chat.terminal import Terminal
from ktrt.errors import KtrtError


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


class Tty(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> tuple[Terminal, Tty]:
    """Returns a terminal whose output streams are one."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Tty()
    return Terminal(io.BytesIO(), screen, screen, interactive=True), screen


def drawn(text: str) -> str:
    """Returns the screen's final text, without styles."""
    lines = [line.split("\r\x1b[K")[-1] for line in text.split("\n")]
    return "\n".join(lines).replace("\x1b[2m", "").replace("\x1b[0m", "")


class TestProgress:
    def test_a_long_prompt_shows_it_and_leaves_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        terminal, screen = at_a_terminal(monkeypatch)

        def pieces() -> Iterator[str]:
            terminal.show_prefill(0, 2000)
            assert drawn(screen.getvalue()) == "reading the prompt, 0% of 2000 tokens"
            terminal.show_prefill(500, 2000)
            assert drawn(screen.getvalue()) == "reading the prompt, 25% of 2000 tokens"
            terminal.show_prefill(2000, 2000)
            yield "a"

        terminal.answer(pieces())
        assert drawn(screen.getvalue()) == "Assistant: a\n"

    def test_a_short_prompt_shows_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal, screen = at_a_terminal(monkeypatch)

        def pieces() -> Iterator[str]:
            terminal.show_prefill(0, 100)
            yield "a"

        terminal.answer(pieces())
        assert screen.getvalue() == "Assistant: a\n"

    def test_it_never_wraps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal, screen = at_a_terminal(monkeypatch, columns=12)

        def pieces() -> Iterator[str]:
            terminal.show_prefill(0, 2000)
            assert drawn(screen.getvalue()) == "reading the"
            yield "a"

        terminal.answer(pieces())

    def test_elsewhere_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm")
        terminal, stdout, stderr = make()
        terminal.show_prefill(0, 2000)
        terminal.collect(iter("ab"), "x")
        assert stdout.getvalue() == stderr.getvalue() == ""

    def test_no_escape_sequences_for_a_terminal_that_knows_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        terminal, screen = at_a_terminal(monkeypatch)
        monkeypatch.setenv("TERM", "dumb")
        terminal.collect(iter("ab"), "x")
        terminal.status("37 tokens")
        assert screen.getvalue() == "37 tokens\n"

    def test_ctrl_c_between_two_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal, screen = at_a_terminal(monkeypatch)

        def pieces() -> Iterator[str]:
            signal.raise_signal(signal.SIGINT)
            screen.write("still here. ")
            terminal.show_prefill(512, 2000)
            raise AssertionError("went on")
            yield

        assert terminal.answer(pieces()) == ""
        assert "still here" in screen.getvalue()
        terminal.show_prefill(512, 2000)  # it applies to that answer only


def test_what_a_model_says_does_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, screen = at_a_terminal(monkeypatch)
    said = "\x1b]0;title\x07 a\tb\r\x9b2J\n你好"
    assert terminal.answer([said]) == said
    assert screen.getvalue() == "Assistant: \ufffd]0;title\ufffd a\tb\ufffd\ufffd2J\n你好\n"


def test_columns_hold_wide_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, screen = at_a_terminal(monkeypatch, columns=40)
    terminal.columns(("base\x1b[2J", "你好" * 20), ("tuned [1]", "[bold]a\x1b[2J[/bold] *b*"))
    rows = screen.getvalue().splitlines()
    left = "".join(row.split("│")[1].strip() for row in rows if "│" in row)
    right = "".join(row.split("│")[2].strip() for row in rows if "│" in row)
    assert left == "你好" * 20
    assert right == "[bold]a\ufffd[2J[/bold] *b*"
    assert "base\ufffd[2J" in rows[1]
    assert "tuned [1]" in rows[1]
