"""Reading data, summing up and keeping results need neither torch nor Megatron."""

import subprocess
import sys

PROGRAM = """
import sys
for name in ("torch", "megatron"):
    sys.modules[name] = None  # importing it raises ImportError
from megatron_sbld.evaluation import lambada, passages, perplexity, results, tasks, texts, wikitext
from megatron_sbld.report import compare, evaluation
print("done")
"""


def test_data_and_results_work_with_torch_and_megatron_blocked():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"
