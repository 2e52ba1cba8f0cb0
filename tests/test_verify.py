"""`carnice verify` passes what a build left, and names what was done to it since."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Finished, Project, TinyCheckpoint
from tiny import Tensor, read_json, read_safetensors, write_json, write_safetensors

from carnice_build.commands.build import build_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.extras import pip_install
from carnice_build.kernels.affine import dequantize_rows, quantize_rows
from carnice_build.verification import run_mlx
from carnice_build.verification.result import Check, Outcome

DEMO = REPOSITORY / "demo" / "carnice-v2-27b"
VARIANT = "mlx-mixed_3_6"
BODY = "language_model.model."
DOWN = f"{BODY}layers.3.mlp.down_proj"


@pytest.fixture
def built(project: Project) -> Path:
    """A built variant whose files are copies, so that damage does not reach the cache."""
    shutil.copy(DEMO / "chat_template.jinja", project.checkpoint)
    return build_of_copies(project, VARIANT)


def build_of_copies(project: Project, variant: str) -> Path:
    """See `built`."""
    build_variants([variant], project.options())
    folder = project.out / variant
    for shard in folder.glob("*.safetensors"):
        content = shard.read_bytes()
        shard.unlink()
        shard.write_bytes(content)
    return folder


def checks(project: Project, variant: str = VARIANT, **changes: Any) -> dict[str, Check]:
    """The checks of the variant's files, by name."""
    options = project.options(**changes)
    (result,) = verify_variants([variant], options, VerifySettings(run=False)).variants
    return {check.name: check for check in result.checks}


def failed(found: Mapping[str, Check]) -> set[str]:
    """The names of the checks that failed."""
    return {name for name, check in found.items() if check.outcome is Outcome.FAILED}


def shard_of(folder: Path, name: str) -> Path:
    """The file that the index says `name` is in."""
    file: str = read_json(folder / "model.safetensors.index.json")["weight_map"][name]
    return folder / file


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of the shard that holds `name` and write it anew."""
    path = shard_of(folder, name)
    tensors = read_safetensors(path)
    change(tensors)
    write_safetensors(path, tensors)


def poke(folder: Path, name: str, position: int, flip: int) -> None:
    """Flip bits of one byte of tensor `name`, and nothing else in the file."""
    path = shard_of(folder, name)
    data = read_safetensors(path)[name].data
    content = bytearray(path.read_bytes())
    start = bytes(content).find(data)
    assert bytes(content).count(data) == 1
    content[start + position] ^= flip
    path.write_bytes(bytes(content))


def test_a_fresh_build_passes(
    project: Project, built: Path, carnice: Callable[..., Finished]
) -> None:
    """Every check of the files passes, and the worst modules are listed with their errors."""
    run = carnice("verify", VARIANT, "--no-run", "--json")

    assert (run.code, run.err) == (0, "")
    report = json.loads(run.out)
    assert report["passed"] is True
    found = {check["name"]: check for check in report["variants"][0]["checks"]}
    outcomes = {name: check["outcome"] for name, check in found.items()}
    assert outcomes == {
        "digests": "passed",
        "structure": "passed",
        "chat": "passed",
        "round trip": "passed",
        "generate": "skipped",
        "perplexity": "skipped",
        "calls": "skipped",
    }
    worst = found["round trip"]["details"]["worst"]
    assert len(worst) == 10
    assert all(0.1 < item["error"] < item["bound"] and item["bits"] == 3 for item in worst)


def test_what_is_stored_as_no_recipe_has_it_is_told(project: Project, built: Path) -> None:
    """A folder that was built before a recipe was changed is not compared, and why is said."""
    options = replace(project.options(), overrides=("quantize.group_size=32",))

    (result,) = verify_variants([VARIANT], options, VerifySettings(run=False)).variants
    (found,) = (check for check in result.checks if check.name == "round trip")

    assert "modules not compared: " in found.summary
    assert "as recipe and family's table are now" in found.summary


def test_a_flipped_byte_is_named(
    project: Project, built: Path, carnice: Callable[..., Finished]
) -> None:
    """One changed bit ends in exit code 1 and the tensor's name, not in a traceback."""
    poke(built, f"{DOWN}.biases", 4, 1)

    run = carnice("verify", VARIANT, "--no-run")

    assert run.code == 1
    assert f"tensor {DOWN}.biases" in run.out
    assert "Traceback" not in run.out + run.err
    assert failed(checks(project)) == {"digests"}


def test_a_changed_header_is_named(project: Project, built: Path) -> None:
    """Metadata belongs to no tensor, but is covered all the same."""
    path = shard_of(built, f"{DOWN}.weight")
    path.write_bytes(path.read_bytes().replace(b'"format":"mlx"', b'"format":"mly"'))

    found = checks(project)

    assert failed(found) == {"digests"}
    assert [f"the header of {path.name} differs"] == list(found["digests"].problems)


def test_a_changed_small_file_is_named(project: Project, built: Path) -> None:
    """Tokenizer, template and card are covered by their digests, missing ones are told."""
    (built / "tokenizer.json").write_text('{"version": "2.0"}\n')
    (built / "chat_template.jinja").unlink()

    problems = "\n".join(checks(project)["digests"].problems)

    assert "chat_template.jinja is missing" in problems
    assert "tokenizer.json" in problems


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3, "tensors": {}}'])
def test_a_damaged_record_is_a_failure(project: Project, built: Path, content: str) -> None:
    """Without a sound build.json the digests cannot be vouched for."""
    (built / "build.json").write_text(content)

    assert failed(checks(project)) == {"digests"}


def test_a_missing_tensor_is_named(project: Project, built: Path) -> None:
    """A shard written without one tensor fails by that tensor's name."""
    name = f"{BODY}layers.0.linear_attn.A_log"
    rewrite(built, name, lambda tensors: tensors.__delitem__(name))

    found = checks(project)

    assert failed(found) == {"digests", "structure"}
    assert f"tensor {name} is missing" in found["structure"].problems


def test_an_extra_tensor_is_named(project: Project, built: Path) -> None:
    """mlx-lm would load a shard that no index names, so it counts."""
    extra = {"language_model.model.layers.8.mlp.up_proj.weight": Tensor("BF16", (2,), bytes(4))}
    write_safetensors(built / "model-extra.safetensors", extra)

    found = checks(project)

    assert failed(found) == {"structure"}
    assert "belongs to no module" in "\n".join(found["structure"].problems)


def test_a_truncated_shard_is_named(project: Project, built: Path) -> None:
    """A file that cannot be read is a problem of the folder, not an error of ours."""
    path = shard_of(built, f"{DOWN}.weight")
    path.write_bytes(path.read_bytes()[:-10])

    found = checks(project)

    assert failed(found) == {"digests", "structure"}
    assert path.name in found["structure"].problems[0]


def test_a_wrong_shape_is_named(project: Project, built: Path) -> None:
    """The same bytes under another shape are not what the plan expects."""
    name = f"{DOWN}.weight"

    def transpose(tensors: dict[str, Tensor]) -> None:
        tensors[name] = replace(tensors[name], shape=tensors[name].shape[::-1])

    rewrite(built, name, transpose)

    problems = "\n".join(checks(project)["structure"].problems)

    assert f"tensor {name} is U32" in problems


@pytest.mark.parametrize(
    ("key", "value"),
    [("bits", 4), ("group_size", 32), ("group_size", None), ("mode", "mxfp4")],
)
def test_config_entries_must_fit_the_tensors(
    project: Project, built: Path, key: str, value: object
) -> None:
    """A module's bits, group size and mode are held against its packed weight."""
    config = read_json(built / "config.json")
    for section in ("quantization", "quantization_config"):
        config[section][DOWN][key] = value
    write_json(built / "config.json", config)

    found = checks(project)

    assert failed(found) == {"digests", "structure"}
    assert DOWN in "\n".join(found["structure"].problems)


def test_config_entries_must_name_modules(project: Project, built: Path) -> None:
    """Settings for a module that is not quantized would make mlx-lm expect scales there."""
    config = read_json(built / "config.json")
    config["quantization"][f"{BODY}norm"] = {"bits": 3, "group_size": 64}
    write_json(built / "config.json", config)

    problems = "\n".join(checks(project)["structure"].problems)

    assert f"{BODY}norm, which is not quantized" in problems
    assert "quantization and quantization_config differ" in problems


def test_the_index_must_agree(project: Project, built: Path) -> None:
    """An index that sends a tensor to another shard, or names one too many, is told."""
    path = built / "model.safetensors.index.json"
    index = read_json(path)
    index["weight_map"][f"{DOWN}.weight"] = "model-00001-of-00004.safetensors"
    index["weight_map"]["ghost"] = "model-00001-of-00004.safetensors"
    write_json(path, index)

    problems = "\n".join(checks(project)["structure"].problems)

    assert f"puts {DOWN}.weight in" in problems
    assert "names ghost" in problems


def test_one_wrong_code_is_out_of_bounds(project: Project, built: Path) -> None:
    """A single weight four steps off is further than three bits allow."""
    poke(built, f"{BODY}layers.3.mlp.up_proj.weight", 0, 4)

    found = checks(project)

    assert failed(found) == {"digests", "round trip"}
    (problem,) = found["round trip"].problems
    assert f"{BODY}layers.3.mlp.up_proj: 1 weights" in problem


@pytest.mark.parametrize("variant", ["mlx-mxfp4", "mlx-nvfp4", "mlx-mxfp8"])
def test_floats_must_fit_their_source_and_their_mode(project: Project, variant: str) -> None:
    """A scale that is another power of two, or the next float, is out of bounds; so is what
    config.json states of another mode, and biases are not what floats have."""
    folder, up = build_of_copies(project, variant), f"{BODY}layers.3.mlp.up_proj"
    assert set() == failed(checks(project, variant))
    poke(folder, f"{up}.scales", 0, 8 if variant == "mlx-nvfp4" else 1)
    wrong = checks(project, variant)
    config = read_json(folder / "config.json")
    other = {"mlx-mxfp4": "nvfp4", "mlx-nvfp4": "mxfp4", "mlx-mxfp8": "fp8"}[variant]
    for section in ("quantization", "quantization_config"):
        config[section] = {**config[section], DOWN: {**config[section], "mode": other}}
    write_json(folder / "config.json", config)

    assert failed(wrong) == {"digests", "round trip"}
    assert up in wrong["round trip"].problems[0]
    assert f"for {DOWN}" in "\n".join(checks(project, variant)["structure"].problems)


def test_another_modules_weights_are_out_of_bounds(project: Project, built: Path) -> None:
    """Two layers swapped keep every shape, but not the numbers."""
    first, second = (f"{BODY}layers.{layer}.mlp.up_proj" for layer in (0, 4))

    def swap(tensors: dict[str, Tensor]) -> None:
        for part in ("weight", "scales", "biases"):
            a, b = f"{first}.{part}", f"{second}.{part}"
            tensors[a], tensors[b] = tensors[b], tensors[a]

    rewrite(built, f"{first}.weight", swap)

    found = checks(project)

    assert failed(found) == {"digests", "round trip"}
    assert len(found["round trip"].problems) == 2


def test_a_norm_must_equal_its_source(project: Project, built: Path) -> None:
    """Tensors that are not quantized are compared bit for bit, norm + 1 and casts included."""
    name = f"{BODY}norm.weight"
    poke(built, name, 0, 1)

    assert [f"tensor {name} is not equal to its source"] == list(
        checks(project)["round trip"].problems
    )


def test_another_source_does_not_pass(
    project: Project, built: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    """The folder of one checkpoint is not that of another with the same shapes."""
    other = tiny_checkpoint(project.root / "other", seed=7, mtp=False)

    assert failed(checks(project, sources={"body": other})) == {"round trip"}


def test_another_recipe_is_told_first(project: Project, built: Path) -> None:
    """A recipe that changed since the build explains the rest, so it stands on top."""
    found = checks(project, overrides=("quantize.bits=4",))

    assert "built from another recipe" in found["structure"].problems[0]


def test_what_was_never_built_is_one_sentence(
    project: Project, carnice: Callable[..., Finished]
) -> None:
    """There is nothing to verify before a build, and no traceback either."""
    run = carnice("verify", VARIANT, "--no-run")

    assert run.code == 2
    assert "holds no safetensors or GGUF file" in run.err


def test_without_mlx_the_rest_is_verified(
    project: Project, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running the model is skipped with the way to install what it needs."""
    monkeypatch.setattr(run_mlx, "installed", lambda library: False)

    report = verify_variants([VARIANT], project.options())

    assert report.passed
    *_, generated, perplexity = report.variants[0].checks
    assert generated.outcome is perplexity.outcome is Outcome.SKIPPED
    assert pip_install("mlx") in generated.summary


GROUPS: dict[str, Callable[[np.random.Generator], np.ndarray[Any, Any]]] = {
    "normal": lambda random: random.standard_normal((64, 512)),
    "signs": lambda random: np.sign(random.standard_normal((64, 512))),
    "offset": lambda random: 1 + random.standard_normal((64, 512)) / 50,
    "one side": lambda random: np.abs(random.standard_normal((64, 512))),
    "tiny": lambda random: random.standard_normal((64, 512)) * 1e-7,
    "constant": lambda random: np.full((64, 512), 0.02),
    "outliers": lambda random: random.standard_t(1, (64, 512)).clip(-1e3, 1e3),
    "near ties": lambda random: (
        random.uniform(-1, 1, (64, 512)).round(1) + random.standard_normal((64, 512)) * 1e-5
    ),
}


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("wide", [False, True], ids=["same type", "float32 source"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_bound_holds_for_every_weight(bits: int, kind: str, dtype: str, wide: bool) -> None:
    """No weight that the quantizer made is outside, whatever its group looks like, or its type."""
    from carnice_build.formats.mlx.checks import allowance
    from carnice_build.kernels import elementwise

    values = GROUPS[kind](np.random.default_rng(0)).astype(np.float32)
    storage = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[dtype]
    raw = np.empty(values.shape, storage)
    elementwise.cast(values, "F32", dtype, raw)
    if not wide:
        elementwise.cast(raw, dtype, "F32", values)
    packed = np.empty((64, 512 * bits // 32), np.uint32)
    scales, biases = np.empty((64, 8), storage), np.empty((64, 8), storage)
    quantize_rows(raw, dtype, bits, 64, packed, scales, biases)
    restored = np.empty_like(values)
    dequantize_rows(packed, scales, biases, dtype, bits, 64, restored)

    off = np.abs(restored - values).reshape(-1, 64)

    assert (off <= allowance(values.reshape(-1, 64), bits, dtype)).all()


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("wide", [False, True], ids=["same type", "float32 source"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_bound_of_floats_holds_and_is_near(
    mode: str, kind: str, dtype: str, wide: bool
) -> None:
    """No weight is outside, and where weights are of all sizes some come near to their bound."""
    from carnice_build.formats.mlx.checks import float_allowance
    from carnice_build.kernels import elementwise, mlx_floats

    values = GROUPS[kind](np.random.default_rng(0)).astype(np.float32)
    raw = np.empty(values.shape, {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[dtype])
    elementwise.cast(values, "F32", dtype, raw)
    if not wide:
        elementwise.cast(raw, dtype, "F32", values)
    made = mlx_floats.MODES[mode]
    packed = np.empty((64, 512 * made.bits // 32), np.uint32)
    scales = np.empty((64, 512 // made.group_size), np.uint8)
    mlx_floats.quantize_rows(raw, dtype, mode, packed, scales)
    restored = np.empty_like(values)
    mlx_floats.dequantize_rows(packed, scales, mode, restored)

    off = np.abs(restored - values).reshape(-1, made.group_size)
    allowed = float_allowance(values.reshape(-1, made.group_size), mode, {dtype})

    assert (off <= allowed).all()
    if kind == "normal":
        assert (off > 0.9 * allowed).any()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a small tokenizer with a chat template, as mlx-lm loads it."""
    pytest.importorskip("mlx_lm")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<unk>", "<eos>", *"abcdefgh"])}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}a {{ message.content }}{% endfor %} b"
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def running(project: Project, tokenizer: Path, tiny_checkpoint: TinyCheckpoint) -> Project:
    """A project whose source has a real tokenizer and four layers, and a held-out text."""
    shutil.rmtree(project.checkpoint)
    tiny_checkpoint(project.checkpoint, layers=4, mtp=False, prefix=True, shards=2)
    shutil.copytree(tokenizer, project.checkpoint, dirs_exist_ok=True)
    random = np.random.default_rng(0)
    (project.root / "demo" / "heldout.txt").write_text(" ".join(random.choice(list("abcd"), 200)))
    return project


SHORT = VerifySettings(samples=3, lengths=(16, 48))


def test_the_model_runs_and_is_measured(running: Project) -> None:
    """Generation and perplexity pass, and the table starts with the unquantized source."""
    build_variants(["mlx-6bit"], running.options())

    report = verify_variants(["mlx-6bit"], running.options(), SHORT)

    assert report.passed, report
    outcomes = {check.name: check.outcome for check in report.variants[0].checks}
    # Its template knows no tools.
    assert (outcomes.pop("chat"), outcomes.pop("calls")) == (Outcome.SKIPPED,) * 2
    assert list(outcomes.values()) == [Outcome.PASSED] * 5
    source, variant = report.perplexities
    assert (source.name, variant.name) == ("BF16", "mlx-6bit")
    assert [(item.length, item.samples) for item in source.found] == [(16, 3), (48, 3)]
    for exact, near in zip(source.found, variant.found, strict=True):
        assert exact.mean is not None and near.mean is not None and exact.error is not None
        assert exact.mean != near.mean
        assert exact.mean == pytest.approx(near.mean, rel=0.02)
        assert exact.error > 0
        assert exact.kl == 0 and near.kl is not None and 0 < near.kl < 0.1


def test_logits_that_are_not_finite_fail(running: Project) -> None:
    """One NaN in the head's scales is found in the first step."""
    (running.root / "demo" / "heldout.txt").unlink()
    build_variants(["mlx-6bit"], running.options())
    folder = running.out / "mlx-6bit"
    name = "language_model.lm_head.scales"
    path = shard_of(folder, name)
    tensors = read_safetensors(path)
    tensors[name] = replace(tensors[name], data=b"\xc0\x7f" + tensors[name].data[2:])
    path.unlink()
    write_safetensors(path, tensors)

    report = verify_variants(["mlx-6bit"], running.options())

    found = {check.name: check for check in report.variants[0].checks}
    assert "step 1 has a logit that is NaN or infinite" in found["generate"].problems
    assert failed(found) == {"digests", "round trip", "generate"}
    assert found["round trip"].details["worst"][0]["error"] is None
    json.dumps([check.details for check in found.values()], allow_nan=False)
