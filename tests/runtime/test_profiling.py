import gzip
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gpt2_jax.runtime.profiling import StepTrace, parse_steps


def marked_steps(folder: Path) -> list[int]:
    """The numbers of the steps that a trace marks."""
    [path] = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted(
        int(event["args"]["step_num"])
        for event in events
        if event.get("name") == "train"
    )


def test_steps_are_two_numbers():
    assert parse_steps("10:15") == range(10, 15)


@pytest.mark.parametrize("text", ["", "10", "15:10", "10:10", "-1:3", "a:b", "1:2:3"])
def test_what_is_no_range_of_steps_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"profile_steps={text!r} must be")):
        parse_steps(text)


def test_a_trace_holds_its_steps_and_the_names_of_the_program(tmp_path):
    @jax.jit
    def work(x):
        with jax.named_scope("a_named_part"):
            return x @ x

    trace = StepTrace(tmp_path, range(2, 4))
    ended = []
    for step in range(1, 6):
        with trace.step(step):
            result = work(jnp.ones((8, 8)))
        if trace.end(step, result):
            ended.append(step)
    trace.close()
    assert ended == [3]
    assert marked_steps(tmp_path) == [2, 3]
    [path] = tmp_path.rglob("*.xplane.pb")
    assert b"a_named_part" in path.read_bytes()


def test_nothing_is_traced_unless_asked_and_an_early_end_writes_what_there_is(tmp_path):
    for folder, steps in ((None, range(9)), (tmp_path / "a", range(0))):
        trace = StepTrace(folder, steps)
        with trace.step(1):
            pass
        assert not trace.end(1, ())
        trace.close()
    assert not list(tmp_path.iterdir())
    trace = StepTrace(tmp_path / "b", range(1, 9))
    with trace.step(5):  # a run that goes on in their midst
        pass
    assert not trace.end(5, ())
    trace.close()
    assert marked_steps(tmp_path / "b") == [5]
