"""The keys that LLaMA-Factory accepts and ktrt does not act on: ignored, reported or refused.

Names: the argument dataclasses of LLaMA-Factory (src/llamafactory/hparams, 0.8.0 … 2026-08), of
transformers' Seq2SeqTrainingArguments (4.45 … 5.23) and kt_kernel's ``kt_sft`` config (0.7.2).
"""

from dataclasses import dataclass

# Training, dataset, evaluation, export and other inference backends: no effect on a chat.
_IGNORED_NAMES = """
buffer_size data_shared_file_system dataset dataset_dir eval_dataset eval_num_beams
eval_on_each_dataset ignore_pad_token_for_loss interleave_probs mask_history max_samples media_dir
image_dir mix_strategy neat_packing overwrite_cache packing preprocessing_batch_size
preprocessing_num_workers streaming tokenized_path train_on_prompt val_size

batch_size download_mode lang n_shot save_dir task task_dir

additional_target apollo_layerwise apollo_proj apollo_proj_type apollo_rank apollo_scale
apollo_scale_front apollo_scale_type apollo_target apollo_update_interval asft_alpha badam_mask_mode
badam_mode badam_start_block badam_switch_interval badam_switch_mode badam_update_ratio
badam_verbose compute_accuracy create_new_adapter disable_shuffling dpo_label_smoothing eaft_alpha
early_stopping_steps freeze_extra_modules freeze_language_model freeze_multi_modal_projector
freeze_trainable_layers freeze_trainable_modules freeze_vision_tower galore_layerwise
galore_proj_type galore_rank galore_scale galore_target galore_update_interval hyper_parallel_args
hyper_parallel_cp_size include_effective_tokens_per_second kto_chosen_weight kto_rejected_weight
ld_alpha lora_dropout lora_target loraplus_lr_embedding loraplus_lr_ratio module_dropout
oft_block_size oft_rank oft_target pissa_convert pissa_init pissa_iter plot_loss ppo_buffer_size
ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards pref_bco_weight pref_beta pref_ftx pref_loss
pure_bf16 ref_model ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters
reward_model_quantization_bit reward_model_type simpo_gamma stage swanlab_api_key
swanlab_lark_secret swanlab_lark_webhook_url swanlab_logdir swanlab_mode swanlab_project
swanlab_run_name swanlab_workspace train_mm_proj_only use_adam_mini use_apollo use_asft_loss
use_badam use_dft_loss use_eaft_loss use_galore use_hyper_parallel use_llama_pro use_mca
use_megatron_bridge use_muon use_ray use_swanlab

audio_sampling_rate crop_to_patches disable_gradient_checkpointing enable_liger_kernel export_device
export_dir export_hub_model_id export_legacy_format export_quantization_bit
export_quantization_dataset export_quantization_maxlen export_quantization_nsamples export_size
hf_hub_token image_do_pan_and_scan image_max_pixels image_min_pixels image_resolution
init_special_tokens kt_cpu_activation moe_aux_loss_coef ms_hub_token om_hub_token print_param_status
sglang_config sglang_lora_backend sglang_maxlen sglang_mem_fraction sglang_tp_size upcast_layernorm
use_audio_in_video use_reentrant_gc use_unsloth use_unsloth_gc video_fps video_max_pixels
video_maxlen video_min_pixels video_resolution vllm_config vllm_enforce_eager vllm_gpu_util
vllm_max_lora_rank vllm_maxlen

enable_torch_profiler fp8 fp8_backend fp8_enable_fsdp_float8_all_gather master_addr master_port
overwrite_output_dir placement_strategy profile_modules profiler_active_steps profiler_output_dir
profiler_profile_memory profiler_record_shapes profiler_repeat profiler_wait_steps
profiler_warmup_steps profiler_with_stack ray_init_kwargs ray_num_workers ray_run_name ray_scope
ray_storage_filesystem ray_storage_path resources_per_worker

accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2
adam_epsilon auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16
bf16_full_eval data_seed dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm
dispatch_batches do_eval do_predict do_train enable_jit_checkpoint eval_accumulation_steps
eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy eval_use_gather_object
evaluation_strategy fp16 fp16_backend fp16_full_eval fp16_opt_level fsdp fsdp_config
fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap full_determinism generation_config
generation_max_length generation_num_beams gradient_accumulation_steps gradient_checkpointing
gradient_checkpointing_kwargs greater_is_better group_by_length half_precision_backend
hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip
include_for_metrics include_inputs_for_metrics include_num_input_tokens_seen
include_tokens_per_second jit_mode_eval label_names label_smoothing_factor learning_rate
length_column_name liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica
log_on_each_node logging_dir logging_first_step logging_nan_inf_filter logging_steps
logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps metric_for_best_model
mp_parameters neftune_noise_alpha no_cuda num_train_epochs optim optim_args optim_target_modules
output_dir parallelism_config past_index per_device_eval_batch_size per_device_train_batch_size
per_gpu_eval_batch_size per_gpu_train_batch_size predict_with_generate prediction_loss_only project
push_to_hub push_to_hub_model_id push_to_hub_organization push_to_hub_token remove_unused_columns
report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node
save_only_model save_safetensors save_steps save_strategy save_total_limit skip_memory_metrics
sortish_sampler split_batches tf32 torch_compile torch_compile_backend torch_compile_mode
torch_empty_cache_steps torchdynamo tpu_metrics_debug tpu_num_cores trackio_bucket_id
trackio_space_id trackio_static_space_id train_sampling_strategy use_cache use_cpu use_ipex
use_legacy_prediction_loop use_liger_kernel use_mps_device warmup_ratio warmup_steps weight_decay

split reserved_label_len visual_inputs vllm_dtype
account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split apply_rope_fusion
bias_activation_fusion block_diag_attn calculate_per_token_loss context_parallel_size
cross_entropy_loss_fusion expert_model_parallel_size export_hf_on_finish extra_config
masked_softmax_fusion megatron_bridge_args megatron_pretrained_checkpoint mixed_precision
moe_grouped_gemm moe_token_dispatcher_type overlap_grad_reduce overlap_param_gather
pipeline_model_parallel_size recompute_granularity recompute_method recompute_num_layers
sequence_parallel tensor_model_parallel_size use_distributed_optimizer use_packed_sequences
virtual_pipeline_model_parallel_size

kt_activation_policy kt_checkpoint_files kt_force_fused_expert_lora kt_full_weight_grad
kt_lora_dropout
kt_share_backward_bb kt_share_cache_pool kt_sharded_metadata kt_skip_expert_loading kt_train_mode
kt_wrap_fn kt_wrap_kwargs
"""
IGNORED = frozenset(_IGNORED_NAMES.split())

# Keys of inference that have no effect here: reported, one line each.
NOTED = {
    "use_dora": "adapter_config.json decides",
    "use_rslora": "adapter_config.json decides",
    "kt_model_max_length": "the context limit is the model's own, or cutoff_len",
    "kt_maxlen": "the context limit is the model's own, or cutoff_len",
    "max_length": "max_new_tokens bounds the answer",
    "length_penalty": "it concerns beam search only",
    "quantization_type": "it concerns 4 bits, which ktrt has for experts only (kt_backend)",
    "double_quantization": "it concerns 4 bits, which ktrt has for experts only (kt_backend)",
    "shift_attn": "it concerns training",
    "use_kv_cache": "generation always uses the KV cache",
    "tool_format": "a chat calls no tools",
    "model_max_length": "the context limit is the model's own, or cutoff_len",
    "device_map": "the memory plan decides what lies where",
    "attn_implementation": "transformers' default attention is used",
    "use_fast": "transformers chooses the tokenizer",
    "padding_side": "sequences of different lengths share a step without padding",
    "flash_attn": "transformers' default attention is used",
    "use_v1_kernels": "ktrt has its own kernels",
    "low_cpu_mem_usage": "the model is always loaded that way",
    "offload_folder": "nothing is offloaded to disk",
    "upcast_lmhead_output": "sampling always runs in float32",
    "cache_dir": "models are read from local directories only",
    "model_revision": "models are read from local directories only",
    "use_fast_tokenizer": "transformers chooses the tokenizer",
    "kt_threadpool_count": "ktrt runs one thread pool",
    "kt_max_cache_depth": "it sizes the activation cache of training",
    "kt_moe_lora_device": "the experts' LoRA runs inside their GEMMs on the CPU",
    "kt_weight_lifecycle": "packed expert weights stay in memory",
    "kt_optimize_rule": "the experts are found in the model itself",
    "kt_mode": "there is no such switch here",
    "mode": "there is no such switch here",
    "chunk_size": "there is no such switch here",
    "kt_use_lora_experts": "the adapter's files decide",
    "kt_lora_expert_num": "the adapter's files decide",
    "kt_lora_expert_intermediate_size": "the adapter's files decide",
}


@dataclass(frozen=True)
class Refusal:
    """A key that would change the answers: only its neutral values are accepted."""

    neutral: tuple[object, ...]
    advice: str


# Keys of transformers' GenerationConfig, with the values that change nothing.
_SAMPLERS: dict[str, tuple[object, ...]] = {
    "assistant_early_exit": (None,),
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "diversity_penalty": (None, 0),
    "dola_layers": (None,),
    "early_stopping": (None, False),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None,),
    "prompt_lookup_num_tokens": (None,),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "token_healing": (None, False),
    "top_h": (None,),
    "typical_p": (None, 1),
    "watermarking_config": (None,),
}

REFUSED = {
    "kt_expert_checkpoint_path": Refusal(
        (None, ""),
        "the experts are read from model_name_or_path, or as kt_kernel packed them from "
        "kt_weight_path",
    ),
    "kt_force_think": Refusal((None, False), "choose a reasoning template instead"),
    "num_beams": Refusal((None, 1), "beam search is not supported"),
    "quantization_method": Refusal(
        (None, "bnb"), "quantization_bit: 8 is ktrt's own INT8, with a scale per output row"
    ),
    "quantization_device_map": Refusal((None,), "load an unquantised checkpoint"),
    "load_in_8bit": Refusal((None, False), "quantization_bit: 8 is ktrt's own INT8"),
    "load_in_4bit": Refusal((None, False), "kt_backend: RAWINT4 has 4 bits for the experts"),
    "rope_scaling": Refusal((None,), "set it in the model's config.json"),
    "mixture_of_depths": Refusal((None,), "it is not supported"),
    "train_from_scratch": Refusal((None, False), "there is nothing to chat with"),
    "split_special_tokens": Refusal((None, False), "templates need special tokens whole"),
    "preserve_thinking": Refusal((None, False), "thoughts of earlier turns are always dropped"),
    **{
        name: Refusal(neutral, "ktrt's sampling does not have it")
        for name, neutral in _SAMPLERS.items()
    },
}

# Names from other programs, and the keys that they mean.
MEANT = {
    "adapter": "adapter_name_or_path",
    "adapter_path": "adapter_name_or_path",
    "batch_invariant": "reproducible",
    "base_model": "model_name_or_path",
    "base_model_name_or_path": "model_name_or_path",
    "chat_template": "template",
    "compute_dtype": "infer_dtype",
    "context_length": "cutoff_len",
    "dtype": "infer_dtype",
    "enable_deterministic_inference": "reproducible",
    "eos_token_id": "stop_token_ids",
    "lora_path": "adapter_name_or_path",
    "max_batch_size": "max_num_seqs",
    "max_concurrent": "max_num_seqs",
    "max_model_len": "cutoff_len",
    "max_seq_len": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "max_tokens": "max_new_tokens",
    "model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "n_ctx": "cutoff_len",
    "n_parallel": "max_num_seqs",
    "num_threads": "kt_num_threads",
    "peft_path": "adapter_name_or_path",
    "stop_sequences": "stop_strings",
    "stop_words": "stop_strings",
    "system": "default_system",
    "system_prompt": "default_system",
    "temp": "temperature",
    "threads": "kt_num_threads",
    "torch_dtype": "infer_dtype",
}
# Keys that only a training's YAML has; its cutoff_len cuts the samples.
TRAINING = frozenset(
    {
        "dataset",
        "do_train",
        "learning_rate",
        "max_samples",
        "max_steps",
        "num_train_epochs",
        "output_dir",
        "per_device_train_batch_size",
        "tokenized_path",
    }
)
