"""Whether this CPU multiplies bfloat16 by instructions of its own, and what to say where it does not."""

from pathlib import Path

PRODUCTS = ("amx_bf16", "avx512_bf16", "bf16")  # as Linux names them; the last is ARM's


def bfloat16_instructions() -> list[str]:
    """The CPU's instructions for bfloat16 products, by the system's names."""
    flags = cpu_flags()
    return [name for name in PRODUCTS if name in flags]


def slow_bfloat16() -> str | None:
    """A sentence for a CPU without such instructions; None where there are some, and where the system does not tell."""
    if not cpu_flags() or bfloat16_instructions():
        return None
    return (
        "this CPU has no instructions for bfloat16 products (AMX or AVX512-BF16), and such products were 20 to 50 times slower "
        "than float32 on a CPU with AVX2: use float32 here"
    )


def cpu_flags() -> frozenset[str]:
    """The CPU's features by the system's names; empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(found.partition(":")[2].split())
