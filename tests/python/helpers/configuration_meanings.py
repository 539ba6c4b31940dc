"""Meanings of the configuration's keys, in the words of docs/configuration.md."""

# Keys that LLaMA-Factory and KTransformers do not have.
_OWN = """
adapters adapter_weights lora_B_layout kt_use_cuda_graph kt_fixed_kernels ktrt_cache ktrt_cache_dir
kt_enable_dynamic_expert_update
min_p max_num_seqs min_tokens_per_second reproducible
presence_penalty frequency_penalty logit_bias stop_strings stop_token_ids logprobs top_logprobs
"""
OWN_KEYS = frozenset(_OWN.split())
# Keys that also occur in KTransformers' kt_config mapping.
_KT_CONFIG = """
kt_backend kt_num_threads kt_tp_enabled kt_num_gpu_experts kt_gpu_prefill_token_threshold
kt_weight_path
"""
KT_CONFIG_KEYS = frozenset(_KT_CONFIG.split())
# Where "–" or the dataclass's own value would not say what happens.
SHOWN_DEFAULTS = {
    "template": "`auto`",
    "default_system": "the template's",
    "adapter_weights": "the first adapter, weight 1",
    "kt_num_threads": "`OMP_NUM_THREADS`, or one per core",
    "ktrt_cache_dir": "`KTRT_CACHE_DIR`, or `~/.cache/ktrt`",
    "seed": "a new one each run",
    "enable_thinking": "the model decides",
    "cutoff_len": "the model's context",
}
MEANINGS = {
    # The model.
    "model_name_or_path": "Directory of the base model, in Hugging Face format with safetensors.",
    "trust_remote_code": "Allows Python code of a model folder. Architectures that transformers "
    "has never run it; a tokenizer's code runs only if the tokenizer exists in no other form.",
    "infer_dtype": "Compute dtype of everything outside the routed experts.",
    "cutoff_len": "Upper bound for the tokens of a conversation. Ignored, with a line, in a YAML "
    "that also trains.",
    "quantization_bit": "`8`: without a GPU, also quantises the linear layers outside the experts "
    "to INT8, except routers and `kv_b_proj`. Other values are refused.",
    "resize_vocab": "The embeddings were resized to the tokenizer before training.",
    "add_tokens": "Tokens that training added, in this order; a list, or one text with commas.",
    "add_special_tokens": "Special tokens that training added, in this order.",
    # The adapters.
    "adapter_name_or_path": "Adapter directory, or several (`a,b` or a list). Empty: the base "
    "model. The output folder of a training stands for its newest complete `checkpoint-N`; an "
    "adapter one folder deeper is found.",
    "lora_rank": "Checked against `adapter_config.json`, which decides.",
    "lora_alpha": "Checked against `adapter_config.json`, which decides.",
    "lora_B_layout": "Column order of stacked lora_B, for files that do not record it: "
    "`rank_major` is PEFT's, `grouped_by_expert` Unsloth's from 2026-02 to 2026-09.",
    "adapters": "Several adapters by name: `{name: path}`. Replaces `adapter_name_or_path`.",
    "adapter_weights": "`{name: weight}`: starts with this weighted sum of adapters.",
    # The experts' engine.
    "kt_backend": "Weight format of the routed experts (case-insensitive, also without `AMX`). "
    "`auto`: as the checkpoint stores them ([all formats](models.md#formats)). It does not require "
    "AMX: the engine picks the best kernels the CPU has.",
    "kt_num_threads": "CPU threads of the engine; at most the CPU quota of a container.",
    "kt_tp_enabled": "Shards every expert over the NUMA nodes.",
    "kt_use_cuda_graph": "With a GPU: runs each decode step as one CUDA graph.",
    "kt_fixed_kernels": "With AMX: one kernel for any number of tokens, so that an answer does not "
    "depend on what else is computed with it ([what it costs](performance.md#many-conversations-"
    "and-adapters)). Without AMX that holds anyway.",
    "kt_num_gpu_experts": "With a GPU: number of experts per layer that stay there; `auto`: as "
    "many as fit.",
    "kt_gpu_prefill_token_threshold": "With a GPU: forwards of at least this many tokens stream "
    "all experts there. `0`: never; `auto`: measured at load.",
    "kt_enable_dynamic_expert_update": "With a GPU: which of a layer's experts stay there follows "
    "the conversation ([what it costs](gpu.md#experts-on-the-gpu)). `false`: the first ones stay.",
    "kt_weight_path": "Experts packed by kt_kernel (INT8 or INT4; a `.kt` tree or converted "
    "safetensors), used instead of the model's own.",
    "ktrt_cache": "Keeps packed experts on disk.",
    "ktrt_cache_dir": "Folder of the pack cache.",
    # The template.
    "template": "Chat template: one of [121 names](models.md#templates), or `auto`, the "
    "tokenizer's own. An adapter needs the template it was trained with.",
    "default_system": 'System prompt instead of the template\'s own; `""`: none.',
    "enable_thinking": "Switches thinking on or off, in templates of reasoning models.",
    # The scheduler.
    "max_num_seqs": "Most answers that are computed at once; others wait.",
    "min_tokens_per_second": "Floor for every stream: a request waits while one more would push "
    "streams below it, by predictions. `0`: no floor.",
    "reproducible": "An answer depends on its request alone, to the last bit: not on what else is "
    "computed (`kt_fixed_kernels` is then on), nor on earlier answers, whose tokens are computed "
    "again in the next turn ([what it costs](serving.md#reproducible-answers)). Without a GPU "
    "only.",
    # Sampling.
    "do_sample": "`false`: greedy.",
    "temperature": "`0` is greedy.",
    "top_p": "Nucleus sampling; `1` switches it off.",
    "top_k": "`0` switches it off.",
    "min_p": "Drops tokens below this share of the likeliest token's probability.",
    "max_new_tokens": "Longest answer, in tokens.",
    "repetition_penalty": "Applies to prompt and answer, as in transformers.",
    "presence_penalty": "OpenAI's definition, −2 to 2; counts the answer only.",
    "frequency_penalty": "OpenAI's definition, −2 to 2; counts the answer only.",
    "logit_bias": "Token ids with what is added to their logits, −100 to 100.",
    "skip_special_tokens": "Leaves special tokens out of the text of an answer.",
    "seed": "Makes sampling reproducible.",
    "stop_strings": "Texts that end an answer. They are never shown, not even in part.",
    "stop_token_ids": "Token ids that end an answer, in addition to the template's.",
    "logprobs": "Reports the log probability of each token.",
    "top_logprobs": "Reports the log probabilities of this many likeliest tokens, at most 20; "
    "requires `logprobs`.",
    # Settled while the file is read.
    "use_kt": "Must be true: ktrt always runs the experts in its engine.",
    "infer_backend": "`huggingface` or `ktransformers`; both mean ktrt.",
    "cpu_infer": "LLaMA-Factory 0.9.4's name of `kt_num_threads`, which wins if both are there.",
    "kt_non_expert_weight_path": "Checked against the model and not read: the model's own weights "
    "are used.",
    "output_dir": "Not used as an adapter; a line says so if it holds one and none is configured.",
    "finetuning_type": "With an adapter: must be `lora`.",
    "adapter_folder": "Folder inside `adapter_name_or_path` that holds the adapter.",
    "new_special_tokens_config": "YAML file whose keys are special tokens that training added; "
    "wins over `add_special_tokens`.",
}
