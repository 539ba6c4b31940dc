"""Tests of ktrt.session, over a tiny dense model."""

import threading
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import pytest
import torch
from helpers.tiny_chat import make_session

from ktrt.adapter.residents import Adapters
from ktrt.config import SamplingArgs, TemplateArgs
from ktrt.errors import ConfigError, KtrtError
from ktrt.prompt.template.load import load_template
from ktrt.session import Session, check_messages

pytestmark = pytest.mark.usefixtures("one_thread")

ASK = [{"role": "user", "content": "你好，请介绍一下你自己。"}]


@pytest.fixture
def session() -> Iterator[Session]:
    with make_session() as session:
        yield session


def expected_answer(session: Session, messages: list[dict[str, str]]) -> str:
    """transformers' own greedy answer to the same conversation."""
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
        session = Session(
            model=plain.model,
            tokenizer=tokenizer,
            template=load_template(TemplateArgs(template), tokenizer),
            sampling=SamplingArgs(),
            audit=plain.audit,
            close=lambda: None,
        )
        assert ({7, 9} <= session._stop_ids) is stops
        assert tokenizer.eos_token_id in session._stop_ids

    def test_errors_come_before_the_first_piece(self, session: Session) -> None:
        with pytest.raises(ConfigError, match="did you mean 'temperature'"):
            session.stream(ASK, temprature=1)
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


def test_no_thread_is_started(session: Session) -> None:
    before = threading.active_count()
    assert list(session.stream(ASK))
    assert threading.active_count() == before


U, A, S = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))
NOT_TEXT: Any = {"role": "user", "content": 3}
NO_ROLE: Any = {"content": "x"}


@pytest.mark.parametrize("messages", [[U], [S, U], [U, A, U], [S, U, A, U]])
def test_good_messages(messages: list[dict[str, str]]) -> None:
    check_messages(messages)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages: expected a last message of the user"),
        ([S], "messages: expected a last message of the user"),
        ([U, A], "messages: expected a last message of the user"),
        ([A], r"messages\[0\]: expected a message of the user, found one of the assistant"),
        ([U, U], r"messages\[1\]: expected a message of the assistant"),
        ([U, S], r"messages\[1\]: expected a message of the assistant, found one of the system"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\]: role: .* found 'tool'"),
        ([{"role": "user", "content": " \n"}], r"messages\[0\]: content: expected text, not empty"),
        (
            [{"role": "user", "content": "a\udc80"}],
            r"messages\[0\]: content: 'a\\udc80' holds half a character",
        ),
        ([NOT_TEXT], r"messages\[0\]: content: expected text, not empty, found 3"),
        ([NO_ROLE], r"messages\[0\]: expected a mapping of role and content"),
        (None, "messages: expected a list of messages, found None"),
        ("hello", "messages: expected a list of messages, found 'hello'"),
        (U, "messages: expected a list of messages, found {'role'"),
    ],
)
def test_bad_messages(messages: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_messages(messages)


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
            model=plain.model, tokenizer=plain.tokenizer, template=plain.template,
            sampling=plain.sampling, audit=plain.audit, close=lambda: None, cutoff_len=64,
        )  # fmt: skip
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


def test_a_cache_of_another_version_is_not_reused(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(session.stream_responses(ASK))
    assert next(session.stream_responses(ASK)).reused_tokens > 0
    monkeypatch.setattr(Adapters, "version", 7)
    assert next(session.stream_responses(ASK)).reused_tokens == 0
