"""Tests of ktrt.api: from a configuration to answers, on a tiny MoE model in the real engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_chat import make_tokenizer
from helpers.tiny_models import save_adapter, save_model

import ktrt
from ktrt import api
from ktrt.errors import CheckpointError, ConfigError, EngineError, KtrtError

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
