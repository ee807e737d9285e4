"""XLA's flags that pay when a model is trained on GPUs or TPUs.

Most must be in the environment before JAX starts a backend. A flag that is there
already keeps the value that it has.
"""

from collections.abc import Mapping, MutableMapping
from pathlib import Path

from gpt2_jax.runtime.distributed import has_tpu
from gpt2_jax.runtime.platform import on_gpu

# Collectives run beside the products that don't wait for them, a sharded product
# starts with the part that it has, and gradients are summed over the devices once a
# batch and not once a microbatch.
GPU = {
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    "xla_gpu_enable_highest_priority_async_stream": "true",
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
    "xla_gpu_enable_while_loop_reduce_scatter_code_motion": "true",
    "xla_gpu_multi_streamed_windowed_einsum": "true",
}
# Of the training step alone. Its products are cuBLAS's, which adds biases and GELU to
# them, and compile in half the time; in decoding cuBLAS would have the vocabulary's
# rows copied to be a multiple of 8. Those with one factor in common stay apart, or what
# comes out of them would have to be cut into q, k and v.
GPU_STEP = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
}
TPU = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
}


def set_flags(environ: MutableMapping[str, str]) -> None:
    """Adds the flags for the accelerator of this machine, if it has one."""
    wanted = environ.get("JAX_PLATFORMS", "")
    if has_tpu() and wanted in ("", "tpu"):
        _add(environ, "LIBTPU_INIT_ARGS", TPU)
    elif Path("/dev/nvidiactl").exists() and wanted in ("", "cuda", "gpu"):
        _add(environ, "XLA_FLAGS", GPU)


def step_options(environ: Mapping[str, str]) -> dict[str, bool | int] | None:
    """Options of the compiler for a training step on what it is traced for.

    Those that the environment's XLA_FLAGS name are left to them.
    """
    if not on_gpu():
        return None
    given = _names(environ.get("XLA_FLAGS", ""))
    return {k: v for k, v in GPU_STEP.items() if k not in given}


def _names(flags: str) -> set[str]:
    return {word.lstrip("-").partition("=")[0] for word in flags.split()}


def _add(environ: MutableMapping[str, str], name: str, flags: dict[str, str]) -> None:
    given = environ.get(name, "")
    added = [f"--{k}={v}" for k, v in flags.items() if k not in _names(given)]
    environ[name] = " ".join([*added, *given.split()])
