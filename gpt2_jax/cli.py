"""The door of the scripts: flags in, one clear line out when the input is bad."""

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

_TRACEBACK = flags.DEFINE_bool(
    "traceback", False, "Show the Python traceback of an error in the input."
)


def run(main: Callable[[list[str]], int | None]) -> None:
    """`app.run`, but bad input is one line on stderr and exit status 2.

    The library says what is wrong with a ValueError or an OSError whose message
    names the value and the limit; anything else is a bug and shows its traceback.
    """
    # Config files import configs.default, which lies beside scripts/, wherever the
    # program is started from and gpt2_jax is installed.
    sys.path.append(str(Path(sys.argv[0]).resolve().parents[1]))
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _guarded(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        if _TRACEBACK.value:
            raise
        return _fail(error)


def _parse(argv: list[str]) -> list[str]:
    try:
        with warnings.catch_warnings():
            # ml_collections 1.1 loads config files by a deprecated method.
            warnings.filterwarnings("ignore", r"the load_module\(\) method")
            rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}")
    except (flags.Error, AttributeError, TypeError, ValueError, OSError) as error:
        # The config file is read and its keys are set while flags are parsed.
        if "--traceback" in argv:
            raise
        if isinstance(error, AttributeError):
            error = flags.Error(f"a config key does not exist: {error}")
        sys.exit(_fail(error))
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax logs each save in 40 lines
    return rest


def _fail(error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    # ml_collections says so in four lines, at once or when the config is first used.
    missing = re.search(
        r"loading config file.*No such file or .*?: '(.*?)'", text, re.S
    )
    if missing:
        text = f"no such config file: {missing[1]}"
    print("error: " + " ".join(text.split()), file=sys.stderr, flush=True)
    return 2
