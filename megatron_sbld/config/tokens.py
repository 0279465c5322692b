"""The token dropping of a config: what method/build_tokens.py makes of its model, its layout and its length."""

from __future__ import annotations

from megatron_sbld.config.sections import Config
from megatron_sbld.method.build_tokens import build_tokens
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.tokens import TokenDrop, strata_needed


def tokens_of(config: Config, train_iters: int, drop: DropConfig | None = None) -> TokenDrop | None:
    """What a run of T iterations drops; None unless granularity is token. Raises ValueError naming the field.

    drop: another section than the config's.
    """
    model = config.model
    return build_tokens(
        drop or config.drop, model.num_layers, train_iters, model.seq_length, strata_needed(config.parallel)
    )
