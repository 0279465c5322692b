"""Fields of megatron-core's configs, of 0.16 to 0.19, of which layer dropping has no need to know, and why.

Those of which it has are in docs/compatibility_evidence.md. A field of a new version belongs into one of both: into the
table, if it touches which layers run, what a skip hands on, gradients and their reduction, the optimizer's step,
recomputation, pipelines or captured graphs; here, if it has been read and touches none of them.
"""

from __future__ import annotations

OF_FSDP = ("fsdp_", "megatron_fsdp_")
"""Beginnings of names: FSDP is refused as a whole."""

OF_NO_CONCERN: dict[str, str] = {
    "sizes and shapes of the model, and which layers a stage holds: decisions go by a layer's number": """
        num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels moe_ffn_hidden_size moe_latent_size
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split mtp_standalone
        hierarchical_context_parallel_sizes heterogeneous_layers_config_path
        heterogeneous_layers_config_encoded_json per_block_parameters microbatch_group_size_per_vp_stage
    """,
    "how weights begin, and how they are counted for muP": """
        init_method init_method_std output_layer_init_method embedding_init_method embedding_init_method_std
        perform_initialization use_cpu_initialization use_mup mup_width_mult mup_base_hidden_size mup_base_head_dim
        mup_attn_scale_power mup_embedding_mult mup_output_mult
    """,
    "arithmetic inside a kept layer, which keeps nothing for the next pass": """
        activation_func activation_func_clamp_value activation_func_fp8_input_store bias_activation_fusion
        glu_linear_offset use_te_activation_func use_fused_weighted_squared_relu layernorm_epsilon
        layernorm_zero_centered_gamma persist_layer_norm memory_efficient_layer_norm
        apply_residual_connection_post_layernorm add_qkv_bias apply_query_key_layer_scaling attention_softmax_in_fp32
        attention_backend attention_output_gate flash_attention_version softmax_scale softmax_type qk_layernorm
        qk_l2_norm window_attn_skip_freq no_rope_freq rotary_interleaved fused_single_qkv_rope mrope_section
        cp_comm_type use_transformer_engine_op_fuser use_grouped_gemm_for_dense_mlp symmetric_ar_type
        disable_bf16_reduced_precision_matmul deterministic_mode batch_invariant_mode test_mode transformer_impl
    """,
    "multi-latent attention inside a kept layer": """
        q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type rotary_base rotary_percent
        rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim
        mla_down_proj_fusion
    """,
    "experts inside a kept layer: routing of a token, kernels, dispatch": """
        moe_router_topk moe_router_topk_limited_devices moe_router_num_groups moe_router_group_topk
        moe_router_pre_softmax moe_router_score_function moe_router_topk_scaling_factor moe_router_dtype
        moe_router_force_load_balancing moe_router_force_biased moe_router_padding_for_fp8
        moe_router_padding_for_quantization moe_aux_loss_coeff moe_router_bias_update_rate moe_token_dropping
        moe_token_drop_policy moe_apply_probs_on_input moe_enable_deepep moe_deepep_num_sms moe_hybridep_num_sms
        moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms moe_hybridep_num_sms_preprocessing
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_pad_uneven_dispatch_inputs
        moe_permute_fusion_into_hybridep moe_ncclep_static_shape moe_ncclep_zero_copy moe_shared_expert_gate
        moe_shared_expert_glu_interleave_size moe_mlp_glu_interleave_size use_grouped_gemm_for_shared_expert
        moe_single_grouped_weight moe_single_grouped_bias moe_use_legacy_grouped_gemm moe_extended_tp
        moe_layer_recompute
    """,
    "what is printed, measured or written aside": """
        moe_per_layer_logging timers barrier_with_L1_time config_logger_dir hetereogenous_dist_checkpoint
    """,
    "outside of all decoder layers: embedding, output, loss, multi-token prediction": """
        clone_scatter_output_in_embedding cross_entropy_fusion_impl fp8_output_proj wgrad_deferral_limit
        mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads mtp_hybrid_override_pattern
    """,
    "what schedules call around whole passes, whatever ran in them": """
        finalize_model_grads_func grad_scale_func moe_grad_scale_func mtp_grad_scale_func no_sync_func
        experimental_attention_variant_loss_scale_func
    """,
    "types and autocasting": """
        params_dtype pipeline_dtype enable_autocast autocast_dtype
    """,
    "how stages send and receive: a skip does neither": """
        batch_p2p_sync use_ring_exchange_p2p overlap_p2p_comm_warmup_flush pipeline_model_parallel_comm_backend
    """,
    "details of tp_comm_overlap, inside Transformer Engine's layers": """
        tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad
        tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_overlap_disable_fc1
        tp_comm_overlap_disable_qkv tp_comm_split_ag tp_comm_split_rs async_tensor_model_parallel_allreduce
    """,
    "details of fp8 and fp4, which are in the table": """
        fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_dot_product_attention
        fp8_multi_head_attention fp8_param fp4_param fp4_recipe tp_only_amax_red first_last_layers_bf16
        num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 disable_parameter_transpose_cache
    """,
    "details of recomputation, which is in the table": """
        recompute_method recompute_num_layers
    """,
    "details of random states: a skipped layer draws no number": """
        use_te_rng_tracker inference_rng_tracker
    """,
    "details of, or older names for, what is refused": """
        _cpu_offloading_context cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights
        cpu_offloading_double_buffering cpu_offloading_retain_pinned_cpu_buffers offload_modules
        min_offloaded_tensor_size fine_grained_offloading_max_inflight_offloads activation_offload_fraction
        delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks enable_cuda_graph external_cuda_graph
        cuda_graph_scope cuda_graph_modules cuda_graph_warmup_steps cuda_graph_use_single_mempool
        cuda_graph_retain_backward_graph max_seqlen_per_dp_cp_rank ep_overlap_early_attn_memory_release
        high_priority_a2a_comm_stream qk_clip_alpha qk_clip_threshold kitchen_attention_backend
        moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu
        moe_router_quantile_balancing_ema
        dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_skip_topk_offset
        dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss dsa_indexer_rope_interleaved dsa_indexer_rotate_activation
        dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 dsa_kernel_backend
        linear_attention_freq linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim
        linear_num_key_heads linear_num_value_heads
    """,
    "Mamba's layers, which are none of a GPTModel": """
        is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path
        mamba_training_ssm_states_dtype
    """,
    "inference, which runs every layer": """
        flash_decode cache_mla_latents mlp_chunks_for_prefill use_inference_optimized_layers inference_sampling_seed
        inference_fuse_tp_communication inference_cuda_graph_scope inference_grouped_gemm_backend
        inference_disable_triton_nvls_kernels inference_moe_disable_fused_quant_kernels
        inference_moe_token_dispatcher_type nccl_all_reduce_for_prefill moe_pad_experts_for_cuda_graph_inference
    """,
    "numbers of a step of Adam or SGD, and of the scale of fp16": """
        lr min_lr decoupled_lr decoupled_min_lr weight_decay apply_wd_to_qk_layernorm decoupled_weight_decay adam_beta1
        adam_beta2 adam_eps sgd_momentum loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis
    """,
    "numbers of optimizers that are refused": """
        muon_momentum muon_split_qkv muon_use_nesterov muon_nesterov muon_scale_mode muon_fp32_matmul_prec
        muon_num_ns_steps muon_tp_mode muon_extra_scale_factor muon_coefficient_type muon_scalar_optimizer lion_beta1
        lion_beta2 soap_shampoo_beta soap_precondition_frequency soap_use_kl_shampoo adaptive_muon_moment2_method
        adaptive_muon_beta2 adaptive_muon_eps
    """,
    "details of the precision-aware and the offloaded optimizer, which are in the table": """
        main_params_dtype exp_avg_dtype exp_avg_sq_dtype store_param_remainders optimizer_offload_fraction
        use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params
    """,
    "how a reduction that is made computes, or where its buffers lie": """
        grad_reduce_in_fp32 disable_symmetric_registration
    """,
}
