"""SamplingOptions, the keywords that type checkers know, is SamplingArgs in another form."""

from dataclasses import fields
from typing import Any, Unpack, get_args, get_origin, get_type_hints

import pytest

from ktrt.config import SamplingArgs, SamplingOptions, override_sampling
from ktrt.config.args import SAMPLING_ALIASES
from ktrt.errors import ConfigError


def accepted(hint: Any) -> Any:
    """Returns the type of the values that a field of this type accepts, None included."""
    if get_origin(hint) is tuple:
        each: Any = get_args(hint)[0]
        return each | list[each] | tuple[each, ...] | None
    return hint | None


def test_names_and_types_are_those_of_the_dataclass() -> None:
    expected = {each.name: accepted(each.type) for each in fields(SamplingArgs)}
    expected |= {alias: expected[name] for alias, name in SAMPLING_ALIASES.items()}
    assert get_type_hints(SamplingOptions) == expected
    assert not SamplingOptions.__required_keys__


def test_the_types_are_accepted() -> None:
    options: SamplingOptions = {
        "stop": ["a", "b"],
        "stop_token_ids": 3,
        "temperature": 0,
        "seed": None,
    }
    args = override_sampling(SamplingArgs(), options)
    assert (args.stop_strings, args.stop_token_ids) == (("a", "b"), (3,))


def test_two_spellings_must_agree() -> None:
    same = override_sampling(SamplingArgs(), {"stop": "a", "stop_strings": ["a"]})
    assert same.stop_strings == ("a",)
    assert override_sampling(same, {"stop": None, "stop_strings": "b"}).stop_strings == ("b",)
    with pytest.raises(ConfigError, match="stop_strings contradict each other"):
        override_sampling(SamplingArgs(), {"stop": "a", "stop_strings": "b"})


def test_type_checkers_know_the_keywords() -> None:
    """mypy --strict finds both errors: without them it would report unused ignores."""

    def chat(**sampling: Unpack[SamplingOptions]) -> None:
        override_sampling(SamplingArgs(), sampling)

    chat(temperature=0.5, stop="x", stop_token_ids=[1, 2], seed=None)
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        chat(temprature=0.5)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="top_k: expected an integer"):
        chat(top_k="three")  # type: ignore[arg-type]
