"""NVFP4 of every family, held against modelopt's own calibration and export, tensor by tensor.

Both calibrate on the same tokens, with the same attention and arithmetic, and keep what the
library's `NVFP4_DEFAULT_CFG` keeps.
"""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from modelopt_export import with_others
from quantizing import decoded_folder, floats_of_gpt_oss
from tiny import Tensor, read_all_tensors, read_json
from zoo import FAMILIES, TOKENIZER, Layout, write_zoo

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.errors import PlanError
from carnice_build.verification.result import Check, Outcome

TEXT = (
    "A recipe names its sources, the steps that change them and the format that it wants.",
    "Every action is keyed by what it reads, so nothing is computed that a cache already has.",
    "Serving engines fuse linears that read one input; such linears must share their scales.",
)
LENGTH = 64

EAGER = ("gpt_oss",)
"""What transformers has no other attention for."""

DROPPED = {"gemma3": ["vision_tower.*", "multi_modal_projector.*"]}
"""What transformers 5 spells otherwise than the hub does."""

QUICK: list[tuple[str, Layout]] = [("qwen3_moe", "transformers"), ("gpt_oss", "transformers")]
WIDE: list[tuple[str, Layout]] = [
    ("llama", "transformers"),
    ("qwen2", "transformers"),
    ("qwen3", "transformers"),
    ("qwen3_5_moe", "transformers"),
    ("qwen3_5_moe", "hub"),
    ("qwen3_next", "transformers"),
    ("mistral3", "transformers"),
    ("mixtral", "transformers"),
    ("gemma3", "transformers"),
    ("gemma4", "transformers"),
    ("gemma4", "hub"),
    ("gemma4_moe", "transformers"),
    ("glm4_moe", "transformers"),
    ("glm4_moe", "hub"),
    ("deepseek_v3", "transformers"),
    ("nemotron_h", "transformers"),
    ("minimax_m2", "transformers"),
    ("phi3", "transformers"),
]


@dataclass(frozen=True)
class Pair:
    """One checkpoint in NVFP4, by us and by the library; and what our checks say of ours."""

    ours: Path
    theirs: Path
    checks: Sequence[Check]


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(case, id="-".join(case)) for case in QUICK),
        *(pytest.param(case, id="-".join(case), marks=pytest.mark.wide) for case in WIDE),
    ],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    family, layout = request.param
    root = tmp_path_factory.mktemp(family)
    write_zoo(root / "source", family, layout)
    export(root, family)
    return Pair(root / "out" / "v", root / "theirs", build(root, family))


def attention(family: str) -> str:
    return "eager" if family in EAGER else "sdpa"


def build(
    root: Path, family: str, quantize: str = "format: nvfp4", *, decode: bool = False
) -> Sequence[Check]:
    """Build `root`/out/v of `root`/source, and check it without running it."""
    recipes = root / "recipes"
    recipes.mkdir(exist_ok=True)
    (root / "text.txt").write_text("\n".join(TEXT))
    (recipes / "_profiles.yaml").write_text("demo: {}\n")
    dropped = DROPPED.get(family)
    steps = [f"drop: {{match: {dropped}}}"] if dropped else []
    steps += ["decode: {}"] if decode else []
    (recipes / "v.yaml").write_text(
        f"variant: v\ndescription: A\nsources: {{body: {{model: a/b}}}}\n"
        f"steps: [{', '.join(f'{{{step}}}' for step in steps)}]\n"
        f"quantize: {{{quantize}}}\n"
        f"calibration: {{dataset: text.txt, samples: {len(TEXT)}, length: {LENGTH}, threads: 1, "
        f"attention: {attention(family)}}}\n"
    )
    options = Options(
        recipes=recipes,
        out=root / "out",
        cache=root / "cache",
        jobs=1,
        sources={"body": root / "source"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        build_variants(["v"], options)
        (result,) = verify_variants(["v"], options, VerifySettings(run=False)).variants
    return result.checks


def export(
    root: Path,
    family: str,
    source: str = "source",
    preset: str = "NVFP4_DEFAULT_CFG",
    others: Mapping[str, str] | None = None,
) -> None:
    """What modelopt makes of `root`/`source`, in `root`/theirs."""
    import modelopt.torch.quantization as mtq
    import torch
    import transformers
    from modelopt.torch.export import export_hf_checkpoint
    from tokenizers import Tokenizer

    torch.set_num_threads(1)
    model: Any = getattr(transformers, FAMILIES[family].model).from_pretrained(
        root / source,
        dtype=torch.bfloat16,
        attn_implementation=attention(family),
        experts_implementation="eager",
    )
    model.config.architectures = [FAMILIES[family].model]
    tokenizer = Tokenizer.from_file(str(root / source / "tokenizer.json"))

    def loop(model: Any) -> None:
        for line in TEXT:
            model(input_ids=torch.tensor([tokenizer.encode(line).ids[:LENGTH]]))

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        settings = with_others(getattr(mtq, preset), others or {})
        mtq.quantize(model.eval(), copy.deepcopy(settings), loop)
        export_hf_checkpoint(model, export_dir=root / "theirs")


def test_every_tensor_is_that_of_modelopts_export(pair: Pair) -> None:
    """Codes, block scales, tensor scales, input scales, and what stays as it is."""
    ours, theirs = read_all_tensors(pair.ours), read_all_tensors(pair.theirs)
    tower = ("vision_tower.", "multi_modal_projector.")
    names = [name for name in theirs if name in ours or not name.startswith(tower)]

    assert [] == [name for name in names if not same(name, ours.get(name), theirs[name])]
    assert {"U8", "F8_E4M3", "BF16", "F32"} <= {theirs[name].dtype for name in names}


def same(name: str, ours: Tensor | None, theirs: Tensor) -> bool:
    """Whether both are one tensor, in the type that it has in the source where ours keeps that.

    transformers makes the correction of a router's scores F32 and a state BF16, when it loads a
    model in BF16.
    """
    if ours is None or ours.dtype == theirs.dtype:
        return ours == theirs
    assert name.endswith((".A_log", "e_score_correction_bias"))
    wide, narrow = sorted((ours, theirs), key=lambda tensor: tensor.dtype, reverse=True)
    assert ("F32", "BF16") == (wide.dtype, narrow.dtype)
    return rounded(wide.data) == narrow.data


def rounded(data: bytes) -> bytes:
    """Numbers in float32 as BF16."""
    import numpy as np

    bits = np.frombuffer(data, np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


def test_only_an_mtp_head_is_ours_alone(pair: Pair) -> None:
    """transformers drops it; it stays in the type of the source."""
    ours, theirs = read_all_tensors(pair.ours), read_all_tensors(pair.theirs)
    alone = [name for name in ours if name not in theirs]

    assert all(name.startswith(("mtp.", "model.layers.4.")) for name in alone)
    assert not any(name.endswith(("weight_scale", "input_scale")) for name in alone)


def test_what_is_excluded_is_what_modelopt_excludes(pair: Pair) -> None:
    """Every entry of theirs names modules of ours; ours names what an engine builds beside.

    That are the MTP head, fused linears, and embeddings of classes that modelopt does not know.
    By faults of the library, of Nemotron-H's entries each ends in a NUL and a name, and the tied
    head of Gemma 3 has the name that transformers gives it in memory.
    """
    lists = [read_json(folder / "hf_quant_config.json") for folder in (pair.ours, pair.theirs)]
    ours, theirs = (item["quantization"]["exclude_modules"] for item in lists)
    entries = [entry.partition(".\0")[0] for entry in theirs]
    tower = ("vision_tower", "multi_modal_projector")
    names = {name: [name, name.removeprefix("language_model.")] for name in ours}
    idle = [
        entry for entry in entries if not any(fnmatch.filter(names[name], entry) for name in ours)
    ]
    more = [
        name for name in ours if not any(fnmatch.filter(names[name], entry) for entry in entries)
    ]

    assert all(entry.startswith(tower) for entry in idle)
    assert all(
        name.startswith(("mtp.", "model.layers.4", *tower))
        or name.endswith(("in_proj_ba", "embed_tokens", "embed_tokens_per_layer"))
        for name in more
    )


def test_both_configs_say_the_same_but_for_what_they_exclude(pair: Pair) -> None:
    """In config.json, and in hf_quant_config.json."""
    for file, section, excluded in (
        ("config.json", "quantization_config", "ignore"),
        ("hf_quant_config.json", "quantization", "exclude_modules"),
    ):
        ours, theirs = (read_json(folder / file)[section] for folder in (pair.ours, pair.theirs))
        assert ours.pop(excluded)
        assert theirs.pop(excluded)
        assert theirs == ours


def test_the_folder_passes_its_checks(pair: Pair) -> None:
    """Structure and round trip, all modules compared."""
    found = {check.name: check for check in pair.checks}

    assert [] == [check for check in pair.checks if check.outcome is Outcome.FAILED]
    assert 0 == found["round trip"].details["not_compared"]


@pytest.mark.parametrize(
    "family",
    [
        "deepseek_v3",
        *(pytest.param(name, marks=pytest.mark.wide) for name in ("gpt_oss", "qwen3_moe_fp8")),
    ],
)
def test_a_quantized_source_is_what_modelopt_makes_of_its_floats(
    tmp_path: Path, family: str
) -> None:
    """Experts in MXFP4 and models in FP8 are calibrated and quantized as the decoded model is."""
    source = write_zoo(tmp_path / "source", family, "hub")
    decoded = floats_of_gpt_oss if family == "gpt_oss" else decoded_folder
    decoded(source, tmp_path / "floats")
    export(tmp_path, family, "floats")
    checks = build(tmp_path, family, decode=True)
    ours, theirs = (read_all_tensors(tmp_path / name) for name in ("out/v", "theirs"))

    assert ours.keys() == theirs.keys()
    assert [] == [name for name in theirs if not same(name, ours[name], theirs[name])]
    assert {"U8", "F8_E4M3", "BF16", "F32"} <= {tensor.dtype for tensor in theirs.values()}
    assert [] == [check for check in checks if check.outcome is Outcome.FAILED]


def test_experts_that_no_token_was_sent_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They get what the library gives them: the scale of the others' inputs, and no NaN.

    build.json says how many tokens each expert was sent.
    """
    entry = FAMILIES["qwen3_moe"]
    config = {**entry.config, "num_experts": 64, "num_hidden_layers": 2}
    monkeypatch.setitem(FAMILIES, "qwen3_moe", replace(entry, config=config))
    write_zoo(tmp_path / "source", "qwen3_moe")
    export(tmp_path, "qwen3_moe")
    build(tmp_path, "qwen3_moe")
    folder = tmp_path / "out" / "v"
    ours, theirs = read_all_tensors(folder), read_all_tensors(tmp_path / "theirs")
    figures = read_json(folder / "build.json")["figures"]
    counts = figures["tokens sent to each expert of layer 1"]
    unseen = counts.index(0)

    assert theirs == ours
    assert 64 == len(counts)
    assert 2 * tokens() == sum(counts)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        names = [f"model.layers.1.mlp.experts.{expert}.{projection}" for expert in range(64)]
        assert 1 == len({ours[f"{name}.input_scale"].data for name in names})
        assert (
            ours[f"{names[unseen]}.weight_scale_2"].data != ours[f"{names[0]}.weight_scale_2"].data
        )


def tokens() -> int:
    """How many tokens all samples have together."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    return sum(min(LENGTH, len(tokenizer.encode(line).ids)) for line in TEXT)


def test_heads_are_kept_whatever_their_names(tmp_path: Path) -> None:
    """GLM's is a layer beyond the last, of which nothing is quantized by the defaults of 0.47."""
    write_zoo(tmp_path / "source", "glm4_moe", "hub")
    build(tmp_path, "glm4_moe")
    tensors = read_all_tensors(tmp_path / "out" / "v")
    head = {tensor.dtype for name, tensor in tensors.items() if name.startswith("model.layers.4.")}

    assert {"BF16", "F32"} == head


OTHER_ALGORITHMS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "FP8": ("qwen3_moe", "quant_algo: FP8", "FP8_DEFAULT_CFG", {}),
    "MXFP8": ("qwen3_moe", "quant_algo: MXFP8", "MXFP8_DEFAULT_CFG", {}),
    "W4A16_NVFP4": ("qwen3_moe", "quant_algo: W4A16_NVFP4", "W4A16_NVFP4_CFG", {}),
    "W4A16_NVFP4 of gpt-oss": ("gpt_oss", "quant_algo: W4A16_NVFP4", "W4A16_NVFP4_CFG", {}),
    "FP8 beside experts in NVFP4": (
        "qwen3_moe",
        "rules: [{match: '*.self_attn.*', quant_algo: FP8}]",
        "NVFP4_DEFAULT_CFG",
        {"*self_attn*": "FP8_DEFAULT_CFG"},
    ),
}


@pytest.mark.parametrize("name", OTHER_ALGORITHMS)
def test_experts_in_other_algorithms(tmp_path: Path, name: str) -> None:
    """Each expert's gate and up share the scale of FP8 too, for transformers has them as one.

    Where there are several algorithms, the configs name the experts of a layer as one module.
    """
    family, knobs, preset, others = OTHER_ALGORITHMS[name]
    write_zoo(tmp_path / "source", family, "transformers")
    export(tmp_path, family, preset=preset, others=others)
    checks = build(tmp_path, family, f"format: nvfp4, {knobs}")
    folders = tmp_path / "out" / "v", tmp_path / "theirs"
    ours, theirs = map(read_all_tensors, folders)
    layers = [
        read_json(folder / "config.json")["quantization_config"].get("quantized_layers")
        for folder in folders
    ]

    assert theirs.keys() == ours.keys()
    assert [] == [item for item in theirs if theirs[item] != ours[item]]
    assert layers[1] == layers[0]
    assert [] == [check for check in checks if check.outcome is Outcome.FAILED]


@pytest.mark.parametrize(
    ("family", "knobs", "words"),
    [
        ("gpt_oss", "quant_algo: FP8", "one tensor with columns for rows are not quantized to FP8"),
        (
            "qwen3_moe",
            "rules: [{match: '*.experts.*.down_proj', quant_algo: FP8}]",
            "because engines run a layer's experts as one",
        ),
    ],
)
def test_experts_that_no_engine_could_run_are_refused(
    tmp_path: Path, family: str, knobs: str, words: str
) -> None:
    """Eight bits of gpt-oss's, and two algorithms in one layer."""
    write_zoo(tmp_path / "source", family, "transformers")

    with pytest.raises(PlanError, match=words):
        build(tmp_path, family, f"format: nvfp4, {knobs}")
