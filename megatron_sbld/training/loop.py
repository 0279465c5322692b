"""`megatron-sbld pretrain`: check everything, build and restore it, train to the end or to a request to stop."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import closing

from megatron_sbld.checkpoint.start import find_start, planned_length
from megatron_sbld.config.sections import Config
from megatron_sbld.config.stages import placement_of
from megatron_sbld.config.validate import validate
from megatron_sbld.data.blend import check_data
from megatron_sbld.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sbld.exit_status import EXIT_TO_BE_CONTINUED
from megatron_sbld.method.build import build_policy
from megatron_sbld.training.announce import announce
from megatron_sbld.training.between import BetweenIterations, Tasks, is_due, no_tasks
from megatron_sbld.training.metrics import check_logging
from megatron_sbld.training.model import (
    check_model,
)
from megatron_sbld.training.processes import distributed_run, world_size_from_environment
from megatron_sbld.training.run import Run, microbatch_calculator, run_folder_lock
from megatron_sbld.training.stop import StopFlag, stop_flag


def pretrain(config: Config, tasks_of: Callable[[Config, Tokenizer], Tasks] = no_tasks) -> int:
    """Train as the config says; the exit status is 0 when the run is complete, else EXIT_TO_BE_CONTINUED.

    Args:
        config: the run.
        tasks_of: makes the tasks that the config asks for (evaluation/in_training.py).

    Raises:
        ValueError: a mistake in the config, the data or the checkpoint; before the first iteration.
        RuntimeError: something could not be read or written on the way.
        FloatingPointError: the loss is no longer finite.
        DropDisagreementError: ranks would drop different layers.
        RankLostError: another rank died or stalled; mostly the process ends instead (watchdog.py).
    """
    world_size = world_size_from_environment()
    validate(config, world_size)
    check_model(config)
    check_logging(config.logging)
    tokenizer = load_tokenizer(config.data.tokenizer)
    data = check_data(config, tokenizer)
    tasks = tasks_of(config, tokenizer)
    with (
        stop_flag() as stop,
        distributed_run(config),
        microbatch_calculator(config),
        run_folder_lock(config.logging.run_dir, "logging.run_dir"),
    ):
        stop.listen()
        start = find_start(config, tokenizer, data)  # not before the lock: a process that is just ending may still save
        length = planned_length(config, start)
        policy = build_policy(
            config.drop, config.model.num_layers, length.train_iters, ranks=placement_of(config).stages
        )
        run = Run(config, tokenizer, data, policy, start, length)
        first = run.iteration
        try:
            with closing(run):
                run.open_run_folder()
                tasks.open_file(run.iteration, goes_on=run.goes_on)
                return train(run, stop, tasks)
        except OSError as error:
            if run.iteration == first:
                raise
            # No mistake of the user's: a disk or a file system, which may be better next time.
            raise RuntimeError(f"after iteration {run.iteration}: {error}") from error


def train(run: Run, stop: StopFlag, tasks: Tasks) -> int:
    """Iterate to the end, validating, evaluating and saving on the way; the exit status."""
    assert run.checkpoints is not None, "open_run_folder comes before train"
    config, first = run.config, run.iteration + 1
    if run.iteration < run.train_iters:
        announce(run)
    for chunk in run.chunks:
        chunk.train()
    between = BetweenIterations(run, tasks, stop)
    run.interrupted = between.do(between.missed(run.interrupted))
    if run.interrupted or (run.iteration < run.train_iters and between.is_stopping()):
        return _stopped(run)  # nothing has changed since it was saved
    while run.iteration < run.train_iters:
        asked = run.iterate(stop)
        done = run.iteration == run.train_iters
        limit = config.training.exit_after_iterations
        run.checkpoints.poll()
        due = between.due(done)
        run.interrupted = due if asked else between.do(due)
        stopping = (
            asked
            or bool(run.interrupted)
            or (limit is not None and run.iteration - first + 1 >= limit)
            or (bool(due) and between.is_stopping())
        )
        if _save_is_due(run, done, stopping):
            run.save()
        if run.interrupted or (stopping and not done):
            return _stopped(run)
    run.note(
        f"complete: {run.train_iters} iterations, {run.consumed_samples:,} samples. Results are in {run.run_dir}; "
        f"`megatron-sbld compare {shlex.quote(str(run.run_dir))}` shows them"
    )
    return 0


def _stopped(run: Run) -> int:
    left = f", before its {' and '.join(run.interrupted)}" if run.interrupted else ""
    run.note(f"stopped on request after iteration {run.iteration} of {run.train_iters}{left}; start again to continue")
    return EXIT_TO_BE_CONTINUED


def _save_is_due(run: Run, done: bool, stopping: bool) -> bool:
    checkpoint = run.config.checkpoint
    return stopping or (done and checkpoint.save_at_end) or is_due(run.iteration, checkpoint.save_interval)
