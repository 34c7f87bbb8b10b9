"""Three steps of Muon over matrices whose rows lie over the ranks, against torch's on the whole ones: prints how far both are apart,
in parameters and in momentum, and how often a step has sent anything."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from outgrow.checkpoint.ranks import join_ranks, leads, world
from outgrow.training.sharded_muon import ShardedMuon

torch.set_num_threads(1)
join_ranks()
mesh = init_device_mesh("cpu", (world(),))
generator = torch.Generator().manual_seed(0)
shapes = [(24, 10)] * 5 + [(7, 30)] * 2 + [(2, 4), (1, 8)]
whole = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
parts = [torch.nn.Parameter(distribute_tensor(matrix.detach().clone(), mesh, [Shard(0)])) for matrix in whole]
settings = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
one, many = torch.optim.Muon(whole, **settings), ShardedMuon(parts, **settings)
for _ in range(3):
    for matrix, part in zip(whole, parts, strict=True):
        matrix.grad = torch.randn(matrix.shape, generator=generator)
        part.grad = distribute_tensor(matrix.grad, mesh, [Shard(0)])
    one.step()
    with CommDebugMode() as seen:
        many.step()
apart = max(float((matrix - part.full_tensor()).detach().abs().max()) for matrix, part in zip(whole, parts, strict=True))
kept = max(
    float((one.state[matrix]["momentum_buffer"] - many.state[part]["momentum_buffer"].full_tensor()).abs().max())
    for matrix, part in zip(whole, parts, strict=True)
)
if leads():
    print(apart, kept, seen.get_total_counts())
