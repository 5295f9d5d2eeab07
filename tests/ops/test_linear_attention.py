"""Linear attention: the factored form against the definition, forward and backward."""

import pytest
import torch

from backbones.ops.linear_attention import BACKENDS, linear_attention


@pytest.mark.parametrize("shape", [(2, 3, 7, 5, 4, 4), (1, 1, 1, 9, 8, 2), (3, 2, 16, 16, 1, 6)], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_factored_is_the_definition_with_gradients(shape, eps):
    batch, heads, queries, keys, dim, out = shape
    torch.manual_seed(0)
    tensors = [torch.rand(batch, heads, n, d, dtype=torch.float64) for n, d in ((queries, dim), (keys, dim), (keys, out))]
    results = []
    for backend in BACKENDS:
        q, k, v = (t.clone().requires_grad_() for t in tensors)
        result = linear_attention(q, k, v, eps, backend)
        result.square().sum().backward()
        results.append((result, q.grad, k.grad, v.grad))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


def test_a_query_without_features_gives_zero_and_half_precision_does_not_overflow():
    q, k, v = (torch.rand(1, 1, 4, 8) for _ in range(3))
    q[:, :, 1] = 0
    assert linear_attention(q, k, v)[:, :, 1].abs().max() == 0
    many = torch.full((1, 1, 20000, 8), 8.0, dtype=torch.float16)
    out = linear_attention(many[:, :, :4], many, many)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.full_like(out, 8.0), rtol=1e-3, atol=0)


def test_bad_calls_are_named():
    q, k, v = torch.rand(1, 2, 4, 8), torch.rand(1, 2, 5, 8), torch.rand(1, 2, 5, 8)
    with pytest.raises(ValueError, match="backend must be one of factored, reference, got 'fast'"):
        linear_attention(q, k, v, backend="fast")
    with pytest.raises(ValueError, match="must agree in batch, d and n"):
        linear_attention(q, k, v[:, :, :4])


def test_no_matrix_of_queries_and_keys_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf))
            return out

    q, k, v = (torch.rand(1, 1, 1024, 8, requires_grad=True) for _ in range(3))
    with Sizes():
        linear_attention(q, k, v).sum().backward()
    assert max(sizes) <= 1024 * 8
