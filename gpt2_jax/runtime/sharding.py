"""The mesh, the table of partition rules, and a tree's shardings by it."""

import math
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
_AUTO = (AxisType.Auto,) * len(AXES)

# Every parameter matches one row, by the end of its path; so do the optimizer's
# moments, whose paths end alike. Where layers are stacked, as `h`, the axis along which
# they lie comes first and is not spread.
RULES: tuple[tuple[str, P], ...] = (
    ("wte/embedding", P("tensor", "fsdp")),
    ("wpe/embedding", P(None, "fsdp")),
    ("attn/c_attn/kernel", P("fsdp", None, "tensor", None)),
    ("attn/c_proj/kernel", P("tensor", None, "fsdp")),
    ("mlp/c_fc/kernel", P("fsdp", "tensor")),
    ("mlp/c_proj/kernel", P("tensor", "fsdp")),
    ("attn/c_attn/weight", P(None, "tensor", None, "fsdp")),
    ("attn/c_proj/weight", P("fsdp", "tensor", None)),
    ("mlp/c_fc/weight", P("tensor", "fsdp")),
    ("mlp/c_proj/weight", P("fsdp", "tensor")),
    ("wte/scale", P("tensor")),
    ("(c_attn|c_proj|c_fc)/(bias|scale)", P()),
    ("(c_attn|c_proj|c_fc)/lora_(a|b)", P()),
    ("(ln_1|ln_2|ln_f)/(scale|bias)", P()),
    ("ns_coeffs", P()),  # three constants in the state of optax's Muon
)

BATCH = ("data", "fsdp")  # the axes over which the examples of a batch are spread


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of all devices, or of those given; one axis may be -1: the rest.

    Raises:
      ValueError: when the product of the axes isn't the number of devices, or when
        several slices do not divide the data axis.
    """
    shape = [data, fsdp, tensor]
    n_devices = jax.device_count() if devices is None else len(devices)
    asked = ", ".join(f"{a}={n}" for a, n in zip(AXES, shape, strict=True))
    if any(n == 0 or n < -1 for n in shape) or shape.count(-1) > 1:
        raise ValueError(f"mesh {asked}: axes are >= 1, and at most one is -1")
    if -1 in shape:
        rest = -math.prod(shape)
        shape[shape.index(-1)] = max(1, n_devices // rest)
    if math.prod(shape) != n_devices:
        raise ValueError(f"mesh {asked} does not fit the {n_devices} devices")
    chosen = jax.devices() if devices is None else list(devices)
    n_slices = len({getattr(d, "slice_index", 0) for d in chosen})
    if n_slices > 1:
        return Mesh(_over_slices(shape, n_slices, chosen), AXES, axis_types=_AUTO)
    return jax.make_mesh(tuple(shape), AXES, axis_types=_AUTO, devices=devices)


def _over_slices(
    shape: Sequence[int], n_slices: int, devices: Sequence[jax.Device]
) -> np.ndarray:
    """Devices in the form of a mesh: only the data axis crosses the slow network."""
    data, fsdp, tensor = shape
    if data % n_slices:
        raise ValueError(
            f"mesh.data={data} does not divide by the {n_slices} slices: only data "
            "parallelism goes across slices"
        )
    within = (data // n_slices, fsdp, tensor)
    return mesh_utils.create_hybrid_device_mesh(within, (n_slices, 1, 1), devices)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf of a (possibly abstract) tree; scalars replicated.

    Raises:
      ValueError: on a leaf that no rule, or more than one, matches, and on a
        dimension that its mesh axis does not divide.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, _spec(path, x, mesh)), tree
    )


def _spec(path: tuple[Any, ...], leaf: Any, mesh: Mesh) -> P:
    if leaf.ndim == 0:
        return P()
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    specs = [s for rule, s in RULES if re.search(rf"(^|/){rule}$", name)]
    if len(specs) != 1:
        raise ValueError(f"{len(specs)} partition rules match the parameter {name!r}")
    spec = P(None, *specs[0]) if re.search(r"(^|/)h/", name) else specs[0]
    for size, axis in zip(leaf.shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{name} has a dimension of {size}, which mesh axis "
                f"{axis}={mesh.shape[axis]} does not divide; "
                f"{_nearest(name, size, mesh.shape[axis], mesh.size, axis)}"
            )
    return spec


def _nearest(name: str, size: int, shards: int, n_devices: int, axis: str) -> str:
    """What would do instead, for an error's text."""
    fits = [str(n) for n in range(1, n_devices + 1) if size % n == 0]
    text = f"of up to {n_devices} devices, {axis}={', '.join(fits)} would"
    if name.endswith("wte/embedding") and axis == "tensor":
        unit = math.lcm(128, shards)
        padded = -(-size // unit) * unit
        text += f", and so would model.vocab_size={padded} (padding is never seen)"
    return text


def on_device(tree: Any, device: jax.Device) -> Any:
    """The sharding of each leaf of a tree that lives on one device."""
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda _: sharding, tree)


def batch_sharding(mesh: Mesh, ndim: int, axis: int) -> NamedSharding:
    """Examples lie along dimension `axis` of an array of `ndim` dimensions."""
    return NamedSharding(mesh, P(*(BATCH if i == axis else None for i in range(ndim))))


def constrain(x: jax.Array, mesh: Mesh | None, *axes: Any) -> jax.Array:
    """`x`, laid over the mesh by one entry an axis as in a PartitionSpec; None: left.

    For where XLA would choose to move more than it has to.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))


@runtime_checkable
class RowSharded(Protocol):
    """A node of a tree that knows the shardings of its own leaves."""

    def row_shardings(self, mesh: Mesh) -> Any: ...


def row_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of the state of decoding: rows lie along the first axis of each leaf.

    A node with a method `row_shardings` says itself how its leaves are sharded.
    """

    def shardings(node: Any) -> Any:
        if isinstance(node, RowSharded):
            return node.row_shardings(mesh)
        return row_sharding(np.shape(node), mesh)

    return jax.tree.map(shardings, tree, is_leaf=lambda x: isinstance(x, RowSharded))


def row_sharding(
    shape: Sequence[int], mesh: Mesh, *, has_heads: bool = False
) -> NamedSharding:
    """Rows along the first axis are sharded over the batch axes of the mesh.

    With `has_heads`, those along the second axis are sharded over its tensor axis. An
    axis that does not divide evenly is not sharded.
    """
    if not shape:
        return replicated(mesh)
    axes: list[Any] = [BATCH if shape[0] % n_batch_shards(mesh) == 0 else None]
    if has_heads:
        axes.append("tensor" if shape[1] % mesh.shape["tensor"] == 0 else None)
    return NamedSharding(mesh, P(*axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def local_copy(tree: Any, mesh: Mesh) -> Any:
    """The whole of each array on one device of this process, for it alone to use.

    All processes of the mesh call it together.
    """
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), whole)


def n_batch_shards(mesh: Mesh) -> int:
    """In how many parts the examples of a batch are spread."""
    return math.prod(mesh.shape[a] for a in BATCH)
