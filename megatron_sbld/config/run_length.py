"""How long a run is: its iterations and its samples, and which iteration has read how many samples.

The global batch may ramp up (`rampup_batch_size`), so an iteration is no fixed number of samples. Megatron counts
learning rates in samples and drops are counted in iterations; both ask here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sbld.config.sections import TrainingConfig


@dataclass(frozen=True)
class RunLength:
    """The iterations of a run in samples, as Megatron's calculator of microbatches takes them."""

    training: TrainingConfig
    iteration: int = 0
    """Iterations that were done when checkpoint.replan planned the rest with another batch size, else 0."""
    samples: int = 0
    """Samples that these iterations had read."""

    @functools.cached_property
    def train_iters(self) -> int:
        """Iterations of the whole run: train_iters, or what train_samples gives (as Megatron-LM counts)."""
        if self.training.train_iters is not None:
            return self.training.train_iters
        end = self.training.train_samples
        assert end is not None, "validate makes sure of one of the two"
        iterations, consumed = self.iteration, self.samples
        for size in self._ramp():
            if consumed > end:
                break
            iterations, consumed = iterations + 1, consumed + size
        return iterations + max(0, end - consumed) // self.training.global_batch_size

    @property
    def train_samples(self) -> int:
        """Samples over which learning rate and weight decay run: train_samples, or what train_iters reads."""
        if self.training.train_samples is not None:
            return self.training.train_samples
        return self.samples_after(self.train_iters)

    @property
    def samples_to_read(self) -> int:
        """Samples that the data sets are built for: Megatron-LM's number, because it takes part in fixing the order."""
        training = self.training
        if training.train_samples is not None:
            # The last step of a ramp may go beyond train_samples, by less than a global batch.
            return training.train_samples + (training.global_batch_size if training.rampup_batch_size else 0)
        return max(self.train_iters * training.global_batch_size, self.samples_after(self.train_iters))

    def samples_after(self, iterations: int) -> int:
        """Samples read when so many iterations are done; those before `iteration` count alike."""
        if iterations <= self.iteration:
            return max(0, iterations) * self.samples // max(1, self.iteration)
        done, consumed = self.iteration, self.samples
        for size in self._ramp():
            if done == iterations:
                return consumed
            done, consumed = done + 1, consumed + size
        return consumed + (iterations - done) * self.training.global_batch_size

    def samples_after_each(self, iterations: NDArray[np.int64]) -> NDArray[np.int64]:
        """`samples_after` of each of some iterations, none below `iteration`."""
        ramp = np.cumsum([self.samples, *self._ramp()])  # after `iteration`, and after each iteration of the ramp
        since = iterations - self.iteration
        beyond = np.maximum(since - (len(ramp) - 1), 0) * self.training.global_batch_size
        return ramp[np.minimum(since, len(ramp) - 1)] + beyond

    def iterations_to_read(self, samples: int) -> int:
        """The first iteration after which so many samples have been read; at least `iteration`."""
        ramp = np.cumsum([self.samples, *self._ramp()])
        if samples <= ramp[-1]:
            return self.iteration + int(np.searchsorted(ramp, samples))
        return self.iteration + len(ramp) - 1 + math.ceil((samples - int(ramp[-1])) / self.training.global_batch_size)

    def _ramp(self) -> Iterator[int]:
        """Global batch sizes of the iterations from `iteration` on whose size the ramp decides."""
        if self.training.rampup_batch_size is None:
            return
        start, increment, ramp_samples = self.training.rampup_batch_size
        samples_per_step = ramp_samples / ((self.training.global_batch_size - start) // increment)
        consumed = self.samples
        while consumed <= ramp_samples:
            size = start + int(consumed / samples_per_step) * increment
            yield size
            consumed += size
