"""Every check of a config that needs no data and no GPU; all problems are reported at once, before anything starts."""

from __future__ import annotations

import math
import warnings

from megatron_sbld.config.combinations import combination_problems
from megatron_sbld.config.flops import ffn_hidden_size
from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config
from megatron_sbld.config.stages import placement_problems, recomputed_layers_problems
from megatron_sbld.config.tokens import tokens_of
from megatron_sbld.fields import problems as field_problems
from megatron_sbld.method.validate import validate_drop

MIN_ITERATIONS_GROWN = 0.1
"""Share of the run below which the last layers have little time to learn."""
_MAX_RAMP_ITERATIONS = 1_000_000  # they are counted one by one, as Megatron-LM does


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
    problems = [line for name, section in vars(config).items() for line in field_problems(section, f"{name}.")]
    if not problems:  # the checks below divide by what the fields' ranges have made sure of
        processes = world_size or _model_parallel_size(config)
        problems = [
            *_model(config),
            *_layout(config, processes),
            *_length(config),
            *_recomputation(config),
            *_optimizer(config),
            *(_data(config) if trains else []),
            *combination_problems(config, trains=trains),
        ]
        problems = problems or _batch(config, data_parallel_size(config, processes))
    if not problems:
        try:
            parallel = config.parallel
            even = parallel.pipeline_model_parallel_layout is None
            stages = parallel.pipeline_model_parallel_size if even else None
            validate_drop(config.drop, config.model.num_layers, train_iterations(config), stages)
            tokens_of(config, train_iterations(config))
        except ValueError as error:
            problems = [str(error)]
    if problems:
        raise ValueError("\n".join(problems))
    if trains and config.drop.policy != "none" and config.drop.stages is not None:
        _warn_of_late_growth(config)


def _warn_of_late_growth(config: Config) -> None:
    """Warn of layers that begin where little can be learned: while the rate decays, or shortly before the end."""
    assert config.drop.stages is not None, "asked for with stages alone"
    total, opt = train_iterations(config), config.optimizer
    growths = [math.floor(round(share * total, 6)) + 1 for share, _ in config.drop.stages[:-1]]
    if growths and total - growths[-1] < MIN_ITERATIONS_GROWN * total:
        warnings.warn(
            f"drop.stages = {config.drop.stages}: the last layers begin at iteration {growths[-1]} of {total}, which "
            f"leaves them less than {MIN_ITERATIONS_GROWN:.0%} of the run to learn in",
            stacklevel=3,
        )
    decays_from = rate_decays_from(config)
    late = [growth for growth in growths if decays_from is not None and growth > decays_from]
    if late:
        warnings.warn(
            f"drop.stages = {config.drop.stages}: layers begin at iteration {late[0]}, but the learning rate decays "
            f"from iteration {decays_from} on (optimizer.lr_decay_style {opt.lr_decay_style}), and new layers learn "
            "little then: let them begin earlier, or use WSD with a later decay",
            stacklevel=3,
        )


def rate_decays_from(config: Config) -> int | None:
    """The iteration from which the learning rate falls; None if it never does, or another unit decides."""
    opt = config.optimizer
    if opt.lr_schedule_by == "layer_tokens" and opt.lr_decay_style != "WSD":
        return None
    if opt.lr_decay_style == "constant" or config.training.train_iters is None:
        return None
    if opt.lr_decay_style == "WSD":
        return (opt.lr_decay_iters or config.training.train_iters) - (opt.lr_wsd_decay_iters or 0)
    return opt.lr_warmup_iters


def train_iterations(config: Config) -> int:
    """Iterations of the run, from train_iters or from train_samples and the batch-size ramp (as Megatron-LM counts)."""
    return RunLength(config.training).train_iters


def _model_parallel_size(config: Config) -> int:
    """Processes that hold one replica of the model."""
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


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
    context = parallel.context_parallel_size
    problems = []
    if world_size % (tensor * pipeline * context):
        problems.append(
            f"{world_size} processes: must be a multiple of parallel.tensor_model_parallel_size * "
            f"pipeline_model_parallel_size * context_parallel_size = {tensor * pipeline * context}"
        )
    problems += placement_problems(config)
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
    return problems


def _length(config: Config) -> list[str]:
    training = config.training
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
    if not problems and train_iterations(config) < 1:
        problems.append(f"training.train_samples = {training.train_samples}: is less than one global batch")
    return problems


def _recomputation(config: Config) -> list[str]:
    training = config.training
    method, layers = training.recompute_method, training.recompute_num_layers
    if training.recompute_granularity == "full" and method is not None and layers is not None:
        return recomputed_layers_problems(config, method, layers)
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
    if opt.lr_wsd_decay_iters is not None:
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
    elif (opt.end_weight_decay or 0.0) < (opt.start_weight_decay or 0.0):
        problems.append(
            f"optimizer.end_weight_decay = {opt.end_weight_decay}: must be at least "
            f"optimizer.start_weight_decay = {opt.start_weight_decay}"
        )
    return problems


def _data(config: Config) -> list[str]:
    if not config.data.train_data_path:
        return ["data.train_data_path: is empty; give the prefix of a data set (see `megatron-sbld prepare`)"]
    return []
