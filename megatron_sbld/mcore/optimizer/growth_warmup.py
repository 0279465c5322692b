"""A second warm-up of the learning rate when layers begin (`drop.stage_warmup`)."""

from __future__ import annotations

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sbld.checks import check_integer
from megatron_sbld.controller import DropController


def warm_up_after_growth(scheduler: OptimizerParamScheduler, controller: DropController, iterations: int) -> None:
    """Let the learning rate rise again, linearly from 0, over so many iterations each time layers begin.

    The factor is k / iterations at the k-th iteration since, on what the scheduler says; it reaches 1. All layers have
    it, those that ran before as well. Call it once, on every rank, after `grow_in_stages`.

    Args:
        scheduler: Megatron's, of the optimizer that the layers have.
        controller: whose policy has stages.
        iterations: 1 or more.

    Raises:
        ValueError: fewer, or a policy without stages.
    """
    check_integer("iterations", iterations, 1)
    if controller.policy.stages is None:
        raise ValueError("the controller's policy has no stages: no layer begins late")

    def set_rates(iteration: int) -> None:
        stages = controller.policy.stages
        since = None if stages is None else stages.iterations_since_growth(iteration)
        if since is not None and since <= iterations:
            for group in scheduler.optimizer.param_groups:
                group["lr"] = scheduler.get_lr(group) * (since / iterations)

    stock_step = scheduler.step

    def step(increment: int) -> None:
        """Megatron's, which sets what the next iteration uses and programs log."""
        stock_step(increment)
        set_rates(controller.iteration + 1)

    scheduler.step = step
    controller.growth.before_iteration[:] = [set_rates]  # also where a step was skipped, or a run goes on
