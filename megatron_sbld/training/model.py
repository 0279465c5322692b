"""From the config to megatron-core's parts: GPTModel chunks in DistributedDataParallel, optimizer, scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch.utils._triton import has_triton

from megatron_sbld.config.flops import ffn_hidden_size
from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config, ModelConfig
from megatron_sbld.mcore.compat import check_megatron_core, wrap_in_ddp
from megatron_sbld.mcore.local.compiled import compile_layers, compiler_obstacle
from megatron_sbld.mcore.local.layer_specs import choose_transformer_impl, gpt_block_spec
from megatron_sbld.mcore.optimizer.copies import copy_in_groups
from megatron_sbld.mcore.optimizer.grad_norm import clip_in_groups
from megatron_sbld.mcore.optimizer.state import fuse_adam
from megatron_sbld.ranks import this_device
from megatron_sbld.residual.choice import library_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_model(config: Config) -> None:
    """Refuse what cannot be built with the libraries of this machine.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    check_megatron_core(trainer=True)
    impl, reason = choose_transformer_impl(config.model.transformer_impl)
    modules = config.training.recompute_modules or []
    usable = ["core_attn"]
    if not torch.cuda.is_available():  # on a GPU the MLP hands its bias to a fused function (mcore/local/linear.py)
        usable.append("mlp")
    unusable = sorted(set(modules) - set(usable))
    if impl == "local" and unusable:
        raise ValueError(
            f"training.recompute_modules = {modules}: {', '.join(unusable)} can be recomputed with Transformer Engine "
            f"only, but model.transformer_impl is local ({reason}); allowed are {', '.join(usable)}"
        )
    if config.training.torch_compile and impl != "local":
        raise ValueError(
            f"training.torch_compile = True: compiles megatron-core's local layers, but model.transformer_impl is "
            f"{impl} ({reason}); must be false, or transformer_impl local"
        )
    if config.training.torch_compile and (obstacle := compiler_obstacle()) is not None:
        raise ValueError(f"training.torch_compile = True: {obstacle}; must be false")
    if config.drop.residual == "fused":
        try:
            library_for(this_device(), DTYPES[config.training.precision])
        except RuntimeError as error:
            raise ValueError(f"drop.residual = 'fused': {error}") from error


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron's TransformerConfig for this run."""
    model, parallel, training = config.model, config.parallel, config.training
    on_gpu = torch.cuda.is_available()
    activation_func, bias_activation_fusion = _activation(model, on_gpu)
    interleaved = parallel.num_virtual_stages_per_pipeline_rank is not None
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=ffn_hidden_size(model),
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=activation_func,
        add_bias_linear=model.add_bias_linear,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        bias_activation_fusion=bias_activation_fusion,
        bias_dropout_fusion=on_gpu,
        cross_entropy_loss_fusion=_fuses_loss(config, on_gpu),
        calculate_per_token_loss=training.calculate_per_token_loss,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.num_virtual_stages_per_pipeline_rank,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        deallocate_pipeline_outputs=parallel.deallocate_pipeline_outputs,
        # On gloo, overlapped sends with deallocated outputs give wrong gradients even when nothing is dropped.
        overlap_p2p_comm=on_gpu and interleaved,
        # Batched, the two messages that an interleaved stage sends to the one other stage of PP 2 are mistaken for each
        # other: wrong losses without an error.
        batch_p2p_comm=on_gpu and not interleaved,
        params_dtype=DTYPES[training.precision],
        pipeline_dtype=DTYPES[training.precision],
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        recompute_granularity=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        recompute_modules=training.recompute_modules,
    )


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GeLU's tanh approximation: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    return F.gelu(x, approximate="tanh")


def _activation(model: ModelConfig, on_gpu: bool) -> tuple[Callable[[torch.Tensor], torch.Tensor], bool]:
    """Megatron's activation_func and bias_activation_fusion.

    Its fused GeLU is the tanh approximation, though asked for by F.gelu: fused for that alone, so that a model computes
    the same on a GPU and elsewhere.
    """
    if model.swiglu:
        return F.silu, on_gpu
    if model.activation_func == "gelu":
        return F.gelu, False
    fused = on_gpu and model.add_bias_linear
    return F.gelu if fused else gelu_tanh, fused


def _fuses_loss(config: Config, on_gpu: bool) -> bool:
    if config.training.cross_entropy_loss_fusion is not None:
        return config.training.cross_entropy_loss_fusion
    return on_gpu and config.training.precision == "bf16" and has_triton()


def loss_weights_text(config: Config) -> str | None:
    """What counts alike in the gradient, where training.calculate_per_token_loss makes a difference."""
    if not config.data.eod_mask_loss:
        return None
    if config.training.calculate_per_token_loss:
        return "training.calculate_per_token_loss: true, so each token that data.eod_mask_loss leaves in counts alike"
    return (
        "training.calculate_per_token_loss: false, so each microbatch counts alike, however many tokens "
        "data.eod_mask_loss leaves in it: the gradient depends on training.micro_batch_size and on the layout"
    )


def build_model(config: Config, vocab_size: int) -> list[DistributedDataParallel]:
    """This rank's model chunks (one, or one for each virtual stage), in Megatron's DistributedDataParallel.

    Args:
        config: the run.
        vocab_size: padded vocabulary.
    """
    chunks = build_chunks(config, vocab_size)
    if config.training.torch_compile:
        compile_layers(chunks)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.training.precision != "fp32",
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        bucket_size=config.parallel.ddp_bucket_size,
    )
    # Only the first chunk's communication is exposed, so the others are not bucketed (as in Megatron-LM).
    return [
        wrap_in_ddp(get_model_config(chunk), ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_chunks(config: Config, vocab_size: int) -> list[torch.nn.Module]:
    """The same without what training adds: GPTModels, in a Float16Module where precision is not fp32."""
    tconfig = transformer_config(config)
    num_chunks = config.parallel.num_virtual_stages_per_pipeline_rank
    vp_stages: list[int | None] = list(range(num_chunks)) if num_chunks else [None]
    chunks: list[torch.nn.Module] = [_build_chunk(config, tconfig, vocab_size, stage) for stage in vp_stages]
    for chunk in chunks:
        for param in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
    if tconfig.fp16 or tconfig.bf16:
        chunks = [Float16Module(tconfig, chunk) for chunk in chunks]
    return chunks


def _build_chunk(config: Config, tconfig: TransformerConfig, vocab_size: int, vp_stage: int | None) -> GPTModel:
    model = config.model
    return GPTModel(
        config=tconfig,
        transformer_layer_spec=gpt_block_spec(tconfig, model.transformer_impl, vp_stage=vp_stage),
        vocab_size=vocab_size,
        max_sequence_length=model.max_position_embeddings or model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )


def build_optimizer(config: Config, chunks: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """Megatron's optimizer, distributed where the config asks for it, and the hooks that its training step expects."""
    opt, training = config.optimizer, config.training
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=opt.lr,
            min_lr=opt.min_lr,
            weight_decay=opt.weight_decay,
            adam_beta1=opt.adam_beta1,
            adam_beta2=opt.adam_beta2,
            adam_eps=opt.adam_eps,
            clip_grad=opt.clip_grad,
            log_num_zeros_in_grad=opt.log_num_zeros_in_grad,
            params_dtype=DTYPES[training.precision],
            bf16=training.precision == "bf16",
            fp16=training.precision == "fp16",
            loss_scale=training.loss_scale,
            initial_loss_scale=training.initial_loss_scale,
            min_loss_scale=training.min_loss_scale,
            loss_scale_window=training.loss_scale_window,
            hysteresis=training.hysteresis,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            overlap_param_gather=config.parallel.overlap_param_gather,
        ),
        list(chunks),
    )
    fuse_adam(optimizer)
    clip_in_groups()
    copy_in_groups(optimizer)
    tconfig = get_model_config(chunks[0])
    tconfig.grad_scale_func = optimizer.scale_loss
    tconfig.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        tconfig.no_sync_func = _one_or_list([chunk.no_sync for chunk in chunks])
    return optimizer


def _one_or_list(functions: list) -> object:
    """Megatron's schedules take a function for one chunk and a list for several."""
    return functions[0] if len(functions) == 1 else functions


def build_param_scheduler(config: Config, optimizer: MegatronOptimizer, length: RunLength) -> OptimizerParamScheduler:
    """Learning rate and weight decay over training, counted in samples as in Megatron-LM."""
    opt = config.optimizer
    total = length.train_samples
    end = opt.lr_decay_iters or length.train_iters
    if config.training.train_samples is not None:
        decay, warmup = opt.lr_decay_samples or total, opt.lr_warmup_samples
    else:
        decay, warmup = length.samples_after(end), length.samples_after(opt.lr_warmup_iters)
    wsd_decay = None
    if opt.lr_wsd_decay_iters is not None:
        wsd_decay = length.samples_after(end) - length.samples_after(end - opt.lr_wsd_decay_iters)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=opt.lr_warmup_init,
        max_lr=opt.lr,
        min_lr=opt.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=opt.lr_decay_style,
        start_wd=opt.weight_decay if opt.start_weight_decay is None else opt.start_weight_decay,
        end_wd=opt.weight_decay if opt.end_weight_decay is None else opt.end_weight_decay,
        wd_incr_steps=total,
        wd_incr_style=opt.weight_decay_incr_style,
        wsd_decay_steps=wsd_decay,
        lr_wsd_decay_style=opt.lr_wsd_decay_style,
        # The config in force decides; a checkpoint only says how far the schedule has come.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
