"""Which layers have begun in a run with stages, and which of them the optimizer has not stepped yet.

Part of the controller: the same on every rank, saved with its state. What stages are is method/stages.py's; what is
done to a layer that begins, mcore/skip/growth.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from megatron_sbld.layout.placement import layer_ranges
from megatron_sbld.method.choices import StageInit
from megatron_sbld.method.policy import Policy
from megatron_sbld.method.stages import Stages, nearest_running

OnGrowth = Callable[[Sequence[int], Collection[int]], None]
"""Called with the layers that begin now, ascending, and those that have begun before."""


class Growth:
    """How far a run has grown. Layers are 1-based; without stages all have begun from the start."""

    def __init__(self, policy: Policy) -> None:
        self.start(policy)
        self.callbacks: list[OnGrowth] = []
        self.before_iteration: list[Callable[[int], None]] = []
        """Called with each iteration of a run with stages, once the layers of it have begun."""
        self.begins_as = ""
        """What a layer begins as, which takes all ranks: they compare it."""
        self._first_steps: frozenset[int] = frozenset()  # begun, but not stepped since
        self._stepped = False  # in the present iteration

    def start(self, policy: Policy) -> None:
        """The state before the first iteration."""
        self.begun = policy.begun_layers(0)

    def let_begin(self, layers: frozenset[int], iteration: int) -> None:
        """The layers of the coming iteration; what is new among them begins."""
        entering = layers - self.begun
        if entering:
            for on_growth in self.callbacks:
                on_growth(sorted(entering), self.begun)
        self.begun |= entering
        self._first_steps |= entering
        for prepare in self.before_iteration:
            prepare(iteration)

    def note_step(self) -> None:
        """The optimizer makes a step with the gradients of the present iteration."""
        self._stepped = True

    def awaits_first_step(self, layer_number: int) -> bool:
        """Whether no step has had a gradient of the layer since it began."""
        return layer_number in self._first_steps

    def end_iteration(self, ran: Callable[[], frozenset[int]]) -> None:
        """Take the layers that a step has reached off the list; late, because an optimizer may have several parts."""
        if self._stepped and self._first_steps:
            self._first_steps -= ran()
        self._stepped = False

    def state_dict(self, policy: Policy) -> dict[str, Any] | None:
        """None without stages."""
        if policy.stages is None:
            return None
        return {
            **policy.stages.state_dict(),
            "begun": sorted(self.begun),
            "first_steps": sorted(self._first_steps),
        }

    def load_state_dict(self, state: dict[str, Any] | None, policy: Policy, next_iteration: int) -> tuple[Policy, str]:
        """Go on as saved; returns the policy with the stages that hold from here on, and a line on what differs.

        state: None for a run without stages.
        Raises ValueError where layers have not begun and the policy has no stages.
        """
        every = frozenset(range(1, policy.num_layers + 1))
        begun = every if state is None else frozenset(state["begun"])
        if policy.stages is None:
            if begun != every:
                raise ValueError(
                    f"the run that is to go on is still growing: layers {sorted(every - begun)} have not begun. Keep "
                    f"its stages; stages [[0.0, {len(begun)}], [1.0, {policy.num_layers}]] let all layers begin now"
                )
            return policy, ""
        asked = policy.stages.state_dict()["asked"]
        if state is None:
            state = {**policy.stages.state_dict(), "first_steps": []}
        stages = policy.stages.continued(state, begun)
        self.begun, self._first_steps = begun, frozenset(state["first_steps"])
        self._stepped = False
        line = ""
        if begun == every and stages.last_growth > next_iteration:
            line = "drop stages: no effect, every layer had begun when saved"
        elif state["asked"] != asked:
            line = f"drop stages: {state['asked']} when saved, {asked} now"
        return policy.with_stages(stages), line


def stages_text(stages: Stages) -> str:
    """A line for each stage: until which iteration which layers run."""
    lines, first = [], 1
    for end in stages.ends:
        begun = stages.begun(end)
        if len(begun) == stages.num_layers:
            break
        if end >= first:
            lines.append(f"until iteration {end} {_layers(begun)} {'runs' if len(begun) == 1 else 'run'}")
        first = end + 1
    return "\n".join([*lines, f"from iteration {first} on all {stages.num_layers} layers run"])


def growth_text(iteration: int, entering: Collection[int], running: Collection[int], init: StageInit) -> str:
    """What happens at an iteration at which layers begin: which ones, and what they begin as.

    running: layers that have begun before.
    """
    sources = {nearest_running(layer, running) for layer in entering}
    begin_as = {
        "random": "as initialised",
        "zero": "with output projections of zero",
        "copy": f"as {'a copy' if len(entering) == 1 else 'copies'} of {layer_ranges(sources)}",
    }[init]
    verb = "begins" if len(entering) == 1 else "begin"
    return f"iteration {iteration}: {_layers(entering)} {verb}, {begin_as}"


def _layers(layers: Collection[int]) -> str:
    return f"{len(layers)} {'layer' if len(layers) == 1 else 'layers'} ({layer_ranges(layers)})"
