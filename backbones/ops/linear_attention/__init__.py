"""Linear attention: weights that are products of features, so that keys and values are summed once for all queries.

`linear_attention` is the public function. `reference` is the definition, with every weight written out; `factored` never makes
a matrix of queries and keys and is linear in their number. Both compute in float32 at least, whatever the inputs' type.
"""

from torch import Tensor

from backbones.ops.linear_attention import factored, reference

BACKENDS = {"factored": factored.run, "reference": reference.run}


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6, backend: str | None = None, per_key: bool = False
) -> Tensor:
    """sum_j (q_i . k_j) v_j / (sum_j (q_i . k_j) + eps) for every query i.

    Args:
        q: features of the queries, not negative, ... N d.
        k: features of the keys, not negative, ... n d.
        v: values, ... n e.
        eps: added to the sum of a query's weights; a query all of whose weights are 0 gives 0.
        backend: "factored", the default, or "reference".
        per_key: eps counts for each key, so that n eps are added.

    Returns ... N e in the type of v. Raises ValueError for another backend or shapes that do not fit.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1] or q.shape[:-2] != k.shape[:-2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q ... N d, k ... n d and v ... n e must agree in batch, d and n, got {shapes}")
    return BACKENDS[backend or "factored"](q, k, v, eps, per_key)
