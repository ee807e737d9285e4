"""What the files beside a vocabulary say of its tokens: which are added, which end."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpt2_jax.checks import shown
from gpt2_jax.runtime.budget import Budget
from gpt2_jax.runtime.files import parse_json
from gpt2_jax.tokenizers.added_tokens import AddedToken

END_OF_TEXT = "<|endoftext|>"
ROLES = "roles.json"  # the file of ours that says all of it
# The files of a folder for transformers that say something of tokens.
TOKENIZER_CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
SPECIAL_MAP, ADDED, CONFIG = (
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
BESIDE = (TOKENIZER_CONFIG, SPECIAL_MAP, ADDED, CONFIG, GENERATION)
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_GPT2_EOS = 50256  # what a GPT-2's config.json that names none stands for


@dataclasses.dataclass(frozen=True)
class Roles:
    """The tokens of a vocabulary that have a part of their own.

    Attributes:
      size: number of ids; those from here on are left out.
      added: what is found in text before all else.
      eot_id: follows every document; None: nothing does.
      bos_id: stands before a text where nothing else does; None: nothing does.
      end_ids: a generated text ends before these.
      begin_ids: every prompt of text begins with these.
      add_prefix_space: text that begins without a space gets one.
    """

    size: int
    added: tuple[AddedToken, ...] = ()
    eot_id: int | None = None
    bos_id: int | None = None
    end_ids: tuple[int, ...] = ()
    begin_ids: tuple[int, ...] = ()
    add_prefix_space: bool = False

    def within(self, size: int) -> "Roles":
        """Without the ids from `size` on."""

        def kept(i: int | None) -> int | None:
            return None if i is None or i >= size else i

        return dataclasses.replace(
            self,
            size=min(size, self.size),
            added=tuple(token for token in self.added if token.id < size),
            eot_id=kept(self.eot_id),
            bos_id=kept(self.bos_id),
            end_ids=tuple(i for i in self.end_ids if i < size),
            begin_ids=tuple(i for i in self.begin_ids if i < size),
        )

    def as_trained(self) -> "Roles":
        """Those of a model that was trained here: an end of text is before and after
        each document, and nothing else is."""
        ends = self.end_ids
        if self.eot_id is not None and self.eot_id not in ends:
            ends = (*ends, self.eot_id)
        return dataclasses.replace(self, bos_id=self.eot_id, end_ids=ends, begin_ids=())

    def same_effect(self, other: "Roles") -> bool:
        """Whether all texts and ids are the same by both."""
        return self._effect() == other._effect()

    def _effect(self) -> "Roles":
        if len({token.normalized for token in self.added}) == 1:  # then it's the same
            added = [dataclasses.replace(t, normalized=False) for t in self.added]
            ordered = tuple(sorted(added, key=lambda token: token.id))
            return dataclasses.replace(self, added=ordered)
        return self

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> "Roles":
        """The inverse of `to_json`; ValueError on anything else."""
        values = json_object(content, ROLES)
        try:
            added = [
                _added_token(entry, entry["id"], ROLES) for entry in values["added"]
            ]
            return cls(
                size=_integer(values["size"], ROLES),
                added=tuple(added),
                eot_id=_optional(values["eot_id"], ROLES),
                bos_id=_optional(values["bos_id"], ROLES),
                end_ids=tuple(_integer(i, ROLES) for i in values["end_ids"]),
                begin_ids=tuple(_integer(i, ROLES) for i in values["begin_ids"]),
                add_prefix_space=values["add_prefix_space"] is True,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{ROLES} is damaged: {error!r}") from None


def json_object(content: bytes, name: str) -> dict[str, Any]:
    """The object in a JSON file; ValueError on anything else."""
    value = parse_json(content, name)
    if not isinstance(value, dict):
        raise ValueError(f"{name}: not a JSON object")
    return value


def read_roles(
    vocab: Mapping[str, int],
    added: Sequence[AddedToken],
    files: Mapping[str, bytes],
    *,
    unlisted: Sequence[str] = (),
    begin_ids: Sequence[int] = (),
    add_prefix_space: bool = False,
) -> Roles:
    """The roles of the tokens of a GPT-2's vocabulary.

    Args:
      vocab: token -> id.
      added: those that tokenizer.json lists.
      unlisted: of the vocabulary, what is special unless a file says otherwise.
      files: name -> content, of those of BESIDE that are there.
      begin_ids, add_prefix_space: as tokenizer.json has them.

    Raises:
      ValueError: on a file that is damaged, naming it.
    """
    values = {name: json_object(files[name], name) for name in BESIDE if name in files}
    settings = values.get(TOKENIZER_CONFIG, {})
    named = _named(values.get(SPECIAL_MAP, {}), SPECIAL_MAP)
    named |= _named(settings, TOKENIZER_CONFIG)
    named.setdefault("eos", AddedToken(END_OF_TEXT, -1, special=True))
    tokens = {token.content: token for token in added}
    listed = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise ValueError(f"{TOKENIZER_CONFIG}: added_tokens_decoder is {shown(listed)}")
    n_tokens = len(added) + len(listed) + len(values.get(ADDED, {}))
    Budget(sum(map(len, files.values()))).draw(1000 * n_tokens)
    for key, entry in listed.items():
        token = _added_token(entry, key, TOKENIZER_CONFIG)
        tokens[token.content] = token
    special = {token.content for token in named.values()}
    for content, i in values.get(ADDED, {}).items():
        is_special = content in special
        token = AddedToken(
            content, _integer(i, ADDED), is_special, normalized=not is_special
        )
        tokens.setdefault(content, token)
    ids = dict(vocab) | {token.content: token.id for token in tokens.values()}
    for role, token in named.items():
        if token.content not in ids:
            if role == "eos" and token.id == -1:  # END_OF_TEXT, where nothing is named
                continue
            ids[token.content] = max(ids.values(), default=-1) + 1
        tokens.setdefault(
            token.content, dataclasses.replace(token, id=ids[token.content])
        )
    for content in unlisted:
        tokens.setdefault(content, AddedToken(content, ids[content], special=True))
    eot_id = ids.get(named["eos"].content)
    bos_id = ids[named["bos"].content] if "bos" in named else None
    ends, begin = ids_of_model(values.get(CONFIG), values.get(GENERATION))
    size = len(ids)
    ends = tuple(i for i in ends if i < size)
    if eot_id is None and ends:
        eot_id = ends[0]
    if begin is not None and begin < size:
        bos_id = begin
    if "add_bos_token" in settings:
        begin_ids = ()
        first = ids[named["bos"].content] if "bos" in named else eot_id
        if settings["add_bos_token"] is True and first is not None:
            begin_ids = (first,)
    if settings.get("tokenizer_class") not in _GENERIC:
        add_prefix_space = settings.get("add_prefix_space", add_prefix_space) is True
    return Roles(
        size=size,
        added=tuple(tokens.values()),
        eot_id=eot_id,
        bos_id=eot_id if bos_id is None else bos_id,
        end_ids=ends or (() if eot_id is None else (eot_id,)),
        begin_ids=tuple(begin_ids),
        add_prefix_space=add_prefix_space,
    )


# The classes that take tokenizer.json as it is.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


def ids_of_model(
    config: Mapping[str, Any] | None, generation: Mapping[str, Any] | None
) -> tuple[tuple[int, ...], int | None]:
    """What ends a generated text, and what begins one, as transformers' `generate` has
    it: by generation_config.json, and where there is none, by config.json."""
    if generation is not None:
        source, default = generation, None
    else:
        source = config or {}
        is_gpt2 = source.get("model_type", "n_embd" in source and "gpt2") == "gpt2"
        default = _GPT2_EOS if is_gpt2 else None
    where = CONFIG if generation is None else GENERATION
    ends, begin = (source.get(f"{x}_token_id", default) for x in ("eos", "bos"))
    found = []
    for i in [*(ends if isinstance(ends, list) else [ends]), begin]:
        if i is not None and type(i) is not int:
            raise ValueError(f"{where}: {shown(i)} is no token id")
        found.append(None if i is None or i < 0 else i)
    return tuple(i for i in found[:-1] if i is not None), found[-1]


def _named(values: Mapping[str, Any], where: str) -> dict[str, AddedToken]:
    """Role -> token, with ids that are not known yet."""
    found = {role: values.get(f"{role}_token") for role in _NAMED}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = values.get(key) or []
        if not isinstance(more, list | dict):
            raise ValueError(f"{where}: {key} is {shown(more)}")
        items = more.items() if isinstance(more, dict) else enumerate(more)
        found |= {f"{key} {name}": entry for name, entry in items}
    return {
        role: _added_token(
            {"content": entry} if isinstance(entry, str) else entry, 0, where, True
        )
        for role, entry in found.items()
        if entry
    }


def _added_token(
    entry: Any, key: Any, where: str, special: bool | None = None
) -> AddedToken:
    """A token with its flags; `key` is its id, perhaps as text."""
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise ValueError(f"{where}: {shown(entry)} is no token")
    if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 20:
        key = int(key)
    flags = {name: entry.get(name, False) for name in _FLAGS}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{where}: {name} of a token is {shown(value)}")
    if special is not None:
        flags["special"] = special
    return AddedToken(entry["content"], _integer(key, where), **flags)


def leading_ids(processor: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The tokens that a post-processor of tokenizer.json puts before a text.

    What it puts after a text is left out: a prompt would end with it.

    Raises:
      ValueError: on one that isn't known, or is damaged.
    """
    kind = processor.get("type")
    try:
        if kind in (None, "ByteLevel"):
            return ()
        if kind == "Sequence":
            parts = [leading_ids(part, where) for part in processor["processors"]]
            return tuple(i for part in parts for i in part)
        if kind in ("BertProcessing", "RobertaProcessing"):
            return (_integer(processor["cls"][1], where),)
        if kind == "TemplateProcessing":
            first = itertools.takewhile(
                lambda piece: "SpecialToken" in piece, processor.get("single", ())
            )
            table = processor.get("special_tokens", {})
            names = [piece["SpecialToken"]["id"] for piece in first]
            return tuple(_integer(i, where) for n in names for i in table[n]["ids"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{where}: post_processor is damaged: {error!r}") from None
    raise ValueError(f"{where}: post_processor is {shown(kind)}")


def added_tokens(entries: Any, where: str) -> Iterator[AddedToken]:
    """The tokens of a list in tokenizer.json."""
    if not isinstance(entries, list):
        raise ValueError(f"{where}: added_tokens is {shown(entries)}")
    for entry in entries:
        key = entry.get("id") if isinstance(entry, dict) else None
        yield _added_token(entry, key, where)


def _integer(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{where}: {shown(value)} is no token id")
    return value


def _optional(value: Any, where: str) -> int | None:
    return None if value is None else _integer(value, where)
