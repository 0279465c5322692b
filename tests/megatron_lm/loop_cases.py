"""Runs of examples/megatron_lm/pretrain_gpt.py by the installed megatron.training, many in the same processes.

    outcomes = call_on_ranks(2, run_case, [ScriptCase("stock", words, stock=True), ScriptCase("absent", words)])

Each case begins as a new process would: what megatron.training keeps in its modules is destroyed after every one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from megatron.core.transformer import transformer_config

from megatron_sbld.config.sections import Config
from tests.megatron_lm import on_cpu
from tests.training.trainer_helpers import REPOSITORY, run_here

SCRIPT = REPOSITORY / "examples" / "megatron_lm" / "pretrain_gpt.py"


@dataclass(frozen=True, kw_only=True)
class ScriptCase:
    """One call of the script.

    name: of the run. Its log goes to NAME.RANK.log in the folder, its scalars to NAME.
    words: the command line.
    stock: without layer dropping, as the script would be without its two lines.
    any_depth: layers begin with the same weights in a model of any depth; Megatron's own divides some by its root.
    refused: part of the ValueError that it must end with.
    """

    name: str
    folder: str
    words: tuple[str, ...]
    stock: bool = False
    any_depth: bool = False
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class CommandCase:
    """One call of `megatron-sbld`, in one process."""

    words: tuple[str, ...]


def run_case(case: ScriptCase | CommandCase | Config) -> int:
    """Do what is asked for in this process, whose ranks and store are torchrun's; the exit status, 0.

    Raises:
        RuntimeError: another exit status, or an error, with what was printed last.
    """
    # megatron-core leaves NVTE_* in it; Megatron-LM asks for this one with tensor parallelism.
    with mock.patch.dict(os.environ, CUDA_DEVICE_MAX_CONNECTIONS="1"):
        if isinstance(case, Config):
            outcome = run_here(case)
            if outcome != 0:
                raise RuntimeError(f"pretrain: {outcome}")
        elif isinstance(case, CommandCase):
            from megatron_sbld.cli.main import main

            _call(functools.partial(main, list(case.words)), " ".join(case.words))
        else:
            _run_script(case)
    return 0


def _run_script(case: ScriptCase) -> None:
    _prepare()
    attach = importlib.import_module("megatron_sbld.megatron_lm")
    log = Path(case.folder, f"{case.name}.{os.environ['RANK']}.log")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        for name in [name for name in os.environ if name.startswith("NVTE_")]:
            del os.environ[name]  # Megatron sets these for each model that is built, and refuses another model's
        if case.stock:
            stack.enter_context(mock.patch.object(attach, "with_layer_dropping", lambda *functions: functions))
        if case.any_depth:
            stack.enter_context(mock.patch.object(transformer_config, "scaled_init_method_normal", _as_the_others))
        stack.enter_context(mock.patch.object(sys, "argv", [str(SCRIPT), *case.words]))
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(log.open("w"))))
        call = functools.partial(runpy.run_path, str(SCRIPT), run_name="__main__")
        if case.refused:
            call = functools.partial(_must_refuse, call, case.refused)
        try:
            _call(call, f"{case.name}, see {log}")
        finally:
            _leave()


def _must_refuse(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def _as_the_others(sigma: float, *depth: Any, **options: Any) -> Any:
    return transformer_config.init_method_normal(sigma)


def _call(function: Callable[[], Any], name: str) -> None:
    try:
        function()
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise RuntimeError(f"{name}: exit status {ended.code}") from ended
    except Exception as error:
        raise RuntimeError(f"{name}:\n{traceback.format_exc()}") from error


@functools.cache
def _prepare() -> None:
    on_cpu.prepare()
    # Saving reports each writer's memory by psutil, which is none of our dependencies.
    importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")._process_memory = lambda: 0


def _leave() -> None:
    """Forget the run."""
    global_vars = importlib.import_module("megatron.training.global_vars")
    writer = global_vars._GLOBAL_TENSORBOARD_WRITER
    if writer is not None:
        writer.close()
    importlib.import_module("megatron.training.training").destroy_global_state()
    if dist.is_initialized():
        dist.destroy_process_group()
