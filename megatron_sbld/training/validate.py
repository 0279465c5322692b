"""Every check of a config that needs no data and no GPU; all problems are reported at once, before anything starts."""

from __future__ import annotations

import math
from typing import Any, get_args, get_type_hints

from megatron_sbld.drop import scales_residual, validate_drop
from megatron_sbld.plan import replicas_run_alike
from megatron_sbld.training.config import Config
from megatron_sbld.training.flops import ffn_hidden_size
from megatron_sbld.training.run_length import RunLength
from megatron_sbld.training.stages import placement_problems, recomputed_layers_problems

_AT_LEAST_ONE = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.kv_channels",
    "model.seq_length",
    "model.max_position_embeddings",
    "model.make_vocab_size_divisible_by",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.ddp_bucket_size",
    "optimizer.lr_decay_iters",
    "optimizer.lr_decay_samples",
    "optimizer.lr_wsd_decay_iters",
    "training.micro_batch_size",
    "training.global_batch_size",
    "training.train_iters",
    "training.train_samples",
    "training.eval_iters",
    "training.recompute_num_layers",
    "training.exit_after_iterations",
    "training.loss_scale_window",
    "training.hysteresis",
    "checkpoint.keep_last",
    "logging.log_interval",
)
_NOT_NEGATIVE = (
    "data.num_workers",
    "optimizer.lr_warmup_iters",
    "optimizer.lr_warmup_samples",
    "optimizer.lr_warmup_init",
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "optimizer.start_weight_decay",
    "optimizer.end_weight_decay",
    "optimizer.clip_grad",
    "training.eval_interval",
    "training.task_interval",
    "checkpoint.save_interval",
)
_POSITIVE = (
    "model.layernorm_epsilon",
    "model.init_method_std",
    "model.rotary_base",
    "optimizer.lr",
    "optimizer.adam_eps",
    "training.initial_loss_scale",
    "training.min_loss_scale",
    "training.loss_scale",
    "logging.peak_tflops",
)
_RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm")
_MAX_SEED = 2**31 - 1  # NumPy's generators take 32 bits, and Megatron adds to the seed for stages and ranks
_MAX_RAMP_ITERATIONS = 1_000_000  # they are counted one by one, as Megatron-LM does
_TIMEOUT_MINUTES = (0.1, 100_000)  # healthy ranks can be silent for seconds while they start
_BELOW_ONE = ("model.hidden_dropout", "model.attention_dropout", "optimizer.adam_beta1", "optimizer.adam_beta2")


def data_parallel_size(config: Config, world_size: int) -> int:
    """Replicas: what the tensor, pipeline and context parallel sizes leave of the processes."""
    return world_size // _model_parallel_size(config)


def validate(config: Config, world_size: int | None, *, trains: bool = True) -> None:
    """Refuse a config that cannot work on `world_size` processes.

    Args:
        config: the run.
        world_size: None is the fewest that hold the model.
        trains: whether there must be data.

    Raises:
        ValueError: one line a problem, each with field, value and what is allowed.
    """
    problems = _nulls(config) or _ranges(config)
    if not problems:  # the checks below divide by what the ranges have made sure of
        processes = world_size or _model_parallel_size(config)
        problems = [
            *_model(config),
            *_layout(config, processes),
            *_length(config),
            *_recomputation(config),
            *_loss(config),
            *_compilation(config),
            *_optimizer(config),
            *(_data(config) if trains else []),
        ]
        problems = problems or _batch(config, data_parallel_size(config, processes))
    if not problems:
        try:
            parallel = config.parallel
            even = parallel.pipeline_model_parallel_layout is None
            stages = parallel.pipeline_model_parallel_size if even else None
            validate_drop(config.drop, config.model.num_layers, train_iterations(config), stages)
        except ValueError as error:
            problems = [str(error)]
    problems = problems or _compiled_scales(config)
    if problems:
        raise ValueError("\n".join(problems))


def train_iterations(config: Config) -> int:
    """Iterations of the run, from train_iters or from train_samples and the batch-size ramp (as Megatron-LM counts)."""
    return RunLength(config.training).train_iters


def _model_parallel_size(config: Config) -> int:
    """Processes that hold one replica of the model."""
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def _get(config: Config, path: str) -> Any:
    section, name = path.split(".")
    return getattr(getattr(config, section), name)


def _nulls(config: Config) -> list[str]:
    """Fields that are null and may not be: the parser takes a null for any field."""
    problems = []
    for section, cls in get_type_hints(Config).items():
        for name, hint in get_type_hints(cls).items():
            if getattr(getattr(config, section), name) is None and type(None) not in get_args(hint):
                problems.append(f"{section}.{name} = null: must have a value")
    return problems


def _is_finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # an integer may be too large to be asked


def _ranges(config: Config) -> list[str]:
    problems = []
    for paths, allowed, fits in (
        (_AT_LEAST_ONE, "at least 1", lambda value: value >= 1),
        (_NOT_NEGATIVE, "0 or more", lambda value: value >= 0),
        (_POSITIVE, "above 0", lambda value: value > 0),
        (_BELOW_ONE, "in [0, 1)", lambda value: 0 <= value < 1),
        (
            ("parallel.distributed_timeout_minutes",),
            f"in [{_TIMEOUT_MINUTES[0]}, {_TIMEOUT_MINUTES[1]}]",
            lambda value: _TIMEOUT_MINUTES[0] <= value <= _TIMEOUT_MINUTES[1],
        ),
        (("model.rotary_percent",), "in (0, 1]", lambda value: 0 < value <= 1),
        (("training.seed",), f"in [0, {_MAX_SEED}]", lambda value: 0 <= value <= _MAX_SEED),
    ):
        for path in paths:
            value = _get(config, path)
            if value is not None and not (_is_finite(value) and fits(value)):
                problems.append(f"{path} = {value}: must be {allowed}{'' if _is_finite(value) else ', and finite'}")
    virtual = config.parallel.num_virtual_stages_per_pipeline_rank
    if virtual is not None and virtual < 2:
        problems.append(f"parallel.num_virtual_stages_per_pipeline_rank = {virtual}: must be at least 2, or null")
    return problems


def _model(config: Config) -> list[str]:
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    problems = []
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        problems.append(
            f"model.hidden_size = {model.hidden_size}: must be divisible by "
            f"model.num_attention_heads = {model.num_attention_heads}"
        )
    groups = model.num_query_groups or model.num_attention_heads
    if model.num_attention_heads % groups:
        problems.append(
            f"model.num_query_groups = {groups}: must divide model.num_attention_heads = {model.num_attention_heads}"
        )
    for name, value in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_query_groups", groups),
        ("model.hidden_size", model.hidden_size),
        ("model.ffn_hidden_size", ffn_hidden_size(model)),
    ):
        if value % tensor:
            problems.append(f"{name} = {value}: must be divisible by parallel.tensor_model_parallel_size = {tensor}")
    if model.swiglu and model.activation_func != "gelu":
        problems.append(
            f"model.activation_func = {model.activation_func!r}: has no effect with model.swiglu, whose activation is "
            "SiLU; leave it out"
        )
    rotated = int((model.kv_channels or model.hidden_size // model.num_attention_heads) * model.rotary_percent)
    if model.position_embedding_type == "rope" and (rotated % 2 or not rotated):
        problems.append(
            f"model.rotary_percent = {model.rotary_percent}: rotates {rotated} channels of a head; must be an even "
            "number of at least 2"
        )
    if model.position_embedding_type == "learned_absolute" and (
        model.max_position_embeddings is not None and model.max_position_embeddings < model.seq_length
    ):
        problems.append(
            f"model.max_position_embeddings = {model.max_position_embeddings}: must be at least "
            f"model.seq_length = {model.seq_length}"
        )
    return problems


def _layout(config: Config, world_size: int) -> list[str]:
    model, parallel = config.model, config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context, virtual = parallel.context_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    problems = []
    if world_size % (tensor * pipeline * context):
        problems.append(
            f"{world_size} processes: must be a multiple of parallel.tensor_model_parallel_size * "
            f"pipeline_model_parallel_size * context_parallel_size = {tensor * pipeline * context}"
        )
    if virtual is not None and pipeline == 1:
        problems.append(
            f"parallel.num_virtual_stages_per_pipeline_rank = {virtual}: needs pipeline_model_parallel_size > 1"
        )
    problems += placement_problems(config)
    if parallel.sequence_parallel and tensor == 1:
        problems.append("parallel.sequence_parallel = true: needs parallel.tensor_model_parallel_size > 1")
    if parallel.sequence_parallel and model.seq_length % (tensor * context):
        problems.append(
            f"model.seq_length = {model.seq_length}: with sequence_parallel it must be divisible by {tensor * context} "
            "(tensor_model_parallel_size * context_parallel_size)"
        )
    if context > 1 and model.seq_length % (2 * context):
        problems.append(
            f"model.seq_length = {model.seq_length}: must be divisible by "
            f"2 * parallel.context_parallel_size = {2 * context}"
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        problems.append(
            "parallel.overlap_param_gather = true: needs use_distributed_optimizer and overlap_grad_reduce as well"
        )
    if not replicas_run_alike(config.drop.replicas, config.drop.granularity) and parallel.overlap_grad_reduce:
        problems.append(
            "drop.replicas = 'distinct': does not work with parallel.overlap_grad_reduce, because replicas would start "
            "their reductions in different orders; use 'shared' or switch the overlap off"
        )
    return problems


def _length(config: Config) -> list[str]:
    training = config.training
    if (training.train_iters is None) == (training.train_samples is None):
        return [
            f"training.train_iters = {training.train_iters} and training.train_samples = {training.train_samples}: "
            "give exactly one of them"
        ]
    ramp = training.rampup_batch_size
    if ramp is None:
        return []
    if len(ramp) != 3 or any(value < 1 for value in ramp):
        return [f"training.rampup_batch_size = {ramp}: must be three positive numbers, [start, increment, samples]"]
    start, increment, ramp_samples = ramp
    if ramp_samples // start > _MAX_RAMP_ITERATIONS:
        return [
            f"training.rampup_batch_size = {ramp}: its samples make more than {_MAX_RAMP_ITERATIONS:,} iterations of "
            f"{start}; allowed are {start * _MAX_RAMP_ITERATIONS:,} samples"
        ]
    if start >= training.global_batch_size or (training.global_batch_size - start) % increment:
        return [
            f"training.rampup_batch_size = {ramp}: start plus one or more times the increment must give "
            f"training.global_batch_size = {training.global_batch_size}"
        ]
    return []


def _batch(config: Config, replicas: int) -> list[str]:
    training, parallel = config.training, config.parallel
    problems = []
    unit = training.micro_batch_size * replicas
    described = f"training.micro_batch_size * data-parallel size = {training.micro_batch_size} * {replicas}"
    if parallel.num_virtual_stages_per_pipeline_rank is not None:
        unit *= parallel.pipeline_model_parallel_size
        described += (
            f" * pipeline_model_parallel_size = {unit} (the interleaved schedule takes microbatches in such groups)"
        )
    sizes = {"training.global_batch_size": training.global_batch_size}
    if training.rampup_batch_size is not None:
        sizes["training.rampup_batch_size's start"] = training.rampup_batch_size[0]
        sizes["training.rampup_batch_size's increment"] = training.rampup_batch_size[1]
    for name, size in sizes.items():
        if size % unit:
            problems.append(f"{name} = {size}: must be divisible by {described}")
    drop = config.drop
    no_choice = (drop.granularity, drop.replicas, training.micro_batch_size) == ("sample", "distinct", 1)
    if no_choice and drop.policy != "none":
        problems.append(
            "drop.replicas = 'distinct': with granularity sample it needs training.micro_batch_size > 1, because with "
            "one sample there is nothing that replicas could choose differently"
        )
    if not problems and train_iterations(config) < 1:
        problems.append(f"training.train_samples = {training.train_samples}: is less than one global batch")
    return problems


def _recomputation(config: Config) -> list[str]:
    training = config.training
    method, layers = training.recompute_method, training.recompute_num_layers
    if training.recompute_granularity == "full":
        if method is None or layers is None:
            return [
                "training.recompute_granularity = 'full': needs training.recompute_method (uniform or block) and "
                "training.recompute_num_layers"
            ]
        return recomputed_layers_problems(config, method, layers)
    if method is not None or layers is not None:
        return ["training.recompute_method and recompute_num_layers: need training.recompute_granularity = 'full'"]
    modules = training.recompute_modules
    if modules is not None and training.recompute_granularity != "selective":
        return ["training.recompute_modules: needs training.recompute_granularity = 'selective'"]
    if modules is not None and not (modules and set(modules) <= set(_RECOMPUTE_MODULES)):
        return [f"training.recompute_modules = {modules}: allowed are {', '.join(_RECOMPUTE_MODULES)}, or null"]
    return []


def _loss(config: Config) -> list[str]:
    training = config.training
    if training.cross_entropy_loss_fusion and training.precision != "bf16":
        return [
            f"training.cross_entropy_loss_fusion = True with training.precision = {training.precision!r}: Megatron's "
            "fused loss gives its gradient in bf16; must be false or null there"
        ]
    return []


def _compilation(config: Config) -> list[str]:
    if not config.training.torch_compile:
        return []
    parallel, training = config.parallel, config.training
    reasons = (
        (
            "parallel.tensor_model_parallel_size",
            parallel.tensor_model_parallel_size > 1,
            "a layer communicates; must be 1",
        ),
        ("parallel.context_parallel_size", parallel.context_parallel_size > 1, "a layer communicates; must be 1"),
        (
            "parallel.overlap_param_gather",
            parallel.overlap_param_gather,
            "modules inside a layer wait for their parameters; must be false",
        ),
        (
            "training.recompute_granularity",
            training.recompute_granularity == "selective",
            "the graph decides itself what backward recomputes; must be full or null",
        ),
    )
    return [
        f"training.torch_compile = True with {path} = {_get(config, path)!r}: {why}"
        for path, conflicts, why in reasons
        if conflicts
    ]


def _compiled_scales(config: Config) -> list[str]:
    if config.training.torch_compile and config.drop.residual == "fused" and scales_residual(config.drop):
        return [
            "training.torch_compile = True with drop.residual = 'fused' and scaled branches (drop.residual_scale, PLD's"
            " default): each scale would be compiled anew; must be 'stock', or residual_scale 'none'"
        ]
    return []


def _optimizer(config: Config) -> list[str]:
    opt, training = config.optimizer, config.training
    problems = []
    if opt.min_lr > opt.lr:
        problems.append(f"optimizer.min_lr = {opt.min_lr}: must be at most optimizer.lr = {opt.lr}")
    if opt.lr_warmup_init > opt.lr:
        problems.append(f"optimizer.lr_warmup_init = {opt.lr_warmup_init}: must be at most optimizer.lr = {opt.lr}")
    if training.train_samples is None:
        unit, decay, warmup = "iters", opt.lr_decay_iters or training.train_iters or 0, opt.lr_warmup_iters
        other = opt.lr_decay_samples or opt.lr_warmup_samples
    else:
        unit, decay, warmup = "samples", opt.lr_decay_samples or training.train_samples, opt.lr_warmup_samples
        other = opt.lr_decay_iters or opt.lr_warmup_iters
    if 0 < decay <= warmup:  # without a length, which is refused, there is nothing to compare with
        problems.append(f"optimizer.lr_warmup_{unit} = {warmup}: must be below the {decay} over which the rate decays")
    if other:
        problems.append(f"optimizer: training is counted in {unit}, so give lr_decay_{unit} and lr_warmup_{unit} alone")
    if (opt.lr_decay_style == "WSD") != (opt.lr_wsd_decay_iters is not None):
        problems.append("optimizer.lr_wsd_decay_iters: is needed by, and only by, lr_decay_style = 'WSD'")
    elif opt.lr_wsd_decay_iters is not None:
        wsd_decay = opt.lr_wsd_decay_iters * (1 if unit == "iters" else training.global_batch_size)
        if wsd_decay > decay - warmup > 0:
            problems.append(
                f"optimizer.lr_wsd_decay_iters = {opt.lr_wsd_decay_iters}: is {wsd_decay} {unit}, but lr_decay_{unit} "
                f"= {decay} less lr_warmup_{unit} = {warmup} leaves {decay - warmup}"
            )
    if opt.weight_decay_incr_style == "constant":
        if opt.start_weight_decay != opt.end_weight_decay:
            problems.append(
                "optimizer.start_weight_decay, end_weight_decay: differ, so weight_decay_incr_style must too"
            )
    elif opt.start_weight_decay is None or opt.end_weight_decay is None:
        problems.append("optimizer.weight_decay_incr_style: needs start_weight_decay and end_weight_decay")
    elif opt.end_weight_decay < opt.start_weight_decay:
        problems.append(
            f"optimizer.end_weight_decay = {opt.end_weight_decay}: must be at least "
            f"optimizer.start_weight_decay = {opt.start_weight_decay}"
        )
    return problems


def _data(config: Config) -> list[str]:
    data, problems = config.data, []
    if not data.train_data_path:
        problems.append("data.train_data_path: is empty; give the prefix of a data set (see `megatron-sbld prepare`)")
    if config.training.task_interval and data.lambada_path is None and data.perplexity_path is None:
        problems.append(
            f"training.task_interval = {config.training.task_interval}: needs data.lambada_path or data.perplexity_path"
        )
    if data.reset_position_ids and config.model.position_embedding_type == "rope":
        problems.append(
            "data.reset_position_ids = true: has no effect with model.position_embedding_type = 'rope', which turns by "
            "the distance of two tokens alone; leave it out"
        )
    if config.parallel.context_parallel_size > 1 and data.reset_attention_mask:
        problems.append("data.reset_attention_mask = true: does not work with parallel.context_parallel_size > 1")
    return problems
