"""What the test of all configs of transformers knows: keys that only sound like layers, and families that are refused."""

from merganser.anatomy.settings.config import words

# Keys that sound like layers, or lists that are as long, and are about something else.
OTHER_KEYS = words(
    # sizes, periods and steps of other things
    """aff_block_r altup_active_idx block_multiple_of block_per_row block_repeats block_size conv_depthwise_kernel_size
    conv_kernel_size depth_divisor depth_separable_channels depthwise_multiplier depthwise_padding
    depthwise_separable_out_channel diffusion_max_period freq_size frequency_embedding_size frequency_stride
    global_block_size index_block_size index_local_blocks index_topk_blocks initial_prior_diagonal_n_blocks
    initial_prior_first_n_blocks last_kernel_size latent_stats_ema_steps max_depth max_source_positions
    max_symbols_per_step num_patterns num_prototypes num_random_blocks prediction_channel_indices prompt_types
    rescale_every s2r_steps segment_types sparse_pred_ignore_index summary_idxs time_step_limit time_step_rank
    two_stage_num_proposals unmasked_channel_indices vocab_size_per_layer_input"""
    # numbers of layers of other stacks
    """ c2f_num_blocks decoder_num_hidden_layers decoder_num_layers depth_separable_num_layers
    duration_predictor_layers energy_predictor_layers iou_head_depth loss_weighting_num_layers lqe_layers
    mit_num_hidden_layers num_adapter_layers num_conv_layers num_feat_extract_layers num_global_layers
    num_layers_per_stack num_mel_attn_blocks num_mtp_layers num_nextn_predict_layers num_pooler_layers num_res_blocks
    num_residual_layers num_self_attends_per_block num_timestamp_prediction_layers num_upscale_blocks
    pitch_predictor_layers posterior_encoder_num_wavenet_layers pred_num_hidden_layers
    prior_encoder_num_wavenet_layers query_dec_layers resampler_depth speech_decoder_postnet_layers
    speech_decoder_prenet_layers speech_encoder_layers t2u_decoder_layers t2u_encoder_layers text_encoder_num_layers
    text_encoder_proj_layers num_sparse_decoder_layers num_sparse_encoder_layers"""
    # lists of other stacks and of stages, which have `depths`
    """ dilations encode_proj_layers encoder_projection_indices hidden_sizes neck_ignore_stages num_attention_heads
    num_heads patch_sizes pretrained_window_sizes resblock_dilation_sizes resblock_kernel_sizes"""
)

# Families that have settings for which the tried layers have no config: stages, a last layer that must be of one kind,
# tables with columns for each layer, blocks of layers.
REFUSED = words(
    """clap_audio_model dinat donut-swin muse_spark_audio swin swin2sr swinv2 diffusion_gemma_text embedding_gemma2_text
    gemma4_text gemma4_unified_text inkling2_text"""
)
