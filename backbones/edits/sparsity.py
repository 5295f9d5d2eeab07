"""Top-k MLPs: only the largest hidden activations of a token count. From the paper, for training from scratch.

Paper:  Li et al. 2022, "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers",
        https://arxiv.org/abs/2210.06313, section 4. No code of the authors exists.

Shapes: B batch, N tokens, K hidden units.
"""

import torch
from torch import Tensor, nn

from backbones.vit import Part, blocks_of


class TopK(nn.Module):
    """Keeps the k largest of a token's hidden activations, zero for the others; of equals the first."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:  # B N K -> B N K
        places = x.topk(self.k, dim=-1).indices
        return x * torch.zeros_like(x).scatter(-1, places, 1.0)

    def extra_repr(self) -> str:
        return str(self.k)


def topk_mlp(model: nn.Module, k: int) -> nn.Module:
    """Keep the k largest hidden activations of every MLP's token, in place. A trained model loses what it dropped.

    Args:
        model: timm's VisionTransformer, Eva or Beit.
        k: hidden units kept, 1 to all of them.
    """
    jobs: list[Part] = []
    for i, block in enumerate(blocks_of(model)):
        mlp: Part = getattr(block, "mlp", None)
        if mlp is None or any(mlp is job for job in jobs):  # a block that is repeated shares its MLP
            continue
        if not hasattr(mlp, "drop1"):
            raise ValueError(
                f"blocks.{i}.mlp is a {type(mlp).__name__}; the hidden units of timm's Mlp, GluMlp and SwiGLU are known"
            )
        hidden = mlp.norm.normalized_shape[0] if isinstance(mlp.norm, nn.LayerNorm) else mlp.fc2.in_features
        if not 1 <= k <= hidden:
            raise ValueError(f"blocks.{i}.mlp has {hidden} hidden units, of which k = {k} cannot be kept")
        jobs.append(mlp)
    for mlp in jobs:
        mlp.drop1 = nn.Sequential(TopK(k), mlp.drop1)
    return model
