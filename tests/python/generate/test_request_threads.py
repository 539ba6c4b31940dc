"""Many threads ask one session at once, cancel, and load and unload adapters; and what callers do
wrong meanwhile."""

from __future__ import annotations

import faulthandler
import random
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.many_adapters import ask, forget, load, make_folder
from safetensors.torch import load_file, save_file

from ktrt.errors import AdapterError, ConfigError, KtrtError
from ktrt.generate.scheduler import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ktrt.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ("hello", "hello, who are you?", "你好，请介绍一下你自己。")
SECONDS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("threads"))


@pytest.fixture
def session(folder: Path) -> Iterator[Session]:
    faulthandler.dump_traceback_later(SECONDS + 60, exit=True)
    with load(folder, ("a", "b", "router")) as session:
        yield session
    faulthandler.cancel_dump_traceback_later()


def together(*calls: Callable[[], None]) -> None:
    """Runs the calls in threads; raises the first error of any, or if they do not end."""
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    end = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    assert not errors, errors[0]
    assert not any(thread.is_alive() for thread in threads)


def nothing_is_held(session: Session) -> bool:
    users: int = session.adapters._users.total()
    forget(session)
    pool = session._open().runner.pool
    return not users and not pool.slots_in_use and not pool.committed_bytes


CHOICES: tuple[Any, ...] = (None, "a", "b", "router", {"a": 0.5})


@dataclass(frozen=True)
class Wanted:
    """A request, and what it says alone. No two texts are equal: where a prompt is held but for its
    last token, that one is computed as a decode step, whose sums have another order."""

    text: str
    choice: int
    alone: tuple[int, ...]


def wanted(session: Session, seed: int) -> list[Wanted]:
    chance = random.Random(seed)
    found = []
    for number in range(5):
        text, choice = f"{chance.choice(TEXTS)} {seed} {number}", chance.randrange(len(CHOICES))
        forget(session)
        answer = session.chat(ask(text), adapter=CHOICES[choice])
        found.append(Wanted(text, choice, answer.token_ids))
    return found


def call(session: Session, seed: int, requests: list[Wanted]) -> None:
    """Reads, waits for or cancels answers; each is what the request says alone."""
    chance = random.Random(seed)
    for each in requests:
        handle = session.submit(ask(each.text), adapter=CHOICES[each.choice], client=seed % 3)
        if chance.random() < 0.3:
            found = tuple(next(handle).token for _ in range(2))
            handle.pause()
            handle.cancel()
            assert found == each.alone[:2]
        elif chance.random() < 0.5:
            assert tuple(token.token for token in handle) == each.alone
        else:
            assert handle.result(timeout=SECONDS).token_ids == each.alone


def load_and_unload(session: Session, folder: Path) -> None:
    for turn in range(6):
        session.adapters.load("more", folder / "bc"[turn % 2])
        handle = session.submit(ask(TEXTS[turn % 3]), adapter="more")
        if turn % 2:
            handle.cancel()
        else:
            handle.result(timeout=SECONDS)
        while "more" in session.adapters.names:
            try:
                session.adapters.unload("more")
            except AdapterError:  # not cancelled yet
                time.sleep(0.01)


def test_many_threads(session: Session, folder: Path) -> None:
    requests = [wanted(session, seed) for seed in range(8)]
    forget(session)
    session._steps.start()

    def switch() -> None:
        for turn in range(10):
            session.adapters.activate("ab"[turn % 2])
            session.adapters.off()

    def count() -> None:
        for turn in range(20):
            assert session.count_tokens(ask(TEXTS[turn % 3])) > 0

    callers = [partial(call, session, seed, requests[seed]) for seed in range(8)]
    together(*callers, partial(load_and_unload, session, folder), switch, count)
    end = time.monotonic() + 10
    while session._steps.scheduler.counts != (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    session._steps.between(lambda: None)
    assert session._steps.scheduler.counts == (0, 0)
    assert nothing_is_held(session)


def test_close_ends_what_others_wait_for(session: Session) -> None:
    handles = [session.submit(ask(text), max_new_tokens=400) for text in TEXTS * 3]
    next(handles[0])
    seen: list[str] = []

    def read(handle: Any) -> None:
        with pytest.raises(KtrtError, match="closed"):
            handle.result()
        seen.append("closed")

    together(*(partial(read, handle) for handle in handles), session.close)
    assert seen == ["closed"] * len(handles)
    with pytest.raises(KtrtError, match="closed"):
        session.submit(ask("hello"))
    with pytest.raises(KtrtError, match="closed"):
        session.batch([{"messages": ask("hello")}])
    with pytest.raises(KtrtError, match="closed"):
        session.chat(ask("hello"))
    session.close()


def test_close_during_a_stream_of_this_thread(session: Session) -> None:
    stream = session.stream(ask("hello"), max_new_tokens=100)
    next(stream)
    session.close()
    with pytest.raises(KtrtError, match="closed"):
        list(stream)


def test_more_requests_than_slots(session: Session) -> None:
    alone = {text: session.chat(ask(text)).token_ids for text in TEXTS}
    requests = [{"messages": ask(TEXTS[n % 3])} for n in range(70)]
    found = session.batch(requests)
    assert [each.token_ids for each in found] == [alone[TEXTS[n % 3]] for n in range(70)]
    assert nothing_is_held(session)


def test_lengths_at_the_edges(session: Session) -> None:
    (one,) = session.batch([{"messages": ask("hello"), "max_new_tokens": 1}])
    assert one.generated_tokens == 1
    with pytest.raises(ConfigError, match="request 1: .*max_new_tokens"):
        session.batch([{"messages": ask("hello")}, {"messages": ask("hello"), "max_new_tokens": 0}])
    with pytest.raises(ConfigError, match="request 0: .*context holds 512"):
        session.batch([{"messages": ask("你好" * 600)}])
    malformed: tuple[Any, ...] = ([], None, "hello", [{}], [{"role": "user"}])
    for messages in malformed:
        with pytest.raises(ConfigError, match="request 0: "):
            session.batch([{"messages": messages}])
    with pytest.raises(AdapterError, match="request 0: there is no adapter 'z'"):
        session.batch([{"messages": ask("hello"), "adapter": "z"}])
    assert session.batch([]) == []
    assert nothing_is_held(session)


def test_ctrl_c_in_a_batch_leaves_the_session_usable(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = session.chat(ask("hello")).token_ids
    runner = session._open().runner
    run, steps = runner.run, []

    def interrupted(step: Any) -> Any:
        steps.append(step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return run(step)

    monkeypatch.setattr(runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.batch([{"messages": ask(text)} for text in TEXTS])
    assert session.chat(ask("hello")).token_ids == expected
    assert nothing_is_held(session)


def test_an_adapter_that_overflows_fails_its_rows_alone(
    session: Session, folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((folder / "a/adapter_config.json").read_bytes())
    tensors = load_file(folder / "a/adapter_model.safetensors")
    damaged = next(name for name in tensors if "o_proj.lora_B" in name)
    # Finite, but not what it is multiplied with.
    tensors[damaged] = torch.full_like(tensors[damaged], 3e38)
    save_file(tensors, broken / "adapter_model.safetensors")
    session.adapters.load("broken", broken)
    expected = [session.chat(ask("hello"), adapter=each).token_ids for each in (None, "a")]
    handles = [session.submit(ask("hello"), adapter=each) for each in (None, "broken", "a")]
    with pytest.raises(KtrtError, match="NaN"):
        handles[1].result(timeout=SECONDS)
    assert handles[1].state is State.FAILED
    found = [handles[index].result(timeout=SECONDS).token_ids for index in (0, 2)]
    assert found == expected


def test_two_sessions_at_once(session: Session, folder: Path) -> None:
    with load(folder, ("b",)) as other:
        expected = [each.chat(ask("hello"), adapter="b").token_ids for each in (session, other)]
        assert expected[0] == expected[1]
        handles = [each.submit(ask("hello"), adapter="b") for each in (session, other) * 3]
        found = [each.result(timeout=SECONDS).token_ids for each in handles]
    assert found == expected * 3
