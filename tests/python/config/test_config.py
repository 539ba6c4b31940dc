"""Tests of ktrt.config."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from ktrt.config import Config, SamplingArgs, load_config, override_sampling
from ktrt.errors import ConfigError

USERS_YAML = """\
### model
model_name_or_path: {model}
adapter_name_or_path: {adapter}
template: deepseek
trust_remote_code: true

### inference backend
infer_backend: huggingface

### ktransformers
use_kt: true
kt_backend: AMXBF16
kt_num_threads: 60
kt_tp_enabled: false
"""


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for name in ("adapter", "adapter/checkpoint-3"):
        make_adapter(tmp_path / name)
    return tmp_path


def make_adapter(folder: Path) -> None:
    """Makes the files that a configuration looks for."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")


@pytest.fixture
def write(folders: Path) -> Callable[[str], Path]:
    """Writes a YAML file of a model and the given lines next to the folders."""

    def write(lines: str, *, model: str = "model_name_or_path: model\n") -> Path:
        path = folders / "chat.yaml"
        path.write_text(model + lines, encoding="utf-8")
        return path

    return write


def refused(source: Path | Mapping[str, object], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


class TestUsersFile:
    def test_runs_unchanged(self, folders: Path) -> None:
        path = folders / "user.yaml"
        model, adapter = folders / "model", folders / "adapter"
        path.write_text(USERS_YAML.format(model=model, adapter=adapter), encoding="utf-8")
        config = load_config(path)
        assert config.model.model_name_or_path == model
        assert config.model.trust_remote_code is True
        assert config.model.infer_dtype == "auto"
        assert config.adapter.adapter_name_or_path == adapter
        assert config.adapter.lora_rank is None
        assert config.template.template == "deepseek"
        assert config.experts.kt_backend == "AMXBF16"
        assert config.experts.kt_num_threads == 60
        assert config.experts.kt_tp_enabled is False

    def test_defaults(self, write: Callable[[str], Path]) -> None:
        config = load_config(write(""))
        assert config.adapter.adapter_name_or_path is None
        assert config.template.template is None
        assert config.experts.kt_num_threads is None
        assert config.sampling == SamplingArgs(
            do_sample=True, temperature=0.95, top_p=0.7, top_k=50, max_new_tokens=1024,
            repetition_penalty=1.0, skip_special_tokens=True, seed=None,
        )  # fmt: skip

    def test_mapping_equals_file(self, folders: Path, write: Callable[[str], Path]) -> None:
        path = write("template: deepseek\ntemperature: 0.5\nlora_rank: 8\n")
        mapping = {
            "model_name_or_path": folders / "model",
            "template": "deepseek",
            "temperature": 0.5,
            "lora_rank": 8,
        }
        assert load_config(path) == load_config(mapping)

    def test_json_is_fine(self, folders: Path) -> None:
        path = folders / "chat.json"
        path.write_text(json.dumps({"model_name_or_path": "model", "top_k": 3}), encoding="utf-8")
        assert load_config(path).sampling.top_k == 3

    def test_frozen(self, write: Callable[[str], Path]) -> None:
        config = load_config(write(""))
        with pytest.raises(FrozenInstanceError):
            config.model = config.model  # type: ignore[misc]


SPELLINGS = {
    "": "auto", "Auto": "auto", "bf16": "AMXBF16", "BF16": "AMXBF16", "amxint8": "AMXInt8",
    "INT8": "AMXInt8", "INT4": "AMXInt4", "fp8": "FP8", "AMXFP8": "FP8", "FP8_PERCHANNEL": "FP8",
    "AMXINT4_KGroup": "RAWINT4", "GPTQ_INT4": "RAWINT4", "RawInt4": "RAWINT4", "mxfp4": "MXFP4",
}  # fmt: skip


class TestKtConfig:
    @pytest.mark.parametrize(
        ("lines", "backend"),
        [
            ("kt_config: {kt_backend: AMXInt8, kt_num_threads: 3}", "AMXInt8"),
            ("kt_config: {kt_expert_weight_format: int8}", "AMXInt8"),
            ("kt_config: {kt_expert_weight_format: int8, kt_backend: auto}", "AMXInt8"),
            ("kt_config: {kt_expert_weight_format: bf16, kt_backend: AMXBF16}", "AMXBF16"),
            ("kt_config: {enabled: true}\nkt_backend: AMXBF16", "AMXBF16"),
            ("kt_backend: amxbf16\nkt_config: {kt_backend: AMXBF16}", "AMXBF16"),
            ("kt_config:", "auto"),
            *((f"kt_backend: {name}", meant) for name, meant in SPELLINGS.items()),
            ("kt_config: {kt_expert_weight_format: fp8, kt_backend: auto}", "FP8"),
            ("kt_config: {kt_expert_weight_format: mxfp4, kt_backend: MXFP4}", "MXFP4"),
        ],
    )
    def test_both_spellings(self, write: Callable[[str], Path], lines: str, backend: str) -> None:
        assert load_config(write(lines)).experts.kt_backend == backend

    def test_nested_keys_reach_their_fields(self, write: Callable[[str], Path]) -> None:
        lines = "kt_config: {kt_num_threads: 7, kt_tp_enabled: true, kt_lora_rank: 8}"
        config = load_config(write(lines))
        assert config.experts.kt_num_threads == 7
        assert config.experts.kt_tp_enabled is True
        assert config.adapter.lora_rank == 8

    @pytest.mark.parametrize(
        ("lines", "named"),
        [
            ("kt_num_threads: 3\nkt_config: {kt_num_threads: 4}", ["kt_num_threads", "3", "4"]),
            ("kt_backend: AMXInt8\nkt_config: {kt_backend: AMXBF16}", ["kt_config.kt_backend"]),
            (
                "kt_config: {kt_expert_weight_format: int8, kt_backend: AMXBF16}",
                ["kt_expert_weight_format", "kt_backend", "AMXInt8", "AMXBF16"],
            ),
            ("lora_rank: 8\nkt_config: {kt_lora_rank: 16}", ["lora_rank", "8", "16"]),
        ],
    )
    def test_contradiction(
        self, write: Callable[[str], Path], lines: str, named: list[str]
    ) -> None:
        message = refused(write(lines))
        assert "contradict" in message
        assert all(name in message for name in named)

    def test_other_keys_do_not_belong_there(self, write: Callable[[str], Path]) -> None:
        assert "kt_config.temperature" in refused(write("kt_config: {temperature: 1}"))
        assert "mapping" in refused(write("kt_config: AMXBF16"))


class TestOverrides:
    def test_win_over_the_file(self, write: Callable[[str], Path]) -> None:
        path = write("temperature: 0.5\nkt_config: {kt_backend: AMXBF16, kt_num_threads: 2}\n")
        overrides = ["temperature=0", "kt_backend=AMXInt8", "kt_config.kt_num_threads=5"]
        config = load_config(path, overrides)
        assert config.sampling.temperature == 0
        assert config.experts.kt_backend == "AMXInt8"
        assert config.experts.kt_num_threads == 5
        assert load_config(path, {"temperature": 0.25}).sampling.temperature == 0.25

    def test_values_are_yaml_scalars_and_text_is_literal(
        self, write: Callable[[str], Path]
    ) -> None:
        pairs = ["do_sample=no", "temperature=1e-1", "default_system=Note: be [brief", "seed=3"]
        config = load_config(write(""), pairs)
        assert config.sampling.do_sample is False
        assert config.sampling.temperature == 0.1
        assert config.sampling.seed == 3
        assert config.template.default_system == "Note: be [brief"

    @pytest.mark.parametrize("value", ["", "null", "~"])
    def test_no_adapter(self, write: Callable[[str], Path], value: str) -> None:
        path = write("adapter_name_or_path: adapter\n")
        assert load_config(path).adapter.adapter_name_or_path is not None
        config = load_config(path, [f"adapter_name_or_path={value}"])
        assert config.adapter.adapter_name_or_path is None
        assert load_config(path, {"adapter_name_or_path": None}) == config

    def test_no_system_prompt_differs_from_the_default_one(
        self, write: Callable[[str], Path]
    ) -> None:
        assert load_config(write(""), ["default_system="]).template.default_system == ""
        assert load_config(write(""), ["default_system=null"]).template.default_system is None

    def test_null_resets_to_the_default(self, write: Callable[[str], Path]) -> None:
        assert load_config(write("top_k: 3\n"), ["top_k=null"]).sampling.top_k == 50

    @pytest.mark.parametrize(
        ("pair", "message"),
        [
            ("temperature", "expected key=value"),
            ("=3", "expected key=value"),
            ("tempersture=3", "did you mean 'temperature'"),
            ("top_k=[3", "not valid YAML"),
            ("top_k=[3]", r"top_k: expected an integer, found \[3\]"),
        ],
    )
    def test_malformed(self, write: Callable[[str], Path], pair: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            load_config(write(""), [pair])

    def test_twice(self, write: Callable[[str], Path]) -> None:
        assert "'top_k' is given twice" in refused(write(""), "top_k=1", "top_k=2")


class TestUnknownAndUnused:
    def test_unknown_keys_come_with_the_nearest_known(self, write: Callable[[str], Path]) -> None:
        message = refused(write("kt_bakend: x\nTemplate: y\nzzzzzz: 1\n"))
        assert "chat.yaml" in message
        assert "'kt_bakend' (did you mean 'kt_backend'?)" in message
        assert "'Template' (did you mean 'template'?)" in message
        assert "'zzzzzz'" in message

    def test_training_keys_give_one_line(
        self, write: Callable[[str], Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        lines = "stage: sft\nlearning_rate: 1e-4\nlora_target: all\ndataset: a\nbf16: true\n"
        with caplog.at_level(logging.INFO):
            load_config(write(lines + "finetuning_type: lora\nlora_rank: 8\nlora_alpha: 16\n"))
        (message,) = caplog.messages
        assert message.endswith("bf16, dataset, learning_rate, lora_target, stage")

    def test_keys_without_effect_give_a_line_each(
        self, write: Callable[[str], Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            load_config(write("kt_maxlen: 99\nkt_config: {kt_threadpool_count: 2}\n"))
        assert len(caplog.messages) == 2
        assert any("kt_maxlen: 99" in message for message in caplog.messages)
        assert any("kt_threadpool_count: 2" in message for message in caplog.messages)

    @pytest.mark.parametrize(
        "line",
        [
            "kt_config: {kt_expert_checkpoint_path: /x}",
            "quantization_method: hqq",
            "num_beams: 2",
            "rope_scaling: linear",
            "no_repeat_ngram_size: 3",
            "load_in_8bit: true",
        ],
    )
    def test_keys_that_would_change_answers_are_refused(
        self, write: Callable[[str], Path], line: str
    ) -> None:
        message = refused(write(line))
        key = line.split("{")[-1].split(":")[0]
        assert key in message
        assert "remove the key" in message

    @pytest.mark.parametrize("line", ["num_beams: 1", "typical_p: 1.0", "kt_weight_path:"])
    def test_their_neutral_values_are_fine(
        self, write: Callable[[str], Path], line: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            load_config(write(line))
        assert caplog.messages == []

    @pytest.mark.parametrize(
        ("lines", "expected"),
        [
            ("use_kt: false", "use_kt: expected true"),
            ("infer_backend: vllm", "infer_backend: expected huggingface or ktransformers"),
            ("finetuning_type: full\nadapter_name_or_path: adapter", "expected lora"),
        ],
    )
    def test_other_ways_to_run(
        self, write: Callable[[str], Path], lines: str, expected: str
    ) -> None:
        assert expected in refused(write(lines))


class TestValues:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("kt_num_threads: many", "kt_num_threads: expected an integer, found 'many' (text)"),
            ("kt_num_threads: true", "kt_num_threads: expected an integer, found True (a boolean)"),
            (
                "kt_num_gpu_experts: many",
                "kt_num_gpu_experts: expected an integer or auto, found 'many' (text)",
            ),
            ("kt_num_gpu_experts: -1", "kt_num_gpu_experts: expected 0 or more, or auto, found -1"),
            (
                "kt_gpu_prefill_token_threshold: 1.5",
                "kt_gpu_prefill_token_threshold: expected an integer or auto, found 1.5",
            ),
            ("kt_num_threads: 2.5", "kt_num_threads: expected an integer"),
            ("kt_num_threads: 1e30", "kt_num_threads: expected an integer, found 1e+30 (float)"),
            ("kt_num_threads: 99999999999", "kt_num_threads: expected at most 8192"),
            ("kt_num_threads: 0x" + "f" * 5000, "found an integer of 20000 bits"),
            ("kt_num_threads: [2]", "kt_num_threads: expected an integer, found [2] (a list)"),
            ("kt_num_threads: .inf", "kt_num_threads: expected an integer, found inf (float)"),
            ("temperature: 0x" + "f" * 5000, "temperature: an integer of 20000 bits is too large"),
            ("temperature: 2024-01-01", "found datetime.date(2024, 1, 1) (date)"),
            ("top_k: 0xffffffffff", "top_k: expected 0 (off) or more, found 1099511627775"),
            ("lora_alpha: .nan", "lora_alpha: expected a finite number, found nan"),
            ("template: {a: b}", "template: expected text, found {'a': 'b'} (a mapping)"),
            ("template: !!binary aGk=", "template: expected text, found b'hi' (bytes)"),
            ('default_system: "\\ud800"', "default_system: '\\ud800' holds half a character"),
            ('kt_weight_path: "a\\0b"', "kt_weight_path: 'a\\x00b' holds a NUL byte"),
            ("kt_num_threads: 0", "kt_num_threads: expected at least 1, found 0"),
            ("temperature: hot", "temperature: expected a number"),
            ("temperature: -1", "temperature: expected 0 or more, found -1"),
            ("temperature: .nan", "temperature: expected 0 or more"),
            ("top_p: 0", "top_p: expected above 0 and at most 1"),
            ("max_new_tokens: 0", "max_new_tokens: expected at least 1"),
            ("min_p: 1.5", "min_p: expected 0 (off) … 1, found 1.5"),
            ("presence_penalty: 3", "presence_penalty: expected -2 … 2, found 3"),
            ("frequency_penalty: -2.5", "frequency_penalty: expected -2 … 2, found -2.5"),
            ("logit_bias: {5: -101}", "logit_bias: expected -100 … 100, found {5: -101"),
            ("logit_bias: {-5: 1}", "logit_bias: expected token ids, found {-5: 1"),
            ("logit_bias: {5: x}", "logit_bias: 5: expected a number, found 'x'"),
            ("stop_strings: [a, 3]", "stop_strings: expected text, found 3 (int)"),
            ("stop: ['']", "stop_strings: expected texts that are not empty, found ('',)"),
            ("stop_token_ids: [-1]", "stop_token_ids: expected token ids, 0 or more"),
            ("top_logprobs: 21\nlogprobs: true", "top_logprobs: expected 0 … 20, found 21"),
            ("top_logprobs: 2", "top_logprobs: expected 0 while logprobs is false, found 2"),
            ("cutoff_len: 1", "cutoff_len: expected at least 2, found 1"),
            ("template: 3", "template: expected text, found 3 (int)"),
            ("do_sample: 1", "do_sample: expected true or false, found 1"),
            ("quantization_bit: 4", "quantization_bit: expected 8 (INT8 for linear layers on"),
            ("quantization_bit: four", "quantization_bit: expected an integer, found 'four'"),
            (
                "quantization_bit: 8\ninfer_dtype: float32",
                "quantization_bit: expected null with infer_dtype float32, not bfloat16, found 8",
            ),
            ("infer_dtype: int8", "infer_dtype: expected auto or bfloat16 or float16 or float32"),
            ("kt_backend: FP6", "AMXInt4, FP8, RAWINT4 or MXFP4, found 'FP6'"),
            ("adapter_name_or_path: [1]", "adapter_name_or_path: expected a path, found 1"),
            ("adapters: a", "adapters: expected a mapping of names, found 'a'"),
            ("adapters: {a: 1}", "adapters.a: expected a path, found 1"),
            ("adapter_weights: {a: x}", "adapter_weights.a: expected a number, found 'x'"),
            ("adapter_weights: {' a': 1}", "adapter_weights: expected names of adapters"),
        ],
    )
    def test_wrong_ones_name_key_found_and_expected(
        self, write: Callable[[str], Path], line: str, expected: str
    ) -> None:
        message = refused(write(line))
        assert expected in message
        assert "chat.yaml" in message

    def test_eight_bits(
        self, write: Callable[[str], Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        """With the keys that LLaMA-Factory's users add."""
        assert load_config(write("")).model.quantization_bit is None
        assert load_config(write("quantization_bit:")).model.quantization_bit is None
        lines = "quantization_bit: 8\nquantization_method: bnb\ndouble_quantization: true\n"
        with caplog.at_level(logging.INFO):
            config = load_config(write(f"{lines}quantization_type: nf4\ninfer_dtype: bfloat16\n"))
        assert config.model.quantization_bit == 8
        assert len(caplog.messages) == 2
        assert all("it concerns 4 bits" in message for message in caplog.messages)

    def test_quoted_numbers_and_booleans(self, write: Callable[[str], Path]) -> None:
        lines = "top_k: '3'\ntemperature: '1e-1'\ndo_sample: 'False'\ntemplate: '3'\n"
        config = load_config(write(lines + "kt_num_gpu_experts: ' 4'\nlora_rank: '+8'\n"))
        assert (config.sampling.top_k, config.sampling.temperature) == (3, 0.1)
        assert config.sampling.do_sample is False
        assert config.template.template == "3"
        assert (config.experts.kt_num_gpu_experts, config.adapter.lora_rank) == (4, 8)
        assert "top_k: expected an integer, found 2.5" in refused(write("top_k: '2.5'"))

    def test_an_integer_is_a_fine_number(self, write: Callable[[str], Path]) -> None:
        assert load_config(write("temperature: 1\nlora_alpha: 16\n")).adapter.lora_alpha == 16.0

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("stop_strings: '###'", ("###",)),
            ("stop: ['###', b]", ("###", "b")),
            ("stop_strings: []", ()),
            ("stop_token_ids: 7", (7,)),
            ("stop_token_ids: [7, 8]", (7, 8)),
        ],
    )
    def test_one_value_or_a_list(
        self, write: Callable[[str], Path], line: str, expected: tuple[object, ...]
    ) -> None:
        sampling = load_config(write(line + "\n")).sampling
        assert (sampling.stop_strings or sampling.stop_token_ids) == expected

    def test_scientific_notation(self, write: Callable[[str], Path]) -> None:
        assert load_config(write("temperature: 5e-1\n")).sampling.temperature == 0.5


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        assert "No such file" in refused(tmp_path / "none.yaml")

    def test_syntax_error_names_file_and_line(self, write: Callable[[str], Path]) -> None:
        path = write("top_k: 3\n  bad: [\n")
        assert f"{path}:3:" in refused(path)

    def test_duplicate_key_names_file_and_line(self, write: Callable[[str], Path]) -> None:
        path = write("top_k: 3\ntop_k: 4\n")
        assert f"{path}:3:1" in refused(path)
        assert "'top_k' is given twice" in refused(path)
        assert "twice" in refused(write("kt_config: {kt_backend: a, kt_backend: b}\n"))

    @pytest.mark.parametrize("text", ["", "- a\n", "just text\n"])
    def test_not_a_mapping(self, write: Callable[..., Path], text: str) -> None:
        assert "expected a mapping" in refused(write(text, model=""))

    def test_a_key_that_is_a_list_names_file_and_line(self, write: Callable[[str], Path]) -> None:
        path = write("top_k: 3\n? [a]\n: b\n")
        assert f"{path}:3:3: not valid YAML: found unhashable key" in refused(path)

    def test_a_key_that_is_no_text(self, write: Callable[[str], Path]) -> None:
        assert "expected text keys" in refused(write("3: 4\n"))

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "gbk.yaml"
        path.write_bytes("template: 你好\n".encode("gbk"))
        assert "not UTF-8" in refused(path)

    def test_byte_order_mark(self, folders: Path) -> None:
        path = folders / "bom.yaml"
        path.write_text("model_name_or_path: model\n", encoding="utf-8-sig")
        assert load_config(path).model.model_name_or_path == folders / "model"

    def test_merge_keys_and_anchors(self, write: Callable[[str], Path]) -> None:
        text = "kt_config: &a {kt_num_threads: 3}\n"
        assert load_config(write(text)).experts.kt_num_threads == 3


class TestPaths:
    def test_current_directory_first_then_beside_the_file(
        self, write: Callable[[str], Path], folders: Path, tmp_path_factory: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        path = write("")
        elsewhere = tmp_path_factory.mktemp("cwd")
        monkeypatch.chdir(elsewhere)
        assert load_config(path).model.model_name_or_path == folders / "model"
        (elsewhere / "model").mkdir()
        assert load_config(path).model.model_name_or_path == Path("model")

    def test_missing_key(self, write: Callable[..., Path]) -> None:
        assert "model_name_or_path is missing" in refused(write("top_k: 1", model=""))
        assert "model_name_or_path is missing" in refused(write(""), "model_name_or_path=")

    def test_hub_id_says_how_to_download(self, write: Callable[[str], Path]) -> None:
        message = refused(write(""), "model_name_or_path=deepseek-ai/DeepSeek-V2-Lite-Chat")
        assert "huggingface-cli download deepseek-ai/DeepSeek-V2-Lite-Chat" in message
        assert "huggingface-cli" not in refused(write(""), "model_name_or_path=/no/such/folder")

    def test_a_file(self, write: Callable[[str], Path], folders: Path) -> None:
        (folders / "weights.safetensors").touch()
        message = refused(write("adapter_name_or_path: weights.safetensors"))
        assert f"expected the directory that holds it, {folders}" in message
        (folders / "m.gguf").touch()
        assert "it is a GGUF file" in refused(write(""), "model_name_or_path=m.gguf")

    def test_a_hub_id_in_the_hubs_cache(
        self, write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.delenv("HF_HUB_CACHE", raising=False)
        snapshot = tmp_path / "hub/models--Qwen--Qwen3-30B-A3B/snapshots/12ab"
        snapshot.mkdir(parents=True)
        assert "cache" not in refused(write(""), "model_name_or_path=Qwen/Qwen3-30B-A3B")
        (snapshot / "config.json").touch()
        message = refused(write(""), "model_name_or_path=Qwen/Qwen3-30B-A3B")
        assert message.endswith(f"set model_name_or_path to {snapshot}")

    @pytest.mark.parametrize(
        "text",
        [
            "adapter_name_or_path: adapter,more/adapter",
            "adapter_name_or_path: 'adapter, more/adapter,'",
            "adapter_name_or_path: [adapter, more/adapter]",
        ],
    )
    def test_several_adapters(self, write: Callable[[str], Path], folders: Path, text: str) -> None:
        make_adapter(folders / "more" / "adapter")
        args = load_config(write(text)).adapter
        assert args.adapter_name_or_path is None
        names = [f"{folders.name}/adapter", "more/adapter"]
        assert args.folders == {
            names[0]: folders / "adapter", names[1]: folders / "more" / "adapter"
        }  # fmt: skip
        assert args.start_weights == {names[0]: 1.0}

    def test_named_adapters(self, write: Callable[[str], Path], folders: Path) -> None:
        make_adapter(folders / "more")
        text = "adapters: {x: more, y: adapter}\nadapter_weights: {y: 0.5, x: 2}"
        args = load_config(write(text)).adapter
        assert args.folders == {"x": folders / "more", "y": folders / "adapter"}
        assert args.start_weights == {"y": 0.5, "x": 2.0}

    def test_one_adapter_is_called_by_its_folder(
        self, write: Callable[[str], Path], folders: Path
    ) -> None:
        make_adapter(folders / "with,comma")
        for name in ("adapter", "with,comma"):
            args = load_config(write(f"adapter_name_or_path: {name}")).adapter
            assert args.folders == {name: folders / name}
            assert args.start_weights == {name: 1.0}
        assert load_config(write("")).adapter.start_weights == {}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("adapter_name_or_path: adapter,other", "adapter_name_or_path: no directory other"),
            ("adapter_name_or_path: [adapter, adapter]", "adapter is given twice"),
            ("adapter_name_or_path: adapter\nadapters: {x: adapter}", "keep one of them"),
            ("adapters: {x: other}", "adapters.x: no directory other"),
            (
                "adapters: {xyz: adapter}\nadapter_weights: {xy: 1}",
                "adapter_weights: unknown adapter 'xy' (did you mean 'xyz'?)",
            ),
            ("adapter_weights: {x: 1}", "adapter_weights: unknown adapter 'x'; there is none"),
            ("finetuning_type: full\nadapters: {x: adapter}", "remove it, or the adapter"),
        ],
    )
    def test_adapters_that_do_not_fit(
        self, write: Callable[[str], Path], text: str, message: str
    ) -> None:
        assert message in refused(write(text))

    def test_adapter_folder(self, write: Callable[[str], Path], folders: Path) -> None:
        lines = "adapter_name_or_path: adapter\nadapter_folder: "
        config = load_config(write(lines + "checkpoint-3"))
        assert config.adapter.adapter_name_or_path == folders / "adapter/checkpoint-3"
        assert "adapter_folder" in refused(write(lines + "none"))
        assert "adapter_folder" in refused(write(lines + "../model"))

    def test_the_newest_checkpoint_of_an_output_folder(
        self, write: Callable[[str], Path], folders: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in ("checkpoint-20", "checkpoint-100"):
            make_adapter(folders / "out" / name)
        with caplog.at_level(logging.INFO):
            config = load_config(write("adapter_name_or_path: out"))
        assert config.adapter.adapter_name_or_path == folders / "out/checkpoint-100"
        assert "taking its newest checkpoint, checkpoint-100" in caplog.text


class TestOverrideSampling:
    def test_replaces_and_none_keeps(self) -> None:
        args = override_sampling(SamplingArgs(top_k=3), {"temperature": 0, "top_k": None})
        assert args == SamplingArgs(top_k=3, temperature=0.0)
        assert override_sampling(args, {"stop": "###"}).stop_strings == ("###",)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"tempature": 1}, "unknown sampling argument 'tempature' .did you mean 'temperature'"),
            ({"temperature": "hot"}, "temperature: expected a number"),
            ({"top_p": 3.0}, "top_p: expected above 0"),
            ({"stop": 3}, "stop: expected text, found 3"),
        ],
    )
    def test_refuses(self, overrides: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            override_sampling(SamplingArgs(), overrides)


def test_import_is_fast_and_light() -> None:
    code = (
        # Seconds of this process's CPU: a wall clock would count other processes.
        "import sys, time; start = time.process_time(); import ktrt.config;"
        "seconds = time.process_time() - start;"
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules);"
        "print(seconds)"
    )
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    )
    assert seconds < 0.15


def test_config_has_one_part_for_each_consumer() -> None:
    assert list(Config.__dataclass_fields__) == [
        "model", "adapter", "experts", "template", "sampling", "scheduler",
    ]  # fmt: skip
