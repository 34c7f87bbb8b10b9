"""What a distributed run saves: a model sharded by FSDP2 over two ranks, its optimizer state by parameter names, and the rest."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

source, target = Path(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(2):
    tokens = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
weights = get_model_state_dict(model)
state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
dcp.save({**weights, "optimizer": state, "train_state": {"step": 2}}, checkpoint_id=target / "plain")
dcp.save({"model": weights, "optimizer": state}, checkpoint_id=target / "nested")
dcp.save(weights, storage_writer=HuggingFaceStorageWriter(str(target / "chunks"), save_distributed=True))
dist.destroy_process_group()
