"""An iteration's time, put together: passes with the drawn decisions, the schedule, reductions, the step and gathers.

The passes run in the pipeline's schedule (simulate.py). Each rank then reduces its gradients: after its last pass, or
with overlap_grad_reduce bucket by bucket as its last backward passes free them; buckets whose layers all were dropped
are left out, as the package does. All ranks wait for the slowest, since the gradients' norm needs them all; then the
optimizer steps, with dropped_update freeze without Adam's part for dropped layers, and in any case without that of
layers that have not begun; and with the distributed optimizer
parameters are gathered, or with overlap_param_gather while the next forward pass runs, bucket by bucket as its layers
need them. With replicas `distinct` the slowest replica decides when a stage is done.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from megatron_sbld.checks import check_choice, check_integer
from megatron_sbld.config.sections import Config
from megatron_sbld.config.validate import data_parallel_size
from megatron_sbld.layout.pipeline import Floats
from megatron_sbld.layout.placement import Placement
from megatron_sbld.method.in_force import dropped_update
from megatron_sbld.predict.cost import Attention, Costs, pass_costs, step_costs
from megatron_sbld.predict.hardware import Hardware
from megatron_sbld.predict.parameters import (
    Bucket,
    chunk_parameters,
    default_bucket_size,
    make_buckets,
    shard_sizes,
    tied_table,
)
from megatron_sbld.predict.simulate import Run, run_schedule


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is predicted: a config on a cluster."""

    config: Config
    vocab_size: int
    """Padded."""
    hardware: Hardware
    gpus: int
    attention: Attention
    placement: Placement

    def __post_init__(self) -> None:
        check_integer("vocab_size", self.vocab_size, 1)
        check_integer("gpus", self.gpus, 1)
        check_choice("attention", self.attention, get_args(Attention))

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        return data_parallel_size(self.config, self.gpus)

    @property
    def num_microbatches(self) -> int:
        """Of an iteration on a replica."""
        training = self.config.training
        return training.global_batch_size // (training.micro_batch_size * self.replicas)

    @property
    def tokens(self) -> int:
        """Of an iteration."""
        return self.config.training.global_batch_size * self.config.model.seq_length


@dataclass(frozen=True)
class IterationTimes:
    """Seconds of n iterations."""

    total: Floats
    """[n]"""
    schedule: Floats
    """From the first forward pass to the last backward pass of any rank, [n]."""
    exposed_reduction: Floats
    """Until all gradients are reduced, [n]."""
    step: Floats
    """The optimizer, of the slowest rank, [n]."""
    gather: Floats
    """Of parameters after the step, [n]; what forward passes wait for is in `schedule`."""
    run: Run
    """The schedule, of the first replica."""


class IterationModel:
    """Computes iterations of a setup at a given efficiency of its matrix products."""

    def __init__(self, setup: Setup, efficiency: float) -> None:
        self.setup = setup
        self.costs: Costs = pass_costs(
            setup.config, setup.vocab_size, setup.hardware, setup.replicas, setup.attention, efficiency
        )
        self.step_costs = step_costs(setup.config, setup.hardware, setup.replicas)
        placement = setup.placement
        self.num_ranks, self.num_chunks = placement.num_ranks, len(placement.layers_per_chunk)
        ends = np.cumsum(placement.layers_per_chunk).tolist()
        self.chunk_layers = [
            list(range(end - count + 1, end + 1)) for end, count in zip(ends, placement.layers_per_chunk, strict=True)
        ]
        self.layer_forward, self.layer_backward = self._layer_seconds()

    def _layer_seconds(self) -> tuple[Floats, Floats]:
        """Seconds of each layer's passes, [L] each."""
        training, costs = self.setup.config.training, self.costs
        num_layers = self.setup.config.model.num_layers
        backward = np.full(num_layers, costs.layer_backward.total)
        full_blocks = training.recompute_granularity == "full" and training.recompute_method == "block"
        for layers in self.chunk_layers:
            repeated = layers[: training.recompute_num_layers] if full_blocks else layers
            backward[np.array(repeated, dtype=int) - 1] += costs.recomputed.total
        return np.full(num_layers, costs.layer_forward.total), backward

    @functools.cached_property
    def _params(self) -> list[list[tuple[int, int]]]:
        """(values, owner as in Bucket) of each parameter of each chunk, in Megatron's order."""
        setup = self.setup
        return [
            chunk_parameters(setup.config, setup.vocab_size, setup.placement, chunk) for chunk in range(self.num_chunks)
        ]

    @functools.cached_property
    def buckets(self) -> list[list[Bucket]]:
        """Of each chunk, in the order in which they are reduced."""
        config = self.setup.config
        size = config.parallel.ddp_bucket_size or default_bucket_size(
            self.setup.replicas * config.parallel.context_parallel_size
        )
        buckets = []
        for chunk, params in enumerate(self._params):
            bucketed = config.parallel.overlap_grad_reduce and chunk == 0
            alone = tied_table(config, chunk, self.num_chunks, len(params))
            buckets.append(make_buckets(params, size if bucketed else np.inf, alone))
        return buckets

    def passes(self, shares: Floats, evenly: bool = False) -> tuple[Floats, Floats]:
        """Seconds of each pass: shares of the microbatches that layers run [n, m, L] -> forward, backward [n, m, C].

        evenly: as if all chunks had the same part of the work, the embedding's and the output layer's included.
        """
        costs = self.costs
        columns = [np.array(layers, dtype=int) - 1 for layers in self.chunk_layers]
        forward, backward = (
            # Not a matrix product, whose rounding depends on the number of rows.
            np.stack([(np.ascontiguousarray(shares[..., i]) * seconds[i]).sum(axis=-1) for i in columns], axis=-1)
            for seconds in (self.layer_forward, self.layer_backward)
        )
        forward[..., 0] += costs.embedding_forward.total
        backward[..., 0] += costs.embedding_backward.total
        forward[..., -1] += costs.output_forward.total
        backward[..., -1] += costs.output_backward.total
        if evenly:
            forward[...], backward[...] = (work.mean(axis=-1, keepdims=True) for work in (forward, backward))
        return forward, backward

    def run(
        self,
        shares: Floats,
        evenly: bool = False,
        record: bool = False,
        gathers: bool = True,
        waiting: NDArray[np.bool_] | None = None,
    ) -> Run:
        """The schedule of the passes: shares [n, m or 1, L]; 1 stands for all microbatches. evenly: as in `passes`.

        gathers: whether the first passes wait for parameters with overlap_param_gather.
        waiting: layers that have not begun, [n, L], whose parameters are not gathered.
        """
        leading, count = shares.shape[:-2], self.setup.num_microbatches
        forward, backward = (
            np.broadcast_to(seconds, (*leading, count, self.num_chunks)) for seconds in self.passes(shares, evenly)
        )
        waits = None
        if gathers and self.setup.config.parallel.overlap_param_gather:
            first = (self.spread_evenly(shares) if evenly else shares)[..., 0, :]
            ungathered = None if waiting is None else self._skipped(~waiting)
            waits = functools.partial(self._first_forward, first, ungathered)
        return run_schedule(
            forward,
            backward,
            self.num_ranks,
            transfer=self.costs.transfer,
            holds=self.num_chunks == self.num_ranks,
            first_forward=waits,
            record=record,
        )

    @functools.cached_property
    def _bucket_starts(self) -> list[dict[int, list[tuple[float, int]]]]:
        """Of each chunk and owner in forward order: what share of it precedes each bucket that begins in it, its index.

        As much of a layer's time passes before a bucket is needed as of its parameters come before.
        """
        starts = []
        for params, buckets in zip(self._params, self.buckets, strict=True):
            sizes: dict[int, int] = {}
            for size, owner in params:
                sizes[owner] = sizes.get(owner, 0) + size
            found: dict[int, list[tuple[float, int]]] = {owner: [] for owner in sizes}
            begin, left = 0, list(reversed(range(len(buckets))))
            for owner, size in sizes.items():
                while left and begin < size:
                    found[owner].append((begin / size, left[0]))
                    begin += buckets[left.pop(0)].size
                begin -= size
            starts.append(found)
        return starts

    def _first_forward(
        self, shares: Floats, ungathered: Sequence[NDArray[np.bool_]] | None, chunk: int, start: Floats
    ) -> Floats:
        """When a chunk's first forward pass ends, which waits for each bucket of its parameters. shares: [n, L].

        ungathered: buckets of layers that have not begun alone, [n, buckets] of each chunk; None: there is none.
        The first one's gather begins with the pass, each other's when the one before is first needed; dropped layers
        wait as well (param_and_grad_buffer.py:310, finish_param_sync; mcore/skip/layer_buckets.py).
        """
        seconds: dict[int, Floats | float] = {
            layer: shares[..., layer - 1] * self.layer_forward[layer - 1] for layer in self.chunk_layers[chunk]
        }
        seconds[0] = self.costs.embedding_forward.total
        seconds[self.setup.config.model.num_layers + 1] = self.costs.output_forward.total
        clock = dispatched = start
        for owner, starts in self._bucket_starts[chunk].items():
            passed = 0.0
            for share, index in starts:
                gather: Floats | float = self.buckets[chunk][index].size * self.step_costs.second_per_gathered
                if ungathered is not None:
                    gather = np.where(ungathered[chunk][:, index], 0.0, gather)
                clock = clock + (share - passed) * seconds[owner]
                clock = np.maximum(clock, dispatched + gather)
                dispatched, passed = clock, share
            clock = clock + (1.0 - passed) * seconds[owner]
        return clock

    def times(
        self,
        replicas: Sequence[Floats],
        evenly: bool = False,
        freezes: bool | None = None,
        waiting: NDArray[np.bool_] | None = None,
    ) -> IterationTimes:
        """The iterations: of each replica that decides for itself, shares of the microbatches, [n, m or 1, L].

        evenly: as in `passes`; the same buckets are left out, and the same layers frozen.
        freezes: whether layers that ran nothing are frozen; None is what the setup's drop section says.
        waiting: layers that have not begun, [n, L], and are frozen in any case; None: all have.
        """
        if freezes is None:
            freezes = dropped_update(self.setup.config.drop) == "freeze"
        runs = [self.run(shares, evenly, waiting=waiting) for shares in replicas]
        ran = np.any([(shares > 0).any(axis=-2) for shares in replicas], axis=0)
        skip = self._skipped(ran)
        last = (self.spread_evenly(replicas[0]) if evenly else replicas[0])[..., -1, :]
        reduced = np.max([self._reduced(rank, runs, last, skip) for rank in range(self.num_ranks)], axis=0)
        schedule = np.max([run.end for run in runs], axis=0)
        parallel = self.setup.config.parallel
        table = self.setup.vocab_size // parallel.tensor_model_parallel_size * self.setup.config.model.hidden_size
        exposed = reduced - schedule + table * self.step_costs.second_per_tied
        frozen = ~ran if freezes else np.zeros_like(ran) if waiting is None else waiting
        step, gather = self._step(frozen), self._gather(self._skipped(~frozen))
        return IterationTimes(schedule + exposed + step + gather, schedule, exposed, step, gather, runs[0])

    @functools.cached_property
    def _rank_sizes(self) -> Floats:
        """Values of the parameters of each pipeline rank."""
        sizes = np.zeros(self.num_ranks)
        for chunk, params in enumerate(self._params):
            sizes[chunk % self.num_ranks] += sum(size for size, _ in params)
        return sizes

    @functools.cached_property
    def state_sizes(self) -> Floats:
        """Values of each owner whose optimizer state a rank holds, [pipeline ranks, replicas that share it, L + 2]."""
        setup = self.setup
        parallel, owners = setup.config.parallel, setup.config.model.num_layers + 2
        shards = setup.replicas * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
        sizes = np.zeros((self.num_ranks, shards, owners))
        for chunk, (params, buckets) in enumerate(zip(self._params, self.buckets, strict=True)):
            sizes[chunk % self.num_ranks] += shard_sizes(params, buckets, shards, owners)
        return sizes

    def _step(self, frozen: NDArray[np.bool_]) -> Floats:
        """Seconds of the optimizer on the slowest rank, [n]: frozen layers [n, L]."""
        costs = self.step_costs
        whole = self._rank_sizes * costs.second_per_updated
        owners = np.pad(frozen, ((0, 0), (1, 1)), constant_values=False).astype(float)
        spared = (self.state_sizes @ owners.T).min(axis=1) * costs.second_per_stepped  # [pipeline ranks, n]
        return (whole[:, None] - spared).max(axis=0)

    def _gather(self, skip: Sequence[NDArray[np.bool_]]) -> Floats:
        """Seconds of gathering parameters after the step, [n]; skip: buckets of frozen layers alone, as `_skipped`."""
        n = len(skip[0])
        if self.setup.config.parallel.overlap_param_gather:
            return np.zeros(n)
        sizes = self._rank_sizes[:, None].repeat(n, 1)
        for chunk, (buckets, skipped) in enumerate(zip(self.buckets, skip, strict=True)):
            sizes[chunk % self.num_ranks] -= skipped @ np.array([bucket.size for bucket in buckets])
        return sizes.max(axis=0) * self.step_costs.second_per_gathered

    def _skipped(self, ran: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
        """Which buckets of each chunk hold dropped layers alone: layers that ran at all [n, L] -> [n, buckets] each."""
        needed = np.pad(ran, ((0, 0), (1, 1)), constant_values=True)
        return [
            np.stack([~needed[:, sorted(bucket.owners)].any(axis=1) for bucket in buckets], axis=1)
            for buckets in self.buckets
        ]

    def _reduced(self, rank: int, runs: Sequence[Run], last: Floats, skip: Sequence[NDArray[np.bool_]]) -> Floats:
        """When a rank's gradients are reduced, [n]. Overlapped reductions need equal replicas: the first one's run.

        last: shares of the last microbatch, [n, L].  skip: buckets that are left out, [n, buckets] of each chunk.
        """
        chunks = range(rank, self.num_chunks, self.num_ranks)
        done = np.max([run.last_backward[chunk][1] for run in runs for chunk in chunks], axis=0)
        overlap = self.setup.config.parallel.overlap_grad_reduce
        end = np.zeros_like(done) if overlap else done
        for chunk in reversed(chunks):
            ready = self._owners_done(runs[0], chunk, last) if overlap else {}
            for index, bucket in enumerate(self.buckets[chunk]):
                seconds = np.where(skip[chunk][:, index], 0.0, bucket.size * self.step_costs.second_per_reduced)
                after = np.maximum(end, ready[min(bucket.owners)]) if overlap else end
                end = np.where(seconds > 0, after + seconds, end)
        return np.maximum(end, done)

    def _owners_done(self, run: Run, chunk: int, shares: Floats) -> dict[int, Floats]:
        """When each owner's last backward pass has ended; the embedding's with the chunk's. shares: [n, L]."""
        start, end = run.last_backward[chunk]
        clock, done = start, {0: end}
        if chunk == self.num_chunks - 1:
            clock = clock + self.costs.output_backward.total
            done[self.setup.config.model.num_layers + 1] = clock
        for layer in reversed(self.chunk_layers[chunk]):
            clock = clock + shares[..., layer - 1] * self.layer_backward[layer - 1]
            done[layer] = clock
        return done

    def spread_evenly(self, shares: Floats) -> Floats:
        """Every layer with the mean share of its microbatch."""
        return np.broadcast_to(shares.mean(axis=-1, keepdims=True), shares.shape)

    @property
    def undropped(self) -> IterationTimes:
        """An iteration that keeps every layer, n = 1."""
        return self.times([np.ones((1, 1, self.setup.config.model.num_layers))])

    def undropped_parts(self) -> dict[str, float]:
        """Seconds of an undropped iteration on the busiest rank, by what they go to; they sum to its total."""
        times, costs, count = self.undropped, self.costs, self.setup.num_microbatches
        rank = int(times.run.busy[0].argmax())
        chunks = range(rank, self.num_chunks, self.num_ranks)
        layers = list(itertools.chain.from_iterable(self.chunk_layers[chunk] for chunk in chunks))
        extra_backward = float(self.layer_backward[np.array(layers, dtype=int) - 1].sum()) if layers else 0.0
        plain = costs.layer_forward + costs.layer_backward
        recomputed = extra_backward - len(layers) * costs.layer_backward.total
        first, last = 0 in chunks, self.num_chunks - 1 in chunks
        output = costs.output_forward + costs.output_backward
        embedding = costs.embedding_forward + costs.embedding_backward
        parts = {
            "layers: matrix products": count * len(layers) * plain.matmul,
            "layers: elementwise": count * len(layers) * plain.memory,
            "layers: tensor and context parallel": count * len(layers) * plain.communication,
            "layers: recomputation": count * recomputed,
            "logits and loss": count * output.total * last,
            "embedding": count * embedding.total * first,
            "pipeline transfers": float(times.run.sent[rank]),
        }
        ungathered = float(self.run(np.ones((1, 1, self.setup.config.model.num_layers)), gathers=False).end[0])
        waiting = ungathered - sum(parts.values()) if self.num_ranks > 1 else 0.0
        return {
            **parts,
            "pipeline bubble and waiting": waiting,
            "gradient reduction, exposed": float(times.exposed_reduction[0]),
            "optimizer": float(times.step[0]),
            "parameter gathering, exposed": float(times.gather[0] + times.schedule[0]) - ungathered,
        }
