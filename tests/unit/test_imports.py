"""The method needs neither torch nor Megatron (design: imports go down the list of rooms only)."""

import subprocess
import sys

PROGRAM = """
import sys
for name in ("torch", "megatron"):
    sys.modules[name] = None  # importing it raises ImportError
from megatron_sbld.method import build as drop
from megatron_sbld.layout import pipeline
from megatron_sbld.layout import placement
from megatron_sbld.method import decisions as plan
from megatron_sbld.method import policy
from megatron_sbld.method import schedule
from megatron_sbld.sensitivity import dynamic, early_stop, file, lists, measurement, mixing, stats
from megatron_sbld.method import schedule_fit as fit
from megatron_sbld.method.schedule import Constant
kept = plan.draw_plan(policy.PLDPolicy(Constant(0.5), 4).keep_probs(1), seed=1, iteration=1, num_microbatches=2)
print(kept.shape)
"""


def test_the_method_works_with_torch_and_megatron_blocked():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(2, 4)\n"


def test_the_package_loads_the_controller_only_when_it_is_asked_for():
    program = "import sys, megatron_sbld; print('torch' in sys.modules, hasattr(megatron_sbld, 'no_such_name'))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "False False\n", result.stderr
