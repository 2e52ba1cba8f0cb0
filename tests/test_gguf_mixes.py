"""Mixes give every tensor the type that llama-quantize gives it.

What a llama-quantize said of all samples is in `golden/gguf_mixes.json`; where one is on PATH, or
named by LLAMA_QUANTIZE, `make test-wide` asks it again.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_models import (
    GOLDEN,
    Sample,
    arguments,
    asked,
    distinct,
    requests,
    run,
    samples,
    spelt,
    write,
    write_importance,
)

from carnice_build.checkpoint.gguf_values import Value
from carnice_build.errors import PlanError
from carnice_build.formats.gguf import mixes
from carnice_build.formats.gguf.mix_rules import MIXES, Case, Cases, Model, Place, decide
from carnice_build.formats.gguf.mixes import (
    Assigned,
    ImportanceFile,
    Request,
    Tensor,
    assign,
    file_type,
    mix_of,
    model_of,
    quantized_metadata,
)

SAMPLES = samples()
PROGRAM = os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize")

needs_program = pytest.mark.skipif(PROGRAM is None, reason="there is no llama-quantize")


def ours(made: Sample, request: Request) -> tuple[Assigned, ...]:
    """What we say of a sample."""
    return assign(made.tensors, model_of(made.metadata), request)


@pytest.mark.parametrize("name", SAMPLES)
def test_types_are_those_of_llama_quantize(name: str) -> None:
    """In all mixes, with and without importance, and with options, in the order of its files."""
    said = json.loads(GOLDEN.read_text())[name]
    made = SAMPLES[name]

    found = {
        case: spelt(item.type for item in ours(made, request))
        for case, request in requests(name, made).items()
    }

    assert said == distinct(found)


def test_every_rule_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case of each mix decides about a tensor of some sample."""
    tried: set[tuple[int, Case]] = set()

    def decided(cases: Cases, place: Place) -> str | None:
        hit = next((case for case in cases if decide((case,), place)), None)
        if hit is not None:
            tried.add((id(cases), hit))
        return decide(cases, place)

    monkeypatch.setattr(mixes, "decide", decided)
    for name in ("falcon", "llama", "llama-8-experts", "qwen3", "qwen3moe"):
        for request in requests(name, SAMPLES[name]).values():
            ours(SAMPLES[name], request)

    assert [] == [
        (mix, role, case)
        for mix, facts in MIXES.items()
        for role, cases in facts.rules.items()
        for case in cases
        if (id(cases), case) not in tried
    ]


def tensor(name: str, *shape: int, kind: str = "F16") -> Tensor:
    """A tensor of a source."""
    return Tensor(name, shape or (256, 256), kind)


def types(tensors: list[Tensor], mix: str, model: Model | None = None, **options: object) -> dict:
    """The types of tensors by name."""
    request = replace(Request(mix), **options)  # type: ignore[arg-type]
    found = assign(tensors, model or Model("qwen35", 8, 8, 2), request)
    return {item.tensor.name: item.type for item in found}


def test_values_and_fused_projections_are_counted_together() -> None:
    """Of 8 layers in Q4_K_M the first, the last and every third between get Q6_K."""
    names = [f"blk.{i}.attn_{'v' if i % 4 == 3 else 'qkv'}.weight" for i in range(8)]

    found = types([tensor(name) for name in names], "Q4_K_M")

    assert [0, 3, 6, 7] == [i for i, name in enumerate(names) if found[name] == "Q6_K"]


def test_layers_are_in_the_order_of_numbers() -> None:
    """Whatever the order of the converter; what is in no layer comes first."""
    names = ["blk.10.ffn_up.weight", "blk.9.attn_q.weight", "token_embd.weight", "output.weight",
             "blk.9.attn_k.weight"]  # fmt: skip

    assert [names[index] for index in (3, 2, 4, 1, 0)] == list(
        types([tensor(name) for name in names], "Q8_0")
    )


@pytest.mark.parametrize(
    ("columns", "kind"),
    [(256, "Q4_K"), (288, "Q5_0"), (100, "F16")],
)
def test_columns_that_are_not_whole_blocks_get_another_type(columns: int, kind: str) -> None:
    """A type of smaller blocks, or F16; a notice says so."""
    (found,) = assign(
        [tensor("blk.0.attn_q.weight", columns, 8)], Model("llama", 1), Request("Q4_K_M")
    )

    assert ("Q4_K", kind) == (found.wanted, found.type)
    assert found.notice == (
        None
        if kind == "Q4_K"
        else f"blk.0.attn_q.weight: {columns} columns are not whole blocks of 256, as Q4_K has"
        f" them; it gets {kind}"
    )


def test_small_and_flat_tensors_stay() -> None:
    """Norms, biases, routers, convolutions, positions and matrices of one row."""
    kept = [
        tensor("blk.0.attn_norm.weight", 256, kind="F32"),
        tensor("blk.0.ffn_down_exps.bias", 256, 16),
        tensor("blk.0.ffn_gate_inp.weight", 256, 16, kind="F32"),
        tensor("blk.0.ssm_conv1d.weight", 4, 512, kind="F32"),
        tensor("position_embd.weight", 256, 64),
        tensor("cls.output.weight", 256, 1, 1),
    ]

    assert {item.name: item.type for item in kept} == types(kept, "Q2_K")


def test_what_needs_importance_says_so() -> None:
    """Not the output layer, not embeddings; Q2_K only in Q2_K_S."""
    tensors = [
        tensor(name) for name in ("output.weight", "token_embd.weight", "blk.0.attn_q.weight")
    ]

    def needing(mix: str) -> list[str]:
        found = assign(tensors, Model("llama", 1, 8, 8), Request(mix))
        return [item.tensor.name for item in found if item.needs_importance]

    assert ["blk.0.attn_q.weight"] == needing("IQ2_XS")
    assert ["blk.0.attn_q.weight"] == needing("Q2_K_S")
    assert [] == needing("Q2_K") + needing("IQ4_XS") + needing("IQ3_S")


def test_what_is_quantized_in_another_type_is_told() -> None:
    """Experts of MXFP4 stay in MXFP4_MOE; any other mix would quantize them again."""
    stack = tensor("blk.0.ffn_up_exps.weight", 256, 8, 4, kind="MXFP4")
    model = Model("gpt-oss", 1, 8, 8, experts=4)

    assert [False, True] == [
        assign([stack], model, Request(mix))[0].requantized for mix in ("MXFP4_MOE", "Q8_0")
    ]


def test_names_of_mixes() -> None:
    """As llama-quantize takes them; each has a number of its own."""
    assert ("Q4_K_M", "IQ4_XS") == (mix_of("q4_k"), mix_of("iq4_xs"))
    assert [7, 15, 17, 18, 30, 38] == [
        file_type(mix) for mix in ("Q8_0", "Q4_K_M", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4_MOE")
    ]
    assert len(MIXES) == len({mix.file_type for mix in MIXES.values()})


BLOCK = tensor("blk.0.ffn_up.weight")

MISTAKES: dict[str, tuple[Tensor, Model, Request, str]] = {
    "mix": (BLOCK, Model("llama", 1), Request("Q4_K_X"), "there is no mix 'Q4_K_X'"),
    "type": (
        BLOCK,
        Model("llama", 1),
        Request("Q4_K_M", embedding="Q4_K_M"),
        "weights cannot have the type 'Q4_K_M'",
    ),
    "integers": (
        BLOCK,
        Model("llama", 1),
        Request("Q4_K_M", output="i8"),
        "weights cannot have the type 'i8'",
    ),
    "columns": (
        tensor("token_embd.weight", 100, 8),
        Model("llama", 1),
        Request("Q4_K_M", embedding="Q8_0"),
        "token_embd.weight cannot have the type Q8_0: its 100 columns are not whole blocks of 32",
    ),
    "layer": (
        tensor("blk.7.ffn_up.weight"),
        Model("qwen3moe", 2, 8, 8, experts=16),
        Request("Q4_K_M"),
        "blk.7.ffn_up.weight is in none of the 2 layers of the model",
    ),
    "no layer": (
        tensor("mtp.ffn_up.weight"),
        Model("qwen3moe", 2, 8, 8, experts=16),
        Request("Q4_K_M"),
        "mtp.ffn_up.weight is in none of the 2 layers of the model",
    ),
    "no heads": (
        tensor("v.blk.0.attn_v.weight"),
        Model("clip", 0),
        Request("Q2_K"),
        "a model of kind 'clip' without layers cannot have a mix",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_llama_quantize_would_not_do_is_refused(mistake: str) -> None:
    """With a sentence that names it."""
    item, model, request, sentence = MISTAKES[mistake]

    with pytest.raises(PlanError) as raised:
        assign([item], model, request)

    assert str(raised.value).startswith(sentence)


def test_a_model_is_known_by_its_metadata() -> None:
    """Of lists the first number counts; without key heads each query head has its own."""
    told = {
        "general.architecture": Value("str", "acme"),
        "acme.block_count": Value("u32", 9),
        "acme.attention.head_count": Value("[i32]", [4, 0, 8]),
        "acme.nextn_predict_layers": Value("u32", 1),
    }

    assert Model("acme", 9, heads=4, kv_heads=4, nextn=1) == model_of(told)
    with pytest.raises(PlanError, match=r"the metadata have no acme\.block_count"):
        model_of({"general.architecture": Value("str", "acme")})


BEFORE = {
    "general.architecture": Value("str", "llama"),
    "general.file_type": Value("u32", 1),
    "llama.block_count": Value("u32", 20),
    "general.quantization_version": Value("u32", 1),
    "split.count": Value("u16", 1),
    "tokenizer.ggml.model": Value("str", "none"),
}


def test_metadata_say_the_mix_and_the_importance_matrix() -> None:
    """What changes goes to the end; texts end after 127 bytes."""
    matrix = ImportanceFile("imatrix.gguf", "ä" * 100, 183, 3)

    assert [
        ("general.architecture", Value("str", "llama")),
        ("llama.block_count", Value("u32", 20)),
        ("tokenizer.ggml.model", Value("str", "none")),
        ("general.quantization_version", Value("u32", 2)),
        ("general.file_type", Value("u32", 30)),
        ("quantize.imatrix.file", Value("str", "imatrix.gguf")),
        ("quantize.imatrix.dataset", Value("str", "ä" * 63)),
        ("quantize.imatrix.entries_count", Value("u32", 183)),
        ("quantize.imatrix.chunks_count", Value("u32", 3)),
    ] == list(quantized_metadata(BEFORE, "IQ4_XS", matrix).items())


@pytest.mark.wide
@needs_program
@pytest.mark.parametrize("name", SAMPLES)
def test_a_llama_quantize_at_hand_says_the_same(name: str, tmp_path: Path) -> None:
    """Types, order, which columns do not fit, and whether an importance matrix is needed."""
    pytest.importorskip("gguf")
    made = SAMPLES[name]
    path = write(tmp_path / "model.gguf", made)
    importance = write_importance(tmp_path / "imatrix.gguf", made.tensors[:1], ["some"])

    for case, request in requests(name, made).items():
        theirs = asked(str(PROGRAM), path, request, importance)
        found = ours(made, request)
        needed = not request.importance and any(item.needs_importance for item in found)

        assert list(theirs.types.items()) == [(item.tensor.name, item.type) for item in found], case
        assert theirs.unfit == {item.tensor.name for item in found if item.notice}, case
        assert theirs.needs_importance == needed, case


@pytest.mark.wide
@needs_program
@pytest.mark.parametrize("mix", ["Q4_K_M", "IQ2_XS"])
@pytest.mark.parametrize("datasets", [[], ["wiki.train.raw", "chat"]])
def test_a_quantized_file_says_the_same(mix: str, datasets: list[str], tmp_path: Path) -> None:
    """Metadata with their kinds and types of a file that llama-quantize wrote."""
    gguf = pytest.importorskip("gguf")
    made = SAMPLES["qwen35"]
    made = Sample({**made.metadata, "split.count": Value("u16", 1)}, made.tensors)
    path = write(tmp_path / "model.gguf", made)
    request = Request(mix, importance=bool(datasets))
    entries = [item for item in made.tensors if len(item.shape) > 1]
    importance = write_importance(tmp_path / f"{'ü' * 90}.gguf", entries, datasets)
    given = [*arguments(request, importance), str(path), str(tmp_path / "made.gguf"), mix]

    result = run(str(PROGRAM), *given)
    if mix == "IQ2_XS" and not datasets:
        first = next(item for item in ours(made, request) if item.needs_importance)
        assert f"offending tensor: {first.tensor.name}\n" in result.stdout + result.stderr
        return
    reader = gguf.GGUFReader(tmp_path / "made.gguf")
    matrix = ImportanceFile(str(importance), datasets[0], len(entries), 3) if datasets else None
    expected = quantized_metadata(made.metadata, mix, matrix)
    written = {
        name: reader.fields[name].contents()
        for name in reader.fields
        if not name.startswith("GGUF.")
    }

    assert list(expected) == list(written)
    assert [value.value for value in expected.values()] == [
        pytest.approx(value) if isinstance(value, float) else value for value in written.values()
    ]
    assert [(item.tensor.name, item.type) for item in ours(made, request)] == [
        (item.name, item.tensor_type.name) for item in reader.tensors
    ]


@pytest.mark.wide
@needs_program
@pytest.mark.parametrize("mistake", ["columns", "layer", "no layer", "no heads"])
def test_a_llama_quantize_at_hand_ends_there_too(mistake: str, tmp_path: Path) -> None:
    """What we refuse, it does not do."""
    pytest.importorskip("gguf")
    item, model, request, _ = MISTAKES[mistake]
    like = {"llama": "llama", "qwen3moe": "qwen3moe", "clip": "clip"}[model.arch]
    metadata = dict(SAMPLES[like].metadata)
    if model.layers:
        metadata[f"{model.arch}.block_count"] = Value("u32", model.layers)
    path = write(tmp_path / "model.gguf", Sample(metadata, [item]))
    given = [*arguments(request, None), str(path), str(tmp_path / "made.gguf"), request.mix]

    assert 0 != run(str(PROGRAM), *given).returncode
