"""Random identifiers that no text contains: what a model can only copy, never recall."""

from __future__ import annotations

import random

_WORD_LIST = (
    "account alpha amber anchor archive arrow atlas audit badge basin batch beacon binary blade "
    "border branch bridge bucket buffer cache canvas carbon cargo cedar channel cipher cobalt "
    "column comet copper coral count cursor delta desk digest dock draft drift ember engine entry "
    "epoch event fabric factor falcon field filter flint folder forest frame garden gate glacier "
    "grain granite graph guard harbor hazel header helper index inlet ingest iris island ivory "
    "jasper journal kernel label lagoon lantern layer ledger lemon level linen loader locust "
    "magnet maple margin marker matrix meadow member merge meter mirror module monitor mosaic "
    "needle nickel node north number object ocean offset onyx option orbit order packet panel "
    "parcel parser pepper phase pilot pixel planet plasma portal prism probe profile query quartz "
    "queue radar ranger raven record region report ribbon river robin router saddle sample schema "
    "sector sensor shadow shard signal silver socket solar source spark spiral spruce stack stage "
    "storm stream summit switch symbol table tango target temple ticket timber token topaz tower "
    "tracer tulip tunnel update value vector velvet vertex violet walnut widget window winter "
    "wire worker yarrow zenith zephyr zone"
)
_WORDS = _WORD_LIST.split()


def words(rng: random.Random, count: int) -> list[str]:
    """`count` plain words."""
    return [rng.choice(_WORDS) for _ in range(count)]


def snake(rng: random.Random) -> str:
    """A snake_case name, at times with a number at its end."""
    name = "_".join(words(rng, rng.randint(2, 3)))
    return f"{name}_{rng.randint(2, 999)}" if rng.random() < 0.3 else name


def camel(rng: random.Random) -> str:
    """A camelCase name."""
    first, *rest = words(rng, rng.randint(2, 3))
    return first + "".join(word.capitalize() for word in rest)


def hex_id(rng: random.Random) -> str:
    """A lower-case hexadecimal id of 6 to 16 digits."""
    return "".join(rng.choices("0123456789abcdef", k=rng.randint(6, 16)))


def code(rng: random.Random) -> str:
    """A code of capitals and digits, such as `QX-4821`."""
    letters = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(2, 3)))
    return f"{letters}-{rng.randint(100, 99999)}"


def nonsense(rng: random.Random) -> str:
    """A pronounceable word that does not exist."""
    pairs = [
        rng.choice("bcdfghjklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4))
    ]
    return "".join(pairs)


def identifier(rng: random.Random) -> str:
    """A name of any of these kinds."""
    return rng.choice((snake, snake, camel, hex_id, code, nonsense))(rng)
