"""The door of the scripts: flags in, one clear line out when the input is bad."""

import gc
import inspect
import logging as std_logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from gpt2_jax.checks import one_line
from gpt2_jax.decoding.options import (
    DEFAULTS,
    EARLY_STOPPING,
    INTEGERS,
    NUMBERS,
    OVERFLOW,
    Options,
)
from gpt2_jax.runtime.xla_flags import set_flags

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
    set_flags(os.environ)
    gc.freeze()  # what is loaded stays: no collection need go through it
    gc.enable()
    # A cache, where one is named, is to hold the small programs too: there are many.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def define_options() -> None:
    """A flag for each of `options.Options`, with its name, default and help."""
    # getdoc: from Python 3.13 on the compiler takes a docstring's indentation away.
    doc = str(inspect.getdoc(Options))
    help_of = dict(re.findall(r"^  (\w+): (.*(?:\n    .*)*)", doc, re.M))
    for name in DEFAULTS:
        text = " ".join(help_of.get(name, "").split())
        if name in NUMBERS:
            flags.DEFINE_float(name, DEFAULTS[name], text)
        elif name in INTEGERS:
            flags.DEFINE_integer(name, DEFAULTS[name], text)
        elif name in ("stop", "bad_words"):
            flags.DEFINE_multi_string(name, [], f"{text} Repeatable.")
        elif name == "logit_bias":
            flags.DEFINE_multi_string(name, [], "ID=NUMBER: added to its logit.")
        elif name in ("stop_token_ids", "allowed_tokens"):
            flags.DEFINE_list(name, None, f"{text.split(' (')[0]}, with commas.")
        elif name == "do_sample":
            flags.DEFINE_bool(name, None, text)
        elif name == "overflow":
            flags.DEFINE_enum(name, DEFAULTS[name], OVERFLOW, text)
        else:
            choices = [str(x).lower() for x in EARLY_STOPPING]
            flags.DEFINE_enum(name, choices[0], choices, text)


def given_options() -> dict[str, Any]:
    """What the flags of `define_options` say, as `Options` takes it."""
    given: dict[str, Any] = {name: flags.FLAGS[name].value for name in DEFAULTS}
    for name in ("stop_token_ids", "allowed_tokens"):
        given[name] = given[name] and [_number(int, name, x) for x in given[name]]
    pairs = [text.partition("=")[::2] for text in given["logit_bias"]]
    ids = [i for i, _ in pairs]
    for i in ids:
        if ids.count(i) > 1:
            raise ValueError(f"--logit_bias: {i!r} is given twice")
    given["logit_bias"] = {
        _number(int, "logit_bias", i): _number(float, "logit_bias", x) for i, x in pairs
    }
    stopping = dict(zip(("false", "true", "never"), EARLY_STOPPING, strict=True))
    return {**given, "early_stopping": stopping[given["early_stopping"]]}


def prompt_ids(text: str) -> list[int]:
    """The ids of `15496,995`."""
    return [_number(int, "prompt_ids", part) for part in text.split(",")]


def _number(kind: type, name: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"--{name}: {text!r} is no {kind.__name__}") from None


def _guarded(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        if _TRACEBACK.value:
            raise
        _silence_threads()
        return _fail(error)


def _silence_threads() -> None:
    """Reads that were given up complain as the interpreter ends: it adds nothing."""
    threading.excepthook = lambda _: None
    sys.unraisablehook = lambda _: None
    for name in ("asyncio", "concurrent.futures"):
        std_logging.getLogger(name).disabled = True


def _parse(argv: list[str]) -> list[str]:
    logging.set_verbosity(logging.ERROR)  # what is wrong is said once, below
    try:
        with warnings.catch_warnings():
            # ml_collections 1.1 loads config files by a deprecated method.
            warnings.filterwarnings("ignore", r"the load_module\(\) method")
            rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}")
    # The config file, a program that may raise anything, is run while flags are parsed.
    except Exception as error:
        if "--traceback" in argv:
            raise
        sys.exit(_fail(_of_config(error, argv)))
    if not flags.FLAGS["verbosity"].present:
        # Orbax logs each save in 40 lines, and each that fails, which an error of ours
        # says in one, in 200.
        logging.set_verbosity(logging.FATAL)
    return rest


def _of_config(error: Exception, argv: Sequence[str]) -> Exception:
    """The error of parsing flags, which names the config file where that raised it."""
    if isinstance(error, AttributeError) and "has no attribute" not in str(error):
        return flags.Error(f"a config key does not exist: {error}")
    if isinstance(error, flags.Error | TypeError | ValueError | OSError):
        return error
    given = [x.partition("=")[2] for x in argv if x.startswith("--config=")]
    kind = type(error).__name__
    return flags.Error(f"the config file {''.join(given[-1:])}: {kind}: {error}")


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
    print(one_line(f"error: {text}"), file=sys.stderr, flush=True)
    return 2
