"""EleutherAI's lm-evaluation-harness on an exported model, called by test_lm_eval.py in a process of its own.

Of its own, because the stand-ins that let megatron-core run on a CPU replace functions of torch, which transformers
does not expect. It knows nothing of this package.

    python -m tests.hf.harness_peer REQUEST.json ANSWER.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LAMBADA = {
    "output_type": "loglikelihood",
    # The texts of the harness's own lambada_openai.
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}


def write_task(folder: Path, name: str, kind: dict[str, Any], data: Path) -> None:
    """A task on local JSON lines of {"text": ...}."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **kind,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def main(request: str, answer: str) -> None:
    """Evaluate {"models": folders, "tasks": names, "task_folder": where their files are}."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    asked = json.loads(Path(request).read_text())
    manager = TaskManager(include_path=asked["task_folder"], include_defaults=False)
    answers = {}
    for model in asked["models"]:
        answers[model] = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": model, "dtype": "float32"},
            tasks=asked["tasks"],
            task_manager=manager,
            batch_size=4,
            device="cpu",
            bootstrap_iters=0,
            log_samples=True,
        )
    kept = {
        model: {
            name: {
                "metrics": found["results"][name],
                "answers": [sample["filtered_resps"][0] for sample in found["samples"][name]],
            }
            for name in asked["tasks"]
        }
        for model, found in answers.items()
    }
    Path(answer).write_text(json.dumps(kept))


if __name__ == "__main__":
    main(*sys.argv[1:])
