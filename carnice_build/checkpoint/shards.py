"""Which safetensors files of a folder are the model, told by their names and the index.

The one place that decides it, for folders on this machine and for repositories of the hub.
transformers takes `model.safetensors` before an index; mlx-lm takes every `model*.safetensors`,
whatever an index says.  Where they would load different weights, or old ones beside new, that is a
question for whoever made the folder, and no guess is made.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from carnice_build.errors import CheckpointError, together

_SINGLE = "model.safetensors"
_NUMBERED = re.compile(r"(?P<stem>.+)-[0-9]{1,9}-of-(?P<total>[0-9]{1,9})\.safetensors")

_PRECISION = r"(fp|bf|f|float|bfloat|int)\d+\w*|(non_)?ema"
_SPARE = re.compile(
    rf"(consolidated\b.*|model\.({_PRECISION})(-\d+-of-\d+)?|model-\d+-of-\d+\.({_PRECISION}))"
    r"\.safetensors"
)
"""Second copies that no library loads unasked: `consolidated.safetensors` has the names of its
publisher's own code, and `model.fp16.safetensors` is what transformers calls a variant."""

_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\b.*\.(safetensors|bin)")
_MERGED = "the adapter merged into its base, with peft's `merge_and_unload` and `save_pretrained`"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Index:
    """An index of shards: its file's name, the path that errors give, and its `weight_map`."""

    file: str
    where: str
    weight_map: Mapping[str, str]


def refuse_adapter(where: str, names: Iterable[str]) -> None:
    """Raise CheckpointError when files of an adapter are among `names`: it is merged in nowhere."""
    names = sorted(names)
    adapter = [name for name in names if _ADAPTER.fullmatch(name)]
    if not adapter:
        return
    if not any(name.endswith(".safetensors") and name not in adapter for name in names):
        raise CheckpointError(
            f"is an adapter ({_first(adapter)}), not a model", where=where, expected=_MERGED
        )
    raise CheckpointError(
        f"holds an adapter ({_first(adapter)}) beside the weights of a model",
        where=where,
        expected=f"{_MERGED}, or, where it is not meant, the folder without the adapter's files",
    )


def model_shards(
    where: str, names: Iterable[str], index: Index | None, others: Collection[str] = ()
) -> list[str]:
    """The shards of the model among the files `names` of `where`, in the order of their names.

    `others` are there too, but must not be touched.  Raises CheckpointError when there is no model,
    when a shard is missing, and when the files do not say which of several models is meant.
    """
    names = sorted(names)
    shards = [name for name in names if name.endswith(".safetensors")]
    if index is not None:
        return _indexed(where, shards, index)
    if not shards:
        raise _no_weights(where, [*names, *others])
    if any(name.startswith("model") and not _SPARE.fullmatch(name) for name in shards):
        shards = [name for name in shards if not _SPARE.fullmatch(name)]
    _check_sets(where, shards)
    return shards


def _indexed(where: str, shards: Sequence[str], index: Index) -> list[str]:
    there, wanted = set(shards), set(index.weight_map.values())
    named = sorted(wanted)
    missing = sorted(wanted - there)
    unnamed = [name for name in sorted(there - wanted) if not _SPARE.fullmatch(name)]
    rivals = [name for name in unnamed if name.startswith("model")]
    if missing and (rivals or (unnamed and missing == named)):
        rival = _first(rivals or unnamed)
        raise CheckpointError(
            f"holds {rival} beside an index of {len(named)} other shards, of which {len(missing)} "
            "are missing, so it is not clear which is the model",
            where=where,
            expected=f"all shards of the index, or, where {rival} is the model, no {index.file}",
        )
    if missing:
        raise _missing(index, missing)
    if rivals:
        rival = _first(rivals)
        raise CheckpointError(
            f"holds {rival} beside an index of other shards ({_first(named)}), so it is not clear "
            "which is the model",
            where=where,
            expected=f"the folder without {rival}, or, where that is the model, "
            f"without {index.file} and its shards",
        )
    return named


def _missing(index: Index, missing: Sequence[str]) -> CheckpointError:
    def error(name: str) -> CheckpointError:
        return CheckpointError(f"names the shard {name!r}, which is missing", where=index.where)

    what = f"names {len(missing)} shards that are missing"
    return together(missing, error, what, index.where)


def _check_sets(where: str, shards: Sequence[str]) -> None:
    """Refuse shards of two sets under one stem, `model.safetensors` counted, and half a set."""
    sets: dict[str, dict[str, list[str]]] = {}
    for name in shards:
        if name == _SINGLE:
            sets.setdefault("model", {})[""] = [name]
        elif match := _NUMBERED.fullmatch(name):
            sets.setdefault(match["stem"], {}).setdefault(match["total"], []).append(name)
    for found in sets.values():
        if len(found) > 1:
            raise CheckpointError(
                "holds several sets of shards and no index, so it is not clear which is the model",
                where=where,
                expected="one of them",
                problems=[_first(members) for members in found.values()],
            )
        for total, members in found.items():
            if total and len(members) < int(total):
                raise CheckpointError(
                    f"holds only {len(members)} of {int(total)} shards ({_first(members)})",
                    where=where,
                )


def _first(names: Sequence[str]) -> str:
    more = len(names) - 1
    return f"{names[0]} and {more} more" if more else names[0]


def _no_weights(where: str, names: Iterable[str]) -> CheckpointError:
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        return CheckpointError(
            f"holds pickled weights ({pickles[0]}), which could run code when loaded",
            where=where,
            expected="safetensors",
        )
    return CheckpointError("holds no safetensors file", where=where)
