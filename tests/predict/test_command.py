"""`megatron-sbld predict`: what it prints and writes, its hardware files, and mistakes by name."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_sbld.cli.main import main
from megatron_sbld.predict.command import PredictOptions
from megatron_sbld.predict.command import predict as predict_config
from megatron_sbld.predict.hardware import KNOWN, load_hardware
from tests.predict.predict_helpers import make_setup

CONFIG = """
model: {num_layers: 8, hidden_size: 512, num_attention_heads: 8, seq_length: 1024}
parallel: {pipeline_model_parallel_size: 2}
training: {micro_batch_size: 1, global_batch_size: 16, train_iters: 1000}
drop: {policy: pld, theta: 0.5}
"""

BLOCKED = """
import sys
for name in ("torch", "megatron"):
    sys.modules[name] = None  # importing it raises ImportError
from megatron_sbld.cli.main import main
main(["predict", "--config", sys.argv[1], "--gpus", "2", "--out", sys.argv[2]])
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "gpt.yaml"
    file.write_text(CONFIG)
    return str(file)


def predict(*args):
    """Exit status of the command."""
    with pytest.raises(SystemExit) as stopped:
        main(["predict", *map(str, args)])
    return stopped.value.code


@pytest.mark.slow
def test_it_needs_neither_torch_nor_megatron_and_writes_json_and_plots(config, tmp_path):
    program = [sys.executable, "-c", BLOCKED, config, str(tmp_path / "out")]
    result = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "ASSUMED baseline: MFU 40%" in result.stdout
    content = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert content["assumed_mfu"] == 0.4
    assert content["num_microbatches"] == 16
    assert sum(content["parts"].values()) == pytest.approx(content["baseline_s"])
    assert {entry["sampler"] for entry in content["predictions"]} == {"bernoulli", "balanced"}
    assert len(content["memory"]) == 2
    for name in ("timeline.png", "gain.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_it_does_not_overwrite_its_config(tmp_path, capsys):
    file = tmp_path / "predict.json"
    file.write_text(CONFIG)
    assert predict("--config", file, "--gpus", 2, "--out", tmp_path) == 2
    assert "is an input" in capsys.readouterr().err
    assert file.read_text() == CONFIG


def test_a_measured_throughput_takes_the_assumptions_place(config, capsys):
    assert predict("--config", config, "--gpus", 4, "--baseline_tokens_per_s", 900_000, "--iterations", 50) == 0
    shown = capsys.readouterr().out
    assert "measured baseline of 900,000 tokens/s" in shown
    assert "ASSUMED" not in shown
    assert "DP 2; 8 microbatches of 1" in shown


@pytest.mark.parametrize(
    "length",
    [
        ("--training.train_iters", "null", "--training.train_samples", 16_000, "--optimizer.lr_warmup_samples", 1600),
        ("--optimizer.lr_warmup_iters", 500),
    ],
)
def test_another_length_leaves_the_learning_rates_fields_alone_and_is_checked_with_the_drop_sections(
    config, capsys, length
):
    arguments = ("--config", config, "--gpus", 2, *length, "--iterations")
    assert predict(*arguments, 100) == 0
    capsys.readouterr()
    assert predict(*arguments, 2, "--drop.schedule", "pwegd", "--drop.epsilon", 1) == 2
    assert "peak_iteration = 0.2 is not allowed" in capsys.readouterr().err


@pytest.mark.slow
def test_options_may_have_dashes_and_compare_needs_no_value(config, capsys):
    arguments = ("--config", config, "--gpus", 2, "--target-gain", 0.1, "--compare-policies", "--hardware=h200")
    assert predict(*arguments) == 0
    shown = capsys.readouterr().out
    assert "2 x H200 SXM" in shown
    assert "for +10.0%: drop.policy pld, drop.theta 0." in shown
    assert "stochastic_depth" in shown


def test_interleaved_stages_are_shown_with_their_chunks_balanced_as_well(config, capsys):
    arguments = ("--gpus", 2, "--parallel.num_virtual_stages_per_pipeline_rank", 2, "--drop.policy", "layerdrop")
    assert predict("--config", config, *arguments) == 0
    shown = capsys.readouterr().out
    samplers = [line.split()[2] for line in shown.splitlines() if line.startswith("layerdrop")]
    assert samplers == ["bernoulli", "balanced", "balanced"]
    assert "balanced 4 " in shown


def test_no_share_is_shown_as_minus_zero(config, capsys):
    overlap = ("overlap_grad_reduce", "use_distributed_optimizer", "overlap_param_gather")
    arguments = [word for name in overlap for word in (f"--parallel.{name}", "true")]
    assert predict("--config", config, "--gpus", 4, *arguments, "--parallel.pipeline_model_parallel_size", 1) == 0
    shown = capsys.readouterr().out
    assert "-0.0%" not in shown
    assert "bubble" not in shown
    assert "parameter gathering, exposed" in shown


@pytest.mark.slow
def test_what_freezing_saves_of_overlapped_gathers_is_said_not_to_be_counted(config, capsys):
    overlaps = ("overlap_grad_reduce", "use_distributed_optimizer", "overlap_param_gather")
    overlapped = [word for name in overlaps for word in (f"--parallel.{name}", "true")]
    for update, layout, said in (("apply", overlapped, False), ("freeze", [], False), ("freeze", overlapped, True)):
        assert predict("--config", config, "--gpus", 2, "--drop.dropped_update", update, *layout) == 0
        assert ("drop.dropped_update freeze: not counted" in capsys.readouterr().out) is said


def test_with_policy_none_the_baseline_alone_is_shown(config, capsys):
    assert predict("--config", config, "--gpus", 2, "--drop.policy", "none") == 0
    shown = capsys.readouterr().out
    assert "drop.policy none drops nothing" in shown
    assert "undropped" in shown


def test_a_model_that_does_not_fit_is_said_not_to(config, capsys):
    sizes = ("--model.hidden_size", 16384, "--model.num_layers", 32, "--drop.theta", 0.9)
    assert predict("--config", config, "--gpus", 2, *sizes) == 0
    assert "DOES NOT FIT: stage 1 needs" in capsys.readouterr().out


def test_a_proposed_placement_is_shown_with_its_memory_and_not_where_it_does_not_fit(tmp_path, capsys):
    config = make_setup(2, num_layers=16, pipeline_model_parallel_size=2, policy="pld", theta=0.4).config

    def shown(memory):
        hardware = tmp_path / "cluster.yaml"
        fields = f"peak_tflops: 312, memory_gb: {memory}, hbm_bandwidth: 1555"
        hardware.write_text(f"{{{fields}, intra_bandwidth: 300, inter_bandwidth: 25}}")
        outcome = predict_config(config, PredictOptions(gpus=2, hardware=str(hardware), vocab_size=1024, mfu=0.05))
        return outcome, {entry.layout for entry in outcome.predictions}, capsys.readouterr().out

    outcome, layouts, text = shown(40)
    assert layouts == {"Et*8|t*8L", *(proposal.placement.layout for proposal in outcome.proposals)}
    assert len(layouts) > 1
    assert "GB of 40 GB on stage 2" in text
    own = max(rank.total for rank in outcome.memory)
    needed = max(proposal.worst.total for proposal in outcome.proposals)
    outcome, fewer, text = shown((own + needed) / 2)
    assert fewer < layouts
    assert "NOT PROPOSED: Et*" in text


def test_stages_are_told_one_by_one_and_theta_is_not(config, tmp_path, capsys):
    staged = ("--drop.policy", "staged", "--drop.stages", "[[0.6, 1], [1.0, 8]]", "--out", tmp_path / "out")
    assert predict("--config", config, "--gpus", 2, "--compare_policies", *staged) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {tuple(words[1:3]) for words in shown if words[:1] == ["staged"]} == {("-", "-")}
    assert ["1", "-", "600", "2/8", "0.250"] in [words[:5] for words in shown]
    assert ["601", "-", "1000", "8/8", "1.000"] in [words[:5] for words in shown]
    (header,) = (words for words in shown if words[:1] == ["memory,"])
    assert header[-4:] == ["until", "600", "until", "1000"]
    content = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert [stage["begun_layers"] for stage in content["predictions"][0]["stages"]] == [2, 8]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predict.json", "timeline.png"]


def test_more_stages_than_layers_are_predicted(config, capsys):
    layout = ("--parallel.pipeline_model_parallel_layout", "E|t|t|L", "--parallel.pipeline_model_parallel_size", 4)
    assert predict("--config", config, "--gpus", 4, "--model.num_layers", 2, "--mfu", 0.1, *layout) == 0
    assert "pld" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "gpus"),
        (("--gpus", 0), "--gpus = 0 is not allowed"),
        (("--gpus", 3), "3 processes: must be a multiple of"),
        (("--gpus", 2, "--hardware", "b300"), "--hardware b300 is not allowed: it must be a100-80gb, h100, h200"),
        (("--gpus", 2, "--hardware", "none.yaml"), "--hardware none.yaml: cannot be read"),
        (("--gpus", 2, "--peak_tflops", -1), "--peak_tflops = -1.0 is not allowed"),
        (("--gpus", 2, "--inter-bandwidth", 0), "--inter_bandwidth = 0.0 is not allowed"),
        (("--gpus", 2, "--attention", "sparse"), "typing.Literal['flash', 'unfused']. Got value: sparse"),
        (("--gpus", 2, "--mfu", 0.4, "--baseline_tokens_per_s", 1e5), "exclude each other"),
        (("--gpus", 2, "--mfu", 1.4), "mfu = 1.4 is not allowed"),
        (("--gpus", 2, "--baseline_tokens_per_s", 1e9), "with matrix products at the full peak"),
        (("--gpus", 2, "--training.precision", "fp32"), "the peak of a100-80gb is that of bf16"),
        (("--gpus", 2, "--iterations", 0), "--iterations = 0 is not allowed"),
        (("--gpus", 2, "--vocab_size", 0), "--vocab_size = 0 is not allowed"),
        (("--gpus", 2, "--data.tokenizer", "nowhere"), "or give --vocab_size"),
        (("--gpus", 2, "--drop.policy", "none", "--target_gain", 0.2), "--target_gain needs drop.policy"),
        (
            ("--gpus", 2, "--drop.policy", "staged", "--drop.stages", "[[0.5, 1], [1.0, 8]]", "--target_gain", 0.2),
            "the gain of staged is set by drop.stages",
        ),
        (("--gpus", 2, "--target_gain", -1), "target_gain = -1"),
        (("--gpus", 2, "--model.num_layers", 7), "model.num_layers = 7"),
        (("--gpus", 2, "--hardwear", "h100"), "did you mean hardware"),
    ],
)
def test_mistakes_are_refused_by_name(config, capsys, arguments, message):
    assert predict("--config", config, *arguments) == 2
    assert message in capsys.readouterr().err


def test_hardware_is_read_from_a_file_and_options_replace_its_fields(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("{peak_tflops: 312, memory_gb: 40, hbm_bandwidth: 1555, intra_bandwidth: 300, inter_bandwidth: 25}")
    found = load_hardware(str(file), gpus_per_node=4, peak_tflops=None)
    assert (found.name, found.memory_gb, found.gpus_per_node, found.peak_tflops) == ("cluster", 40, 4, 312)
    file.write_text("{peak_tflops: 312, tflops: 1}")
    with pytest.raises(ValueError, match="unknown field tflops"):
        load_hardware(str(file))
    file.write_text("{peak_tflops: 312}")
    with pytest.raises(ValueError, match="memory_gb is missing"):
        load_hardware(str(file))
    file.write_text("- 1")
    with pytest.raises(ValueError, match="must be a mapping"):
        load_hardware(str(file))
    file.write_text("{peak_tflops: much, memory_gb: 40, hbm_bandwidth: 1, intra_bandwidth: 1, inter_bandwidth: 1}")
    with pytest.raises(ValueError, match="peak_tflops = 'much'"):
        load_hardware(str(file))


def test_the_known_cards_have_the_data_sheets_figures():
    assert (KNOWN["a100-80gb"].peak_tflops, KNOWN["a100-80gb"].hbm_bandwidth) == (312, 2039)
    assert KNOWN["h100"].peak_tflops == pytest.approx(1978.9 / 2, abs=0.1)  # the sheet's figure is with sparsity
    assert KNOWN["h200"].memory_gb == 141
    assert KNOWN["h100"].intra_bandwidth == 900 / 2  # the sheet's is both directions
