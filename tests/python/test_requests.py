"""Many requests at once through a session: submit, batch, threads and their ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.raising import raising_in
from helpers.tiny_chat import make_session

from ktrt.errors import AdapterError, ConfigError, EngineError, KtrtError
from ktrt.generate.scheduler import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ktrt.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


ASKED = [ask(text) for text in ("你好，请介绍一下你自己。", "hello, who are you?", "再见", "🚀?")]


@pytest.fixture
def session() -> Iterator[Session]:
    with make_session() as session:
        yield session


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """The answers of a session that gets nothing else."""
    found = []
    for messages in ASKED:
        with make_session() as session:
            found.append(session.chat(messages).text)
    return found


class TestBatch:
    def test_answers_equal_those_alone(self, session: Session, alone: list[str]) -> None:
        found = session.batch([{"messages": messages} for messages in ASKED])
        assert [each.text for each in found] == alone
        assert session.batch([]) == []
        assert session._open().runner.pool.slots_in_use == 0

    def test_each_has_its_sampling(self, session: Session) -> None:
        options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "top_p": 1.0, "top_k": 0}
        seeds = [{"messages": ASKED[0], "seed": seed, **options} for seed in (1, 2, 1)]
        one, other, same = (each.text for each in session.batch(seeds))
        assert one == same != other
        assert one == session.chat(ASKED[0], seed=1, **options).text
        short = session.batch([{"messages": ASKED[0], "max_new_tokens": n} for n in (1, 3)])
        assert [each.generated_tokens for each in short] == [1, 3]

    @pytest.mark.parametrize(
        ("wrong", "kind", "words"),
        [
            ({"messages": ASKED[0], "temprature": 1}, ConfigError, "did you mean 'temperature'"),
            ({"mesages": ASKED[0]}, ConfigError, "a mapping with messages"),
            ({"messages": []}, ConfigError, "expected"),
            ({"messages": ASKED[0], "adapter": "x"}, AdapterError, "no adapter 'x'"),
            ("hello", ConfigError, "a mapping with messages"),
        ],
    )
    def test_errors_name_the_request(
        self, session: Session, wrong: Any, kind: type[Exception], words: str
    ) -> None:
        with pytest.raises(kind, match=rf"^request 1: .*{words}"):
            session.batch([{"messages": ASKED[0]}, wrong])
        assert session._open().runner.pool.slots_in_use == 0

    def test_a_failure_ends_all(
        self, session: Session, alone: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            error = raising_in("ktrt.layers.linear", ValueError("x: expected 3"))
            patch.setattr(session.model, "forward", error)
            with pytest.raises(EngineError, match="expected 3"):
                session.batch([{"messages": messages} for messages in ASKED])
        assert session._open().runner.pool.slots_in_use == 0
        assert session.chat(ASKED[0]).text == alone[0]

    def test_streams_under_way_wait(self, session: Session, alone: list[str]) -> None:
        pieces = session.stream(ASKED[0])
        text = next(pieces)
        found = session.batch([{"messages": messages} for messages in ASKED[1:]])
        assert [each.text for each in found] == alone[1:]
        assert text + "".join(pieces) == alone[0]

    def test_next_to_another_threads_answer(self, session: Session, alone: list[str]) -> None:
        """Needs the thread that steps for all."""
        found: list[str] = []
        threads: list[threading.Thread] = []

        def batch() -> None:
            found.extend(each.text for each in session.batch([{"messages": ASKED[1]}]))

        def on_prefill(done: int, total: int) -> None:
            if not threads:
                threads.append(threading.Thread(target=batch))
                threads[0].start()
                threads[0].join(0.1)

        assert session.chat(ASKED[0], on_prefill=on_prefill).text == alone[0]
        threads[0].join(60)
        assert found == [alone[1]]


class TestSubmit:
    def test_many_at_once(self, session: Session, alone: list[str]) -> None:
        handles = [session.submit(messages, client=n) for n, messages in enumerate(ASKED)]
        assert [handle.result(60).text for handle in handles] == alone
        assert ["".join(each.text for each in handle) for handle in handles] == alone

    def test_from_many_threads(self, session: Session, alone: list[str]) -> None:
        """Streams of threads meanwhile, too, whose callbacks run in their threads."""
        session.submit(ASKED[0]).cancel()
        found: dict[int, str] = {}
        callers: dict[int, set[int]] = {n: set() for n in range(4)}

        def run(number: int) -> None:
            def on_prefill(done: int, total: int) -> None:
                callers[number].add(threading.get_ident())

            found[number] = session.chat(ASKED[number], on_prefill=on_prefill).text
            callers[number].discard(threading.get_ident())

        threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [found[n] for n in range(4)] == alone
        assert not any(callers.values())
        assert [each.text for each in session.batch([{"messages": m} for m in ASKED])] == alone

    def test_cancel(self, session: Session, alone: list[str]) -> None:
        handle = session.submit(ASKED[0], max_new_tokens=2000)
        next(handle)
        handle.cancel()
        with pytest.raises(KtrtError, match="was cancelled"):
            handle.result(60)
        assert handle.state is State.CANCELLED
        assert session.submit(ASKED[1]).result(60).text == alone[1]
        assert session._open().runner.pool.slots_in_use == 0

    def test_a_stream_that_was_begun_goes_on(self, session: Session, alone: list[str]) -> None:
        pieces = session.stream(ASKED[0])
        text = next(pieces)
        other = session.submit(ASKED[1])
        assert text + "".join(pieces) == alone[0]
        assert other.result(60).text == alone[1]

    def test_an_error_of_a_callback_ends_its_answer(
        self, session: Session, alone: list[str]
    ) -> None:
        session.submit(ASKED[1]).result(60)

        def on_prefill(done: int, total: int) -> None:
            raise ValueError("the caller's")

        with pytest.raises(ValueError, match="the caller's"):
            session.chat(ASKED[0], on_prefill=on_prefill)
        assert session.chat(ASKED[0]).text == alone[0]

    def test_an_error_fails_its_requests_and_the_thread_lives(
        self, session: Session, alone: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session.submit(ASKED[1]).result(60)
        with monkeypatch.context() as patch:
            error = raising_in("ktrt.layers.linear", RuntimeError("broken"))
            patch.setattr(session.model, "forward", error)
            handle = session.submit(ASKED[0])
            with pytest.raises(EngineError, match="broken"):
                handle.result(60)
            assert handle.state is State.FAILED
        assert session.submit(ASKED[0]).result(60).text == alone[0]

    def test_errors_come_at_once(self, session: Session) -> None:
        before = set(threading.enumerate())
        with pytest.raises(ConfigError, match="expected"):
            session.submit([])
        with pytest.raises(AdapterError, match="no adapter 'x'"):
            session.submit(ASKED[0], adapter="x")
        new = set(threading.enumerate()) - before
        assert "ktrt-scheduler" not in {thread.name for thread in new}

    def test_the_threads_settings_are_the_callers(self, session: Session) -> None:
        before = torch.get_num_threads()
        seen = []
        try:
            torch.set_num_threads(2)
            with make_session() as other:
                torch.set_num_threads(1)
                other.submit(ASKED[0]).result(60)
                seen.append(other._steps.between(torch.get_num_threads))
        finally:
            torch.set_num_threads(before)
        assert seen == [2]

    def test_changes_run_between_steps_in_the_owners_thread(self, session: Session) -> None:
        handle = session.submit(ASKED[0], max_new_tokens=2000)
        next(handle)
        owner = session._steps.between(threading.current_thread)
        assert owner.name == "ktrt-scheduler"
        session.adapters.refresh()
        with pytest.raises(KtrtError, match="changed during the answer"):
            handle.result(60)
        with pytest.raises(ZeroDivisionError):
            session._steps.between(lambda: 1 / 0)
        session.warm_up()


class TestFromOnPrefill:
    """The thread that reads an answer has the model while its callback runs, and the worker that
    the callback starts waits for it."""

    @staticmethod
    def chat(session: Session, call: Callable[[], object]) -> str | BaseException:
        """Returns the answer's text after ``call`` in its first callback, after a ``submit``."""
        calls: list[Callable[[], object]] = [call]
        found: list[str | BaseException] = [TimeoutError()]

        def on_prefill(done: int, total: int) -> None:
            if calls:
                session.submit(ASKED[1])
                calls.pop()()

        def run() -> None:
            try:
                found[0] = session.chat(ASKED[0], on_prefill=on_prefill).text
            except BaseException as error:  # noqa: BLE001 - for the assertion
                found[0] = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(20)
        return found[0]

    def test_other_answers(self, session: Session, alone: list[str]) -> None:
        found: list[str] = []

        def ask_more() -> None:
            found.append(session.chat(ASKED[2]).text)
            found.extend(each.text for each in session.batch([{"messages": ASKED[3]}]))

        assert self.chat(session, ask_more) == alone[0]
        assert found == alone[2:]
        assert session.submit(ASKED[1]).result(60).text == alone[1]

    def test_adapters(self, session: Session, alone: list[str]) -> None:
        assert self.chat(session, lambda: session.adapters.activate({})) == alone[0]

    def test_close(self) -> None:
        session = make_session()
        found = self.chat(session, session.close)
        assert isinstance(found, KtrtError)
        assert "closed" in str(found)


class TestClose:
    def test_ends_requests_and_the_thread(self) -> None:
        before = set(threading.enumerate())
        closed: list[set[threading.Thread]] = []
        session = make_session(close=lambda: closed.append(set(threading.enumerate()) - before))
        handles = [session.submit(messages, max_new_tokens=2000) for messages in ASKED]
        next(handles[0])
        session.close()
        assert closed == [set()]
        for handle in handles:
            with pytest.raises(KtrtError, match="this session is closed"):
                handle.result(60)
        with pytest.raises(KtrtError, match="closed"):
            session.submit(ASKED[0])

    def test_without_a_thread(self) -> None:
        session = make_session()
        pieces = session.stream(ASKED[0])
        next(pieces)
        session.close()
        with pytest.raises(KtrtError, match="closed"):
            next(pieces)
        with pytest.raises(KtrtError, match="closed"):
            session.batch([{"messages": ASKED[0]}])


def test_the_interpreter_ends_during_an_answer() -> None:
    """Without ``close``."""
    script = (
        "from helpers.tiny_chat import make_session\n"
        "session = make_session()\n"
        "handle = session.submit([{'role': 'user', 'content': 'hello'}], max_new_tokens=1900)\n"
        "print(bool(next(handle).text))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr


def test_a_dropped_stream_frees_its_slot(session: Session) -> None:
    pool = session._open().runner.pool
    for _ in range(3):
        pieces = session.stream(ASKED[0])
        next(pieces)
        assert pool.slots_in_use == 1
        del pieces
        assert pool.slots_in_use == 0


def test_more_streams_than_slots(session: Session) -> None:
    """They hold their slots while they wait: the next one is told so."""
    pool = session._open().runner.pool
    streams = []
    for _ in range(pool.most_slots):
        streams.append(session.stream(ASKED[0]))
        next(streams[-1])
    with pytest.raises(KtrtError, match=f"no slot for another answer: {pool.most_slots} are"):
        session.chat(ASKED[1])
    del streams
    assert session.chat(ASKED[1]).text
