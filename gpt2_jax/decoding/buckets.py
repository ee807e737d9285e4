"""Buckets of shapes, so that few programs are compiled for many lengths."""

MIN_BUCKET = 32  # tokens of a prompt
MIN_CACHE = 128  # tokens of a cache


def power_of_two(n: int) -> int:
    """The least power of two >= n."""
    return 1 << (n - 1).bit_length()


def bucket(length: int, limit: int, *, at_least: int = MIN_BUCKET) -> int:
    """The least power of two >= length and >= at_least, but at most `limit`."""
    return min(max(at_least, power_of_two(length)), limit)


def round_up(n: int, multiple: int) -> int:
    """The least multiple >= n."""
    return -(-n // multiple) * multiple
