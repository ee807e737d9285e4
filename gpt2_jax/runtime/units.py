"""Quantities as people read them."""


def size_of(n: int) -> str:
    """Bytes, as people read them."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"


def time_of(seconds: float) -> str:
    """Seconds, as people read them."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 3600:
        return f"{seconds:.3g} s"
    return f"{seconds / 3600:,.1f} hours"
