"""The pipeline stages that a config describes: which layers each holds, and what is wrong with that."""

from __future__ import annotations

from megatron_sbld.config.sections import Config
from megatron_sbld.layout.placement import Placement, even_placement, read_layout


def placement_of(config: Config) -> Placement:
    """Which layers each pipeline rank holds.

    Raises:
        ValueError: the layout is not one of this model, or the layers cannot be divided evenly.
    """
    parallel, num_layers = config.parallel, config.model.num_layers
    ranks, chunks = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank or 1
    layout = parallel.pipeline_model_parallel_layout
    if layout is None:
        return even_placement(num_layers, ranks, chunks)
    return read_layout(layout, num_layers, ranks, chunks)


def placement_problems(config: Config) -> list[str]:
    """Why the layers cannot be placed as the config says; empty if they can."""
    parallel, num_layers = config.parallel, config.model.num_layers
    stages = parallel.pipeline_model_parallel_size * (parallel.num_virtual_stages_per_pipeline_rank or 1)
    sizes = "parallel.pipeline_model_parallel_size * num_virtual_stages_per_pipeline_rank"
    layout = parallel.pipeline_model_parallel_layout
    if layout is not None:
        try:
            placement_of(config)
        except ValueError as error:
            return [f"parallel.pipeline_model_parallel_layout = {layout!r}: {error} ({sizes} = {stages})"]
    elif num_layers % stages:
        return [
            f"model.num_layers = {num_layers}: must be divisible by the {stages} pipeline stages ({sizes}), or be "
            "spread over them by parallel.pipeline_model_parallel_layout"
        ]
    return []


def recomputed_layers_problems(config: Config, method: str, layers: int) -> list[str]:
    """Full recomputation: uniform cuts each stage into pieces of `layers`, block takes that many of a stage or all."""
    if placement_problems(config):
        return []  # told already
    held = sorted(set(placement_of(config).layers_per_chunk))
    if method == "uniform" and any(count % layers for count in held):
        verb = "divide"
    elif layers > max(held):
        verb = "be at most"
    else:
        return []
    return [
        f"training.recompute_num_layers = {layers}: must {verb} the {' and '.join(map(str, held))} layers of a stage"
    ]
