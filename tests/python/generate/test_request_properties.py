"""Any order of requests, cancellations, pauses and adapters on a tiny model in the real engine:
each request gets the tokens that it gets alone in a fresh cache."""

from __future__ import annotations

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
    rule,
    run_state_machine_as_test,
)

from ktrt.errors import AdapterError
from ktrt.generate.scheduler import State

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ktrt.generate.scheduler import Handle, Scheduler
    from ktrt.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

# The longest has a chunk's border in it.
TEXTS = ("hello", "hello, who are you?", "你好，请介绍一下你自己。", "专家混合 " * 30)
# Adapters that are always resident; "named" comes and goes, with the contents of another.
ADAPTERS: tuple[Any, ...] = (
    None, "a", "b", "router", "dora", {"a": 0.5}, {"a": 1.0, "b": 0.25}, ...,
)  # fmt: skip
SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"do_sample": True, "temperature": 1.5, "top_k": 20, "seed": 3},
    {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0, "seed": 4},
)


@dataclass(eq=False)
class Asked:
    """A request, and what it would say alone."""

    handle: Handle
    alone: list[int]


class Oracle:
    """Answers one request at a time, in a cache without anything."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, text: str, adapter: Any, sampling: dict[str, Any]) -> list[int]:
        forget(self._session)
        found = self._session.stream_responses(ask(text), adapter=adapter, **sampling)
        return [each.token for each in found]


class Callers(RuleBasedStateMachine):
    session: Session
    folder: Path
    oracle: Oracle

    asked = Bundle("asked")

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Asked] = []
        self.named: str | None = None
        self.active: Any = None
        self.session.adapters.off()
        if "named" in self.session.adapters.names:
            self.session.adapters.unload("named")

    @property
    def scheduler(self) -> Scheduler:
        return self.session._steps.scheduler

    @rule(
        target=asked,
        text=st.sampled_from(TEXTS),
        adapter=st.sampled_from((*ADAPTERS, "named")),
        sampling=st.sampled_from(SAMPLING),
        tokens=st.integers(1, 6),
        client=st.sampled_from("ab"),
    )
    def submit(
        self, text: str, adapter: Any, sampling: dict[str, Any], tokens: int, client: str
    ) -> Asked:
        # Two tokens at least are left of a prompt whose beginning is held: one alone is computed as
        # a decode step, whose sums have another order.
        text = f"{text} {len(self.all)}"
        if adapter == "named" and self.named is None:
            adapter = None
        contents = self.active if adapter is ... else adapter
        if contents == "named":
            contents = self.named
        begin = self.session._prepare(ask(text), adapter, {**sampling, "max_new_tokens": tokens})
        handle = self.scheduler.submit(begin(client=client))
        self.all.append(
            Asked(handle, self.oracle(text, contents, {**sampling, "max_new_tokens": tokens}))
        )
        return self.all[-1]

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.scheduler.step()

    @rule(one=consumes(asked))
    def cancel(self, one: Asked) -> None:
        pool = self.session._open().runner.pool
        used = pool.slots_in_use
        had_slot = one.handle.state in (State.PREFILL, State.DECODE)
        one.handle.cancel()
        self.scheduler.tidy()
        assert one.handle.state.ended
        assert pool.slots_in_use == used - had_slot

    @rule(one=asked, paused=st.booleans())
    def pause(self, one: Asked, paused: bool) -> None:
        if paused:
            one.handle.pause()
        else:
            one.handle.resume()

    @rule(contents=st.sampled_from(("b", "c", "dora")))
    def load(self, contents: str) -> None:
        if self.named is None:
            self.session.adapters.load("named", self.folder / contents)
            self.named = contents

    @rule()
    def unload(self) -> None:
        users = self.session.adapters._users["named"]
        if self.named is None or self.active == "named" or users:
            with pytest.raises(AdapterError):
                self.session.adapters.unload("named")
        else:
            self.session.adapters.unload("named")
            self.named = None

    @rule(adapter=st.sampled_from(("a", "dora", "named", {"b": 0.5})))
    def activate(self, adapter: Any) -> None:
        if adapter == "named" and self.named is None:
            return
        self.session.adapters.activate(adapter)
        self.active = adapter

    @rule()
    def off(self) -> None:
        self.session.adapters.off()
        self.active = None

    @invariant()
    def answers_are_those_of_requests_alone(self) -> None:
        for one in self.all:
            found = [each.token for each in one.handle._tokens]
            assert found == one.alone[: len(found)]
            assert one.handle.state is not State.FAILED
            assert one.handle.state is not State.FINISHED or found == one.alone

    def teardown(self) -> None:
        for one in self.all:
            one.handle.resume()
        while self.scheduler.step():
            pass
        self.scheduler.rest()
        for one in self.all:
            assert one.handle.state in (State.FINISHED, State.CANCELLED)
        self.answers_are_those_of_requests_alone()
        assert self.scheduler.counts == (0, 0)
        assert not self.session.adapters._users.total()
        pool = self.session._open().runner.pool
        assert not pool.slots_in_use
        forget(self.session)
        assert not pool.committed_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("requests"))


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def machine(request: pytest.FixtureRequest, folder: Path) -> Iterator[type[Callers]]:
    with (
        load(folder, infer_dtype=request.param) as session,
        load(folder, infer_dtype=request.param) as alone,
    ):

        class OnTheseSessions(Callers):
            pass

        OnTheseSessions.session, OnTheseSessions.folder = session, folder
        OnTheseSessions.oracle = Oracle(alone)
        yield OnTheseSessions


def run(machine: type[Callers], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_any_order(machine: type[Callers]) -> None:
    run(machine, 8, 20)


@pytest.mark.long
def test_any_order_for_long(machine: type[Callers]) -> None:
    run(machine, 200, 50)
