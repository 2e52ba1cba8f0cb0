"""What mlx-lm makes of a model is told by a trace of mlx-lm itself, or by a table that equals it.

The checkpoints are those of `zoo`, of many families, in the layouts of transformers and of the hub.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Project
from tiny import read_all_tensors, write_json
from zoo import FAMILIES, Layout, write_zoo

from carnice_build.backends import mlx_trace
from carnice_build.commands.asking import Asking
from carnice_build.commands.build import build_variants
from carnice_build.commands.plan import plan_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import BackendError, PlanError
from carnice_build.formats.mlx.answers import answered
from carnice_build.formats.mlx.conversion import Fused, Numbered, Parts, knows, told
from carnice_build.formats.mlx.entries import older_entries, with_entries
from carnice_build.formats.mlx.table import TABLES, Table, table_of, trace_of
from carnice_build.formats.mlx.target import Target
from carnice_build.formats.mlx.trace import (
    Kind,
    Refusal,
    Step,
    Trace,
    Traced,
    TracedSource,
    parsed,
)
from carnice_build.steps.base import Question
from carnice_build.tensors import stacks

pytest.importorskip("mlx_lm")
pytest.importorskip("transformers")

from mlx_families import (
    asked,
    converted,
    listed_modules,
    model_of,
    replayed,
    trace_of_folder,
)

Zoo = Callable[[str, Layout], Path]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """`zoo(family, layout)`: its tiny checkpoint, made once; not to be changed."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, layout: Layout) -> Path:
        key = family, layout
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{layout}") / "checkpoint"
            made[key] = write_zoo(folder, family, layout)
        return made[key]

    return make


FP8 = "qwen3_moe_fp8"
"""A family whose FP8 it does not decode."""

TAKEN: Sequence[tuple[str, Layout]] = [
    *((family, "hub") for family, entry in FAMILIES.items() if entry.hub and family != FP8),
    ("deepseek_v3", "transformers"),
    ("gemma3_text", "transformers"),
    ("llama", "transformers"),
    ("ministral3", "transformers"),
    ("mistral3", "transformers"),
    ("nemotron_h", "transformers"),
    ("qwen3_5", "transformers"),
]
"""Checkpoints that mlx-lm converts."""

REFUSED: Sequence[tuple[str, Layout, str]] = [
    ("qwen3_5_text", "transformers", "not supported"),
    ("glm4_moe", "transformers", "rope_theta"),
    ("qwen3_5_moe", "transformers", "experts.0.down_proj.weight"),
    ("minimax", "transformers", "shared_intermediate_size"),
    (FP8, "hub", "weight_scale_inv"),
]
"""Checkpoints that it does not take, and a word of what it says."""


@pytest.mark.parametrize(("family", "layout"), TAKEN)
def test_a_replayed_trace_is_what_mlx_lm_converts(
    zoo: Zoo, tmp_path: Path, family: str, layout: Layout
) -> None:
    """Names, types, shapes and bytes of all tensors agree, and what config.json says of modules."""
    folder = zoo(family, layout)
    trace = trace_of_folder(folder)
    assert isinstance(trace, Trace)
    theirs = converted(folder, tmp_path / "theirs")
    config = json.loads((theirs / "config.json").read_text())
    modules = {k: v for k, v in config["quantization"].items() if isinstance(v, dict)}
    expected, found = read_all_tensors(theirs), replayed(trace, folder)

    assert expected == found
    assert modules == listed_modules(trace, found)


@pytest.mark.parametrize(("family", "layout", "word"), REFUSED)
def test_a_refusal_is_told_in_the_words_of_mlx_lm(
    zoo: Zoo, family: str, layout: Layout, word: str
) -> None:
    """What mlx-lm does not take has no trace, but its own sentence."""
    trace = trace_of_folder(zoo(family, layout))

    assert isinstance(trace, Refusal)
    assert word in trace.reason


def test_experts_are_one_line_of_a_trace(zoo: Zoo) -> None:
    """A stack of experts, even of those that are decoded from FP8, is one tensor of few sources."""
    trace = trace_of_folder(zoo("deepseek_v3", "hub"))
    assert isinstance(trace, Trace)
    stack = next(item for item in trace.tensors if item.name.endswith("switch_mlp.up_proj.weight"))
    path = "model.layers.1.mlp.experts.*.up_proj.weight"

    assert [path, f"{path}_scale_inv"] == [source.name for source in stack.sources]
    assert ["each"] == [step.op for step in stack.steps]


def test_a_trace_is_the_same_each_time(zoo: Zoo) -> None:
    """It is part of what identifies a plan."""
    folder = zoo("gpt_oss", "hub")

    assert trace_of_folder(folder) == trace_of_folder(folder)


# --- tables --------------------------------------------------------------------------------------

TABLED = sorted(path.stem for path in TABLES.glob("*.yaml"))
KNOWN = sorted(path.stem for path in (REPOSITORY / "carnice_build/models/tables").glob("*.yaml"))


@pytest.mark.parametrize("family", [name for name in TABLED if name in KNOWN])
def test_a_table_equals_the_trace_of_its_family(zoo: Zoo, tmp_path: Path, family: str) -> None:
    """For a model in the spelling of the hub: tensors, steps, types, and what is quantized how."""
    layout: Layout = "hub" if FAMILIES[family].hub else "transformers"
    config, architecture, specs = model_of(zoo(family, layout))
    specs = {
        name: TensorSpec("BF16" if spec.dtype.startswith("F8") else spec.dtype, spec.shape)
        for name, spec in specs.items()
    }
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    table = table_of(family, Target.MLX_LM)
    assert table is not None
    ours = trace_of(table, specs, architecture.tensors, architecture.dtype)
    facts = [architecture.tensors[name] for name in specs]
    answer = asked(config, Numbered(specs).tensors, tmp_path)
    theirs = told(answer, {}) if isinstance(answer, Trace) else None
    if theirs is None:
        fused = Fused(specs, facts)
        theirs = told(asked(config, fused.tensors, tmp_path), fused.parts)

    assert {item.name: item for item in theirs.tensors} == {
        item.name: item for item in ours.tensors
    }
    assert theirs.modules == ours.modules


@pytest.mark.parametrize("family", [name for name in TABLED if name in KNOWN])
def test_what_a_table_makes_of_the_config_loads(zoo: Zoo, tmp_path: Path, family: str) -> None:
    """A config that transformers 5 saved gets the entries without which mlx-lm refuses it."""
    config, architecture, specs = model_of(zoo(family, "transformers"))
    table = table_of(family, Target.MLX_LM)
    try:
        entries = older_entries(config, table)
    except PlanError as error:
        assert family == "minimax_m2"
        assert "shared_intermediate_size" in str(error)
        return
    config = with_entries(config, entries)
    facts = [architecture.tensors[name] for name in specs]
    answers = [
        asked(config, tensors, tmp_path)
        for tensors in (Numbered(specs).tensors, Fused(specs, facts).tensors)
    ]

    assert any(isinstance(answer, Trace) for answer in answers)


@pytest.mark.parametrize(
    ("target", "model_type", "known"),
    [
        (Target.MLX_LM, "llama", True),
        (Target.MLX_LM, "kimi_k2", True),
        (Target.MLX_LM, "phi-msft", True),
        (Target.MLX_LM, "format", False),
        (Target.MLX_LM, "../models/llama", False),
        (Target.MLX_VLM, "gemma3", True),
        (Target.MLX_VLM, "llava-qwen2", True),
        (Target.MLX_VLM, "format", False),
    ],
)
def test_a_library_knows_its_models_and_what_it_runs_as_one(
    target: Target, model_type: str, known: bool
) -> None:
    """By its files and its table of other names; any other word that its code holds is no model."""
    if target is Target.MLX_VLM:
        pytest.importorskip("mlx_vlm")

    assert known == knows(model_type, target)


@pytest.mark.parametrize("target", Target)
def test_what_a_library_does_not_do_is_said_of_that_library(target: Target) -> None:
    """A fused tensor that it takes as a whole, and an entry that it needs."""
    half, whole = TensorSpec("BF16", (2, 3, 4)), TensorSpec("BF16", (2, 6, 4))
    parts = {"both": Parts([TracedSource("gate", half), TracedSource("up", half)], turns=True)}
    shifted = Step("add_number", (0,), (1,))
    trace = Trace((Traced("both", whole, (TracedSource("both", whole),), (shifted,)),), {})
    table = Table(about="A library.", needs=["width"])

    with pytest.raises(PlanError, match=f"{target} does not take both apart"):
        told(trace, parts, target)
    with pytest.raises(PlanError, match=f"no entry width, which {target} needs"):
        older_entries({}, table, target)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "bfloat16", "text_config": {"dtype": "float16"}}, "bfloat16"),
        ({"text_config": {"dtype": "float16"}}, "float16"),
        ({"dtype": "float16"}, "float32"),
        ({"torch_dtype": "auto"}, "float32"),
    ],
)
def test_a_model_is_cast_to_the_type_that_libraries_read(
    config: dict[str, Any], dtype: str
) -> None:
    """Its floats are, wherever else a type may stand; integers and what it asks for stay."""
    import mlx.core as mx
    from mlx import nn

    model = nn.Linear(2, 2)
    model.order, model.gate = mx.array([300, 1]), mx.ones(1)
    model.cast_predicate = lambda name: name != "gate"
    mlx_trace.cast_as_stated(model, config)
    found = {name: item.dtype for name, item in model.parameters().items()}

    as_cast = getattr(mx, dtype)
    kept = {"order": mx.int32, "gate": mx.float32}
    assert {"weight": as_cast, "bias": as_cast, **kept} == found


# --- plans and builds ----------------------------------------------------------------------------


def recipe(project: Project, *steps: dict[str, Any], **knobs: Any) -> None:
    """A recipe `family`, whose source is to be given."""
    content = {
        "variant": "family",
        "description": "a family",
        "sources": {"body": {"model": "example/family"}},
        "steps": steps,
        "quantize": {"format": "mlx", "bits": 4, **knobs},
    }
    write_json(project.recipes / "family.yaml", content)


def quantized_source(folder: Path) -> bool:
    """Whether a checkpoint is quantized already."""
    return "quantization_config" in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("family", "layout"), TAKEN)
def test_a_built_folder_is_what_mlx_lm_converts(
    project: Project, zoo: Zoo, family: str, layout: Layout
) -> None:
    """The program's own folder has mlx-lm's tensors, with or without a table; it verifies."""
    folder = zoo(family, layout)
    # mlx-lm keeps MXFP4, and so do we.
    decodes = quantized_source(folder) and family != "gpt_oss"
    recipe(project, *([{"decode": {}}] if decodes else []))
    options = project.options(sources={"body": folder})
    build_variants(["family"], options)
    theirs = converted(folder, project.root / "theirs")

    assert read_all_tensors(theirs) == read_all_tensors(project.out / "family")
    expected = json.loads((theirs / "config.json").read_text())
    found = json.loads((project.out / "family" / "config.json").read_text())
    assert expected["quantization"] == found["quantization"]
    result = verify_variants(["family"], options, VerifySettings(run=False))
    assert result.passed, [check for variant in result.variants for check in variant.checks]


MODES: Sequence[tuple[str, str]] = [
    ("qwen3_moe", "nvfp4"),
    ("deepseek_v3", "mxfp4"),
    ("gpt_oss", "mxfp8"),
    ("phi3", "mxfp8"),
]
"""Stacks of experts, routers that want bits of their own, what is decoded from FP8 on the way, what
stays in MXFP4, and tensors that are cut apart."""


@pytest.mark.parametrize(("family", "mode"), MODES)
def test_a_folder_of_floats_is_what_mlx_lm_converts(
    project: Project, zoo: Zoo, family: str, mode: str
) -> None:
    """Tensors and config.json agree, and both checks and a backend that is mlx itself find so."""
    folder = zoo(family, "hub")
    steps = [{"decode": {}}] if quantized_source(folder) and family != "gpt_oss" else []
    recipe(project, *steps, bits=None, mode=mode)
    options = project.options(sources={"body": folder})
    build_variants(["family"], options)
    theirs = converted(folder, project.root / "theirs", mode=mode)
    made = read_all_tensors(project.out / "family")

    assert read_all_tensors(theirs) == made
    expected = json.loads((theirs / "config.json").read_text())
    found = json.loads((project.out / "family" / "config.json").read_text())
    assert expected["quantization"] == found["quantization"]
    result = verify_variants(["family"], options, VerifySettings(run=False))
    assert result.passed, [check for variant in result.variants for check in variant.checks]
    recipe(project, *steps, bits=None, mode=mode, backend="mlx")
    build_variants(["family"], options)
    assert made == read_all_tensors(project.out / "family")


MIXED: Sequence[tuple[str, str, int]] = [
    ("deepseek_v3", "mixed_3_6", 3),
    ("deepseek_v3", "mixed_3_4", 3),
    ("gpt_oss", "mixed_3_6", 3),
    ("gpt_oss", "mixed_2_6", 2),
    ("phi3", "mixed_3_6", 3),
    ("mixtral", "mixed_4_6", 4),
    ("nemotron_h", "mixed_3_6", 3),
    ("qwen3_moe", "mixed_3_6", 3),
]
"""Families whose modules mlx-lm's mixed recipes find by other names than `v_proj` and `down_proj`.

Each with the low bits, which routers get there, too.
"""


@pytest.mark.parametrize(("family", "preset", "low"), MIXED)
def test_a_mixed_preset_is_what_mlx_lm_converts(
    project: Project, zoo: Zoo, family: str, preset: str, low: int
) -> None:
    """In every tensor, once a rule takes back the 8 bits that models ask for their routers."""
    folder = zoo(family, "hub" if FAMILIES[family].hub else "transformers")
    routers = ["*.mlp.router", "*.mlp.gate", "*.block_sparse_moe.gate"]
    recipe(project, *([{"decode": {}}] if family == "deepseek_v3" else []))
    path = project.recipes / "family.yaml"
    rule = {"match": routers, "paths": "mlx", "optional": True, "bits": low}
    content = {
        **json.loads(path.read_text()),
        "extends": f"preset:mlx-{preset}",
        "quantize": {"rules+": [rule]},
    }
    write_json(path, content)
    build_variants(["family"], project.options(sources={"body": folder}))
    theirs = converted(folder, project.root / "theirs", preset)

    assert read_all_tensors(theirs) == read_all_tensors(project.out / "family")
    expected = json.loads((theirs / "config.json").read_text())
    found = json.loads((project.out / "family" / "config.json").read_text())
    assert expected["quantization"] == found["quantization"]


def test_a_mixed_preset_plans_kimi_k2_at_full_size(project: Project) -> None:
    """Of attention without `v_proj`, the sensitive layers' `kv_a_proj_with_mqa` gets high bits."""
    steps: list[dict[str, Any]] = [{"drop": {"match": "*.inv_freq"}}, {"decode": {}}]
    recipe(project, *steps)
    path = project.recipes / "family.yaml"
    written = {**json.loads(path.read_text()), "extends": "preset:mlx-mixed_3_6", "quantize": {}}
    write_json(path, written)
    body = REPOSITORY / "benchmarks" / "shapes" / "kimi-k2.json"
    (plan,) = plan_variants(["family"], project.options(sources={"body": body})).variants
    schemes = plan.conversion.quantized

    assert 61 == plan.architecture.num_layers
    for layer, bits in ((0, 6), (7, 3), (9, 6), (60, 6)):
        assert bits == schemes[f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa"].bits
        assert 3 == schemes[f"model.layers.{layer}.self_attn.embed_q"].bits


def test_a_rule_may_match_nothing_where_it_says_so(project: Project, zoo: Zoo) -> None:
    """Otherwise a pattern that matches nothing is refused, with the nearest path of its kind."""
    rule = {"match": "*.fc1_latent_prj", "bits": 6}
    options = project.options(sources={"body": zoo("mixtral", "transformers")})
    recipe(project, rules=[{**rule, "optional": True}])
    plan_variants(["family"], options)
    recipe(project, rules=[{"match": "*.switch_mlp.dwon_proj", "paths": "mlx", "bits": 6}])

    with pytest.raises(PlanError, match=r"matches no module; did you mean 'switch_mlp.down_proj'"):
        plan_variants(["family"], options)


def known(family: str) -> Any:
    """Needs a table of the family's tensors."""
    return pytest.mark.skipif(family not in KNOWN, reason=f"there is no table of {family}")


@known("llama")
def test_a_family_with_a_table_asks_nobody(
    project: Project, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan needs no mlx, whether or not it is installed."""
    monkeypatch.setattr(Asking, "__call__", lambda *_: pytest.fail("mlx-lm was asked"))
    recipe(project)
    plan_variants(["family"], project.options(sources={"body": zoo("llama", "hub")}))


@known("deepseek_v3")
def test_a_model_is_traced_once(
    project: Project, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second plan finds mlx-lm's answer in the cache."""
    recipe(project)
    options = project.options(sources={"body": zoo("deepseek_v3", "transformers")})
    (first,) = plan_variants(["family"], options).variants
    monkeypatch.setattr(
        "carnice_build.commands.asking._asked", lambda _: pytest.fail("mlx-lm was asked")
    )
    (second,) = plan_variants(["family"], options).variants

    assert [item.name for item in first.conversion.tensors] == [
        item.name for item in second.conversion.tensors
    ]


@known("deepseek_v3")
def test_without_mlx_a_model_that_needs_it_says_so(
    project: Project, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan names what to install."""
    monkeypatch.setattr("carnice_build.commands.asking.library_version", lambda _: "absent")
    recipe(project)
    with pytest.raises(PlanError, match=r"pip install .*\[mlx\]"):
        plan_variants(
            ["family"], project.options(sources={"body": zoo("deepseek_v3", "transformers")})
        )


@known("qwen3_5_text")
def test_what_mlx_lm_refuses_is_refused_at_the_plan(project: Project, zoo: Zoo) -> None:
    """With its own words, and the place in the recipe."""
    recipe(project)
    with pytest.raises(PlanError, match="qwen3_5_text not supported") as caught:
        plan_variants(
            ["family"], project.options(sources={"body": zoo("qwen3_5_text", "transformers")})
        )

    assert "family.yaml" in str(caught.value)


@known("qwen3_moe")
def test_a_rule_has_the_last_word_over_the_models_own_code(project: Project, zoo: Zoo) -> None:
    """mlx-lm keeps routers at 8 bits; a rule that names them changes that, and all are listed."""
    recipe(project, rules=[{"match": "*.mlp.gate", "bits": 6}])
    (variant,) = plan_variants(
        ["family"], project.options(sources={"body": zoo("qwen3_moe", "hub")})
    ).variants
    modules = variant.conversion.stated["modules"]

    assert {"group_size": 64, "bits": 6, "mode": "affine"} == modules["model.layers.1.mlp.gate"]
    assert modules.keys() == variant.conversion.quantized.keys()


@known("qwen3_moe")
def test_bits_that_mlx_lm_wants_are_told(
    project: Project, zoo: Zoo, carnice: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `plan` and by `new`, with the number of modules; not where a rule says otherwise."""
    folder = zoo("qwen3_moe", "hub")
    options = project.options(sources={"body": folder})
    recipe(project)
    (plan,) = plan_variants(["family"], options).variants
    told = "mlx-lm wants 8 bits for 3 modules of this model, not 4"
    monkeypatch.chdir(project.root)
    arguments = ("--from", str(folder), "--as", "mlx-4bit")
    finished = carnice("new", "mine", *arguments, "--recipes", "own/recipes")

    assert [told] == [notice.partition(", and")[0] for notice in plan.notices]
    assert told in finished.out, finished.err
    recipe(project, rules=[{"match": "*.mlp.gate", "bits": 6}])
    assert () == plan_variants(["family"], options).variants[0].notices


# --- answers -------------------------------------------------------------------------------------


def question(folder: Path) -> Question[Trace | Refusal]:
    """What is asked about a folder."""
    config = json.loads((folder / "config.json").read_text())
    rows = {name: [item.dtype, list(item.shape)] for name, item in read_all_tensors(folder).items()}
    specs = {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in rows.items()}
    names = {*specs, *(stack for name in specs for stack in stacks(name))}
    parse = partial(answered, tensors=specs, names=names)
    return Question(
        "carnice_build.backends.mlx_trace:answer", (config, rows), ("mlx-lm",), 0, parse, "mlx"
    )


def test_an_answer_that_somebody_damaged_is_asked_for_again(zoo: Zoo, tmp_path: Path) -> None:
    """Nothing in a cache is believed for being there."""
    asking, what = Asking(tmp_path), question(zoo("llama", "hub"))
    first = asking(what)
    (file,) = (tmp_path / "answers").iterdir()
    for content in (b"", b"no zlib", file.read_bytes()[:-9]):
        file.write_bytes(content)

        assert first == asking(what)


@pytest.mark.parametrize("kind", ["a pipe", "a link", "of another model", "of 7 bits"])
def test_an_answer_that_does_not_fit_is_asked_for_again(
    zoo: Zoo, tmp_path: Path, kind: str
) -> None:
    """Neither what is no file, nor what is none of this question."""
    asking, what = Asking(tmp_path), question(zoo("qwen3_moe", "hub"))
    first = asking(what)
    (file,) = (tmp_path / "answers").iterdir()
    table = json.loads(zlib.decompress(file.read_bytes()))
    if kind == "of another model":
        table["tensors"][0][3][0][0] += "s"
    if kind == "of 7 bits":
        next(iter(table["modules"].values()))["bits"] = 7
    content = zlib.compress(json.dumps(table).encode())
    file.unlink()
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a link":
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.write_bytes(content)

    assert first == asking(what)
    assert file.is_file() and not file.is_symlink()
    assert first == what.parse(zlib.decompress(file.read_bytes()).decode())


def test_a_question_about_another_model_has_another_answer(zoo: Zoo, tmp_path: Path) -> None:
    """The key covers the config and the tensors, with their types and shapes."""
    asking, what = Asking(tmp_path), question(zoo("llama", "hub"))
    asking(what)
    config, rows = what.arguments
    others = [({**config, "note": 1}, rows), (config, dict(reversed(rows.items())))]
    for arguments in others:
        asking(replace(what, arguments=arguments))

    assert 2 == len(list((tmp_path / "answers").iterdir()))


def test_another_tracer_is_asked_anew(
    project: Project, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer is remembered by the version of what traced it, which brings no mlx into a plan."""
    recipe(project)
    options = project.options(sources={"body": zoo("gpt_oss", "transformers")})
    counts = []
    for version in (mlx_trace.TRACER_VERSION, mlx_trace.TRACER_VERSION + 1):
        monkeypatch.setattr(mlx_trace, "TRACER_VERSION", version)
        plan_variants(["family"], options)
        counts.append(len(list((options.cache / "answers").iterdir())))
    code = "import sys, carnice_build.backends.mlx_trace; print('mlx' in sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    first, both = counts
    assert 0 < 2 * first == both
    assert "False" == loaded.stdout.strip()


def test_what_a_library_raises_is_one_sentence(tmp_path: Path) -> None:
    """A question that no answer comes of says so."""
    what = Question("carnice_build.backends.mlx_trace:answer", ({},), ("mlx-lm",), 0, parsed, "mlx")
    with pytest.raises(BackendError):
        Asking(tmp_path)(what)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ImportError("no jinja2"), MemoryError()]
)
def test_what_this_machine_lacks_is_no_refusal(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Nothing is remembered of it, for the next time mlx-lm may take the model."""

    def failing(*_: Any, **__: Any) -> None:
        raise error

    for place in ("MlxLm.load", "as_checkpoint"):
        with monkeypatch.context() as patch:
            patch.setattr(f"carnice_build.backends.mlx_trace.{place}", failing)
            with pytest.raises((BackendError, type(error))):
                trace_of_folder(zoo("llama", "hub"))


def test_shapes_that_cost_nothing_are_no_program(zoo: Zoo) -> None:
    """A moved axis of size 1, a stack and a norm plus 1 take no steps of mlx's."""
    trace = trace_of_folder(zoo("qwen3_next", "hub"))
    assert isinstance(trace, Trace)

    assert {Kind.SAME, Kind.SHIFT} == {item.kind for item in trace.tensors}
