"""Llama 3.2 1B in Megatron-Bridge with layer dropping: `torchrun --nproc-per-node 8 pretrain_llama.py`. Not run yet."""

from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

from megatron_sbld.bridge import LayerDropping

if __name__ == "__main__":
    cfg = llama32_1b_pretrain_config()
    cfg.train.train_iters = 10_000
    pretrain(cfg, forward_step, callbacks=[LayerDropping(cfg, policy="pld", theta=0.5, dropped_update="freeze")])
