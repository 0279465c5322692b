"""What megatron_sbld/bridge.py needs of Megatron-Bridge, read from its sources without importing it.

Bridge needs Python 3.12 and Transformer Engine at import. MEGATRON_BRIDGE_WHEEL names its wheel:

    pip download --no-deps --only-binary :all: --python-version 3.12 megatron-bridge==0.6.2
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import os
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

from megatron_sbld import bridge
from megatron_sbld.bridge import REFUSED, LayerDropping

ROOT = Path(__file__).parents[2]
VARIABLE = "MEGATRON_BRIDGE_WHEEL"
TRAINING = "megatron/bridge/training"
EVENTS = sorted(name for name in vars(LayerDropping) if name.startswith("on_"))
Sources = Callable[[str], str]


@pytest.fixture(scope="module")
def sources() -> Sources:
    """The text of a file of Bridge's wheel, or of the installed megatron-core, by its path."""
    path = os.environ.get(VARIABLE)
    if not path:
        pytest.skip(f"{VARIABLE} is not set: it is the path of a wheel of megatron-bridge (CONTRIBUTING.md)")
    wheel = zipfile.ZipFile(path)
    return functools.cache(lambda name: wheel.read(name).decode())


parsed = functools.lru_cache(maxsize=64)(ast.parse)


def definition(source: str | ast.AST, *names: str) -> Any:
    """A class or function by its name, or one within another."""
    found: Any = parsed(source) if isinstance(source, str) else source
    for name in names:
        kinds = (ast.ClassDef, ast.FunctionDef)
        found = next((node for node in found.body if isinstance(node, kinds) and node.name == name), None)
        if found is None:
            raise LookupError(f"no {'.'.join(names)}")
    return found


def parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


def attributes(cls: ast.ClassDef) -> set[str]:
    """Fields and properties of a class."""
    fields = {
        node.target.id for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    made = next((node for node in cls.body if getattr(node, "name", "") == "__init__"), ast.Pass())
    assigned = {
        node.attr
        for node in ast.walk(made)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    return fields | assigned | {node.name for node in cls.body if isinstance(node, ast.FunctionDef)}


def chains_in(tree: ast.AST, root: str) -> set[tuple[str, ...]]:
    """What is read of a name, as ("state", "train_state", "step") of context.state.train_state.step."""
    found = set()
    for node in ast.walk(tree):
        names: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            names.insert(0, inner.attr)
            inner = inner.value
        if names and ast.unparse(inner) == root:
            found.add(tuple(names))
    return found


OURS = ast.parse(Path(bridge.__file__).read_text(encoding="utf-8"))


def read_of_context(event: str) -> set[tuple[str, ...]]:
    return chains_in(definition(OURS, "LayerDropping", event), "context")


def call_of(tree: ast.AST, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function:
            yield node


def lines_of(tree: ast.AST, function: str) -> list[int]:
    return sorted(node.lineno for node in call_of(tree, function))


def fired(tree: ast.AST, event: str) -> ast.Call:
    """Where an event is fired."""
    for node in call_of(tree, "callback_manager.fire"):
        if ast.unparse(node.args[0]) == repr(event):
            return node
    raise LookupError(f"{event} is not fired")


def callback_problems(sources: Sources) -> list[str]:
    """Events, their methods and the fields of the context that our events read."""
    text = sources(f"{TRAINING}/callbacks.py")
    fields = attributes(definition(text, "CallbackContext"))
    found = []
    for event in EVENTS:
        try:
            if parameters(definition(text, "Callback", event)) != ["self", "context"]:
                found.append(f"Callback.{event} has other parameters")
        except LookupError as error:
            found.append(str(error))
        found += [f"CallbackContext has no {chain[0]}" for chain in read_of_context(event) if chain[0] not in fields]
    return found


def state_problems(sources: Sources) -> list[str]:
    """What is read of context.state and its train_state."""
    text = sources(f"{TRAINING}/state.py")
    classes = {"state": "GlobalState", "train_state": "TrainState"}
    found = []
    for chain in set().union(*(read_of_context(event) for event in EVENTS)):
        for owner, name in itertools.pairwise(chain):
            cls = classes.get(owner)
            if cls is not None and name not in attributes(definition(text, cls)):
                found.append(f"{cls} has no {name}")
    return found


def loop_problems(sources: Sources) -> list[str]:
    """Events come where they must be, with the fields that we read there."""
    text = sources(f"{TRAINING}/train.py")
    train = definition(text, "train")
    found = []
    for event in EVENTS:
        try:
            context = fired(train, event).args[1]
        except LookupError as error:
            found.append(str(error))
            continue
        given = {keyword.arg for keyword in context.keywords}
        found += [f"{event} gives no {chain[0]}" for chain in read_of_context(event) if chain[0] not in given]
    if found:
        return found
    (step,) = lines_of(train, "wrapped_train_step")
    loop = next(node.lineno for node in ast.walk(train) if isinstance(node, ast.While))
    order = [fired(train, "on_train_start").lineno, loop, fired(train, "on_train_step_start").lineno, step]
    order += [fired(train, "on_train_step_end").lineno]
    order += [node.lineno for node in ast.walk(train) if ast.unparse(node) == "global_state.train_state.step += 1"][-1:]
    if order != sorted(order) or len(order) != 6:
        found.append(f"events come in another order: lines {order}")
    if lines_of(definition(text, "train_step"), "optimizer.step") == []:
        found.append("train_step does not step the optimizer")
    if "num_microbatches_calculator import" not in text or not lines_of(train, "get_num_microbatches"):
        found.append("the number of microbatches is another's than megatron-core's")
    return found


def setup_problems(sources: Sources) -> list[str]:
    """Hooks, optimizer and loading, in this order."""
    text = sources(f"{TRAINING}/setup.py")
    setup = definition(text, "setup")
    names = ("create_checkpoint_manager", "_build_distributed_model", "setup_optimizer", "checkpoint_manager.load")
    lines = [lines_of(setup, name)[:1] for name in names]
    found = [f"setup calls no {name}" for name, line in zip(names, lines, strict=True) if not line]
    if not found and lines != sorted(lines):
        found.append(f"setup goes in another order: lines {lines}")
    register = ast.unparse(definition(text, "_register_pre_wrap_hook"))
    for way in ("model_cfg.pre_wrap_hooks.append(hook)", "model_cfg.register_pre_wrap_hook(hook)"):
        if way not in register:
            found.append(f"hooks are not registered by {way}")
    for context in call_of(setup, "CheckpointLoadContext"):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in context.keywords}
        if {name: given.get(name) for name in ("model", "optimizer", "opt_param_scheduler")} != {
            "model": "model",
            "optimizer": "optimizer",
            "opt_param_scheduler": "scheduler",
        }:
            found.append(f"a checkpoint is loaded with {given}")
    return found


def provider_problems(sources: Sources) -> list[str]:
    """A provider's hooks, which are called before the model is wrapped."""
    text = sources("megatron/bridge/models/model_provider.py")
    found = []
    try:
        register = definition(text, "ModelProviderMixin", "register_pre_wrap_hook")
        if parameters(register)[:2] != ["self", "hook"]:
            found.append("register_pre_wrap_hook has other parameters")
    except LookupError as error:
        found.append(str(error))
    get_model = definition(text, "get_model")
    hook, wrap = lines_of(get_model, "pre_wrap_hook"), lines_of(get_model, "_ddp_wrap")
    if not hook or not wrap or hook[0] > wrap[0]:
        found.append("hooks are not called before the model is wrapped")
    return found


def checkpoint_problems(sources: Sources) -> list[str]:
    """The manager's methods; where the scheduler's state is saved and loaded; what a loading context has."""
    text = sources(f"{TRAINING}/checkpointing.py")
    ours = definition(OURS, "CheckpointManager")
    found = []
    for cls in ("CheckpointManager", "DefaultCheckpointManager"):
        for method in ("__init__", "save", "load", "finalize_async_saves"):
            try:
                theirs = parameters(definition(text, cls, method))
            except LookupError as error:
                found.append(str(error))
                continue
            if theirs != parameters(definition(OURS, "CheckpointManager", method)):
                found.append(f"{cls}.{method} has the parameters {theirs}")
    protocol = definition(text, "CheckpointManager")
    methods = {node.name for node in protocol.body if isinstance(node, ast.FunctionDef)}
    found += [f"CheckpointManager needs {name}" for name in methods - attributes(ours)]
    read = chains_in(definition(OURS, "CheckpointManager", "load"), "ctx")
    fields = attributes(definition(text, "CheckpointLoadContext"))
    found += [f"CheckpointLoadContext has no {chain[0]}" for chain in read if chain[0] not in fields]
    for call in ("opt_param_scheduler.state_dict", "opt_param_scheduler.load_state_dict"):
        if not lines_of(parsed(text), call):
            found.append(f"checkpoints do not call {call}")
    if "checkpoint_config.custom_manager_class" not in ast.unparse(definition(text, "create_checkpoint_manager")):
        found.append("custom_manager_class is not what makes the manager")
    register = definition(sources("megatron/bridge/utils/instantiate_utils.py"), "register_allowed_target_prefix")
    if parameters(register) != ["prefix"]:
        found.append("register_allowed_target_prefix has other parameters")
    return found


def config_problems(sources: Sources) -> list[str]:
    """Every setting that is read or refused is a field of ConfigContainer."""
    text = sources(f"{TRAINING}/config.py")
    container = attributes(definition(text, "ConfigContainer"))
    read = chains_in(OURS, "cfg") | chains_in(OURS, "self._cfg") | {tuple(path.split(".")) for path in REFUSED}
    found = [f"ConfigContainer has no {chain[0]}" for chain in read if chain[0] not in container]
    owners = {
        "checkpoint": "CheckpointConfig",
        "train": "TrainingConfig",
        "dist": "DistributedInitConfig",
        "logger": "LoggerConfig",
        "inprocess_restart": "InProcessRestartConfig",
    }
    for section, name in (("checkpoint", "custom_manager_class"), ("dist", "use_decentralized_pg")):
        if name not in attributes(definition(text, owners[section])):  # Bridge's own, of no base
            found.append(f"{owners[section]} has no {name}")
    for section, *names in read:
        if section in owners and names:
            known = inherited(text, owners[section])
            if known is not None and names[0] not in known:
                found.append(f"{owners[section]} has no {names[0]}")
    return found


def inherited(text: str, name: str) -> set[str] | None:
    """Fields of a class of Bridge's and of its base in megatron.training; None where that one is not installed."""
    cls = definition(text, name)
    fields = attributes(cls)
    for base in cls.bases:
        base_name = ast.unparse(base)
        if base_name.startswith("MTrain"):
            found = of_megatron_training(base_name.removeprefix("MTrain"))
            if found is None:
                return None
            fields |= found
    return fields


def of_megatron_training(name: str) -> set[str] | None:
    megatron = PathFinder.find_spec("megatron", sys.path)
    folders = [Path(place, "training", "config") for place in (megatron.submodule_search_locations if megatron else ())]
    for path in (path for folder in folders for path in folder.glob("*.py")):
        try:
            return attributes(definition(path.read_text(encoding="utf-8"), name))
        except LookupError:
            continue
    return None


def loss_problems(sources: Sources) -> list[str]:
    """The dynamic estimate looks for this name among the losses."""
    has_name = "'lm loss'" in ast.unparse(parsed(sources(f"{TRAINING}/losses.py")))
    return [] if has_name else ["no loss is called 'lm loss'"]


def example_problems(sources: Sources) -> list[str]:
    """What the example imports exists, and `pretrain` takes callbacks."""
    found = []
    for path in (ROOT / "examples" / "megatron_bridge").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("megatron.bridge"):
                continue
            place = str(node.module).replace(".", "/")
            text = text_of(sources, f"{place}.py") or text_of(sources, f"{place}/__init__.py") or ""
            found += [f"{node.module} has no {name.name}" for name in node.names if name.name not in defined_in(text)]
    if parameters(definition(sources(f"{TRAINING}/pretrain.py"), "pretrain")) != [
        "config",
        "forward_step_func",
        "callbacks",
    ]:
        found.append("pretrain has other parameters")
    return found


def text_of(sources: Sources, path: str) -> str | None:
    try:
        return sources(path)
    except KeyError:
        return None


def defined_in(text: str) -> set[str]:
    tree = parsed(text)
    imported = {
        name.asname or name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    return imported | {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


PARTS = [
    callback_problems,
    state_problems,
    loop_problems,
    setup_problems,
    provider_problems,
    checkpoint_problems,
    config_problems,
    loss_problems,
    example_problems,
]


def problems(sources: Sources) -> list[str]:
    return [line for part in PARTS for line in part(sources)]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_bridge_has_what_is_needed_of_it(sources: Sources, part: Callable[[Sources], list[str]]) -> None:
    assert part(sources) == []


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (f"{TRAINING}/callbacks.py", "on_train_step_start", "on_step_start"),
        (f"{TRAINING}/callbacks.py", "def on_train_start(self, context:", "def on_train_start(self, trainer, context:"),
        (f"{TRAINING}/callbacks.py", "    state: GlobalState", "    global_state: GlobalState"),
        (f"{TRAINING}/callbacks.py", "    loss_dict:", "    losses:"),
        (f"{TRAINING}/state.py", "    step: int = 0", "    iteration: int = 0"),
        (f"{TRAINING}/state.py", "train_state", "training_state"),
        (f"{TRAINING}/state.py", "tensorboard_logger", "tensorboard_writer"),
        (f"{TRAINING}/train.py", '"on_train_step_end"', '"on_train_step_over"'),
        (f"{TRAINING}/train.py", "scheduler=scheduler,", ""),
        (f"{TRAINING}/train.py", '"on_train_step_start"', '"on_train_step_end"'),
        (f"{TRAINING}/setup.py", "opt_param_scheduler=scheduler", "scheduler=scheduler"),
        (f"{TRAINING}/setup.py", "model_cfg.pre_wrap_hooks.append", "model_cfg.hooks.append"),
        (f"{TRAINING}/setup.py", "checkpoint_manager.load(", "checkpoint_manager.load_all("),
        ("megatron/bridge/models/model_provider.py", "def register_pre_wrap_hook", "def add_pre_wrap_hook"),
        ("megatron/bridge/models/model_provider.py", "pre_wrap_hook(model)", "later_hook(model)"),
        (f"{TRAINING}/checkpointing.py", "self, ctx: CheckpointLoadContext", "self, context: CheckpointLoadContext"),
        (f"{TRAINING}/checkpointing.py", "opt_param_scheduler.load_state_dict", "opt_param_scheduler.load"),
        (f"{TRAINING}/checkpointing.py", "custom_manager_class", "manager_class"),
        (f"{TRAINING}/config.py", "    custom_manager_class", "    manager_class"),
        (f"{TRAINING}/config.py", "    use_decentralized_pg", "    decentralized"),
        (f"{TRAINING}/config.py", "    peft:", "    adapters:"),
        (f"{TRAINING}/losses.py", "lm loss", "loss"),
        (f"{TRAINING}/pretrain.py", "    callbacks:", "    hooks:"),
        ("megatron/bridge/recipes/llama/__init__.py", "llama32_1b_pretrain_config", "llama32_1b_config"),
        ("megatron/bridge/utils/instantiate_utils.py", "def register_allowed_target_prefix", "def allow_prefix"),
    ],
)
def test_what_is_renamed_there_is_found(sources: Sources, path: str, old: str, new: str) -> None:
    assert old in sources(path)

    def renamed(name: str) -> str:
        return sources(name).replace(old, new) if name == path else sources(name)

    with contextlib.suppress(LookupError):  # a function or class that is no more
        assert problems(renamed)


def test_bridges_own_manager_of_callbacks_takes_ours(sources: Sources) -> None:
    """callbacks.py needs nothing else of Bridge, so this much of it runs here."""
    module: Any = types.ModuleType("callbacks_of_bridge")
    sys.modules[module.__name__] = module
    try:
        exec(compile(sources(f"{TRAINING}/callbacks.py"), "callbacks.py", "exec"), vars(module))
        seen: list[str] = []

        class Ours(LayerDropping):
            def __init__(self) -> None:
                """Without a config."""

            def on_train_start(self, context: Any) -> None:
                seen.append(context.state)

        manager = module.normalize_callbacks([Ours()])
        assert sorted(event for event in manager.events if manager.has_callbacks(event)) == EVENTS
        manager.fire("on_train_start", module.CallbackContext(state="the state", model=[]))
        assert seen == ["the state"]
    finally:
        del sys.modules[module.__name__]
