"""The names of models: the base, adapters, weighted sums; and their cards."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from ktrt.errors import ConfigError
from ktrt.serve.errors import ApiError
from ktrt.serve.names import Names

if TYPE_CHECKING:
    import anthropic
    import openai

    from ktrt.session import Session

BASE = "demo"


@pytest.fixture(scope="module")
def names(serve_session: Session) -> Names:
    return Names(serve_session, BASE)


def refusal(names: Names, model: str, weights: Any = None) -> ApiError:
    with pytest.raises(ApiError) as found:
        names.resolve(model, weights)
    return found.value


class TestResolve:
    def test_base_and_adapters(self, names: Names) -> None:
        assert names.resolve(BASE) is None
        assert names.resolve("adapter_a") == "adapter_a"

    @pytest.mark.parametrize(
        ("model", "weights"),
        [
            ("adapter_a*0.5+adapter_b*0.3", {"adapter_a": 0.5, "adapter_b": 0.3}),
            (" adapter_b * -1e-1 + adapter_a ", {"adapter_b": -0.1, "adapter_a": 1}),
            ("adapter_a*1e+1", {"adapter_a": 10}),
            ("adapter_a*.5", {"adapter_a": 0.5}),
            ("adapter_a+adapter_b", {"adapter_a": 1, "adapter_b": 1}),
        ],
    )
    def test_a_sum(self, names: Names, model: str, weights: dict[str, float]) -> None:
        assert names.resolve(model) == weights

    def test_weights_in_a_field(self, names: Names) -> None:
        weights = {"adapter_a": 0.5, "adapter_b": 0.3}
        assert names.resolve(BASE, weights) == weights
        assert names.resolve("", weights) == weights
        assert names.resolve(BASE, {}) is None

    @pytest.mark.parametrize(
        "model",
        ["", "x", "adapter_a ", "demo ", "adapter_a*", "adapter_a*0.5+x*0.3", "adapter_a*0.5+",
         "*1", "adapter_a*nan", "adapter_a*1*2", "adapter_a-adapter_b", "a\ud800"],
    )  # fmt: skip
    def test_an_unknown_name(self, names: Names, model: str) -> None:
        error = refusal(names, model)
        assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
        assert "demo, adapter_a, adapter_b" in error.message

    @pytest.mark.parametrize(
        "model",
        ["adapter_a*" + "1" * 4900 + "x", "adapter_a" + " " * 4900 + "x", "adapter_a+" * 10**6],
    )
    def test_a_wrong_sum_is_refused_in_linear_time(self, names: Names, model: str) -> None:
        """Tries of all ways to read 4,900 digits took 5 s, in which no other thread ran."""
        before = time.thread_time()
        assert refusal(names, model).status == 404
        assert time.thread_time() - before < 0.5

    def test_an_unknown_weight(self, names: Names) -> None:
        error = refusal(names, BASE, {"x": 1.0})
        assert (error.status, error.param) == (404, "adapter_weights")

    @pytest.mark.parametrize(
        ("model", "weights", "words"),
        [
            ("demo+adapter_a", None, "the base 'demo' is part of every sum"),
            ("demo*0.5", None, "the base 'demo' is part of every sum"),
            ("adapter_a*0.5+adapter_a*0.3", None, "named twice"),
            ("adapter_a*1e999", None, "is inf, expected -1000 … 1000"),
            ("adapter_a", {"adapter_b": 1.0}, "expected with the base's name"),
            ("adapter_a*-1e19", None, "expected -1000 … 1000"),
            (BASE, {"adapter_b": float("nan")}, "expected -1000 … 1000"),
        ],
    )
    def test_weights_that_cannot_be_used(
        self, names: Names, model: str, weights: Any, words: str
    ) -> None:
        error = refusal(names, model, weights)
        assert error.status == 400
        assert words in error.message

    def test_names_with_signs(self, serve_session: Session, monkeypatch: Any) -> None:
        """The exact name wins over a sum, and the longest name within one."""
        names = Names(serve_session, "adapter_a+x")
        assert names.resolve("adapter_a+x") is None
        assert names.resolve("adapter_a+adapter_b") == {"adapter_a": 1, "adapter_b": 1}
        with pytest.raises(ConfigError, match="both named 'adapter_a'"):
            Names(serve_session, "adapter_a")

    def test_the_folder_names_the_base(self, serve_session: Session) -> None:
        assert Names(serve_session).base == "model"

    def test_what_is_active_does_not_matter(self, names: Names, serve_session: Session) -> None:
        serve_session.adapters.activate("adapter_b")
        assert names.resolve(BASE) is None


class TestRoutes:
    def test_cards(self, openai_client: openai.OpenAI) -> None:
        cards = {card.id: card.model_dump() for card in openai_client.models.list()}
        assert list(cards) == [BASE, "adapter_a", "adapter_b"]
        base, a, b = cards.values()
        assert (base["parent"], a["parent"], b["parent"]) == (None, BASE, BASE)
        assert [each["root"] for each in (base, a, b)] == ["model", "adapter_a", "adapter_b"]
        assert len({base["digest"], a["digest"], b["digest"]}) == 3
        assert all(len(each["digest"]) == 32 for each in (base, a, b))
        assert openai_client.models.retrieve("adapter_a").model_dump() == a

    def test_a_sum_has_a_card(self, openai_client: openai.OpenAI) -> None:
        found = [
            openai_client.models.retrieve(model).model_dump()
            for model in ("adapter_a*0.5+adapter_b", "adapter_b*1.0+adapter_a*0.5", "adapter_a*0.5")
        ]
        assert found[0]["id"] == "adapter_a*0.5+adapter_b"
        assert found[0]["digest"] == found[1]["digest"] != found[2]["digest"]

    def test_anthropics_client_reads_them(self, anthropic_client: anthropic.Anthropic) -> None:
        found = list(anthropic_client.models.list())
        assert [each.id for each in found] == [BASE, "adapter_a", "adapter_b"]
        assert found[0].type == "model"
        assert found[0].created_at.year >= 2024

    @pytest.mark.parametrize("name", ["x", "../x", "a/b", "adapter_a*", "%00", "x" * 5000])
    def test_an_unknown_model(self, server_url: str, name: str) -> None:
        answer = httpx.get(f"{server_url}/v1/models/{name}")
        assert answer.status_code == 404
        assert len(answer.json()["error"]["message"]) < 500
