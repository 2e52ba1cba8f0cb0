"""The MTP head as a drafter of mlx-vlm: a folder of its own beside that of the model.

What `mlx_vlm.convert --mtp` makes of the head: bare names, norms of 1 + w, stacks of experts, no
cast, and all matrices quantized alike but for routers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from carnice_build.checkpoint.assets import Reads
from carnice_build.checkpoint.json import to_json
from carnice_build.formats.base import Companion
from carnice_build.formats.card import Card, own_template
from carnice_build.formats.mlx.files import section_of
from carnice_build.formats.mlx.format import MlxFormat, MlxRule
from carnice_build.formats.mlx.names import drafter_table
from carnice_build.formats.mlx.table import trace_of
from carnice_build.formats.mlx.trace import Trace
from carnice_build.formats.rules import Settings
from carnice_build.formats.variant import Variant
from carnice_build.graph import View
from carnice_build.steps.base import PlanContext

if TYPE_CHECKING:
    from carnice_build.formats.mlx.checks import MlxDrafterChecks


class MlxDrafter(MlxFormat):
    """The MTP head of a model, in groups of `bits`, or as it is."""

    plain: bool

    @property
    def about(self) -> str:
        """What it is, in a sentence."""
        how = "as it is" if self.plain else f"in {self.bits} bits"
        return f"The MTP head {how}, as a drafter for mlx-vlm"

    def engine_reads(self) -> Collection[Reads]:
        """A tokenizer, so that it can be told whose drafter this is."""
        return (Reads.TOKENIZER,)

    def companions(self, view: View, context: PlanContext) -> Sequence[Companion]:
        """None: it is one."""
        return ()

    def trace(self, view: View, context: PlanContext) -> Trace:
        """What becomes of the head."""
        facts = context.architecture.tensors
        specs = {name: ref.spec for name, ref in view.items()}
        table = drafter_table(context.architecture)
        assert table is not None
        # Types stay as they are, whatever the config says of the model.
        found = trace_of(table, specs, facts, None)
        return replace(found, modules={}) if self.plain else found

    def _settings(
        self, own: Mapping[str, Any], rules: Sequence[tuple[int, MlxRule]]
    ) -> Settings | None:
        """As those of a model, but that `mtp` may be what says the bits."""
        chosen = super()._settings(own, rules)
        if chosen is not None and self.mtp is not None:
            chosen.causes["bits"] = ("mtp",)
        return chosen

    def files(self, variant: Variant) -> Mapping[str, bytes]:
        """config.json, as mlx-vlm writes it."""
        return {"config.json": to_json(self._config(variant))}

    def _config(self, variant: Variant) -> dict[str, Any]:
        text = variant.config.get("text_config", variant.config)
        config = {
            "model_type": variant.architecture.mlx_drafter,
            # A round of as many drafts as there are layers, and one more; the model adds one.
            "block_size": text["mtp_num_hidden_layers"] + 2,
            "text_config": text,
            "tie_word_embeddings": text["tie_word_embeddings"],
        }
        if variant.quantized:
            section = section_of(self.whole)
            config |= {"quantization": section, "quantization_config": section}
        return dict(sorted(config.items()))

    def card(self) -> Card:
        """See `Format.card`."""
        return Card(own_template(__package__, "drafter.md.j2"), "mlx", ("mlx", "mtp"))

    def checks(self) -> MlxDrafterChecks:
        """See `Format.checks`."""
        from carnice_build.formats.mlx.checks import MlxDrafterChecks

        return MlxDrafterChecks(zero=self.nonfinite == "zero")
