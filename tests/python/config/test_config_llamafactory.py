"""Tests of ktrt.config with LLaMA-Factory's keys and the files that it ships.

The examples are reduced copies of examples/ktransformers in its repository (Apache 2.0), 0.9.4 and
2026-08: with the same keys and other paths.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ktrt.config import Config, load_config
from ktrt.config.keys import MEANT
from ktrt.config.kt_files import MANIFEST
from ktrt.config.load import _ACTING
from ktrt.errors import ConfigError

# Every field of the dataclasses in src/llamafactory/hparams of 0.9.5.
KEYS = """
adapter_folder adapter_name_or_path add_special_tokens add_tokens additional_target
apollo_layerwise apollo_proj apollo_proj_type apollo_rank apollo_scale apollo_scale_front
apollo_scale_type apollo_target apollo_update_interval asft_alpha audio_sampling_rate
badam_mask_mode badam_mode badam_start_block badam_switch_interval badam_switch_mode
badam_update_ratio badam_verbose batch_size block_diag_attn buffer_size cache_dir compute_accuracy
compute_dtype create_new_adapter crop_to_patches cutoff_len data_shared_file_system dataset
dataset_dir default_system device_map disable_gradient_checkpointing disable_shuffling do_sample
double_quantization download_mode dpo_label_smoothing eaft_alpha early_stopping_steps
enable_liger_kernel enable_thinking enable_torch_profiler eval_dataset eval_num_beams
eval_on_each_dataset export_device export_dir export_hub_model_id export_legacy_format
export_quantization_bit export_quantization_dataset export_quantization_maxlen
export_quantization_nsamples export_size finetuning_type flash_attn fp8 fp8_backend
fp8_enable_fsdp_float8_all_gather freeze_extra_modules freeze_language_model
freeze_multi_modal_projector freeze_trainable_layers freeze_trainable_modules freeze_vision_tower
galore_layerwise galore_proj_type galore_rank galore_scale galore_target galore_update_interval
hf_hub_token hyper_parallel_args ignore_pad_token_for_loss image_do_pan_and_scan image_max_pixels
image_min_pixels include_effective_tokens_per_second infer_backend infer_dtype init_special_tokens
interleave_probs kt_expert_checkpoint_path kt_lora_expert_intermediate_size kt_lora_expert_num
kt_use_lora_experts kt_weight_path kto_chosen_weight kto_rejected_weight lang ld_alpha
length_penalty lora_alpha lora_dropout lora_rank lora_target loraplus_lr_embedding
loraplus_lr_ratio low_cpu_mem_usage mask_history master_addr master_port max_length max_new_tokens
max_samples media_dir mix_strategy mixture_of_depths model_max_length model_name_or_path
model_revision module_dropout moe_aux_loss_coef ms_hub_token n_shot neat_packing
new_special_tokens_config num_beams offload_folder oft_block_size oft_rank oft_target om_hub_token
overwrite_cache overwrite_output_dir packing pissa_convert pissa_init pissa_iter plot_loss
ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards pref_bco_weight pref_beta
pref_ftx pref_loss preprocessing_batch_size preprocessing_num_workers preserve_thinking
print_param_status profile_modules profiler_active_steps profiler_output_dir
profiler_profile_memory profiler_record_shapes profiler_repeat profiler_wait_steps
profiler_warmup_steps profiler_with_stack pure_bf16 quantization_bit quantization_device_map
quantization_method quantization_type ray_init_kwargs ray_num_workers ref_model ref_model_adapters
ref_model_quantization_bit repetition_penalty resize_vocab reward_model reward_model_adapters
reward_model_quantization_bit reward_model_type rope_scaling save_dir seed sglang_config
sglang_lora_backend sglang_maxlen sglang_mem_fraction sglang_tp_size shift_attn simpo_gamma
skip_special_tokens split_special_tokens stage streaming swanlab_api_key swanlab_lark_secret
swanlab_lark_webhook_url swanlab_logdir swanlab_mode swanlab_project swanlab_run_name
swanlab_workspace task task_dir temperature template tokenized_path tool_format top_k top_p
train_from_scratch train_on_prompt trust_remote_code upcast_layernorm upcast_lmhead_output
use_adam_mini use_apollo use_asft_loss use_audio_in_video use_badam use_dft_loss use_dora
use_eaft_loss use_fast_tokenizer use_galore use_hyper_parallel use_kt use_kv_cache use_llama_pro
use_mca use_muon use_reentrant_gc use_rslora use_swanlab use_unsloth use_unsloth_gc use_v1_kernels
val_size video_fps video_max_pixels video_maxlen video_min_pixels vllm_config vllm_enforce_eager
vllm_gpu_util vllm_max_lora_rank vllm_maxlen
"""

CHAT = """\
model_name_or_path: model
adapter_name_or_path: saves
template: deepseek
infer_backend: ktransformers  # choices: [huggingface, vllm, sglang, ktransformers]
trust_remote_code: true

use_kt: true # use KTransformers as LoRA sft backend to inference
kt_optimize_rule: examples/kt_optimize_rules/DeepSeek-V2-Lite-Chat-sft-amx.yaml
cpu_infer: 32
chunk_size: 8192
"""
# Training files are read like chat files.
TRAINING = """\
### model
model_name_or_path: model
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity, alpaca_en_demo
cutoff_len: 2048
max_samples: 100000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### ktransformers
use_kt: true
"""
INT8 = f"""\
{TRAINING}
lora_alpha: 16
template: deepseek3
kt_cpu_activation: retain
kt_weight_path: experts
kt_non_expert_weight_path: non-experts
kt_config:
  kt_expert_weight_format: int8
  kt_backend: auto
  kt_weight_lifecycle: persistent
  kt_num_threads: 96
  kt_tp_enabled: true
  kt_threadpool_count: 2
  kt_max_cache_depth: 2
  kt_share_backward_bb: true
"""
QWEN3_VL = f"""\
{TRAINING}
image_max_pixels: 262144
video_max_pixels: 16384
lora_alpha: 16
template: qwen3_vl
kt_cpu_activation: retain
kt_config:
  kt_expert_weight_format: bf16
  kt_backend: AMXBF16
  kt_num_threads: 96
  kt_tp_enabled: true
  kt_threadpool_count: 2
  kt_max_cache_depth: 2
  kt_model_max_length: 2176  # Includes the text-only template's dummy-image tokens.
  kt_share_backward_bb: true
"""
INFERENCE = """\
model_name_or_path: model
adapter_name_or_path: saves/checkpoint-300
finetuning_type: lora
lora_rank: 8
lora_alpha: 16
lora_dropout: 0.0

use_kt: true
kt_cpu_activation: retain
kt_config:
  kt_expert_weight_format: bf16
  kt_backend: AMXBF16
  kt_num_threads: 96
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model, KTransformers' two copies of it, and the output of a training."""
    for name in ("model", "experts", "non-experts", "saves/checkpoint-300"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "saves/checkpoint-300/adapter_config.json").write_text("{}")
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/model.safetensors.index.json").write_text('{"weight_map": {}}')
    write_manifest(tmp_path)
    return tmp_path


def write_manifest(folder: Path, **changes: object) -> None:
    """Writes the part of kt_kernel.sft's manifest that names the model."""
    source: dict[str, object] = {"model_name_or_path": str(folder / "model")}
    for key, name in (("config", "config.json"), ("index", "model.safetensors.index.json")):
        digest = hashlib.sha256((folder / "model" / name).read_bytes()).hexdigest()
        source[f"{key}_sha256"] = digest
    manifest = {"version": 2, "status": "ready", "source": source, **changes}
    (folder / "non-experts" / MANIFEST).write_text(json.dumps(manifest))


def load(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refused(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return str(caught.value)


class TestExamples:
    def test_chat(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            config = load(folder, CHAT)
        assert config.experts.kt_num_threads == 32
        assert config.adapter.adapter_name_or_path == folder / "saves/checkpoint-300"
        assert "cpu_infer: 32 is taken as kt_num_threads" in caplog.messages
        assert sum("kt_optimize_rule" in message for message in caplog.messages) == 1
        assert sum("chunk_size" in message for message in caplog.messages) == 1

    def test_kt_num_threads_wins_over_cpu_infer(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            config = load(folder, CHAT, "kt_num_threads=3")
        assert config.experts.kt_num_threads == 3
        assert "Ignored cpu_infer: kt_num_threads 3 decides" in caplog.messages
        assert "cpu_infer: expected an integer" in refused(folder, CHAT.replace("32", "many"))

    def test_int8(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            config = load(folder, INT8)
        assert config.experts.kt_backend == "AMXInt8"
        assert config.experts.kt_weight_path == folder / "experts"
        assert config.experts.kt_tp_enabled
        assert config.template.template == "deepseek3"
        assert any("kt_non_expert_weight_path" in message for message in caplog.messages)

    def test_qwen3_vl(self, folder: Path) -> None:
        config = load(folder, QWEN3_VL)
        assert config.template.template == "qwen3_vl"
        assert config.model.cutoff_len is None

    def test_inference(self, folder: Path) -> None:
        config = load(folder, INFERENCE)
        assert config.adapter.adapter_name_or_path == folder / "saves/checkpoint-300"

    @pytest.mark.parametrize("text", [TRAINING, INT8, QWEN3_VL])
    def test_a_trainings_output_is_mentioned(
        self, folder: Path, text: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert load(folder, text).adapter.adapter_name_or_path is None
        (message,) = caplog.messages
        assert f"adapter_name_or_path={folder}/saves takes it" in message
        caplog.clear()
        assert load(folder, text, "adapter_name_or_path=").adapter.adapter_name_or_path is None
        assert not caplog.messages


class TestCutoffLen:
    def test_of_a_training_is_ignored(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            assert load(folder, TRAINING).model.cutoff_len is None
        assert any("Ignored cutoff_len: this is a training" in each for each in caplog.messages)

    def test_of_a_chat_or_the_command_line_counts(self, folder: Path) -> None:
        assert load(folder, CHAT + "cutoff_len: 512").model.cutoff_len == 512
        assert load(folder, TRAINING, "cutoff_len=512").model.cutoff_len == 512


class TestNonExperts:
    KEYS = "model_name_or_path: model\nkt_non_expert_weight_path: non-experts\n"

    def test_the_manifest_of_another_model(self, folder: Path) -> None:
        (folder / "model/config.json").write_text('{"hidden_size": 8}')
        message = refused(folder, self.KEYS)
        assert "kt_non_expert_weight_path" in message
        assert "config.json is not that of" in message
        write_manifest(folder, status="writing")
        assert "is 'writing', expected 'ready'" in refused(folder, self.KEYS)
        (folder / "non-experts" / MANIFEST).write_text("[]")
        assert MANIFEST in refused(folder, self.KEYS)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w, ""),
            (lambda w: {"norm": w["norm"]}, ""),
            (lambda w: w | {"norm": w["norm"] + 1}, "norm differs from the model's own"),
            (lambda w: w | {"norm": w["norm"].float()}, "norm is F32 [4] there and BF16 [4]"),
            (lambda w: w | {"other": w["norm"].clone()}, "other is no tensor of"),
        ],
        ids=["all", "some", "values", "dtype", "name"],
    )
    def test_without_a_manifest_the_bytes_decide(
        self, folder: Path, message: str, change: Callable[[Any], Any]
    ) -> None:
        (folder / "non-experts" / MANIFEST).unlink()
        weights = {"norm": torch.ones(4).bfloat16(), "head": torch.rand(3, 4).bfloat16()}
        save_file(weights, folder / "model/model.safetensors")
        save_file(change(weights), folder / "non-experts/a.safetensors")
        if message:
            assert message in refused(folder, self.KEYS)
        else:
            load(folder, self.KEYS)

    def test_no_copy(self, folder: Path) -> None:
        (folder / "non-experts" / MANIFEST).unlink()
        save_file({"norm": torch.ones(4)}, folder / "model/model.safetensors")
        assert "holds no *.safetensors" in refused(folder, self.KEYS)
        (folder / "non-experts/a.safetensors").write_bytes(b"damaged" * 9)
        assert "is no safetensors file" in refused(folder, self.KEYS)
        load(folder, self.KEYS.replace("non-experts", "model"))


class TestAddedTokens:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("add_tokens: '<a>, <b>'", ((("<a>", "<b>")), ())),
            ("add_tokens: [<a>, <b>]", ((("<a>", "<b>")), ())),
            ("add_special_tokens: <a>", ((), ("<a>",))),
            ("new_special_tokens: <a>,<b>", ((), ("<a>", "<b>"))),
            ("add_tokens: ''", ((), ())),
        ],
    )
    def test_one_text_or_a_list(
        self, folder: Path, line: str, expected: tuple[object, object]
    ) -> None:
        model = load(folder, f"model_name_or_path: model\n{line}\nresize_vocab: true\n").model
        assert (model.add_tokens, model.add_special_tokens) == expected
        assert model.resize_vocab

    def test_a_file_of_descriptions_wins(self, folder: Path) -> None:
        (folder / "tokens.yaml").write_text("<c>: an end\n<d>: a start\n")
        lines = "model_name_or_path: model\nadd_special_tokens: <a>\n"
        lines += "new_special_tokens_config: tokens.yaml\n"
        assert load(folder, lines).model.add_special_tokens == ("<c>", "<d>")
        assert "tokens.yaml" in refused(folder, lines.replace("tokens.yaml", "no/tokens.yaml"))


class TestKeys:
    @pytest.mark.parametrize("key", KEYS.split())
    def test_every_key_is_known_or_points_to_one(self, folder: Path, key: str) -> None:
        """Null is accepted everywhere; LLaMA-Factory itself refuses compute_dtype in a file."""
        text = f"model_name_or_path: model\n{key}: null\n"
        if key == "compute_dtype":
            assert "did you mean 'infer_dtype'" in refused(folder, text)
        elif key != "model_name_or_path":
            load(folder, text)

    @pytest.mark.parametrize(
        ("key", "hint"),
        [
            ("torch_dtype", "infer_dtype"),
            ("dtype", "infer_dtype"),
            ("max_tokens", "max_new_tokens"),
            ("system", "default_system"),
            ("num_threads", "kt_num_threads"),
            ("lora_path", "adapter_name_or_path"),
            ("learnin_rate", "learning_rate"),
            ("torch_script", ""),
            ("bos_token_id", ""),
            ("cache_implementation", ""),
        ],
    )
    def test_hints(self, folder: Path, key: str, hint: str) -> None:
        message = refused(folder, f"{key}: 1\n")
        assert f"unknown key {key!r}" in message
        assert ("did you mean" in message) == bool(hint), message
        assert f"{hint!r}" in message or not hint

    def test_what_is_meant_is_a_key_that_acts(self) -> None:
        assert set(MEANT.values()) <= _ACTING
        assert not set(MEANT) & _ACTING

    def test_transformers_own_keys(self, folder: Path) -> None:
        """Keys of training are known; keys of generation are used, refused if they have an
        effect, or unknown without a misleading hint."""
        from transformers import GenerationConfig, Seq2SeqTrainingArguments

        known = "\n".join(f"{each.name}: null" for each in fields(Seq2SeqTrainingArguments))
        load(folder, f"model_name_or_path: model\n{known}\n")
        for key in GenerationConfig().to_dict():
            message = ""
            try:
                load(folder, f"model_name_or_path: model\n{key}: null\n")
            except ConfigError as error:
                message = str(error)
            assert "did you mean" not in message or key in MEANT, message


def test_a_wrong_weight_format_names_all_values() -> None:
    expected = "expected auto, bf16, int8, int4, fp8, rawint4 or mxfp4, found 'q4'"
    with pytest.raises(ConfigError, match=expected):
        load_config({"model_name_or_path": "m", "kt_expert_weight_format": "q4"})
