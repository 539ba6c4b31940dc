"""Every kind of cache that transformers gives MoE models: conversations with reuse equal those
without, for any chunk of the prompt, against transformers' own generate.

The models are the tiny ones of the families' test; windows are 16 positions, so that conversations
of 70 tokens leave them, and the rings of 24 that hold them. Decode steps are graphs' where the
static cache has a kind for all layers.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.fake_streams import FakeGraphs, dense_graphs
from helpers.families_table import REFUSED
from helpers.family_models import FIRST_SPECIAL, Family, families, random_model
from transformers import DynamicCache, Llama4ForCausalLM, Llama4TextConfig

from ktrt.generate import graphs, loop, runner
from ktrt.generate.graphs import GraphMaker
from ktrt.generate.runner import KvCache
from ktrt.kv import positions, snapshots
from ktrt.kv.snapshots import continues
from ktrt.kv.static import cache_argument, makes_own_cache, unusual_layers

pytestmark = pytest.mark.usefixtures("one_thread", "small_rings")

FAMILIES = [family for family in families() if family.class_name not in REFUSED]
# Model types that take a prompt in one forward only.
WHOLE_PROMPTS = {"jamba", "unlimited_ocr"}
# At least one model type for every kind of cache; `make check-long` holds conversations with all.
REPRESENTATIVES = {
    "cohere2_moe", "deepseek_v2", "deepseek_v32", "deepseek_v4", "gemma4_text", "glm5_next",
    "gpt_oss", "granitemoehybrid", "inkling2_text", "inkling_text", "jamba", "kimi_linear",
    "lfm2_moe", "minimax", "mixtral", "nemotron_h", "qwen3_moe", "qwen3_next", "unlimited_ocr",
    "zaya",
}  # fmt: skip
# Its config lacks what its own generate reads.
WITHOUT_GENERATE = {"Qwen3OmniMoeThinkerForConditionalGeneration"}
ANSWER = 9


@pytest.fixture
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "SLACK", 6)
    monkeypatch.setattr(positions, "_BLOCK", 8)
    monkeypatch.setattr(graphs, "MIN_WINDOW", 8)


def new_cache(model: Any, maker: GraphMaker | None = None) -> KvCache:
    return KvCache(model, None if unusual_layers(model) else dense_graphs(model, maker))


def ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(2, FIRST_SPECIAL, (count,), generator=generator).tolist()
    return found


def reference(model: Any, prompt: Sequence[int], count: int = ANSWER) -> list[int]:
    """The answer of transformers' generate."""
    if type(model).__name__ in WITHOUT_GENERATE:
        return uncached(model, prompt, count)
    inputs = torch.tensor([list(prompt)])
    found = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=count,
        eos_token_id=None, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer


def uncached(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    found = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([found]), use_cache=False).logits[0, -1]
        found.append(int(logits.argmax()))
    return found[len(prompt) :]


class Talk:
    """A conversation on one cache, whose every answer is compared with the reference's."""

    def __init__(self, model: Any, expected: dict[tuple[int, ...], list[int]]) -> None:
        """``expected`` keeps the reference's answers."""
        self.model, self.maker, self.expected = model, FakeGraphs(), expected
        self.cache = new_cache(model, self.maker)
        self.lengths: list[int] = []
        model.register_forward_pre_hook(self._spy, with_kwargs=True)

    def _spy(self, _: Any, __: Any, options: dict[str, Any]) -> None:
        self.lengths.append(options["input_ids"].shape[1])

    def answer(self, prompt: Sequence[int]) -> tuple[list[int], int]:
        """The answer, and how many tokens of the prompt were computed for it."""
        key = tuple(prompt)
        if key not in self.expected:
            self.expected[key] = reference(self.model, prompt)
        self.lengths.clear()
        reused = self.cache.reuse(prompt)
        steps = loop.generate_step(self.cache, prompt[reused:], lambda logits: int(logits.argmax()))
        found = [token for token, _ in (next(steps) for _ in range(ANSWER))]
        assert found == self.expected[key]
        counted = sum(self.lengths)
        assert counted >= len(prompt) - reused + ANSWER - 1, "not what was counted"
        return found, len(prompt) - reused


def check_talks(
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    chunks: Sequence[int] = (6, 512),
    *,
    whole: bool = False,
) -> None:
    """A conversation for each size of a prompt's chunks (answers are read token by token)."""
    expected: dict[tuple[int, ...], list[int]] = {}
    for chunk in chunks:
        monkeypatch.setattr(runner, "PREFILL_CHUNK", chunk)
        check_talk(Talk(model, expected), whole=whole)


def check_talk(chat: Talk, *, whole: bool) -> None:
    system, first, second, third = ids(7, 1), ids(14, 2), ids(11, 3), ids(13, 4)
    assert chat.cache.continues is not whole
    prompt = system + first
    answer, computed = chat.answer(prompt)
    assert computed == len(prompt)
    # Only the new turn, and the last token of the answer, which was never fed back.
    longer = prompt + answer + second
    answer, computed = chat.answer(longer)
    assert computed == (len(longer) if whole else len(second) + 1)
    # The same again; then with an edited last message: no more than that turn.
    for edited in (longer, longer[:-4] + ids(6, 5)):
        _, computed = chat.answer(edited)
        assert computed <= (len(edited) if whole else len(second) + 1 + 6)
    # A turn is taken back, and the conversation goes on from the first answer.
    _, computed = chat.answer(longer[: -len(second)] + third)
    assert computed <= (len(longer) + 2 if whole else len(third) + 1 + ANSWER)
    # Changed in the middle of an answer; soon after the start, within a window; at the start.
    for edited in (longer[: -len(second) - 4] + third, longer[:9] + third, ids(7, 6) + longer[7:]):
        chat.answer(edited)


def kind_of(model: Any) -> object:
    layers = DynamicCache(config=model.config).layers
    own = makes_own_cache(model), cache_argument(model), continues(model)
    return frozenset(map(type, layers)), *own


def restarts() -> bool:
    """Whether states of this version of transformers may restart when several tokens follow."""
    return snapshots._version() < snapshots._CHECKED_VERSION


def has_states(model: Any) -> bool:
    layers = DynamicCache(config=model.config).layers
    return not makes_own_cache(model) and any(isinstance(x, snapshots._STATES) for x in layers)


@pytest.mark.long
def test_every_kind_is_represented() -> None:
    kinds: dict[object, set[str]] = {}
    for family in FAMILIES:
        if family.model_type != "inkling_mm_model":  # needs scipy
            kinds.setdefault(kind_of(random_model(family)), set()).add(family.model_type)
    assert not {kind: types for kind, types in kinds.items() if not types & REPRESENTATIVES}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            family, marks=[] if family.model_type in REPRESENTATIVES else [pytest.mark.long]
        )
        for family in FAMILIES
    ],
    ids=str,
)
def test_conversations(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    check_family(family, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_prompts_token_by_token(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    check_family(family, monkeypatch, (1,))


def check_family(
    family: Family, monkeypatch: pytest.MonkeyPatch, chunks: Sequence[int] = (6, 512)
) -> None:
    if family.folder == "inkling" and family.model_type == "inkling_mm_model":
        pytest.importorskip("scipy", reason="transformers' vision tower of Inkling needs scipy")
    model = random_model(family)
    whole = family.model_type in WHOLE_PROMPTS or (restarts() and has_states(model))
    check_talks(model, monkeypatch, chunks, whole=whole)


def test_chunked_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        attention_chunk_size=16, layer_types=["chunked_attention", "full_attention"],
        moe_layers=[1], initializer_range=0.3, max_position_embeddings=256,
    )  # fmt: skip
    check_talks(Llama4ForCausalLM(config).eval(), monkeypatch)


def test_compressed_attention_of_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(each for each in FAMILIES if each.model_type == "deepseek_v4")
    kinds = ["compressed_sparse_attention", "heavily_compressed_attention"]
    check_talks(random_model(family, changes={"layer_types": kinds}), monkeypatch)


@pytest.mark.parametrize(
    "model_type", ["deepseek_v2", "gpt_oss", "qwen3_next", "inkling_text", "zaya", "minimax"]
)
def test_an_interrupted_forward_leaves_no_trace(model_type: str) -> None:
    """Wherever it is interrupted, the next answer is right, and what was held before stays where
    that is possible."""
    model = random_model(next(each for each in FAMILIES if each.model_type == model_type))
    layers = next(m for n, m in model.named_modules() if n.endswith("layers"))
    prompt, more = ids(20, 1), ids(12, 2)
    expected = reference(model, prompt + more)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for layer in layers:
        for part in (layer, *layer.children()):
            cache = new_cache(model)
            loop._prefill(cache, prompt, lambda _done, _total: None)
            hook = part.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                cache.forward(more[:5])
            hook.remove()
            kept = 0 if restarts() and has_states(model) else len(prompt)
            assert cache.reuse(prompt + more) == kept
            left = (prompt + more)[kept:]
            steps = loop.generate_step(cache, left, lambda logits: int(logits.argmax()))
            assert [next(steps)[0] for _ in range(ANSWER)] == expected


def test_older_libraries_get_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "_CHECKED_VERSION", (99, 0))
    kinds = {"qwen3_next": False, "gpt_oss": True, "deepseek_v2": True}
    for model_type, expected in kinds.items():
        model = random_model(next(each for each in FAMILIES if each.model_type == model_type))
        assert continues(model) is expected
