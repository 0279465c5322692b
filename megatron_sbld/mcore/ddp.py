"""Finding the DistributedDataParallel wrapper of a layer, and telling it what a skipped layer leaves unsaid.

Megatron's wrapper learns from hooks that a parameter is about to be used (it then waits for the parameter's gather) and
that its gradient is ready (it then starts the bucket's reduction). The modules of a skipped layer never run, so neither
hook fires; `LayerBuckets` does what they would have done.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch.nn.modules.module import register_module_module_registration_hook

from megatron_sbld.mcore.refusals import is_refused_wrapper, refuse_active_wrapper, refuse_wrapper

# A model may be made switchable before it is wrapped (Megatron-LM's hooks come first), and the wrapper leaves no
# reference on the parameters. Torch tells of every child that a module is given: so wrappers are noted as they are
# built. In the order of building: of two around one model the newer one is in use.
_wrappers: weakref.WeakKeyDictionary[DistributedDataParallel, None] = weakref.WeakKeyDictionary()
_refused_wrappers: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def _note_wrapper(parent: torch.nn.Module, name: str, child: torch.nn.Module | None) -> None:
    if isinstance(parent, DistributedDataParallel):
        _wrappers[parent] = None
        for layer in _switchable_layers(child):
            layer._drop_buckets = None  # those of an earlier wrapper, or of none
    elif is_refused_wrapper(parent):
        _refused_wrappers.add(parent)
        if any(_switchable_layers(child)):
            refuse_wrapper(parent)


def _switchable_layers(model: torch.nn.Module | None) -> Iterator[Any]:
    return (module for module in (model.modules() if model is not None else ()) if hasattr(module, "_drop_controller"))


register_module_module_registration_hook(_note_wrapper)


def note_wrappers(modules: Iterable[torch.nn.Module]) -> None:
    """Note wrappers that were built before this module was imported."""
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            _wrappers.setdefault(module)


def refuse_wrappers_around(layers: Iterable[torch.nn.Module]) -> None:
    """Refuse layers in a wrapper that cannot work, also when the model inside of it was given alone.

    Raises:
        ValueError: naming the wrapper.
    """
    layers = set(layers)
    if any(not layers.isdisjoint(wrapper.modules()) for wrapper in list(_refused_wrappers)):
        gc.collect()  # torch's wrappers refer to themselves, so one that was given up may still be there
    for wrapper in list(_refused_wrappers):
        if not layers.isdisjoint(wrapper.modules()):
            refuse_wrapper(wrapper)


class LayerBuckets:
    """The gradient buckets of one layer's parameters, in the order of registration, in which Megatron gathers them.

    `wrapper` is None for a model that is not wrapped: there is then nothing to wait for or to report. Parameters that
    the wrapper does not know (frozen when it was built, or added since) are nothing to it, as in Megatron's own hooks.
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        refuse_active_wrapper()
        self._params = list(layer.parameters())
        self.wrapper = wrapper_of(self._params)
        known = {} if self.wrapper is None else self.wrapper.param_to_bucket_group
        self._groups = {param: known[param] for param in self._params if param in known}
        self._distinct_groups = list(dict.fromkeys(self._groups.values()))
        self._stand_in: torch.Tensor | None = None
        self._accumulator: Any = None

    def wait_for_params(self) -> None:
        """Finish the gathers that a kept layer would have waited for, so that no later iteration starts them twice.

        Does what the wrapper's forward pre-hooks do (distributed_data_parallel.py, `_make_forward_pre_hook`), while
        they are enabled.
        """
        wrapper = self.wrapper
        if wrapper is None or not wrapper.remove_forward_pre_hook_handles:
            return
        skip_next = wrapper.ddp_config.align_param_gather or wrapper.overlap_param_gather_with_optimizer_step
        for group in self._distinct_groups:
            group.finish_param_sync(skip_next_bucket_dispatch=skip_next)

    @property
    def reports_gradients(self) -> bool:
        """Whether reductions overlap with backward, so that each gradient must be reported."""
        return self.wrapper is not None and self.wrapper.ddp_config.overlap_grad_reduce

    def stand_in(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """What autograd takes for the layer's parameters when the layer is skipped; None where it need not know any.

        A leaf without elements. The layer's output has a gradient if it would have one with the parameters, and
        autograd comes to the leaf as it comes to a parameter: once in a backward pass, after all forward passes that
        lead to it, and not at all while the layer is frozen. That is when gradients are reported.
        """
        if not torch.is_grad_enabled() or (hidden_states.requires_grad and not self.reports_gradients):
            return None
        if not any(param.requires_grad for param in self._params):
            return None
        if self._stand_in is None or self._stand_in.device != hidden_states.device:
            self._stand_in = torch.empty(0, device=hidden_states.device, requires_grad=True)
            # As Megatron finds it for a parameter; the tensor itself does not keep it.
            view: Any = self._stand_in.expand_as(self._stand_in)
            self._accumulator = view.grad_fn.next_functions[0][0]
            self._accumulator.register_hook(_reporting(weakref.ref(self)))
        return self._stand_in

    def report_gradients(self) -> None:
        """Report every gradient ready, as the backward hooks would; nothing is added to main_grad.

        `register_grad_ready` itself counts in the last microbatch alone. Reversed, because backward reaches the last
        module first.
        """
        if self.wrapper is None or not self.reports_gradients:
            return
        for param, group in reversed(self._groups.items()):
            if param.requires_grad:
                group.register_grad_ready(param, self.wrapper.force_all_reduce)


def _reporting(buckets: weakref.ref[LayerBuckets]) -> Callable[..., None]:
    """A hook of autograd's that keeps nothing alive."""

    def report(*_: Any) -> None:
        found = buckets()
        if found is not None:
            found.report_gradients()

    return report


def wrapper_of(params: Iterable[torch.nn.Parameter]) -> DistributedDataParallel | None:
    """The newest wrapper that has one of a layer's parameters in its buckets."""
    params = list(params)
    for wrapper in reversed(list(_wrappers)):
        if any(param in wrapper.param_to_bucket_group for param in params):
            return wrapper
    return None
