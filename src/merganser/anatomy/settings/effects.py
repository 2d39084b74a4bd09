"""Classify config settings by name: what does a setting change?"""

from __future__ import annotations

import re
from typing import Literal

from .config import COUNT_KEYS, words

__all__ = ["Kind", "kind_of"]

Kind = Literal["meaning", "behaviour", "unknown"]
"""What a setting changes.

    meaning      how the numbers of the tensors are used (heads, activation, multipliers); averaging is meaningless
    behaviour    the tensors mean the same, but the model acts differently (RoPE base, windows, epsilons, top-k experts)
    unknown      not known, as for settings of a checkpoint's own code
"""

_MEANING = re.compile(
    r"""
    # how a matrix is cut into heads
    (^|_)(n|num)_(\w+_)?heads?(_kv)?$ | attention_heads$ | head_?dim$ | d_head$
    | ^(multi_query | d_kv | kv_channels | head_size)$
    # activations and gates
    | (^|_)act$ | _act_fn$ | (^|_)activation(_function|_type)?$ | gated_(act|mlp) | ^feed_forward_proj$ | ^swiglu_
    # multipliers of embeddings, residuals, attention, experts and logits
    | multiplier | ^logits?_scal(e|ing)$ | (^|_)emb(ed|edding)?s?_scal | scale_emb | query_pre_attn_scalar
    | (^|_)rout(ed|e|er)_scal | ^qk_scale | ^scale_(attn|decoder|depth) | ^(attention|attn|residual|softmax)_scal
    | ^mup_ | ^dim_model_base$ | normalize_embeddings
    # positions
    | position_embeddings?_type$ | ^position_type$ | alibi | partial_rotary | ^rotary_(dim|pct)$ | rope_interleave
    | ^no_rope_layers$ | ^relative_attention(_max_distance)?$ | ^pos_att_type$ | position_biased_input
    | absolute_position | ^sinusoidal | learned_pos | ^use_(abs|rel)_pos$
    # kinds of norms, and where they stand
    | norm_type$ | (^|_)(pre|post)_?norm$ | layer_?norm_before | normalize_(before|after) | ^norm_after
    | post_layernorm$ | (^|_)qk_(layer)?norm$ | zero_centered | unit_offset | norm_before_gate | _rms_norm$
    | ^_remove_final_layer_norm$ | parallel_(attn|residual) | new_decoder_architecture
    # routers
    | ^scoring_func | norm_topk | ^moe_renormalize$ | ^topk_method$ | router_activation | ^clip_qkv$
    """,
    re.VERBOSE,
)
_BEHAVIOUR = re.compile(
    r"""
    rope | rotary | window | (layer|attention)_types$ | attention_chunk | local_attention | soft_?cap | _eps$ | epsilon$
    | ^((original_)?max_position_embeddings | n_positions | n_ctx | max_seq(uence)?_len(gth)? | seq_length)$
    | experts_per_tok | ^moe_(top_?)?k$ | top_?k_(experts|group) | ^n(um_expert)?_group$ | index_topk
    | ^is_decoder$ | causal | bidirectional | pooling | ^summary_ | time_step | feature_(layer|select)
    | ^id2label$ | ^log_scaling | attn_(scale|temperature) | floor_scale
    """,
    re.VERBOSE,
)

# Training, generation, caches, names and number formats: no effect on what the model computes.
_NOT_COMPUTED = words(
    """architectures auto_map model_name name license torchscript prefix pruned_heads label2id num_labels problem_type
    finetuning_task task_specific_params pretraining_tp use_cache use_bfloat16 fp16 bf16 fp32 is_encoder_decoder
    chunk_size_feed_forward max_length min_length do_sample temperature top_k top_p typical_p num_beams num_beam_groups
    num_return_sequences diversity_penalty repetition_penalty length_penalty no_repeat_ngram_size early_stopping
    encoder_no_repeat_ngram_size bad_words_ids remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens gradient_checkpointing gradient_clipping use_return_dict return_dict use_mamba_kernels
    use_mambapy use_associative_scan deterministic_flash_attn reorder_and_upcast_attn residual_in_fp32 seed ep_size
    attn_implementation label_smoothing max_batch_size quantization_config compression_config generation_config
    output_attentions output_hidden_states output_router_logits output_past output_scores num_logits_to_keep legacy
    onnx_export is_training dtype"""
)
# Sizes, biases and kinds of layers, which are visible in the tensors; and rules whose results are compared instead.
_SHOWN = words(
    """dim n_embd d_model d_ff d_inner n_inner embedding_size word_embed_proj_dim num_channels in_channels projection_dim
    state_size num_experts num_local_experts num_routed_experts num_shared_experts n_routed_experts n_shared_experts
    moe_num_experts moe_num_shared_experts num_mtp_layers num_nextn_predict_layers relative_attention_num_buckets
    conv_kernel classifier_proj_size dense_act_fn is_gated_act patch_size image_size num_mel_bins max_source_positions
    max_target_positions max_relative_positions encoder_stride pooler_output_size first_k_dense_replace mlp_only_layers
    moe_layer_freq decoder_sparse_step moe_layers interleave_moe_layer_step mlp_layer_types cross_attention_layers
    layers_block_type num_hidden_groups inner_group_num no_rope_layer_interval sliding_window_pattern
    image_seq_length global_attn_every_n_layers full_attention_interval"""
)
_NO_PART = re.compile(
    r"""
    ^_(?!remove) | _version$ | ^(tie|tied|tokenizer|unsloth|torch|init|mm_use|mm_hidden)_ | _dtype$ | softmax_in_fp32$
    | token_ids?$ | token_index$ | drop | initializer | _init(_value|_std)?$ | _std$ | loss | aux_ | coef | jitter | noise
    | _cost$ | mask_(time|feature) | spec_augment | keys_to_ignore | use_kernel | flash
    | bias$ | hidden_size | hidden_dim$ | intermediate_size | ffn_dim$ | vocab_size | lora_rank$ | conv_kernel_dim$
    """,
    re.VERBOSE,
)


def kind_of(key: str) -> Kind | None:
    """Return what a setting changes.

    Args:
        key: Name of the setting, without its sub-config.

    Returns:
        None if it changes nothing, or only what is visible in the tensors.
    """
    if key in COUNT_KEYS or key in _NOT_COMPUTED or key in _SHOWN or _NO_PART.search(key):
        return None
    if _MEANING.search(key):
        return "meaning"
    return "behaviour" if _BEHAVIOUR.search(key) else "unknown"
