"""`reproducible`: whatever was asked before, is asked meanwhile or was cancelled, a request has the
text and the logits, bit for bit, that it has in an empty cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from helpers.many_adapters import ask, forget, load, make_folder
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from ktrt import api
from ktrt.config import Config, ModelArgs, SchedulerArgs
from ktrt.errors import ConfigError
from ktrt.generate import runner
from ktrt.generate.scheduler import SchedulerLimits, State
from ktrt.loading.scheduler import make_scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ktrt.generate.response import Response
    from ktrt.generate.scheduler import Begin, Handle, Scheduler
    from ktrt.generate.step import Step
    from ktrt.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

# The longest has borders of chunks in it.
TEXTS = ("hello", "你好，请介绍一下你自己。", "专家混合 " * 30)
ADAPTERS = (None, "a", {"a": 0.5})
SAMPLING: tuple[Mapping[str, Any], ...] = (
    {}, {"do_sample": True, "temperature": 1.5, "top_k": 20, "seed": 3},
)  # fmt: skip


class Logits:
    """Digests of the logits that a session's answers chose their tokens from."""

    def __init__(self, session: Session) -> None:
        self.of: dict[int, list[bytes]] = {}
        scheduler = session._steps.scheduler
        choose = scheduler._choose_tokens

        def noting(answers: Sequence[Any], logits: Sequence[Any]) -> Any:
            for answer, row in zip(answers, logits, strict=True):
                numbers = row.float().contiguous().numpy().tobytes()
                self.of.setdefault(id(answer), []).append(hashlib.sha256(numbers).digest())
            return choose(answers, logits)

        scheduler._choose_tokens = noting


@dataclass(eq=False)
class Asked:
    """A request, what it says in an empty cache, and the logits there."""

    handle: Handle
    prompt: list[int]
    options: dict[str, Any]
    logits: list[bytes]
    alone: Response
    logits_alone: list[bytes]
    # The scheduler's answer: while it is kept, no other one has its id.
    answer: object


def prepare(session: Session, prompt: list[int], options: Mapping[str, Any]) -> Begin:
    rest = dict(options)
    return session._prepare_prompt(prompt, rest.pop("adapter"), rest)


def answer_alone(session: Session, prompt: list[int], options: Mapping[str, Any]) -> Response:
    (found,) = session._steps.batch([prepare(session, prompt, options)])
    return found


class Callers(RuleBasedStateMachine):
    session: Session
    cold: Session
    logits: Logits
    logits_cold: Logits

    asked = Bundle("asked")

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Asked] = []

    @property
    def scheduler(self) -> Scheduler:
        return self.session._steps.scheduler

    def begin(self, prompt: list[int], options: dict[str, Any]) -> Asked:
        forget(self.cold)
        self.logits_cold.of.clear()
        alone = answer_alone(self.cold, prompt, options)
        (logits_alone,) = self.logits_cold.of.values()
        new = prepare(self.session, prompt, options)()
        logits = self.logits.of.setdefault(id(new.answer), [])
        handle = self.scheduler.submit(new)
        self.all.append(Asked(handle, prompt, options, logits, alone, logits_alone, new.answer))
        return self.all[-1]

    @rule(
        target=asked,
        text=st.sampled_from(TEXTS),
        adapter=st.sampled_from(ADAPTERS),
        sampling=st.sampled_from(SAMPLING),
        tokens=st.integers(1, 9),
    )
    def submit(self, text: str, adapter: Any, sampling: Mapping[str, Any], tokens: int) -> Asked:
        options = {**sampling, "adapter": adapter, "max_new_tokens": tokens}
        return self.begin(self.session.render(ask(text)), options)

    @rule(target=asked, one=asked)
    def again(self, one: Asked) -> Asked:
        return self.begin(one.prompt, one.options)

    @rule(target=asked, one=asked, text=st.sampled_from(("?", "谢谢", "专家混合 " * 30)))
    def go_on(self, one: Asked, text: str) -> Any:
        """The next turn, after the answer as far as it came."""
        if len(one.prompt) > 350:
            return multiple()
        said = [each.token for each in one.handle._tokens]
        return self.begin([*one.prompt, *said, *self.session.render(ask(text))], one.options)

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.scheduler.step()

    @rule(one=consumes(asked))
    def cancel(self, one: Asked) -> None:
        one.handle.cancel()

    @rule(one=asked, paused=st.booleans())
    def pause(self, one: Asked, paused: bool) -> None:
        if paused:
            one.handle.pause()
        else:
            one.handle.resume()

    @invariant()
    def everything_is_as_in_an_empty_cache(self) -> None:
        for one in self.all:
            found = tuple(each.token for each in one.handle._tokens)
            assert found == one.alone.token_ids[: len(found)]
            assert one.logits == one.logits_alone[: len(one.logits)]
            assert one.handle.state is not State.FAILED
            if one.handle.state is State.FINISHED:
                assert one.handle.result().text == one.alone.text
                assert one.logits == one.logits_alone

    def teardown(self) -> None:
        for one in self.all:
            one.handle.resume()
        while self.scheduler.step():
            pass
        self.scheduler.rest()
        self.everything_is_as_in_an_empty_cache()
        self.logits.of.clear()
        forget(self.session)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("reproducible"))


def machine_of(session: Session, cold: Session) -> type[Callers]:
    class OnTheseSessions(Callers):
        pass

    OnTheseSessions.session, OnTheseSessions.cold = session, cold
    OnTheseSessions.logits, OnTheseSessions.logits_cold = Logits(session), Logits(cold)
    return OnTheseSessions


def run(machine: type[Callers], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def sessions(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Session, Session]]:
    options = {"infer_dtype": request.param, "reproducible": True}
    with load(folder, ("a",), **options) as session, load(folder, ("a",), **options) as cold:
        yield session, cold


def test_any_order(sessions: tuple[Session, Session]) -> None:
    run(machine_of(*sessions), 5, 15)


@pytest.mark.long
def test_any_order_for_long(sessions: tuple[Session, Session]) -> None:
    run(machine_of(*sessions), 300, 50)


OPTIONS: Mapping[str, Any] = {"adapter": "a", "logprobs": True, "top_logprobs": 20}


def dialogue(session: Session) -> tuple[list[int], Response]:
    """Asks; returns the next prompt and the first answer."""
    forget(session)
    prompt = session.render(ask("hello, who are you?"))
    first = answer_alone(session, prompt, OPTIONS)
    return [*prompt, *first.token_ids, *session.render(ask("谢谢"))], first


def test_a_turn_computes_the_answer_before_it_again(sessions: tuple[Session, Session]) -> None:
    session, cold = sessions
    prompt, first = dialogue(session)
    # The memory of the answer's keys and values is free, its prompt's is not.
    assert [each.length for each in session._open().runner.pool.slots if each.length] == [
        first.prompt_tokens
    ]
    again = answer_alone(session, prompt, OPTIONS)
    assert again.reused_tokens == first.prompt_tokens
    forget(cold)
    alone = answer_alone(cold, prompt, OPTIONS)
    assert alone.reused_tokens == 0
    assert (again.text, again.top_logprobs) == (alone.text, alone.top_logprobs)


def test_without_it_the_answer_is_reused(folder: Path) -> None:
    with load(folder, ("a",)) as session:
        prompt, first = dialogue(session)
        again = answer_alone(session, prompt, OPTIONS)
        # The last token was chosen, not computed.
        assert again.reused_tokens == first.prompt_tokens + first.generated_tokens - 1


def test_where_sequences_run_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Nothing is reused, and prompts are divided alike: bits depend on a chunk's borders there."""
    monkeypatch.setattr(runner, "PREFILL_CHUNK", 192)
    with load(folder, ("a",)) as session:
        loaded = session._open()
        loaded.runner._mixed = None
        scheduler = make_scheduler(loaded, SchedulerLimits(reproducible=True))
        session._steps.__dict__["scheduler"] = scheduler
        scheduler.on_wait(session._steps._drive)
        chunks: list[int] = []
        run = loaded.runner.run

        def noting(step: Step) -> Any:
            chunks.extend(len(each.ids) for each in step.spans if len(each.ids) > 1)
            return run(step)

        monkeypatch.setattr(loaded.runner, "run", noting)
        prompt = session.render(ask("专家混合 " * 200))
        found = [answer_alone(session, prompt, OPTIONS) for _ in "ab"]
        assert chunks == [192, 192, len(prompt) - 384] * 2
        assert found[1].reused_tokens == 0
        assert found[0].top_logprobs == found[1].top_logprobs
        assert not any(each.length for each in loaded.runner.pool.slots)


def test_a_gpu_cannot_promise_it(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    config = Config(ModelArgs(folder / "model"), scheduler=SchedulerArgs(reproducible=True))
    assert api._experts(config).kt_fixed_kernels
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ConfigError, match="reproducible: expected false with a GPU"):
        api._experts(config)
