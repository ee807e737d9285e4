"""Draws loss and learning rate of one or several runs as a picture.

python scripts/plot.py --workdirs=runs/quickstart --out=curves.png
python scripts/plot.py --workdirs=runs/a,runs/b --out=curves.png --x=tokens
"""

from gpt2_jax.commands.door import run  # first: what Ctrl-C does from here on

# isort: split
from absl import flags

from gpt2_jax.runtime.files import user_path
from gpt2_jax.training.plot import AXES, draw_curves

_WORKDIRS = flags.DEFINE_list("workdirs", None, "Folders of runs.", required=True)
_OUT = flags.DEFINE_string("out", None, "The PNG to write.", required=True)
_X = flags.DEFINE_enum("x", "step", AXES, "What lies along the x axis.")


def main(_: list[str]) -> None:
    runs = [user_path(path) for path in _WORKDIRS.value]
    draw_curves(runs, user_path(_OUT.value), x=_X.value)
    print(_OUT.value)


if __name__ == "__main__":
    run(main)
