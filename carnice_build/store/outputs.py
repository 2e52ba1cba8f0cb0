"""What an action made when it ran: what its outputs hold, and where the store still has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from carnice_build.dtypes import TensorSpec
from carnice_build.store.packs import Location


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of an action, of the types and shapes in `specs` and the contents in `digests`.

    The contents are known for good; the bytes may be gone, so `find` (the store's `locate`, given
    a digest and a number of bytes) is asked for them when somebody wants them, and not before.
    """

    digests: Sequence[str]
    specs: Sequence[TensorSpec]
    find: Callable[[str, int], Location | None]

    def locate(self, index: int) -> Location | None:
        """Where the bytes of output number `index` are; None when they are gone."""
        return self.find(self.digests[index], self.specs[index].nbytes)
