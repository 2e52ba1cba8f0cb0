"""A report as one of 13 variants looks, without building any."""

from __future__ import annotations

from carnice_build.commands.findings import Findings
from carnice_build.commands.report import ModuleError, Report, Sharing, VariantSummary
from carnice_build.formats.library import Library
from carnice_build.store.history import BuildRecord
from carnice_build.verification.perplexity import Perplexity
from carnice_build.verification.result import Check, Outcome
from carnice_build.verification.running import SOURCE, PerplexityRow

MODEL = "kai-os/Carnice-V2-27b"
HOSTILE = "</script><script>throw 'run'</script><b>& \"quoted\""
LAYERS = 8

# Name, format, bits per weight, perplexity, KL.
_VARIANTS = (
    ("mlx-mixed_2_6", "mlx", 3.38, 41.12, None),
    ("mlx-mixed_3_4", "mlx", 3.75, 25.90, None),
    ("mlx-mixed_3_6", "mlx", 4.17, 24.61, None),
    ("mlx-4bit", "mlx", 4.54, 22.68, None),
    ("mlx-mixed_4_6", "mlx", 4.96, 22.31, None),
    ("mlx-6bit", "mlx", 6.54, 21.98, None),
    ("int4-rtn", "autoround", 7.91, 22.74, 0.0297),
    ("int4-autoround", "autoround", 7.91, 22.50, 0.0223),
    ("int4-bf16-mtp", "autoround", 7.91, 22.87, 0.0703),
    ("nvfp4-text-mtp", "nvfp4", 8.15, 23.38, 0.0544),
    ("w4a16-awq", "compressed-tensors", 9.92, 22.27, 0.0170),
    ("w4a16-awq-minmax", "compressed-tensors", 9.92, 22.29, 0.0175),
)
UNKNOWN = "qwen-nvfp4-text-mtp"
NAMES = [*(row[0] for row in _VARIANTS), UNKNOWN]


def sample_report() -> Report:
    """Twelve verified variants, some with every figure there is, and one of which nothing is."""
    variants = [_variant(*row) for row in _VARIANTS]
    variants.append(_summary(UNKNOWN, "nvfp4", 10.0, None, None))
    sizes = [variant.size for variant in variants]
    shared = [
        [min(a, b) // (1 + abs(i - j)) for j, b in enumerate(sizes)] for i, a in enumerate(sizes)
    ]
    sharing = Sharing(shared, sum(sizes), 2 * sum(sizes) // 3, sum(sizes) // 10, 1105, 486)
    return Report("0.1.0", variants, sharing)


def _variant(
    name: str, form: str, bits: float, perplexity: float, kl: float | None
) -> VariantSummary:
    library = Library.MLX_LM if kl is None else Library.TRANSFORMERS
    rows = [
        PerplexityRow(SOURCE, library, [Perplexity(1024, 8, 21.99, 1.04)], source=MODEL),
        PerplexityRow(name, library, [Perplexity(1024, 8, perplexity, 1.05, kl)]),
    ]
    checks = [Check("digests", Outcome.PASSED, "fine")]
    if kl is not None:
        checks += [_mtp(), _fidelity(name)]
    if name == "int4-rtn":
        checks.append(Check("structure", Outcome.FAILED, "wrong", [HOSTILE] * 5))
    record = BuildRecord("key", 85, 60, 20, 12.34, 45.6, 13, 2, 145, 30.0)
    return _summary(name, form, bits, Findings("key", True, "heldout.txt", checks, rows), record)


def _summary(
    name: str, form: str, bits: float, findings: Findings | None, build: BuildRecord | None
) -> VariantSummary:
    return VariantSummary(
        variant=name,
        description=HOSTILE,
        format=form,
        model=MODEL,
        profile="demo",
        tools={"numba": "0.68.1"},
        parameters=2_808_656,
        bits_per_weight=bits,
        size=int(bits * 370_000),
        findings=findings,
        errors=_errors(bits) if findings else [],
        build=build,
    )


def _errors(bits: float) -> list[ModuleError]:
    kinds = ("linear_attn.in_proj_qkv", "mlp.gate_proj", "mlp.down_proj")
    inside = [
        ModuleError(f"layers.{layer}.{kind}", kind, layer, 0.8 / bits / (layer + 1))
        for kind in kinds
        for layer in range(LAYERS)
    ]
    return [ModuleError("embed_tokens", "embed_tokens", None, 0.4 / bits), *inside]


def _mtp() -> Check:
    def figures(length: float) -> dict[str, object]:
        return {"1": {"mean_length": 1.7, "error": 0.1}, "3": {"mean_length": length, "error": 0.2}}

    heads = {"head as packaged": 3.1, "head quantized too": 3.0, "no head": 1.0}
    details = {head: figures(length) for head, length in heads.items()}
    return Check("mtp", Outcome.PASSED, "fine", (), details)


def _fidelity(name: str) -> Check:
    counts = {SOURCE: (46, 1, 1), name: (40, 6, 2)}
    details = {
        model: {"exact": exact, "typos": typos, "misses": misses}
        for model, (exact, typos, misses) in counts.items()
    }
    return Check("fidelity", Outcome.PASSED, "fine", (), details)
