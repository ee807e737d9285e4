"""The names that GPT-2's tensors have in PyTorch -> paths of our parameters.

Hugging Face, nanoGPT and their forks name them alike, with prefixes of the modules
around them, and may have the tied matrix under either of its names or both.
"""

import re
from collections.abc import Mapping

from gpt2_jax.checks import one_line, shown
from gpt2_jax.formats.tensors import Tensor, same_numbers

HEAD, EMBEDDING = "lm_head.weight", "wte.weight"
# Of DistributedDataParallel, torch.compile, and the model around the layers.
_PREFIXES = re.compile(r"^(?:(?:module|_orig_mod|transformer)\.)+")
BUFFER = re.compile(r"h\.[0-9]{1,6}\.attn\.(bias|masked_bias)")
_EMBEDDING = re.compile(r"(wte|wpe)\.weight")
_PARAMETER = re.compile(
    r"(ln_f|h\.[0-9]{1,6}\.(?:ln_[12]|attn\.c_(?:attn|proj)|mlp\.c_(?:fc|proj)))"
    r"\.(weight|bias)"
)


def bare_name(name: str) -> str:
    """A tensor's name without the prefixes of modules around it."""
    name = name.replace("_orig_mod.", "")  # a block that was compiled by itself
    return _PREFIXES.sub("", name)


def by_our_paths(named: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """The tensors by our paths, without the causal masks of older versions.

    The embedding and the head are one matrix in GPT-2, and files have it under either
    name or both.

    Raises:
      ValueError: on a tensor that no GPT-2 has, on one that is there twice, and on a
        head that is another matrix than the embedding.
    """
    tensors: dict[str, Tensor] = {}
    for full_name, tensor in named.items():
        name = bare_name(full_name)
        if name in tensors:
            raise ValueError(
                f"{where} has {one_line(name, 60)} twice, with prefix and without"
            )
        if not BUFFER.fullmatch(name):
            tensors[name] = tensor
    head = tensors.pop(HEAD, None)
    if head is not None:
        wte = tensors.setdefault(EMBEDDING, head)
        if not same_numbers(head, wte):
            raise ValueError(
                f"{where}: {HEAD} {shown(list(head.shape))} is not {EMBEDDING} "
                f"{shown(list(wte.shape))}, and an untied head is not supported"
            )
    return {our_path(name, where): tensor for name, tensor in tensors.items()}


def our_path(name: str, where: object) -> str:
    """Our path of the tensor `h.0.attn.c_attn.weight`, say.

    Raises:
      ValueError: when no GPT-2 has such a tensor.
    """
    if embedding := _EMBEDDING.fullmatch(name):
        return f"{embedding[1]}/embedding"
    found = _PARAMETER.fullmatch(name)
    if not found:
        raise ValueError(f"{where} has a tensor {shown(name)}, which no GPT-2 has")
    module, leaf = found.groups()
    module = re.sub(r"^h\.", "h_", module).replace(".", "/")
    if leaf == "weight":
        leaf = "scale" if "ln_" in module else "kernel"
    return f"{module}/{leaf}"


def their_name(path: str) -> str:
    """The inverse of `our_path`, without a prefix."""
    module, leaf = path.replace("h_", "h/", 1).rsplit("/", 1)
    return f"{module.replace('/', '.')}.{'bias' if leaf == 'bias' else 'weight'}"
