#!/usr/bin/env python3
"""Layer dropping in a training loop of your own on megatron-core: one process, on a GPU or a CPU.

    python examples/own_loop.py

It prints the iteration, the loss, theta and how many of the 8 layers ran. The three lines that add layer dropping are
marked.
"""

import tempfile

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_sbld import DropController, Exponential, PLDPolicy, make_switchable
from megatron_sbld.mcore.local.layer_specs import gpt_block_spec

LAYERS, VOCAB, SEQUENCE, BATCH = 8, 128, 32, 4
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if device.type == "cpu":  # what megatron-core asks of CUDA, answered by the CPU
    from megatron_sbld.mcore.cpu.standins import install_cpu_standins

    install_cpu_standins()

backend = "nccl" if device.type == "cuda" else "gloo"
store = f"file://{tempfile.mkdtemp()}/store"
dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1)
torch.manual_seed(1)

config = TransformerConfig(num_layers=LAYERS, hidden_size=64, num_attention_heads=4)
model = GPTModel(config, gpt_block_spec(config), VOCAB, SEQUENCE).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

controller = DropController(PLDPolicy(Exponential(theta=0.5, gamma=0.1), LAYERS), seed=1234)  # added
make_switchable(model, controller)  # added

positions = torch.arange(SEQUENCE, device=device).expand(BATCH, SEQUENCE)
for iteration in range(1, 21):
    tokens = torch.arange(SEQUENCE + 1, device=device) + torch.randint(VOCAB - SEQUENCE, (BATCH, 1), device=device)
    controller.begin_iteration(iteration, num_microbatches=1)  # added
    loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"{iteration:3} loss {loss:.3f} theta {controller.theta:.2f} layers {controller.plan.sum()} of {LAYERS}")

dist.destroy_process_group()
