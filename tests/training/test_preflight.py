import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from test_train import config

from foreign import hf_state, write_hf
from gpt2_jax.layout import dtype_named
from gpt2_jax.model import GPT2
from gpt2_jax.runtime.chips import Chip, chip_named
from gpt2_jax.runtime.platform import on_cpu
from gpt2_jax.runtime.sharding import make_mesh
from gpt2_jax.tokenizers.plain import ByteTokenizer
from gpt2_jax.training import preflight
from gpt2_jax.training.optim import make_optimizer
from gpt2_jax.training.preflight import (
    Memory,
    Plan,
    compile_step,
    fewest,
    memory_of,
    plan,
    render,
    vocab_size,
)
from gpt2_jax.training.setup import make_model
from gpt2_jax.training.step import abstract_state, train_step
from gpt2_jax.training.train import train

ROOT = Path(__file__).parents[2]
V, P, D, T, B = 64, 32, 32, 16, 64  # one layer
TINY = {
    "steps": 200,
    "batch_size": B,
    "block_size": T,
    "model__vocab_size": V,
    "model__n_positions": P,
    "model__n_embd": D,
    "model__n_layer": 1,
    "model__n_head": 4,
}
MATRICES = 12 * D * D  # c_attn 3, c_proj 1, c_fc 4, c_proj 4
VECTORS = 13 * D + 2 * D  # their biases 3, 1, 4, 1; two norms of 2; ln_f
N_PARAMS = V * D + P * D + MATRICES + VECTORS


def chip_of(usable: int) -> Chip:
    """With so many bytes to use."""
    total = math.ceil(usable / (1 - preflight.HEADROOM))
    return Chip(("tiny",), ("Tiny",), 1e12, total, 1e9)


BIG = chip_of(2**40)


@pytest.fixture(autouse=True, scope="module")
def _compile_once():
    """Each program of these tests: they ask about the same few over and over."""
    compiled = {}

    def compile_once(cfg, model, optimizer, state, mesh, n_valid):
        key = repr((cfg, model.attention, mesh.shape_tuple))
        if key not in compiled:
            compiled[key] = compile_step(cfg, model, optimizer, state, mesh, n_valid)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "compile_step", compile_once)
        yield


def plan_of(
    data=-1, fsdp=1, tensor=1, *, chip=BIG, mfu=0.5, n=8, cut=1, **values
) -> Plan:
    """With the batch cut into so many microbatches."""
    mesh = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
    if cut > 1:
        values["device_batch_size"] = B // 8 // cut
    return plan(config(**{**TINY, **mesh, **values}), chip, n, mfu)


@pytest.mark.parametrize(
    ("mesh", "n_params"),
    [
        ((8, 1, 1), N_PARAMS),
        ((1, 8, 1), (V * D + P * D + MATRICES) // 8 + VECTORS),
        ((2, 2, 2), (V * D + MATRICES) // 4 + P * D // 2 + VECTORS),
    ],
)
def test_bytes_on_each_device(mesh, n_params):
    found = plan_of(*mesh)
    assert found.n_params == N_PARAMS == 15_840
    assert found.params_bytes == 4 * n_params
    # AdamW's two moments, and some counters
    assert 0 < found.optimizer_bytes - 2 * 4 * n_params <= 64
    state = found.params_bytes + found.optimizer_bytes + 4  # and the step
    batch = 4 * (T + 1) * B // found.batch_shards
    memory = found.trials[1]
    assert memory.arguments == state + batch
    assert memory.temporaries > found.params_bytes  # the gradients, at least
    # The state is donated. What does not take its place are metrics, pointers, and some
    # vectors that XLA chooses to shard.
    assert memory.outputs < 3 * 4 * VECTORS


def test_the_peak_is_all_that_a_step_holds():
    assert Memory(arguments=10, temporaries=5, outputs=1).peak == 16


def test_the_peak_falls_with_fsdp():
    """Of a short batch, beside which state and gradients count."""
    short = {"batch_size": 8, "block_size": 2}
    peaks = [plan_of(*mesh, **short).trials[1].peak for mesh in [(8, 1), (1, 8)]]
    assert peaks[0] - peaks[1] > 0.5 * 16 * N_PARAMS


def test_the_peak_grows_with_the_microbatch():
    found = {a: plan_of(cut=a).trials[a] for a in (1, 2, 4, 8)}
    peaks = [memory.peak for memory in found.values()]
    assert peaks == sorted(set(peaks), reverse=True)
    # From 2 to 4 activations halve, the two sets of gradients stay.
    activations = [found[a].temporaries - 2 * 4 * N_PARAMS for a in (2, 4)]
    assert activations[0] / activations[1] == pytest.approx(2, rel=0.1)


GPU = Chip(("gpu",), ("NVIDIA X",), 1e12, 2**40, 1e9)


def test_scores_are_held_where_the_chip_has_no_kernel_for_them():
    long = {"block_size": 128, "model__n_positions": 128, "dtype": "bfloat16"}
    values = {**long, "batch_size": 2, "model__n_layer": 2, "n": 1}

    def temporaries(chip, **more):
        return plan_of(chip=chip, **values, **more).trials[1].temporaries

    scores = 2 * 2 * 2 * 4 * 128**2  # bytes in bfloat16, of 2 layers and texts, 4 heads
    for chip in (GPU, BIG):
        fused = temporaries(chip)
        assert temporaries(chip, attention="xla") - fused > scores
        assert temporaries(chip, model__attn_pdrop=0.1) - fused > scores
    with pytest.raises(ValueError, match=r"'pallas' cannot run: it needs a TPU, .*gpu"):
        temporaries(GPU, attention="pallas")


def test_flops_time_and_speed_by_hand():
    found = plan_of(chip=chip_named("v4"), mfu=0.25)
    N = N_PARAMS - P * D
    assert found.flops_per_token == 6 * N + 12 * 1 * D * T == 95_040
    assert found.tokens_per_update == B * T
    assert found.total_tokens == 200 * B * T
    assert found.tokens_per_second == 0.25 * 8 * 275e12 / 95_040
    assert found.seconds_per_update == pytest.approx(
        B * T * 95_040 / (0.25 * 8 * 275e12), rel=1e-12
    )
    warmup = {"batch_warmup": ((8 * 10 * T, 8),)}  # ten updates of 8 examples
    warmed_up = dataclasses.replace(found, cfg=config(**TINY, **warmup))
    assert warmed_up.total_tokens == (10 * 8 + 190 * B) * T
    # Gradients are read; parameters and two moments, which have counters, also written.
    assert found.optimizer_seconds == pytest.approx(28 * N_PARAMS / 1.2e12, rel=1e-3)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_bytes_of_a_sequence_in_the_cache(dtype, size):
    model = GPT2(plan_of().model, dtype=dtype_named(dtype))
    assert preflight.cache_bytes(model) == 2 * P * D * size + 4  # and its length


def test_the_program_is_that_of_the_training_loop(monkeypatch, tmp_path):
    """Compiled here from shapes, there with the state that it then updates."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    cfg = config(
        **{**TINY, "model__vocab_size": 320, "steps": 1, "device_batch_size": 4},
        **{"dtype": "bfloat16", "mesh__data": 2, "mesh__fsdp": 4},
        **{"data__tokenizer": "bytes", "data__vocab_size": 0, "data__path": str(text)},
        **{"data__splits": (1.0, 0.0, 0.0), "optim__warmup_steps": 0},
    )
    jit, executed = jax.jit, []

    def recording(function, *args, **kwargs):
        jitted = jit(function, *args, **kwargs)
        if getattr(function, "func", None) is not train_step:
            return jitted

        def call(*arguments):
            compiled = jitted.lower(*arguments).compile(preflight.COMPILER_OPTIONS)
            executed.append(memory_of(compiled))
            return compiled(*arguments)

        return call

    monkeypatch.setattr(jax, "jit", recording)
    assert train(cfg, tmp_path / "run").step == 1
    monkeypatch.undo()
    mesh = make_mesh(2, 4, 1)
    model = make_model(cfg, ByteTokenizer(), mesh)
    optimizer = make_optimizer(cfg.optim, cfg.steps)
    state = abstract_state(model, optimizer, mesh)
    ahead = memory_of(compile_step(cfg, model, optimizer, state, mesh, 257))
    assert executed == [ahead]


def test_adapters_of_another_model_and_examples(tmp_path):
    """What is not trained is held and computed with, and has no gradient or moments."""
    base = str(write_hf(tmp_path / "base"))  # 2 layers, 8 wide
    values = {"init_from": base, "block_size": 8, "model__vocab_size": 0}
    values["model__n_positions"] = 0  # the base's
    whole = plan_of(**values)
    n_params = sum(x.size for x in hf_state().values())
    assert whole.n_trained == whole.n_params == n_params
    found = plan_of(**values, lora__rank=2, data__kind="sft", data__path="x")
    adapters = 2 * 2 * ((8 + 24) + (8 + 8) + (8 + 32) + (32 + 8))  # A and B
    assert (found.n_params, found.n_trained) == (n_params + adapters, adapters)
    assert found.params_bytes == 4 * (n_params + adapters)
    assert found.gradient_bytes == 4 * adapters
    # their two moments, and counters
    assert 0 <= found.optimizer_bytes - 8 * adapters < 100
    N = n_params + adapters - 8 * 8
    assert found.flops_per_token == 4 * N + 12 * 2 * 8 * 8
    assert found.trials[1].arguments > 4 * n_params
    text = render(found)
    assert f" {found.n_params:,}, {adapters:,} of them trained\n" in text
    assert "= 4N + 12LDT" in text


@pytest.mark.parametrize("most", [1, 2, 7, 12, 64, 96])
def test_the_smallest_accumulation_is_found_in_few_questions(most):
    divisors = [a for a in range(1, most + 1) if most % a == 0]
    for least in range(1, most + 2):
        asked = []

        def fits(a, least=least, asked=asked):
            asked.append(a)
            return a >= least

        expected = next((a for a in divisors if a >= least), None)
        assert fewest(most, fits) == expected
        assert len(asked) == len(set(asked)) <= 1 + math.ceil(math.log2(len(divisors)))
    # one microbatch holds no second set of gradients
    assert fewest(most, lambda a: a in (1, most)) == 1


def test_the_smallest_accumulation_that_fits_is_smallest():
    peaks = {a: plan_of(cut=a).trials[a].peak for a in (1, 2, 4, 8)}
    for usable in (*peaks.values(), *(peak - 1 for peak in peaks.values())):
        found = plan_of(chip=chip_of(usable), cut=2)
        fitting = [a for a, peak in peaks.items() if peak <= found.usable_bytes]
        assert found.smallest == min(fitting, default=None)
        assert found.fits == (2 in fitting)
        assert {a: memory.peak for a, memory in found.trials.items()}.items() <= (
            peaks.items()
        )


def test_the_text_says_what_fits_and_the_flag_to_give():
    peak = plan_of(cut=2).trials[2].peak
    text = render(plan_of(chip=chip_of(peak)))
    assert re.search(r"^ +1 +8 .* does not fit, as given$", text, re.M)
    assert re.search(r"^ +2 +4 .* fits$", text, re.M)
    verdict = text.splitlines()[-1]
    assert verdict.startswith("does not fit as given;")
    assert verdict.endswith("--config.device_batch_size=4")
    assert all(len(line) <= 88 for line in text.splitlines())
    nothing = render(plan_of(chip=chip_of(2**10)))
    assert "does not fit as given, nor with one example a device" in nothing
    assert nothing.endswith("--config.mesh.fsdp=-1")
    assert all(len(line) <= 88 for line in nothing.splitlines())


def test_a_gpu_that_is_nearly_filled_needs_more_than_jax_takes():
    found = plan_of()
    gpu = dataclasses.replace(GPU, memory=int(found.trials[1].peak / 0.7))
    assert "XLA_CLIENT_MEM_FRACTION=0.95" in render(plan_of(chip=gpu))
    assert "MEM_FRACTION" not in render(found)
    assert "MEM_FRACTION" not in render(plan_of(chip=chip_named("h100")))


def test_a_vocabulary_that_is_known_ahead_of_time():
    assert vocab_size(config(model__vocab_size=99)) == 99
    assert vocab_size(config(data__vocab_size=4096)) == 4096
    assert vocab_size(config(data__tokenizer="bytes")) == 257
    for values in [
        {"data__tokenizer": "char"},
        {"data__tokenizer": "folder/of/gpt2"},
        {"data__vocab_size": 0},
    ]:
        with pytest.raises(ValueError, match=r"tokenizer='.*set model\.vocab_size"):
            vocab_size(config(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": 3}, "mesh data=3, fsdp=1, tensor=1 does not fit the 8 devices"),
        ({"fsdp": 8, "model__n_embd": 36}, "a dimension of 36, which mesh axis fsdp=8"),
        ({"data": 1, "tensor": 8}, "a dimension of 4, which mesh axis tensor=8"),
        ({"batch_size": 12}, "12 examples does not divide by the 8 devices"),
        ({"n": 9}, "n_devices=9 exceeds the 8 CPU devices"),
        ({"mfu": 0.0}, r"mfu=0.0 must be in \(0, 1\]"),
        ({"mfu": 40.0}, r"mfu=40.0 must be in \(0, 1\]"),
    ],
)
def test_what_can_not_be_planned_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**values)


def script(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "scripts/preflight.py", *flags],
        capture_output=True,
        text=True,
        # The script makes its own devices, whatever else is asked for.
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cuda"},
        check=False,
    )


def test_the_script_plans_for_devices_that_are_not_there():
    done = script(
        f"--config={ROOT}/configs/quickstart.py",
        *("--chip=v4", "--n_devices=16", "--mfu=0.5", "--config.mesh.tensor=4"),
        *("--config.model.n_embd=32", "--config.model.n_layer=1"),
    )
    assert done.returncode == 0, done.stderr
    # 2048 + 128 positions, 12 D^2 + 13 D a layer, ln_f: D = 32
    assert re.search(r"^parameters +82,400$", done.stdout, re.M)
    assert re.search(
        r"^devices +16 x v4, mesh data=4 fsdp=1 tensor=4", done.stdout, re.M
    )
    assert "At an assumed MFU of 50%" in done.stdout
    assert (
        "fits as given; the most that fits: --config.device_batch_size=4" in done.stdout
    )
    assert done.stderr == "compiling with device_batch_size=4\n"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--chip=h1000", "chip 'h1000' is not one of v3, v4, "),
        ("--n_devices=0", "n_devices=0 must be >= 1"),
    ],
)
def test_the_script_refuses_bad_flags_in_one_line(flag, message):
    done = script(f"--config={ROOT}/configs/quickstart.py", flag)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")


XL = """
import json
import sys

from configs import gpt2_1558m
from gpt2_jax.training import preflight
from gpt2_jax.runtime import sharding
from gpt2_jax.runtime.chips import chip_named
from gpt2_jax.training.config import TrainConfig

chip, n_devices, remat = sys.argv[1], int(sys.argv[2]), sys.argv[3]
preflight.fake_devices(n_devices)
config = gpt2_1558m.get_config()
config.remat = remat
cfg = TrainConfig.from_dict(config.to_dict())
plan = preflight.plan(cfg, chip_named(chip), n_devices, 0.4)
print(json.dumps({
    "n_params": plan.n_params,
    "params": plan.params_bytes,
    "optimizer": plan.optimizer_bytes,
    "fits": plan.fits,
    "usable": plan.usable_bytes,
    "hours": plan.total_tokens / plan.tokens_per_second / 3600,
    "peaks": {plan.device_batch_size(n): m.peak for n, m in plan.trials.items()},
    "most": plan.device_batch_size(plan.smallest),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "n_devices", "remat"),
    [("h100", 8, "none"), ("h100", 8, "block"), ("v4", 16, "block")],  # v4-32
)
def test_1558m_is_planned(chip, n_devices, remat):
    done = subprocess.run(
        [sys.executable, "-c", XL, chip, str(n_devices), remat],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # 50,304 tokens and 1024 positions; 48 layers, 1600 wide
    vectors = 48 * 13 * 1600 + 2 * 1600
    matrices = (50_304 + 1024) * 1600 + 48 * 12 * 1600**2
    assert found["n_params"] == matrices + vectors == 1_557_686_400
    assert found["params"] == 4 * (matrices // n_devices + vectors)
    assert 0 < found["optimizer"] - 2 * found["params"] < 64  # counters
    # 33.6e9 tokens of 6 (N - positions) + 12 LDT FLOPs, 989 or 275 TFLOP/s at 40%
    assert found["hours"] == pytest.approx({"h100": 30.3, "v4": 54.4}[chip], abs=0.05)
    peaks = {int(each): peak for each, peak in found["peaks"].items()}
    state = found["params"] + found["optimizer"]
    assert found["fits"]
    assert state + found["params"] < peaks[2] <= found["usable"]
    # Of its own two examples, not of all, and no scores: what 48 layers keep of each is
    # 16 times 1024 x 1600 in bfloat16, 2.5 GB.
    assert peaks[2] < (12e9 if remat == "none" else 8e9)
    fitting = [each for each, peak in peaks.items() if peak <= found["usable"]]
    assert found["most"] == max(fitting)
    assert peaks.get(2 * found["most"], found["usable"] + 1) > found["usable"]


def test_the_step_has_the_form_that_accelerators_get(monkeypatch):
    forms = []

    def compiled(*args):
        forms.append(on_cpu())
        return compile_step(*args)

    monkeypatch.setattr(preflight, "compile_step", compiled)
    plan(config(**TINY), BIG, 1, 0.4)
    assert set(forms) == {False}
    assert on_cpu()
