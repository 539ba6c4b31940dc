"""Tests of ktrt.session, over a tiny dense model."""

import inspect
import threading
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any, Unpack

import pytest
import torch
from helpers.raising import raising_in
from helpers.tiny_chat import make_loaded, make_session

from ktrt.adapter.residents import Adapters
from ktrt.config import SamplingArgs, SamplingOptions, TemplateArgs
from ktrt.errors import ConfigError, EngineError, KtrtError
from ktrt.prompt.template.load import load_template
from ktrt.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

ASK = [{"role": "user", "content": "你好，请介绍一下你自己。"}]


@pytest.fixture
def session() -> Iterator[Session]:
    with make_session() as session:
        yield session


def expected_answer(session: Session, messages: list[dict[str, str]]) -> str:
    """Returns transformers' greedy answer to the same conversation."""
    prompt = load_template(TemplateArgs("default"), session.tokenizer).encode(messages)
    inputs = torch.tensor([prompt])
    ids = session.model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=40,
        eos_token_id=session.tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    answer = ids[0, len(prompt) :]
    text = str(session.tokenizer.decode(answer, skip_special_tokens=True))
    return text.removesuffix("�")


class TestStream:
    def test_greedy_equals_transformers_over_turns(self, session: Session) -> None:
        messages = [{"role": "system", "content": "Be brief."}, *ASK]
        for question in ("再见", "路由器?"):
            answer = "".join(session.stream(messages))
            assert answer == expected_answer(session, messages)
            assert answer.strip()
            messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": question},
            ]

    def test_a_continued_conversation_reuses_the_cache(self, session: Session) -> None:
        first = list(session.stream_responses(ASK))
        assert first[-1].reused_tokens == 0
        answer = {"role": "assistant", "content": "".join(each.text for each in first)}
        second = list(session.stream_responses([*ASK, answer, *ASK]))
        assert second[-1].reused_tokens >= first[-1].prompt_tokens
        assert second[-1].reused_tokens < second[-1].prompt_tokens

    def test_pieces_are_not_empty(self, session: Session) -> None:
        pieces = list(session.stream(ASK))
        assert len(pieces) > 1
        assert all(pieces)

    def test_sampling_arguments_win(self, session: Session) -> None:
        assert len(list(session.stream_responses(ASK, max_new_tokens=3))) == 3
        options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "top_p": 1.0, "top_k": 0}
        one, same, other = (
            "".join(session.stream(ASK, seed=seed, **options)) for seed in (1, 1, 2)
        )
        assert one == same
        assert one != other

    def test_template_stop_ids_end_the_answer(self, session: Session) -> None:
        free = list(session.stream_responses(ASK))
        stop = free[5].token
        session._stop_ids |= {stop}
        assert [each.token for each in session.stream_responses(ASK)][-1] == stop

    @pytest.mark.parametrize(("template", "stops"), [("auto", True), ("default", False)])
    def test_the_models_own_stop_ids_hold_for_its_own_template(
        self, template: str, stops: bool
    ) -> None:
        plain = make_session()
        tokenizer = plain.tokenizer
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        plain.model.generation_config.eos_token_id = [7, 9]
        loaded, args = make_loaded(plain.model), TemplateArgs(template)
        session = Session(loaded, tokenizer, load_template(args, tokenizer), SamplingArgs())
        assert ({7, 9} <= session._stop_ids) is stops
        assert tokenizer.eos_token_id in session._stop_ids

    def test_errors_come_before_the_first_piece(self, session: Session) -> None:
        with pytest.raises(ConfigError, match="did you mean 'temperature'"):
            session.stream(ASK, temprature=1)  # type: ignore[call-arg]
        with pytest.raises(ConfigError, match="expected"):
            session.stream([])

    def test_too_long_a_conversation(self) -> None:
        session = make_session(model_options={"max_position_embeddings": 64})
        with pytest.raises(ConfigError, match="context holds 64"):
            session.stream([{"role": "user", "content": "你好" * 100}])
        # Little room left: the answer ends there instead of failing.
        session._stop_ids = frozenset()
        question = [{"role": "user", "content": "你" * 20}]
        last = list(session.stream_responses(question))[-1]
        assert last.finish_reason == "length"
        assert last.prompt_tokens + last.generated_tokens == 64

    def test_answers_interleave(self, session: Session) -> None:
        other = [{"role": "user", "content": "hello, who are you?"}]
        alone = ["".join(session.stream(messages)) for messages in (ASK, other)]
        texts = ["", ""]
        pieces = zip_longest(session.stream(ASK), session.stream(other), fillvalue="")
        for pair in pieces:
            texts = [text + piece for text, piece in zip(texts, pair, strict=True)]
        assert texts == alone

    def test_an_abandoned_answer_does_no_harm(self, session: Session) -> None:
        expected = "".join(session.stream(ASK))
        pieces = session.stream(ASK, do_sample=True, temperature=2.0)
        next(pieces)
        del pieces
        assert "".join(session.stream(ASK)) == expected


class TestChat:
    def test_is_the_whole_answer(self, session: Session) -> None:
        steps = list(session.stream_responses(ASK))
        found = session.chat(ASK)
        assert found.text == "".join(session.stream(ASK)) == expected_answer(session, ASK)
        assert found.token_ids == tuple(each.token for each in steps)
        assert found.finish_reason == steps[-1].finish_reason
        assert found.generated_tokens == len(steps)
        assert found.prompt_tokens == session.count_tokens(ASK)
        assert found.reused_tokens == found.prompt_tokens - 1
        assert session.chat(ASK, max_new_tokens=3).finish_reason == "length"

    def test_on_prefill_and_logprobs(self, session: Session) -> None:
        seen: list[tuple[int, int]] = []
        found = session.chat(
            ASK, on_prefill=lambda *each: seen.append(each), logprobs=True, top_logprobs=2
        )
        assert seen == [(0, found.prompt_tokens), (found.prompt_tokens,) * 2]
        assert len(found.logprobs) == len(found.top_logprobs) == found.generated_tokens
        assert all(len(each) == 2 for each in found.top_logprobs)

    def test_content_parts_are_text(self, session: Session) -> None:
        parts = [{"type": "text", "text": each} for each in ("你好，", "请介绍一下你自己。")]
        messages = [{"role": "user", "content": parts}]
        assert session.chat(messages).text == session.chat(ASK).text
        assert session.count_tokens(messages) == session.count_tokens(ASK)
        assert session.fit(messages) == (ASK, 0)

    @pytest.mark.parametrize(
        "method",
        [Session.chat, Session.stream, Session.stream_responses, Session.submit, Session.fit],
    )
    def test_keywords_are_typed(self, method: Callable[..., Any]) -> None:
        sampling = inspect.signature(method).parameters["sampling"]
        assert sampling.kind is inspect.Parameter.VAR_KEYWORD
        assert sampling.annotation == Unpack[SamplingOptions]


class TestThreads:
    def test_two_at_once_are_refused(self, session: Session) -> None:
        """The second thread asks while the first one is within a forward."""
        expected = session.chat(ASK).text
        found: list[Exception] = []

        def other() -> None:
            for call in (session.warm_up, lambda: session.chat(ASK)):
                try:
                    call()
                except KtrtError as error:
                    found.append(error)

        def on_prefill(done: int, total: int) -> None:
            if done == 0:
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()

        assert session.chat(ASK, on_prefill=on_prefill).text == expected
        assert ["another thread is using this session" in str(each) for each in found] == [True] * 2
        assert session.chat(ASK).text == expected

    def test_one_after_another_may(self, session: Session) -> None:
        """A second thread may even finish an answer."""
        expected = session.chat(ASK).text
        pieces, texts = session.stream(ASK), list[str]()
        texts.append(next(pieces))
        thread = threading.Thread(target=lambda: texts.extend(pieces))
        thread.start()
        thread.join()
        assert "".join(texts) == expected

    def test_one_thread_may_ask_within_its_callback(self, session: Session) -> None:
        inner: list[str] = []
        expected = session.chat(ASK).text

        def on_prefill(done: int, total: int) -> None:
            if done == 0 and not inner:
                inner.append(session.chat(ASK).text)

        assert [session.chat(ASK, on_prefill=on_prefill).text, *inner] == [expected] * 2

    def test_close_waits_for_the_token_under_way(self) -> None:
        order: list[str] = []
        session = make_session(close=lambda: order.append("closed"))
        threads: list[threading.Thread] = []

        def on_prefill(done: int, total: int) -> None:
            if done == 0:
                threads.append(threading.Thread(target=session.close))
                threads[0].start()
                threads[0].join(0.05)
                order.append("computed")

        with pytest.raises(KtrtError, match="closed"):
            session.chat(ASK, on_prefill=on_prefill)
        threads[0].join()
        assert order == ["computed", "closed"]


def failing(error: Exception) -> Callable[..., Any]:
    return raising_in("ktrt.layers.linear", error)


class TestEngineErrors:
    @pytest.mark.parametrize("kind", [ValueError, RuntimeError, MemoryError])
    def test_an_answer(
        self, session: Session, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = session.chat(ASK).text
        pieces = session.stream(ASK)
        next(pieces)
        with monkeypatch.context() as patch:
            patch.setattr(session.model, "forward", failing(kind("x: expected 3, found 4")))
            with pytest.raises(EngineError, match="the engine failed: x: expected 3") as caught:
                list(pieces)
            with pytest.raises(EngineError):
                session.chat(ASK)
        assert type(caught.value.__cause__) is kind
        assert session.chat(ASK).text == expected

    def test_others_stay(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        def on_prefill(done: int, total: int) -> None:
            raise ValueError("the caller's")

        with pytest.raises(ValueError, match="the caller's"):
            session.chat(ASK, on_prefill=on_prefill)
        monkeypatch.setattr(session.model, "forward", lambda **_: torch.ones(2).view(3))
        with pytest.raises(RuntimeError, match="shape") as caught:
            session.chat(ASK)
        assert not isinstance(caught.value, KtrtError)

    def test_warming_up(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(session.model, "forward", failing(ValueError("bad")))
        with pytest.raises(EngineError, match="the engine failed: bad"):
            session.warm_up()


class TestClose:
    def test_once(self) -> None:
        calls = []
        session = make_session(close=lambda: calls.append(1))
        session.close()
        session.close()
        assert calls == [1]

    def test_context_manager(self) -> None:
        calls = []
        with pytest.raises(RuntimeError), make_session(close=lambda: calls.append(1)):
            raise RuntimeError
        assert calls == [1]

    def test_nothing_is_answered_afterwards(self) -> None:
        session = make_session()
        session.close()
        with pytest.raises(KtrtError, match="closed"):
            session.stream(ASK)

    def test_an_answer_under_way_ends(self) -> None:
        session = make_session()
        pieces = session.stream(ASK)
        next(pieces)
        session.close()
        with pytest.raises(KtrtError, match="closed"):
            list(pieces)


def test_two_sessions_in_one_process(session: Session) -> None:
    with make_session() as second:
        assert "".join(second.stream(ASK)) == "".join(session.stream(ASK))
    assert "".join(session.stream(ASK))


def test_the_model_works_as_a_model(session: Session) -> None:
    logits = session.model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, len(session.tokenizer))


def test_the_gpus_share_is_the_models() -> None:
    plain = make_session()
    loaded = make_loaded(plain.model)
    share: Any = object()
    loaded.gpu = share
    session = Session(loaded, plain.tokenizer, plain.template, plain.sampling)
    assert plain.gpu is None
    assert session.gpu is share


def test_no_thread_is_started(session: Session) -> None:
    before = threading.active_count()
    assert list(session.stream(ASK))
    assert threading.active_count() == before


LONG = [
    {"role": "assistant" if index % 2 else "user", "content": f"{index} " + "你好" * 20}
    for index in range(9)
]


class TestContext:
    def test_fit_drops_whole_turns(self) -> None:
        session = make_session(model_options={"max_position_embeddings": 192}, max_new_tokens=50)
        count = session.count_tokens
        assert count(LONG) > 192
        system = {"role": "system", "content": "Be brief."}
        kept, dropped = session.fit([system, *LONG])
        assert dropped > 0
        assert kept == [system, *LONG[2 * dropped :]]
        assert count(kept) <= 192 - 50
        assert session.fit(kept) == (kept, 0)
        assert session.fit([system, *LONG], max_new_tokens=120)[1] > dropped
        with pytest.raises(ConfigError, match="context holds 192"):
            session.stream(LONG)
        assert "".join(session.stream(kept))

    def test_count_is_the_prompts(self, session: Session) -> None:
        assert session.count_tokens([]) == 0
        assert session.count_tokens(ASK) == next(session.stream_responses(ASK)).prompt_tokens

    def test_an_answer_ends_with_the_context(self) -> None:
        session = make_session(model_options={"max_position_embeddings": 64}, max_new_tokens=999)
        session._stop_ids = frozenset()
        responses = list(session.stream_responses([{"role": "user", "content": "你" * 12}]))
        assert responses[-1].finish_reason == "length"
        assert responses[-1].prompt_tokens + len(responses) == 64

    def test_cutoff_len(self) -> None:
        plain = make_session()
        session = Session(
            make_loaded(plain.model), plain.tokenizer, plain.template, plain.sampling, cutoff_len=64
        )
        assert plain.context_limit == 2048
        assert session.context_limit == 64
        with pytest.raises(ConfigError, match="tokens, cutoff_len allows 64"):
            session.stream(LONG)


class TestEnds:
    def test_stop_strings_are_never_shown(self, session: Session) -> None:
        """Wherever the answer is cut: inside tokens, across their borders."""
        free = "".join(session.stream(ASK))
        tokens = len(list(session.stream_responses(ASK)))
        for start in range(len(free) - 3):
            stop = free[start : start + 3]
            first = free.index(stop)
            responses = list(session.stream_responses(ASK, stop=[stop, "never there"]))
            assert "".join(each.text for each in responses) == free[:first]
            assert responses[-1].finish_reason == "stop"
            assert len(responses) <= tokens
        assert "".join(session.stream(ASK, stop_strings="never there")) == free

    def test_stop_token_ids(self, session: Session) -> None:
        free = [each.token for each in session.stream_responses(ASK)]
        found = list(session.stream_responses(ASK, stop_token_ids=[free[4], 399]))
        assert [each.token for each in found] == free[: free.index(free[4]) + 1]
        assert found[-1].finish_reason == "stop"

    def test_held_text_comes_with_the_last_token(self, session: Session) -> None:
        free = "".join(session.stream(ASK, max_new_tokens=10))
        assert "".join(session.stream(ASK, max_new_tokens=10, stop=free[-1] + "?!")) == free


def test_logprobs(session: Session) -> None:
    prompt = session.template.encode(ASK)
    responses = list(session.stream_responses(ASK, logprobs=True, top_logprobs=3))
    ids = torch.tensor([prompt + [each.token for each in responses]])
    with torch.no_grad():
        values = session.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for row, each in zip(values, responses, strict=True):
        assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-4)
        assert [value for _, value in each.top_logprobs] == pytest.approx(
            row.topk(3).values.tolist(), abs=1e-4
        )
        assert each.top_logprobs[0][0] == each.token, "greedy"
    assert responses[0].logprob != responses[1].logprob
    plain = next(session.stream_responses(ASK))
    assert (plain.logprob, plain.top_logprobs) == (None, ())


def test_thinking(session: Session) -> None:
    assert session.template.thinking is None
    with pytest.raises(ConfigError, match="'default' cannot switch thinking"):
        session.set_thinking(True)


def test_a_prefix_of_other_adapters_is_not_reused(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(session.stream_responses(ASK))
    assert next(session.stream_responses(ASK)).reused_tokens > 0
    monkeypatch.setattr(Adapters, "prefix_key", lambda *_: "other contents")
    assert next(session.stream_responses(ASK)).reused_tokens == 0
