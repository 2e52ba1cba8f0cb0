"""Which modules of a decoder layer AWQ may smooth, and what balances them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from carnice_build.models.base import SmoothingMapping


def mappings_of_layer(
    mappings: Sequence[SmoothingMapping], modules: Collection[str], quantized: Collection[str]
) -> Iterator[SmoothingMapping]:
    """Those of `mappings` that smooth a layer made of `modules`, of which some are `quantized`.

    All of a mapping's modules must be there, and one of those that balance it quantized: by their
    rounding llm-compressor chooses scales, and where there is none it finds 1, or ends in an error.
    """
    for mapping in mappings:
        names = (mapping.smooth, *mapping.balance)
        if all(name in modules for name in names) and any(
            name in quantized for name in mapping.balance
        ):
            yield mapping
