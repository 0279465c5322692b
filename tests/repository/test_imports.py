"""The method needs neither torch nor Megatron (design: imports go down the list of rooms only)."""

import subprocess
import sys

PROGRAM = """
import sys
for name in ("torch", "megatron"):
    sys.modules[name] = None  # importing it raises ImportError
from megatron_sbld import Constant, PLDPolicy, draw_plan
from megatron_sbld.layout import pipeline, placement
from megatron_sbld.method import build, config, decisions, policy, schedule, schedule_fit
from megatron_sbld.sensitivity import dynamic, early_stop, file, lists, measurement, mixing, stats
print(draw_plan(PLDPolicy(Constant(0.5), 4).keep_probs(1), seed=1, iteration=1, num_microbatches=2).shape)
"""


def test_the_method_works_with_torch_and_megatron_blocked():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(2, 4)\n"


def test_the_package_loads_the_controller_only_when_it_is_asked_for():
    program = "import sys, megatron_sbld; print('torch' in sys.modules, hasattr(megatron_sbld, 'no_such_name'))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "False False\n", result.stderr


def test_all_public_names_are_there_at_the_top():
    import megatron_sbld

    for name in megatron_sbld.__all__:
        assert getattr(megatron_sbld, name) is not None
    assert megatron_sbld.__dir__() == megatron_sbld.__all__
    assert sorted(name for names in megatron_sbld._HOMES.values() for name in names) == sorted(
        set(megatron_sbld.__all__) - {"__version__"}
    )
