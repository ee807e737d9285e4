"""A plan of a training run, made ahead of time and without an accelerator.

The train step is compiled for a mesh of CPU devices that stand for the accelerators,
from shapes alone, and the compiler says how much memory it takes. What XLA:CPU says
is near to what an accelerator needs, but not the same:

- A kernel for attention that a chip has and a CPU has not is stood in for by a loop
  that holds as little (`attention.STAND_IN`).
- A CPU multiplies some bfloat16 factors in float32 copies, and in another order.
- TPUs pad arrays to tiles.

Of programs of 124M, 355M and 1.5B, with 2 to 256 examples a device, without
rematerialisation and with each kind of it, XLA:TPU wanted 0.92 to 1.16 times the peak
of XLA:CPU, compiled for v5e with jax 0.10.2 and libtpu 0.0.52, and XLA:GPU 0.75 to 1.16
times, compiled for an H100 with jax 0.11.2. Hence `HEADROOM`.
"""

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_jax.cache import KVCache
from gpt2_jax.config import GPT2Config
from gpt2_jax.fields import check_range
from gpt2_jax.formats.open_model import open_model
from gpt2_jax.layout import count_params
from gpt2_jax.model import GPT2
from gpt2_jax.ops.attention import STAND_IN, Platform, attention_backend
from gpt2_jax.runtime import sharding
from gpt2_jax.runtime.chips import Chip
from gpt2_jax.runtime.platform import traced_for
from gpt2_jax.runtime.units import size_of, time_of
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.plain import ByteTokenizer
from gpt2_jax.training import metrics
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.optim import Optimizer, make_optimizer
from gpt2_jax.training.setup import make_model
from gpt2_jax.training.step import TrainState, abstract_state, jit_step

HEADROOM = 0.2  # share of a chip's memory that is kept free

COMPILER_OPTIONS = {
    # Memory is assigned before machine code is made; nobody runs that, so it may be
    # slow: this halves the time of compilation.
    "xla_backend_optimization_level": 0,
    # It takes conversions out of loops, which only CPUs need: what all layers keep for
    # the gradient would be there in float32 too.
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a compiled train step takes on each device, in bytes."""

    arguments: int  # the state, and a batch
    temporaries: int  # gradients, activations, copies
    outputs: int  # that do not take an argument's place, as the new state does

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.outputs


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run ahead of time. Bytes are those of one device."""

    cfg: TrainConfig
    model: GPT2Config
    chip: Chip
    mesh: dict[str, int]
    mfu: float  # assumed
    n_params: int
    n_trained: int  # of them: all, or the adapters
    params_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    cache_bytes: int  # of a sequence as long as the context
    given: int  # microbatches that the config's batch is cut into
    trials: dict[int, Memory]  # by their number, ascending: what was compiled
    smallest: int | None  # number of them that fits; None: none does

    @property
    def n_devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def batch_shards(self) -> int:
        return math.prod(self.mesh[axis] for axis in sharding.BATCH)

    def device_batch_size(self, microbatches: int) -> int:
        """Examples on a device at a time."""
        return self.cfg.batch_size // microbatches // self.batch_shards

    @property
    def usable_bytes(self) -> int:
        """The chip's memory in bytes, without what is kept free."""
        return usable_bytes(self.chip)

    @property
    def fits(self) -> bool:
        """As the config gives it."""
        return self.trials[self.given].peak <= self.usable_bytes

    @property
    def flops_per_token(self) -> int:
        return metrics.flops_per_token(
            self.model, self.n_params, self.cfg.block_size, per_param=self.per_param
        )

    @property
    def per_param(self) -> int:
        """FLOPs per token of a parameter: 4 where most have no gradient."""
        return 6 if self.n_trained == self.n_params else 4

    @property
    def tokens_per_update(self) -> int:
        return self.cfg.batch_size * self.cfg.block_size

    @property
    def total_tokens(self) -> int:
        """All that are seen, while the batch warms up too."""
        return self.cfg.batch(self.cfg.steps - 1).stop * self.cfg.block_size

    @property
    def tokens_per_second(self) -> float:
        peak = self.n_devices * self.chip.peak_flops
        return self.mfu * peak / self.flops_per_token

    @property
    def seconds_per_update(self) -> float:
        return self.tokens_per_update / self.tokens_per_second

    @property
    def optimizer_seconds(self) -> float:
        """Seconds of an update, at least: gradients are read, the rest also written."""
        moved = 3 * self.gradient_bytes + 2 * self.optimizer_bytes
        return moved / self.chip.bandwidth


def fake_devices(n_devices: int) -> None:
    """Gives this process so many CPU devices and no others, before JAX starts."""
    check_range("n_devices", n_devices, 1, 1 << 16)  # each has threads
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n_devices)


def plan(
    cfg: TrainConfig,
    chip: Chip,
    n_devices: int,
    mfu: float,
    *,
    progress: Callable[[str], object] = lambda line: None,
) -> Plan:
    """Compiles the step as given, and until the fewest microbatches are known.

    Args:
      cfg: the run.
      n_devices: of `chip`; the process must have as many CPU devices.
      mfu: share of the chip's peak that is assumed for the time of an update.
      progress: is told in a line what is being compiled.

    Raises:
      ValueError: when the mesh fits neither the devices nor the parameters, or the
        batch the mesh, or where the vocabulary is not known ahead of time.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"{mfu=} must be in (0, 1]")
    devices = jax.devices("cpu")[:n_devices]
    if len(devices) < n_devices:
        raise ValueError(f"{n_devices=} exceeds the {len(devices)} CPU devices here")
    mesh = sharding.make_mesh(**dataclasses.asdict(cfg.mesh), devices=devices)
    given = cfg.microbatches(cfg.batch_size, mesh)
    base = open_model(cfg.init_from) if cfg.init_from else None
    n_tokens = base.tokenizer.vocab_size if base else vocab_size(cfg)
    tokenizer = NoTokenizer(n_tokens, None, "a plan needs none")
    plain = dataclasses.replace(cfg, attention="auto")
    model = make_model(plain, tokenizer, mesh, base=base.config if base else None)
    attention = planned_attention(cfg, model, chip)
    # Written out, as on GPUs without remat, layers would take longer to compile here.
    model = model.clone(scan_layers=True, attention=attention)
    optimizer = make_optimizer(cfg.optim, cfg.steps)
    state = abstract_state(model, optimizer, mesh, cfg.adapters)
    frozen = abstract_state(model, optimizer, mesh).params if cfg.adapters else {}
    trials: dict[int, Memory] = {}

    most = cfg.batch_size // sharding.n_batch_shards(mesh)

    def fits(microbatches: int) -> bool:
        if microbatches not in trials:
            each = most // microbatches
            progress(f"compiling with device_batch_size={each}")
            trial = dataclasses.replace(cfg, device_batch_size=each)
            with traced_for("gpu" if chip.is_gpu else "tpu"):
                step = compile_step(
                    trial, model, optimizer, state, mesh, tokenizer.vocab_size
                )
            trials[microbatches] = memory_of(step)
        return trials[microbatches].peak <= usable_bytes(chip)

    fits(given)
    smallest = fewest(most, fits)
    return Plan(
        cfg=cfg,
        model=model.cfg,
        chip=chip,
        mesh=dict(mesh.shape),
        mfu=mfu,
        n_params=count_params(state.params) + count_params(frozen),
        n_trained=count_params(state.params),
        params_bytes=bytes_per_device(state.params) + bytes_per_device(frozen),
        gradient_bytes=bytes_per_device(state.params),
        optimizer_bytes=bytes_per_device(state.opt_state),
        cache_bytes=cache_bytes(model),
        given=given,
        trials=dict(sorted(trials.items())),
        smallest=smallest,
    )


def planned_attention(cfg: TrainConfig, model: GPT2, chip: Chip) -> str:
    """What takes the memory, in a program for CPUs, of the attention on a chip.

    Raises:
      ValueError: when what the config asks for cannot run there.
    """
    assert model.mesh is not None
    rows = cfg.batch_size // cfg.microbatches(cfg.batch_size, model.mesh)
    backend = attention_backend(
        cfg.attention,
        (rows, cfg.block_size, model.cfg.n_head, model.cfg.head_dim),
        model.dtype,
        dropout=model.cfg.attn_pdrop > 0,
        mesh=model.mesh,
        place=Platform("gpu", 8.0) if chip.is_gpu else Platform("tpu", None),
    )
    return "xla" if backend == "xla" else STAND_IN


def vocab_size(cfg: TrainConfig) -> int:
    """The model's, or that of the tokenizer as far as it is known before training.

    Raises:
      ValueError: where it is not.
    """
    if size := cfg.model["vocab_size"]:
        return size
    if cfg.data.tokenizer == "bytes":
        return ByteTokenizer().vocab_size
    if cfg.data.tokenizer in ("", "sentencepiece") and cfg.data.vocab_size:
        return cfg.data.vocab_size
    raise ValueError(
        f"model.vocab_size=0 is the tokenizer's, and that of data.tokenizer="
        f"{cfg.data.tokenizer!r} is not known ahead of time: set model.vocab_size"
    )


def compile_step(
    cfg: TrainConfig,
    model: GPT2,
    optimizer: Optimizer,
    state: TrainState,
    mesh: Mesh,
    n_valid: int,
) -> jax.stages.Compiled:
    """The train step of a run, for a state of abstract leaves."""
    step = jit_step(cfg, model, optimizer, state, mesh, n_valid)
    microbatches = cfg.microbatches(cfg.batch_size, mesh)
    rows, T = cfg.batch_size // microbatches, cfg.block_size
    spread = sharding.batch_sharding(mesh, ndim=3, axis=1)
    tokens_ABT, segment_ABT = (
        jax.ShapeDtypeStruct((microbatches, rows, size), jnp.int32, sharding=spread)
        for size in (T + 1, T)
    )
    base = abstract_state(model, optimizer, mesh).params if cfg.adapters else None
    is_sft = cfg.data.kind == "sft"
    segments = segment_ABT if is_sft or cfg.data.packing == "documents" else None
    masks = None
    if is_sft:
        masks = jax.ShapeDtypeStruct(segment_ABT.shape, jnp.bool_, sharding=spread)
    return step.lower(state, tokens_ABT, masks, segments, base).compile(
        compiler_options=COMPILER_OPTIONS
    )


def memory_of(step: jax.stages.Compiled) -> Memory:
    """The memory of each device; `peak_memory_in_bytes` lacks temporaries on CPUs."""
    stats: Any = step.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    )


def fewest(most: int, fits: Callable[[int], bool]) -> int | None:
    """The smallest divisor of `most` that fits, in few questions; None: none does.

    Args:
      most: examples of a batch on each device.
      fits: once one fits, so do all that are larger; but 1, which holds no second set
        of gradients to add to, may fit where 2 does not.
    """
    if fits(1):
        return 1
    others = [a for a in range(2, most + 1) if most % a == 0]
    found = bisect_left(others, True, key=fits)
    return others[found] if found < len(others) else None


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree with shardings; abstract leaves will do."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def cache_bytes(model: GPT2) -> int:
    """Bytes of the keys and values of n_positions tokens of one row, in `model.dtype`.

    So it is on an accelerator; on a CPU they are float32.
    """
    cfg = model.cfg
    cache = jax.eval_shape(lambda: KVCache.empty(cfg, 1, cfg.n_positions, model.dtype))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def usable_bytes(chip: Chip) -> int:
    return int((1 - HEADROOM) * chip.memory)


def render(plan: Plan) -> str:
    """The plan as one screen of text, its verdict last."""
    cfg, model, chip = plan.cfg, plan.model, plan.chip
    N = plan.n_params - model.n_positions * model.n_embd
    total_flops = plan.total_tokens * plan.flops_per_token
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    temporaries = plan.trials[plan.given].temporaries
    cache = size_of(plan.cache_bytes)
    trained = ""
    if plan.n_trained < plan.n_params:
        trained = f", {plan.n_trained:,} of them trained"
    return f"""\
parameters         {plan.n_params:,}{trained}
                   {N:,} = N without position embeddings
FLOPs per token    {plan.flops_per_token:,} = {plan.per_param}N + 12LDT
tokens per update  {plan.tokens_per_update:,}
run                {cfg.steps:,} updates, {plan.total_tokens:,} tokens
                   {total_flops:.3g} FLOPs
computed           in {cfg.dtype}, with remat={cfg.remat}
devices            {plan.n_devices} x {chip.name}, mesh {mesh}
                   each {chip.peak_flops / 1e12:g} TFLOP/s in bfloat16
                   {size_of(chip.memory)} at {chip.bandwidth / 1e9:,.0f} GB/s

At an assumed MFU of {plan.mfu:.0%}
update             {time_of(plan.seconds_per_update)}
the optimizer's    {time_of(plan.optimizer_seconds)} or more, by the memory's speed
tokens per second  {plan.tokens_per_second:,.0f}
whole run          {time_of(plan.total_tokens / plan.tokens_per_second)}

On each device
parameters         {size_of(plan.params_bytes)}
gradients          {size_of(plan.gradient_bytes)}
optimizer state    {size_of(plan.optimizer_bytes)}
temporaries        {size_of(temporaries)}, gradients among them, as given
KV cache           {cache} a sequence of {model.n_positions:,} tokens
usable             {size_of(plan.usable_bytes)}, {HEADROOM:.0%} are kept free

microbatches  examples a device        peak
{_table(plan)}

Peaks are XLA:CPU's for this mesh. XLA:TPU took 0.9 to 1.2 times as much, XLA:GPU
0.7 to 1.2.
{_verdict(plan)}"""


def _table(plan: Plan) -> str:
    lines = []
    for microbatches, memory in plan.trials.items():
        examples = plan.device_batch_size(microbatches)
        said = "fits" if memory.peak <= plan.usable_bytes else "does not fit"
        if microbatches == plan.given:
            said += ", as given"
        lines.append(
            f"{microbatches:12}  {examples:17}  {size_of(memory.peak):>10}  {said}"
        )
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    said = "fits as given" if plan.fits else "does not fit as given"
    if plan.smallest is None:
        return (
            f"{said}, nor with one example a device: compute activations again,\n"
            "--config.remat=block, or shard the state over more devices, "
            "--config.mesh.fsdp=-1"
        )
    examples = plan.device_batch_size(plan.smallest)
    said += f"; the most that fits: --config.device_batch_size={examples}"
    if plan.chip.is_gpu and plan.trials[plan.smallest].peak > 0.65 * plan.chip.memory:
        said += (
            "\nfor which XLA_CLIENT_MEM_FRACTION=0.95 has to be set: JAX takes 75% else"
        )
    return said
