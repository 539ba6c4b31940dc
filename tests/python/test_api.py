"""Tests of ktrt.api: from a configuration to answers, on a tiny MoE model in the real engine."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_chat import make_tokenizer
from helpers.tiny_models import save_adapter, save_model

import ktrt
from ktrt import api
from ktrt.config import load_config
from ktrt.errors import AdapterError, CheckpointError, ConfigError, EngineError, KtrtError
from ktrt.loading.model import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

ASK = [{"role": "user", "content": "你好，请介绍一下你自己。"}]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """chat.yaml, model and adapter side by side."""
    folder = tmp_path_factory.mktemp("chat")
    save_model(folder / "model", "deepseek_v2", 96)
    make_tokenizer(vocab_size=384).save_pretrained(folder / "model")
    save_adapter(folder / "adapter", folder / "model", "b")
    (folder / "chat.yaml").write_text(
        "model_name_or_path: model\nadapter_name_or_path: adapter\ntemplate: deepseek\n"
        "kt_num_threads: 1\ninfer_dtype: float32\ndo_sample: false\nmax_new_tokens: 12\n",
        encoding="utf-8",
    )
    return folder


def answer(session: Any) -> str:
    return "".join(session.stream(ASK))


def test_load_from_a_file(folder: Path) -> None:
    with ktrt.load(folder / "chat.yaml") as session:
        assert answer(session).strip()
        ids = session.tokenizer("你好", return_tensors="pt").input_ids
        logits = session.model(ids).logits
        assert logits.shape[:2] == ids.shape
        assert logits.isfinite().all()
        assert session.audit.found > 0
        assert session.audit.not_applied == 0
        assert len(session.audit.rows) == session.audit.found


def test_mapping_and_overrides(folder: Path) -> None:
    mapping = {
        "model_name_or_path": folder / "model",
        "adapter_name_or_path": folder / "adapter",
        "template": "deepseek",
        "kt_num_threads": 1,
        "infer_dtype": "float32",
    }
    with (
        ktrt.load(str(folder / "chat.yaml")) as tuned,
        ktrt.load(mapping, **GREEDY) as same,
        ktrt.load(folder / "chat.yaml", adapter_name_or_path=None) as base,
    ):
        assert answer(tuned) == answer(same)
        assert answer(base) != answer(tuned)
        assert base.audit.rows == []
        assert base.model is not tuned.model


class TestAdapterArgument:
    def test_a_models_folder_and_its_adapter(self, folder: Path) -> None:
        options: dict[str, Any] = {
            "template": "deepseek", "kt_num_threads": 1, "infer_dtype": "float32", **GREEDY,
        }  # fmt: skip
        with (
            ktrt.load(folder / "chat.yaml") as expected,
            ktrt.load(str(folder / "model"), adapter=folder / "adapter", **options) as tuned,
            ktrt.load(folder / "model", **options) as base,
        ):
            assert tuned.chat(ASK).text == answer(expected)
            assert base.chat(ASK).text != answer(expected)
            assert (tuned.adapters.names, base.adapters.names) == (("adapter",), ())

    @pytest.mark.parametrize("several", [False, True])
    def test_it_replaces_what_the_yaml_names(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, several: bool
    ) -> None:
        found: list[Any] = []
        monkeypatch.setattr(api, "open_session", lambda config: found.append(config.adapter))
        (folder / "two.yaml").write_text(
            "model_name_or_path: model\nadapters: {a: adapter, b: adapter}\n"
            "adapter_weights: {a: 0.5}\nadapter_folder: inner\n"
        )
        other = folder / "other"
        other.mkdir(exist_ok=True)
        (other / "adapter_config.json").touch()
        if several:
            ktrt.load(folder / "two.yaml", adapter=[folder / "adapter", str(other)])
            assert found[0].folders == {"adapter": folder / "adapter", "other": other}
        else:
            ktrt.load(folder / "two.yaml", adapter=other)
            assert found[0].folders == {"other": other}
        assert found[0].adapter_weights == {}

    def test_the_base_alone(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """However the YAML names adapters, and as the command line does."""
        found: list[Any] = []
        monkeypatch.setattr(api, "open_session", lambda config: found.append(config.adapter))
        (folder / "named.yaml").write_text(
            "model_name_or_path: model\nadapters: {a: adapter}\nadapter_weights: {a: 0.5}\n"
        )
        ktrt.load(folder / "named.yaml", adapter_name_or_path=None)
        found.append(load_config(folder / "named.yaml", ["adapter_name_or_path="]).adapter)
        assert [each.folders for each in found] == [{}, {}]
        named = {"adapter_name_or_path": None, "adapters": {"z": folder / "adapter"}}
        assert list(load_config(folder / "chat.yaml", named).adapter.folders) == ["z"]

    def test_the_current_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found: list[Any] = []
        monkeypatch.setattr(api, "open_session", lambda config: found.append(config.adapter))
        monkeypatch.chdir(folder / "adapter")
        ktrt.load(folder / "model", adapter=".")
        for text in (".", "./"):
            overrides = [f"adapter_name_or_path={text}"]
            found.append(load_config(folder / "model", overrides).adapter)
        assert [each.folders for each in found] == [{"adapter": folder / "adapter"}] * 3

    def test_weights_of_the_caller_hold(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found: list[Any] = []
        monkeypatch.setattr(api, "open_session", lambda config: found.append(config.adapter))
        weights = {"adapter": 0.5}
        ktrt.load(folder / "model", adapter=folder / "adapter", adapter_weights=weights)
        assert found[0].adapter_weights == weights

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"adapter_name_or_path": "x"}, "adapter and adapter_name_or_path are both given"),
            ({"adapters": {"a": "x"}}, "adapter and adapters are both given"),
            ({"adapter": []}, "adapter: expected a folder or a list of folders, found []"),
            ({"adapter": ""}, "adapter: expected a folder or a list of folders, found ''"),
            (
                {"adapter": Path()},
                "adapter: expected a folder or a list of folders, found PosixPath",
            ),
            ({"adapter": [""]}, "adapter: expected a folder or a list of folders, found ['']"),
            ({"adapter": "nowhere"}, "adapter_name_or_path: no directory nowhere"),
            ({"adapter": 3}, "adapter_name_or_path: expected a path, found 3"),
        ],
    )
    def test_refused(self, folder: Path, options: dict[str, Any], expected: str) -> None:
        given = {"adapter": folder / "adapter", **options}
        with pytest.raises(ConfigError, match=re.escape(expected)):
            ktrt.load(folder / "model", **given)

    def test_folders_the_wrong_way_round(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="adapter is an adapter's folder: expected its base"):
            ktrt.load(folder / "adapter", adapter=folder / "model")
        with pytest.raises(AdapterError, match="found a model folder"):
            ktrt.load(folder / "model", adapter=folder / "model")


def test_greedy_equals_transformers_generate_over_turns(folder: Path) -> None:
    with ktrt.load(folder / "chat.yaml", max_new_tokens=25) as session:
        prompt = session.template.encode(ASK)
        inputs = torch.tensor([prompt])
        expected = session.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=25
        )
        found = [response.token for response in session.stream_responses(ASK)]
        assert found == expected[0, len(prompt) :].tolist()


def test_closed_sessions_answer_no_more(folder: Path) -> None:
    session = ktrt.load(folder / "chat.yaml")
    session.close()
    session.close()
    with pytest.raises(KtrtError, match="closed"):
        session.stream(ASK)


def test_a_template_that_does_not_fit_is_found_before_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=r"deepseek3.*｜User｜"):
        ktrt.load(folder / "chat.yaml", template="deepseek3")


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_a_folder_without_tokenizer(tmp_path: Path, trust_remote_code: bool) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v2"}', encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no tokenizer: expected"):
        ktrt.load({"model_name_or_path": tmp_path, "trust_remote_code": trust_remote_code})


@pytest.mark.parametrize("kind", ["an empty folder", "a LoRA adapter"])
def test_what_the_folder_is_comes_before_its_tokenizer(tmp_path: Path, kind: str) -> None:
    if kind == "a LoRA adapter":
        (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{tmp_path} is {kind}"):
        ktrt.load({"model_name_or_path": tmp_path})


@pytest.mark.parametrize("where", ["__init__", "warm_up"])
def test_a_session_that_fails_to_start_closes_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    found: list[Any] = []

    def load_and_note(*args: Any, **more: Any) -> Any:
        found.append(load_model(*args, **more))
        return found[0]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "load_model", load_and_note)
    monkeypatch.setattr(ktrt.Session, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ktrt.load(folder / "chat.yaml")
    assert found[0].engine.closed


def test_unknown_override(folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'kt_backend'"):
        ktrt.load(folder / "chat.yaml", kt_bakend="AMXInt8")


class TestEngineErrors:
    def test_loading(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ktrt.engine.build.MAX_QLEN", 0)
        with pytest.raises(EngineError, match="the engine failed: .*max_qlen") as caught:
            ktrt.load(folder / "chat.yaml")
        assert type(caught.value.__cause__) is ValueError

    def test_answers_and_adapters(self, folder: Path) -> None:
        with ktrt.load(folder / "chat.yaml") as session:
            session._open().engine.close()
            with pytest.raises(EngineError, match="the engine failed: .*closed") as caught:
                session.chat(ASK)
            assert type(caught.value.__cause__) is RuntimeError
            with pytest.raises(EngineError, match="closed"):
                session.adapters.load("again", folder / "adapter")
