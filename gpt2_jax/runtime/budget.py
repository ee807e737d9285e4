"""One account of memory and time for everything that is made from a file.

Whoever wrote a file chose the sizes in it. A reader draws from the account of a file
before it makes something whose size the file decides, so that no file costs more than
its own size allows, whatever it holds.
"""

MEMORY = 48 << 20  # bytes that a file of any size may take; 16 MB stay for the rest
PER_BYTE = 8
STEPS = 500_000  # of a microsecond or two


class Budget:
    """What reading a file of `size` bytes may still take."""

    def __init__(self, size: int) -> None:
        self._memory = MEMORY + PER_BYTE * size
        self._steps = STEPS

    def draw(self, memory: int = 0, steps: int = 0) -> None:
        """Takes `memory` bytes and `steps` from the account.

        Raises:
          ValueError: when there is less in it.
        """
        self._memory -= memory
        self._steps -= steps
        if self._memory < 0:
            raise ValueError(
                f"reading it takes more memory than {MEMORY >> 20} MB and {PER_BYTE} "
                "times its size"
            )
        if self._steps < 0:
            raise ValueError(f"reading it takes more than {STEPS:,} steps")
