"""What FSDP hands from block to block when parameters are gathered in bf16, as on CUDA: prints the types that the residual stream has."""

import torch

from outgrow.checkpoint.ranks import join_ranks, leads
from outgrow.lab.tiny import TINY
from outgrow.models.build import initialised, resolved
from outgrow.models.forward import blocks_of, forward_of
from outgrow.training.distributed import shard

torch.set_num_threads(1)
join_ranks()
model = initialised(resolved({**TINY["llama"], "tie_word_embeddings": False}), 0)
forward = forward_of(model, torch.bfloat16)
shard(model, blocks_of(model), torch.bfloat16)
forward = forward.through(model)
model.forward = forward.loss
seen = set()
for block in blocks_of(model):
    block.register_forward_hook(
        lambda module, given, made: seen.update({given[0].dtype, (made[0] if isinstance(made, tuple) else made).dtype})
    )
tokens = torch.randint(0, 53, (2, 17), generator=torch.Generator().manual_seed(0))
model(tokens[:, :-1], tokens[:, 1:]).backward()
if leads():
    print(*sorted(map(str, seen)))
