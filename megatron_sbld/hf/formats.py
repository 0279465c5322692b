"""The formats of Hugging Face's transformers that models go to and come from: GPT-2, Llama and GPT-NeoX.

Which one holds a model follows from its architecture alone: GPT-2's has learned positions, the others rotary ones;
Llama's has RMSNorm, SwiGLU and grouped queries, GPT-NeoX's LayerNorm and GeLU.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_sbld.config.flops import ffn_hidden_size
from megatron_sbld.config.sections import ModelConfig
from megatron_sbld.hf.format import (
    FINAL_NORM,
    POSITIONS,
    FieldReader,
    Format,
    Heads,
    Rule,
    head_size,
    positions,
    unmet,
)

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_TO_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


class GPT2(Format):
    """Learned positions, LayerNorm, GeLU, biases; linear layers are transposed ("Conv1D")."""

    title = "GPT-2"
    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    prefix = "transformer."
    buffers = r".*\.attn\.(bias|masked_bias)"
    embedding = "transformer.wte.weight"

    def problems(self, model: ModelConfig) -> list[str]:
        return unmet(model, _layer_norm_and_gelu(model, "learned_absolute"))

    def config(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "n_embd": model.hidden_size,
            "n_layer": model.num_layers,
            "n_head": model.num_attention_heads,
            "n_inner": ffn_hidden_size(model),
            "n_positions": positions(model),
            "activation_function": _TO_ACTIVATION[model.activation_func],
            "layer_norm_epsilon": model.layernorm_epsilon,
            "resid_pdrop": model.hidden_dropout,
            "embd_pdrop": model.hidden_dropout,
            "attn_pdrop": model.attention_dropout,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
        }

    def model(self, config: FieldReader) -> ModelConfig:
        config.only(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        hidden, dropout = config.count("n_embd"), config.number("resid_pdrop", 0.1)
        if config.number("embd_pdrop", 0.1) != dropout:
            config.refuse("embd_pdrop", config.get("embd_pdrop", 0.1), f"equal to resid_pdrop = {dropout}")
        length = config.count("n_positions")
        return ModelConfig(
            num_layers=config.count("n_layer"),
            hidden_size=hidden,
            num_attention_heads=config.count("n_head"),
            ffn_hidden_size=config.count("n_inner", 4 * hidden),
            seq_length=length,
            max_position_embeddings=length,
            position_embedding_type="learned_absolute",
            layernorm_epsilon=config.number("layer_norm_epsilon", 1e-5),
            activation_func=config.choose("activation_function", _ACTIVATIONS, "gelu_new"),  # type: ignore[arg-type]
            untie_embeddings_and_output_weights=not config.flag("tie_word_embeddings", True),
            hidden_dropout=dropout,
            attention_dropout=config.number("attn_pdrop", 0.1),
            init_method_std=config.number("initializer_range", 0.02),
        )

    def outer_rules(self, model: ModelConfig) -> list[Rule]:
        shape = (positions(model), model.hidden_size)
        norm = _norm(FINAL_NORM, "transformer.ln_f.", model.hidden_size)
        return [Rule(POSITIONS, shape, ("transformer.wpe.weight",)), *norm]

    def layer_rules(self, model: ModelConfig, layer: int) -> list[Rule]:
        heads, hidden, ffn = Heads.of(model), model.hidden_size, ffn_hidden_size(model)
        place = f"transformer.h.{layer}."
        return [
            *_norm("self_attention.linear_qkv.layer_norm_", f"{place}ln_1.", hidden),
            Rule(
                "self_attention.linear_qkv.weight",
                (heads.rows, hidden),
                (f"{place}attn.c_attn.weight",),
                lambda qkv: [torch.cat(heads.split(qkv)).T],
                lambda parts: heads.join(parts[0].T.chunk(3)),
            ),
            Rule(
                "self_attention.linear_qkv.bias",
                (heads.rows,),
                (f"{place}attn.c_attn.bias",),
                lambda qkv: [torch.cat(heads.split(qkv))],
                lambda parts: heads.join(parts[0].chunk(3)),
            ),
            *_conv1d("self_attention.linear_proj.", f"{place}attn.c_proj.", hidden, hidden),
            *_norm("mlp.linear_fc1.layer_norm_", f"{place}ln_2.", hidden),
            *_conv1d("mlp.linear_fc1.", f"{place}mlp.c_fc.", ffn, hidden),
            *_conv1d("mlp.linear_fc2.", f"{place}mlp.c_proj.", hidden, ffn),
        ]


class Llama(Format):
    """Rotary positions, RMSNorm, SwiGLU, grouped queries; all linear layers with biases or none."""

    title = "Llama"
    model_type = "llama"
    architecture = "LlamaForCausalLM"
    prefix = "model."
    buffers = r".*\.rotary_emb\.inv_freq"
    embedding = "model.embed_tokens.weight"

    def problems(self, model: ModelConfig) -> list[str]:
        return unmet(
            model,
            {
                "position_embedding_type": (model.position_embedding_type == "rope", "'rope'"),
                "rotary_percent": (model.rotary_percent == 1.0, "1.0"),
                "normalization": (model.normalization == "RMSNorm", "'RMSNorm'"),
                "swiglu": (model.swiglu, "True"),
                "hidden_size": (
                    model.hidden_size % model.num_attention_heads == 0,
                    f"divisible by num_attention_heads = {model.num_attention_heads}",
                ),
            },
        )

    def config(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "hidden_size": model.hidden_size,
            "intermediate_size": ffn_hidden_size(model),
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
            "head_dim": head_size(model),
            "hidden_act": "silu",
            "max_position_embeddings": positions(model),
            "rms_norm_eps": model.layernorm_epsilon,
            "attention_bias": model.add_bias_linear,
            "mlp_bias": model.add_bias_linear,
            "attention_dropout": model.attention_dropout,
            "rope_theta": float(model.rotary_base),  # read by transformers 4
            "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},  # by 5
        }

    def model(self, config: FieldReader) -> ModelConfig:
        config.only(hidden_act="silu", sliding_window=None)
        base, share = _rotary(config, "rope_theta", 10000.0, "partial_rotary_factor", 1.0)
        if share != 1:
            config.refuse("partial_rotary_factor", share, "1.0")
        heads, biases = config.count("num_attention_heads"), config.flag("attention_bias", False)
        if config.flag("mlp_bias", False) != biases:
            config.refuse("mlp_bias", not biases, f"equal to attention_bias = {biases}")
        length, hidden = config.count("max_position_embeddings"), config.count("hidden_size")
        return ModelConfig(
            num_layers=config.count("num_hidden_layers"),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=config.count("num_key_value_heads", heads),
            kv_channels=config.count("head_dim", hidden // heads),
            ffn_hidden_size=config.count("intermediate_size"),
            seq_length=length,
            position_embedding_type="rope",
            rotary_base=base,
            normalization="RMSNorm",
            layernorm_epsilon=config.number("rms_norm_eps", 1e-6),
            swiglu=True,
            add_bias_linear=biases,
            untie_embeddings_and_output_weights=not config.flag("tie_word_embeddings", False),
            hidden_dropout=0.0,  # the format has none
            attention_dropout=config.number("attention_dropout", 0.0),
            init_method_std=config.number("initializer_range", 0.02),
        )

    def outer_rules(self, model: ModelConfig) -> list[Rule]:
        return _norm(FINAL_NORM, "model.norm.", model.hidden_size, bias=False)

    def layer_rules(self, model: ModelConfig, layer: int) -> list[Rule]:
        heads, hidden, ffn, bias = Heads.of(model), model.hidden_size, ffn_hidden_size(model), model.add_bias_linear
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        rules = [
            *_norm(
                "self_attention.linear_qkv.layer_norm_", f"model.layers.{layer}.input_layernorm.", hidden, bias=False
            ),
            *_norm("mlp.linear_fc1.layer_norm_", f"model.layers.{layer}.post_attention_layernorm.", hidden, bias=False),
            *_linear("self_attention.linear_proj.", f"{attention}o_proj.", hidden, heads.rows_of_queries, bias),
            *_linear("mlp.linear_fc2.", f"{mlp}down_proj.", hidden, ffn, bias),
        ]
        for kind, rest in [("weight", (hidden,)), *([("bias", ())] if bias else [])]:
            projections = tuple(f"{attention}{name}_proj.{kind}" for name in "qkv")
            rules += [
                Rule(f"self_attention.linear_qkv.{kind}", (heads.rows, *rest), projections, heads.split, heads.join),
                Rule(
                    f"mlp.linear_fc1.{kind}",  # the gate above what it multiplies
                    (2 * ffn, *rest),
                    (f"{mlp}gate_proj.{kind}", f"{mlp}up_proj.{kind}"),
                    lambda both: both.chunk(2),
                    lambda parts: torch.cat(list(parts)),
                ),
            ]
        return rules


class GPTNeoX(Format):
    """Rotary positions (of a part of each head, too), LayerNorm, GeLU, biases; linear_qkv as in Megatron."""

    title = "GPT-NeoX"
    model_type = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    prefix = "gpt_neox."
    buffers = r".*(\.attention\.(bias|masked_bias)|\.rotary_emb\.inv_freq)"
    output = "embed_out.weight"
    embedding = "gpt_neox.embed_in.weight"

    def problems(self, model: ModelConfig) -> list[str]:
        return unmet(model, _layer_norm_and_gelu(model, "rope"))

    def config(self, model: ModelConfig) -> dict[str, Any]:
        base, share = float(model.rotary_base), model.rotary_percent
        return {
            "hidden_size": model.hidden_size,
            "intermediate_size": ffn_hidden_size(model),
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "hidden_act": _TO_ACTIVATION[model.activation_func],
            "max_position_embeddings": positions(model),
            "layer_norm_eps": model.layernorm_epsilon,
            "use_parallel_residual": False,
            "attention_bias": True,
            "hidden_dropout": model.hidden_dropout,
            "attention_dropout": model.attention_dropout,
            "rotary_emb_base": base,  # read by transformers 4
            "rotary_pct": share,
            "rope_parameters": {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": share},  # by 5
        }

    def model(self, config: FieldReader) -> ModelConfig:
        config.only(attention_bias=True)
        if config.flag("use_parallel_residual", True):
            config.refuse("use_parallel_residual", True, "false: attention and MLP of a layer run one after the other")
        base, share = _rotary(config, "rotary_emb_base", 10000.0, "rotary_pct", 0.25)
        return ModelConfig(
            num_layers=config.count("num_hidden_layers"),
            hidden_size=config.count("hidden_size"),
            num_attention_heads=config.count("num_attention_heads"),
            ffn_hidden_size=config.count("intermediate_size"),
            seq_length=config.count("max_position_embeddings"),
            position_embedding_type="rope",
            rotary_base=base,
            rotary_percent=share,
            layernorm_epsilon=config.number("layer_norm_eps", 1e-5),
            activation_func=config.choose("hidden_act", _ACTIVATIONS, "gelu"),  # type: ignore[arg-type]
            untie_embeddings_and_output_weights=not config.flag("tie_word_embeddings", False),
            hidden_dropout=config.number("hidden_dropout", 0.0),
            attention_dropout=config.number("attention_dropout", 0.0),
            init_method_std=config.number("initializer_range", 0.02),
        )

    def outer_rules(self, model: ModelConfig) -> list[Rule]:
        return _norm(FINAL_NORM, "gpt_neox.final_layer_norm.", model.hidden_size)

    def layer_rules(self, model: ModelConfig, layer: int) -> list[Rule]:
        hidden, ffn, place = model.hidden_size, ffn_hidden_size(model), f"gpt_neox.layers.{layer}."
        return [
            *_norm("self_attention.linear_qkv.layer_norm_", f"{place}input_layernorm.", hidden),
            *_linear("self_attention.linear_qkv.", f"{place}attention.query_key_value.", 3 * hidden, hidden, True),
            *_linear("self_attention.linear_proj.", f"{place}attention.dense.", hidden, hidden, True),
            *_norm("mlp.linear_fc1.layer_norm_", f"{place}post_attention_layernorm.", hidden),
            *_linear("mlp.linear_fc1.", f"{place}mlp.dense_h_to_4h.", ffn, hidden, True),
            *_linear("mlp.linear_fc2.", f"{place}mlp.dense_4h_to_h.", hidden, ffn, True),
        ]


FORMATS: tuple[Format, ...] = (GPT2(), Llama(), GPTNeoX())


def format_of_model(model: ModelConfig) -> Format:
    """The format that holds a model.

    Raises:
        ValueError: none does; says for each which field is in the way, its value, and what it would have to be.
    """
    reasons = []
    for candidate in FORMATS:
        problems = candidate.problems(model)
        if not problems:
            return candidate
        reasons.append(f"{candidate.title}: {'; '.join(problems)}")
    raise ValueError("no format of Hugging Face's holds this model:\n" + "\n".join(reasons))


def format_of_config(config: FieldReader) -> Format:
    """The format of a folder, from its config.json.

    Raises:
        ValueError: it is none of ours.
    """
    allowed = {candidate.architecture: candidate for candidate in FORMATS}
    by_type = {candidate.model_type: candidate.architecture for candidate in FORMATS}
    named = config.get("architectures", None) or [by_type.get(config.get("model_type"), config.get("model_type"))]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in allowed:
        config.refuse("architectures", named, f"one of {', '.join(allowed)}")
    return allowed[named[0]]


def _layer_norm_and_gelu(model: ModelConfig, position_embedding: str) -> dict[str, tuple[bool, str]]:
    """What GPT-2's and GPT-NeoX's formats demand alike, but for their positions."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    return {
        "position_embedding_type": (model.position_embedding_type == position_embedding, repr(position_embedding)),
        "normalization": (model.normalization == "LayerNorm", "'LayerNorm'"),
        "swiglu": (not model.swiglu, "False"),
        "add_bias_linear": (model.add_bias_linear, "True"),
        "num_query_groups": (model.num_query_groups in (None, heads), f"None or num_attention_heads = {heads}"),
        "kv_channels": (head_size(model) * heads == hidden, f"hidden_size / num_attention_heads = {hidden} / {heads}"),
    }


def _rotary(config: FieldReader, base_name: str, base: float, share_name: str, share: float) -> tuple[int, float]:
    """Base, and the share of a head that is rotated, from transformers 4's fields or 5's."""
    given: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):  # where both are given, transformers 5 takes rope_scaling alone
        found = config.get(name, {})
        if not _is_unscaled(found):
            config.refuse(name, found, "of rope_type 'default' or left out: scaled rotary positions cannot be held")
        given = found or given
    base = given.get("rope_theta") or config.number(base_name, base)
    share = given.get("partial_rotary_factor") or config.number(share_name, share)
    if not isinstance(base, int | float) or base != int(base) or base < 1:
        config.refuse(base_name, base, "a whole number, as model.rotary_base is")
    return int(base), float(share)


def _is_unscaled(rope: Any) -> bool:
    """Whether rotary positions are the plain ones: no type, or 'default' under its new or its old name."""
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):  # one for each layer type
        return False
    return all(rope.get(name) in (None, "default") for name in ("rope_type", "type"))


def _norm(ours: str, theirs: str, hidden: int, bias: bool = True) -> list[Rule]:
    return [Rule(f"{ours}{kind}", (hidden,), (f"{theirs}{kind}",)) for kind in _kinds(bias)]


def _linear(ours: str, theirs: str, rows: int, columns: int, bias: bool) -> list[Rule]:
    shapes = {"weight": (rows, columns), "bias": (rows,)}
    return [Rule(f"{ours}{kind}", shapes[kind], (f"{theirs}{kind}",)) for kind in _kinds(bias)]


def _conv1d(ours: str, theirs: str, rows: int, columns: int) -> list[Rule]:
    """A linear layer that GPT-2's format holds transposed."""
    return [
        Rule(
            f"{ours}weight",
            (rows, columns),
            (f"{theirs}weight",),
            lambda weight: [weight.T],
            lambda parts: parts[0].T,
        ),
        Rule(f"{ours}bias", (rows,), (f"{theirs}bias",)),
    ]


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)
