"""Conversations end to end, the demo model in the engine: the answers of transformers' generate
over the same model, with and without reuse, for any chunk; and what a turn computes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_chat import make_session

import ktrt
from ktrt.config import SamplingArgs
from ktrt.generate import runner
from ktrt.generate.loop import stream_generate
from ktrt.generate.response import TokenResponse
from ktrt.generate.runner import KvCache
from ktrt.generate.step import Step
from ktrt.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

DEMO = Path(__file__).parents[3] / "examples" / "demo" / "chat.yaml"
QUESTIONS = [
    "你好，请介绍一下你自己。", "What is MoE?", "Thank you!", "什么是 LoRA？", "Who are you?",
    "What is AMX?", "谢谢", "What is quantisation?", "你好", "Bye!",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> Iterator[Session]:
    with ktrt.load(DEMO, infer_dtype="float32", kt_num_threads=2, kt_fixed_kernels=True) as session:
        yield session


def generate(model: Any, prompt: Sequence[int], count: int, eos: int | None = None) -> list[int]:
    """The answer of transformers' generate."""
    inputs = torch.tensor([list(prompt)])
    ids = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=count,
        eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip
    answer: list[int] = ids[0, len(prompt) :].tolist()
    return answer


class Chunks:
    """One conversation of token ids on a cache for each size of the prompt's chunks, and on new
    caches."""

    def __init__(self, session: Session, chunks: Sequence[int], stop_ids: Sequence[int]) -> None:
        self.session, self.stop_ids = session, stop_ids
        self.caches = {chunk: KvCache(session.model) for chunk in chunks}
        self.prompt: list[int] = []
        self.ties = 0

    def ask(self, question: str, count: int, patch: pytest.MonkeyPatch) -> int:
        """Compares all answers with generate's; how many tokens it has."""
        session, before = self.session, max(len(self.prompt) - 1, 0)
        turn = session.template.encode([{"role": "user", "content": question}])
        self.prompt += turn
        eos = self.stop_ids[0] if self.stop_ids else None
        expected = generate(session.model, self.prompt, count, eos)
        for chunk, kept in self.caches.items():
            patch.setattr(runner, "PREFILL_CHUNK", chunk)
            for cache, reused in ((kept, before), (KvCache(session.model), 0)):
                args = SamplingArgs(do_sample=False, logprobs=True, top_logprobs=2)
                responses = list(
                    stream_generate(
                        session.tokenizer, cache, self.prompt, args,
                        stop_ids=self.stop_ids, max_tokens=count,
                    )
                )  # fmt: skip
                self._compare(responses, expected)
                assert responses[-1].reused_tokens == reused, chunk
        self.prompt += expected
        return len(expected)

    def _compare(self, responses: list[TokenResponse], expected: list[int]) -> None:
        """The engine rounds to bfloat16 between its GEMMs, so another number of tokens in a forward
        may decide between two tokens that are as good as equal."""
        pairs = enumerate(zip(responses, expected, strict=False))
        differs = next((at for at, (each, token) in pairs if each.token != token), None)
        if differs is None:
            assert len(responses) == len(expected)
            return
        (best, first), (second, next_best) = responses[differs].top_logprobs
        assert {best, second} >= {expected[differs]}
        assert first - next_best < 0.03
        self.ties += 1


def test_long_answers_equal_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """210 tokens in each of three turns of the tiny model."""
    with make_session() as tiny:
        talk = Chunks(tiny, (1, 7, 64, 512), ())
        for question in QUESTIONS[:3]:
            assert talk.ask(question, 210, monkeypatch) == 210
    assert talk.ties == 0


def test_the_demo_in_two_turns(demo: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Chunks(demo, (7, 512), sorted(demo._stop_ids))
    assert sum(talk.ask(question, 40, monkeypatch) for question in QUESTIONS[:2]) >= 20
    assert talk.ties <= 1, "of 4 answers"


@pytest.mark.long
def test_the_demo_answers_as_generate_does(demo: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten turns on all kinds of chunks. Where the model has nothing to say, after its stop id, any
    other order of sums may decide: 210 tokens are compared for the same forwards only."""
    talk = Chunks(demo, (1, 7, 64, 512), sorted(demo._stop_ids))
    total = sum(talk.ask(question, 60, monkeypatch) for question in QUESTIONS)
    assert total >= 200
    assert talk.ties <= 2, "of 80 answers"
    cache = KvCache(demo.model)
    found = stream_generate(
        demo.tokenizer, cache, talk.prompt, SamplingArgs(do_sample=False), stop_ids=(),
        max_tokens=210,
    )  # fmt: skip
    assert [each.token for each in found] == generate(demo.model, talk.prompt, 210)


class Talk:
    """A conversation, and how many tokens were computed for it."""

    def __init__(self, session: Session, patch: pytest.MonkeyPatch) -> None:
        self.session, self.computed = session, 0
        self.messages: list[dict[str, str]] = []
        run = runner.ModelRunner.run

        def spy(model: runner.ModelRunner, step: Step) -> list[torch.Tensor]:
            self.computed += sum(len(span.ids) for span in step.spans)
            return run(model, step)

        patch.setattr(runner.ModelRunner, "run", spy)

    def answer(self) -> TokenResponse:
        """The last response to the messages so far; counts only the prompt's tokens."""
        self.computed = 0
        responses = list(self.session.stream_responses(self.messages))
        last = responses[-1]
        self.computed -= last.generated_tokens - 1
        # A prompt's last token shares a forward with the one before it.
        assert self.computed == max(2, last.prompt_tokens - last.reused_tokens)
        self.text = "".join(each.text for each in responses)
        return last

    def say(self, text: str) -> TokenResponse:
        self.messages.append({"role": "user", "content": text})
        last = self.answer()
        self.messages.append({"role": "assistant", "content": self.text})
        return last


def forget(session: Session) -> None:
    """Empties the slots of earlier answers."""
    pool = session._open().runner.pool
    for slot in pool.slots:
        pool.empty(slot)


@pytest.fixture
def talk(demo: Session, monkeypatch: pytest.MonkeyPatch) -> Talk:
    forget(demo)
    return Talk(demo, monkeypatch)


def test_a_turn_computes_its_own_tokens(talk: Talk) -> None:
    """All of ten turns: the question in the template, and the end of the answer before."""
    count = talk.session.count_tokens
    for turn, question in enumerate(QUESTIONS):
        before = count(talk.messages)
        last = talk.say(question)
        assert last.finish_reason == "stop"
        alone = count([{"role": "user", "content": question}]) - 1  # without bos
        # The stop id that ended the answer before was never fed back.
        assert talk.computed == alone + 1, turn
        assert last.prompt_tokens >= before + talk.computed - 1


def test_retry_edit_and_another_system_prompt(talk: Talk) -> None:
    for question in QUESTIONS[:4]:
        last = talk.say(question)
    whole = last.prompt_tokens
    # The same again: the last token of the prompt, whose logits are needed, and one before it.
    talk.messages.pop()
    assert talk.answer().reused_tokens == whole - 1
    assert talk.computed == 2
    # Another last question.
    talk.messages[-1] = {"role": "user", "content": QUESTIONS[5]}
    talk.answer()
    asked = talk.session.template.encode([talk.messages[-1]])
    assert talk.computed < len(asked)
    # Two turns back.
    del talk.messages[-3:]
    talk.messages.append({"role": "user", "content": QUESTIONS[6]})
    talk.answer()
    assert talk.computed < len(asked)
    # A system prompt comes first: everything after {bos} is new.
    talk.messages.insert(0, {"role": "system", "content": "Be brief."})
    last = talk.answer()
    assert last.reused_tokens <= 2
    assert last.prompt_tokens < whole


def test_ctrl_c_between_chunks_keeps_what_is_done(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PREFILL_CHUNK", 16)
    talk.messages = [{"role": "user", "content": "专家混合 " * 40}]
    expected = list(talk.session.stream_responses(talk.messages))
    forget(talk.session)
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(talk.session.stream_responses(talk.messages, on_prefill=progress))
    total = expected[-1].prompt_tokens
    assert seen == [(0, total), (16, total), (32, total), (48, total)]
    found = list(talk.session.stream_responses(talk.messages, on_prefill=lambda *_: None))
    assert found[-1].reused_tokens == 48
    assert [each.token for each in found] == [each.token for each in expected]


def test_progress_counts_new_tokens(talk: Talk) -> None:
    talk.say(QUESTIONS[0])
    talk.messages.append({"role": "user", "content": QUESTIONS[1]})
    seen: list[tuple[int, int]] = []
    responses = talk.session.stream_responses(
        talk.messages, on_prefill=lambda done, total: seen.append((done, total))
    )
    first = next(iter(responses))
    new = first.prompt_tokens - first.reused_tokens
    assert seen == [(0, new), (new, new)]
