"""Tests of ktrt.generate.loop: the loop against transformers' generate, text, the KV cache."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.fake_streams import dense_graphs
from helpers.tiny_chat import make_model, make_tokenizer
from transformers import PreTrainedTokenizerFast

from ktrt.config import SamplingArgs
from ktrt.errors import ConfigError
from ktrt.generate import graphs, runner
from ktrt.generate.loop import stream_generate
from ktrt.generate.prompts import check_prompt
from ktrt.generate.response import TokenResponse
from ktrt.generate.runner import KvCache
from ktrt.kv import positions, static

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingArgs(do_sample=False)
PROMPT = [5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return make_model(tokenizer)


def reference(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    """The ids that transformers' own generate adds."""
    options = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0} | options
    inputs = torch.tensor([prompt])
    ids = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    return list(ids[0, len(prompt) :].tolist())


def run(
    tokenizer: Any,
    cache: KvCache,
    prompt: list[int],
    args: SamplingArgs = GREEDY,
    count: int = 25,
    stop_ids: frozenset[int] = frozenset(),
) -> list[TokenResponse]:
    return list(
        stream_generate(tokenizer, cache, prompt, args, stop_ids=stop_ids, max_tokens=count)
    )


def tokens(responses: list[TokenResponse]) -> list[int]:
    return [response.token for response in responses]


def test_greedy_equals_transformers(model: Any, tokenizer: Any) -> None:
    ours = tokens(run(tokenizer, KvCache(model), PROMPT, count=250))
    assert ours == reference(model, PROMPT, 250)
    assert len(set(ours)) > 5, "a degenerate model would prove nothing"


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_sampling_equals_transformers(model: Any, tokenizer: Any, penalty: float) -> None:
    args = SamplingArgs(temperature=0.8, top_p=0.9, top_k=30, repetition_penalty=penalty, seed=3)
    torch.manual_seed(3)
    expected = reference(
        model, PROMPT, 25,
        do_sample=True, temperature=0.8, top_p=0.9, top_k=30, repetition_penalty=penalty,
    )  # fmt: skip
    assert tokens(run(tokenizer, KvCache(model), PROMPT, args)) == expected


@pytest.mark.parametrize("chunk", [1, 5, 11, 12, 100])
def test_any_prefill_chunk_gives_the_same(
    model: Any, tokenizer: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PREFILL_CHUNK", chunk)
    assert tokens(run(tokenizer, KvCache(model), PROMPT)) == reference(model, PROMPT, 25)


def test_forwards_are_chunked_and_ask_for_one_row_of_logits(tokenizer: Any) -> None:
    model = make_model(tokenizer)
    seen = []

    def spy(_: Any, __: Any, options: dict[str, Any]) -> None:
        seen.append((options["input_ids"].shape[1], options["logits_to_keep"]))

    model.register_forward_pre_hook(spy, with_kwargs=True)
    run(tokenizer, KvCache(model), [5] * 1100, count=3)
    assert seen == [(512, 1), (512, 1), (76, 1), (1, 1), (1, 1)]


def test_bfloat16_model(tokenizer: Any) -> None:
    model = make_model(tokenizer).to(torch.bfloat16)
    assert tokens(run(tokenizer, KvCache(model), PROMPT)) == reference(model, PROMPT, 25)


def test_stop_id_ends_the_answer_without_its_text(model: Any, tokenizer: Any) -> None:
    free = run(tokenizer, KvCache(model), PROMPT)
    stop = free[9].token
    first = tokens(free).index(stop)
    stopped = run(tokenizer, KvCache(model), PROMPT, stop_ids=frozenset([stop]))
    assert tokens(stopped) == tokens(free)[: first + 1]
    assert stopped[-1].finish_reason == "stop"
    assert stopped[-1].text == ""
    assert all(response.finish_reason is None for response in stopped[:-1])


def test_length_ends_the_answer(model: Any, tokenizer: Any) -> None:
    responses = run(tokenizer, KvCache(model), PROMPT, count=4)
    assert [response.finish_reason for response in responses] == [None, None, None, "length"]
    assert [response.generated_tokens for response in responses] == [1, 2, 3, 4]
    last = responses[-1]
    assert (last.prompt_tokens, last.reused_tokens) == (len(PROMPT), 0)
    assert last.prefill_seconds > 0
    assert last.decode_seconds > 0
    assert "4 tokens" in last.summary()
    assert "length" in last.summary()
    assert "interrupted" in responses[0].summary()


MakeCache = Callable[[Any], KvCache]


@pytest.fixture(params=["dynamic", "graphs"])
def make_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeCache:
    """Both kinds of cache; the one for graphs crosses windows and growths within 100 tokens."""
    if request.param == "dynamic":
        return KvCache
    monkeypatch.setattr(static, "MIN_CAPACITY", 16)
    monkeypatch.setattr(graphs, "MIN_WINDOW", 8)
    return lambda model: KvCache(model, dense_graphs(model))


class TestKvCache:
    def test_a_continued_conversation_computes_only_new_tokens(
        self, model: Any, tokenizer: Any, make_cache: MakeCache
    ) -> None:
        cache = make_cache(model)
        answer = tokens(run(tokenizer, cache, PROMPT))
        longer = [*PROMPT, *answer, 50, 51, 52]
        continued = run(tokenizer, cache, longer)
        # The last token of an answer was never fed back.
        assert continued[-1].reused_tokens == len(PROMPT) + len(answer) - 1
        assert tokens(continued) == reference(model, longer, 25)

    @pytest.mark.parametrize("shared", [0, 1, 5, 11, 12])
    def test_a_changed_conversation_is_cropped(
        self, model: Any, tokenizer: Any, make_cache: MakeCache, shared: int
    ) -> None:
        cache = make_cache(model)
        run(tokenizer, cache, PROMPT)
        changed = [*PROMPT[:shared], 60, 61, 62]
        responses = run(tokenizer, cache, changed)
        assert responses[-1].reused_tokens == shared
        assert tokens(responses) == reference(model, changed, 25)

    def test_the_same_prompt_again(self, model: Any, tokenizer: Any, make_cache: MakeCache) -> None:
        cache = make_cache(model)
        first = tokens(run(tokenizer, cache, PROMPT))
        again = run(tokenizer, cache, PROMPT)
        assert again[-1].reused_tokens == len(PROMPT) - 1
        assert tokens(again) == first

    def test_an_abandoned_answer_leaves_it_usable(
        self, model: Any, tokenizer: Any, make_cache: MakeCache
    ) -> None:
        cache = make_cache(model)
        answer = stream_generate(tokenizer, cache, PROMPT, GREEDY, stop_ids=(), max_tokens=25)
        for _ in range(3):
            next(answer)
        assert isinstance(answer, Iterator)
        del answer
        assert tokens(run(tokenizer, cache, PROMPT)) == reference(model, PROMPT, 25)

    def test_an_interrupted_forward_costs_only_itself(
        self, tokenizer: Any, make_cache: MakeCache
    ) -> None:
        model = make_model(tokenizer)
        cache = make_cache(model)
        answer = tokens(run(tokenizer, cache, PROMPT, count=2))

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        # Layer 0 has stored the new token by now, layer 1 has not.
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tokenizer, cache, [*PROMPT, answer[0], 3, 4])
        hook.remove()
        longer = [*PROMPT, answer[0], 5]
        responses = run(tokenizer, cache, longer)
        assert responses[-1].reused_tokens == len(PROMPT) + 1
        assert tokens(responses) == reference(model, longer, 25)

    def test_a_sliding_window_goes_on_but_not_back(
        self, tokenizer: Any, make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import MistralConfig, MistralForCausalLM

        monkeypatch.setattr(runner, "PREFILL_CHUNK", 5)
        monkeypatch.setattr(positions, "SLACK", 0)
        monkeypatch.setattr(positions, "_BLOCK", 1)
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=8, initializer_range=0.4,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        model = MistralForCausalLM(config).eval()
        cache = make_cache(model)
        assert cache.plain
        answer = tokens(run(tokenizer, cache, PROMPT))
        # On: everything but the last token, which was never fed back, is there.
        longer = [*PROMPT, *answer, 50, 51]
        responses = run(tokenizer, cache, longer)
        assert responses[-1].reused_tokens == len(longer) - 3
        assert tokens(responses) == reference(model, longer, 25)
        # Back to where that turn's new tokens began, and no further.
        changed = [*longer[:-2], 60, 61, 62]
        responses = run(tokenizer, cache, changed)
        assert responses[-1].reused_tokens == len(longer) - 3
        assert tokens(responses) == reference(model, changed, 25)
        changed = [*PROMPT[:-1], 60, 61, 62]
        responses = run(tokenizer, cache, changed)
        assert responses[-1].reused_tokens == 10, "where the last chunk began"
        assert tokens(responses) == reference(model, changed, 25)
        assert run(tokenizer, cache, [3, 4, *PROMPT])[-1].reused_tokens == 0


class TestCheckPrompt:
    def test_room_left(self, model: Any) -> None:
        assert check_prompt(model, PROMPT, 2048) == 2048 - len(PROMPT)

    def test_too_long(self, model: Any) -> None:
        assert check_prompt(model, [1] * 2047, 2048) == 1
        with pytest.raises(ConfigError, match=r"has 2048 tokens.*holds 2048"):
            check_prompt(model, [1] * 2048, 2048)

    def test_foreign_tokenizer(self, model: Any) -> None:
        with pytest.raises(ConfigError, match="does not belong"):
            check_prompt(model, [3, 10**6], 2048)
