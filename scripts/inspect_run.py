"""Prints on one screen what the folder of a run says of it.

python scripts/inspect_run.py --workdir=runs/quickstart

It is not called inspect.py: a script's folder comes first when Python imports, and
many packages import the standard library's `inspect`.
"""

from gpt2_jax.commands.door import run  # first: what Ctrl-C does from here on

# isort: split
from absl import flags

from gpt2_jax.commands.inspect_run import describe
from gpt2_jax.runtime.files import user_path

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)


def main(_: list[str]) -> None:
    from configs import default  # found since cli.run looks beside scripts/

    print(describe(user_path(_WORKDIR.value), default.get_config().to_dict()))


if __name__ == "__main__":
    run(main)
