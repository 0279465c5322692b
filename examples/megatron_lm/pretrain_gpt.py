"""GPT pretraining by the training loop that pip installs with megatron-core 0.19, with layer dropping.

    torchrun --nproc-per-node N pretrain_gpt.py ARGUMENTS OF MEGATRON-LM --sbld-policy pld --sbld-theta 0.5

Megatron-LM's repository has a script like this one; the wheel has the loop alone, megatron.training. Layer dropping is
the two lines that name with_layer_dropping. README.md beside this file says what to install.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import datasets, parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_sbld.megatron_lm import with_layer_dropping

NOT_HERE = (
    "sft",
    "fim_data",
    "mtp_num_layers",
    "hybrid_layer_pattern",
    "hybrid_context_parallel",
    "dataloader_inter_document_masking",
    "overlap_moe_expert_parallel_comm",
    "logits_load_dir",
    "inprocess_restart",
)
"""Arguments that need more of a script than this one has, which would otherwise do nothing or fail later."""


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> list[Any]:
    """Training, validation and test sets of that many samples, on the ranks that read them."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, functools.partial(reads_data, vp_stage), config).build()


build_datasets.is_distributed = True  # every rank calls it


def reads_data(vp_stage: int | None) -> bool:
    """Whether this rank reads samples: one of each tensor-parallel group, where the model begins or ends."""
    return is_first_or_last_pipeline_stage(vp_stage) and parallel_state.get_tensor_model_parallel_rank() == 0


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]] | None, vp_stage: int | None) -> dict[str, Any]:
    """This rank's part of a microbatch; nothing in the middle of a pipeline."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(("tokens", "labels", "loss_mask", "attention_mask", "position_ids"))
    args = get_args()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        batch = {name: value.cuda(non_blocking=True) for name, value in next(data_iterator).items()}
        batch.setdefault("attention_mask", None)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The sum of the tokens' losses, the number of tokens, and both for the log. Shapes [b, s]."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    num_tokens = mask.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One microbatch: the model's output, and what turns it into a loss."""
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, functools.partial(loss_func, batch["loss_mask"])


def keep_compiled_helpers() -> None:
    """Let megatron.training take the data sets' helpers as the wheel has them.

    It would compile them with make, for which the wheel has no Makefile, and end with exit status 1.
    """
    if not Path(datasets.__file__).with_name("Makefile").exists():
        datasets.utils.compile_helpers = lambda: None


def check(args: argparse.Namespace) -> None:
    """Refuse what this script has no code for."""
    asked = [f"--{name.replace('_', '-')}" for name in NOT_HERE if getattr(args, name, None)]
    if asked:
        raise ValueError(f"{', '.join(asked)}: not allowed, this script has no code for it; see Megatron-LM's own")


if __name__ == "__main__":
    pretrain, parse_and_validate_args = with_layer_dropping(pretrain, parse_and_validate_args)
    keep_compiled_helpers()
    args = parse_and_validate_args()
    check(args)
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, build_datasets, ModelType.encoder_or_decoder, forward_step)
