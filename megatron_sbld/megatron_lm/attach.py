"""Layer dropping in Megatron-LM's `pretrain`: where each piece hooks in.

    arguments           Megatron-LM's extra_args_provider
    switchable layers   a pre_wrap_hook of the model's config (core 0.19 and later); around model_provider where
                        there is no such config (0.16, and 0.19 where the script gives a provider instead)
    decisions           around `train_step`, on every rank before the pipeline schedule starts: inside of it ranks wait
                        for each other, and could not compare their decisions
    optimizer, state    around `get_optimizer_param_scheduler`, which is called between optimizer and checkpoint
    scalars             around `training_log`

The last three are functions of megatron.training.training, which has no hook there: they are replaced while `pretrain`
runs, and only when the arguments ask for something. With `--sbld-policy none`, `--sbld-granularity layer` and
`--sbld-residual stock`, the defaults, nothing but the arguments is added.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_sbld.megatron_lm.arguments import (
    argument_name,
    drop_config,
    extra_args_provider,
    ignored_arguments,
    lr_schedule_by,
)
from megatron_sbld.megatron_lm.run import LayerDropping
from megatron_sbld.method.in_force import drops

logger = logging.getLogger(__name__)

_TRAINING = "megatron.training.training"
_REPLACED = ("train_step", "get_optimizer_param_scheduler", "training_log")


def with_layer_dropping(pretrain: Callable[..., Any], parse_args: Callable[..., Any] | None = None) -> Any:
    """Megatron-LM's `pretrain` with layer dropping as the `--sbld-*` arguments say.

    Args:
        pretrain: of core 0.16, which parses the arguments itself, or of 0.19 and later.
        parse_args: `parse_and_validate_args` of 0.19 and later.

    Returns:
        pretrain, or with parse_args the pair of both, to be called as the stock ones.
    """
    if parse_args is None:
        return functools.partial(_pretrain_from_provider, pretrain)
    return functools.partial(_pretrain_from_config, pretrain), functools.partial(_parse, parse_args)


def _pretrain_from_provider(
    pretrain: Callable[..., Any], dataset_provider: Any, model_provider: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    kwargs["extra_args_provider"] = extra_args_provider(kwargs.get("extra_args_provider"))
    with _Attachment() as attachment:
        return pretrain(dataset_provider, attachment.around(model_provider), *args, **kwargs)


def _pretrain_from_config(pretrain: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
    with _Attachment() as attachment:
        if not attachment.prepare():
            return pretrain(config, *args, **kwargs)
        if config.model is not None:
            config.model.pre_wrap_hooks.append(attachment.add)
            return pretrain(config, *args, **kwargs)
        call = inspect.signature(pretrain).bind(config, *args, **kwargs)
        call.arguments["model_provider"] = attachment.around(call.arguments["model_provider"])
        return pretrain(*call.args, **call.kwargs)


def _parse(parse_args: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kwargs["extra_args_provider"] = extra_args_provider(kwargs.get("extra_args_provider"))
    return parse_args(*args, **kwargs)


class _Attachment:
    """Replaces functions of Megatron-LM's training module for one call of `pretrain`."""

    def __init__(self) -> None:
        self._run: LayerDropping | None = None
        self._module: Any = None
        self._stock: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> _Attachment:
        return self

    def __exit__(self, *exception: Any) -> None:
        for name, function in self._stock.items():
            setattr(self._module, name, function)
        self._stock.clear()

    def prepare(self) -> bool:
        """Check the arguments and replace what is needed, once; whether anything is asked for."""
        if self._run is not None:
            return True
        args = importlib.import_module("megatron.training").get_args()
        ignored = ignored_arguments(drop_config(args), lr_schedule_by(args))
        if ignored and not args.skip_train and getattr(args, "rank", 0) == 0:
            _warn_of_ignored(ignored)
        if not _asks_for_something(args):
            return False
        self._module = importlib.import_module(_TRAINING)
        missing = [name for name in (*_REPLACED, "update_train_iters") if not hasattr(self._module, name)]
        if missing:
            raise RuntimeError(
                f"{_TRAINING} has no {', '.join(missing)}: this Megatron-LM is not one of the "
                "versions in patches/README.md"
            )
        counted = copy.copy(args)  # with train_iters of its own, Megatron-LM would take --train-samples for iterations
        self._module.update_train_iters(counted)
        run = LayerDropping(args, counted.train_iters, self._module)
        for name in _REPLACED:
            stock = self._stock[name] = getattr(self._module, name)
            setattr(self._module, name, functools.wraps(stock)(functools.partial(getattr(run, name), stock)))
        self._run = run
        return True

    def around(self, model_provider: Callable[..., Any]) -> Callable[..., Any]:
        """A model_provider that prepares, and makes what the other one builds switchable."""

        def provide(*args: Any, **kwargs: Any) -> Any:
            self.prepare()
            model = model_provider(*args, **kwargs)
            self.add([model])
            return model

        return provide

    def add(self, chunks: list[Any]) -> list[Any]:
        """Make built chunks of the model switchable; returns them."""
        if self._run is not None:
            self._run.add(chunks)
        return chunks


def _asks_for_something(args: Namespace) -> bool:
    config = drop_config(args)
    return not args.skip_train and (drops(config) or config.residual != "stock")


@functools.cache  # once in a process, however many chunks the model has
def _warn_of_ignored(names: tuple[str, ...]) -> None:
    logger.warning("no effect with %s none: %s", argument_name("policy"), ", ".join(names))
