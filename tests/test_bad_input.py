"""Bad input ends in one clear line, exit code 2, and nothing in the output folder."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, Project, TinyCheckpoint
from tiny import (
    Tensor,
    contents,
    misprefixed,
    read_json,
    read_safetensors,
    write_json,
    write_raw,
    write_safetensors,
)

from carnice_build.checkpoint.checkpoint import INDEX_NAME
from carnice_build.store.records import Records
from carnice_build.store.store import Store

Carnice = Callable[..., Finished]
Change = Callable[[dict[str, Tensor]], None]

DOWN = misprefixed("model.language_model.layers.2.mlp.down_proj.weight")
CONV = misprefixed("model.language_model.layers.2.linear_attn.conv1d.weight")
NORM = misprefixed("model.language_model.layers.2.input_layernorm.weight")
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
NAN, INFINITY = b"\xc0\x7f", b"\x80\xff"


def check_refused(finished: Finished, project: Project, *parts: str, code: int = 2) -> str:
    """The last thing said holds `parts`, the exit code, and no trace of a build.

    It is one line, or a headline and an indented line for each of several problems; returned is
    what was said before.
    """
    before, found, said = f"\n{finished.err}".rpartition("\ncarnice: ")

    assert code == finished.code, finished.err
    assert found
    assert all(line.startswith("  ") for line in said.splitlines()[1:])
    for part in parts:
        assert part in f"carnice: {said}"
    assert "Traceback" not in finished.err
    assert finished.out == ""
    assert sorted(project.out.glob("*")) == [] if project.out.exists() else True
    return before


def check_refused_at_once(finished: Finished, project: Project, *parts: str) -> None:
    """As `check_refused`, and nothing else was said: no work had begun."""
    assert "" == check_refused(finished, project, *parts)


def rewrite(path: Path, change: Change) -> None:
    """Change the tensors of a shard, in place."""
    tensors = read_safetensors(path)
    change(tensors)
    write_safetensors(path, tensors)


def reheader(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a shard, leaving its data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    write_raw(path, header, content[8 + length :])


def shard_of(project: Project, name: str) -> Path:
    """The shard of the Carnice stand-in that holds `name`."""
    return project.checkpoint / read_json(project.checkpoint / INDEX_NAME)["weight_map"][name]


def poison(project: Project, name: str, element: int, value: bytes) -> None:
    """Put a BF16 value, or several, into a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        old = tensors[name]
        data = old.data[: 2 * element] + value + old.data[2 * element + len(value) :]
        tensors[name] = Tensor(old.dtype, old.shape, data)

    rewrite(shard_of(project, name), change)


# --- recipes -------------------------------------------------------------------------------------

BODY = "extends: [_base/carnice-text.yaml, preset:mlx-4bit]\nvariant: bad\ndescription: x\n"

RECIPES = {
    "an unknown key": (
        BODY + "quantize: {bits: 4}\npackge: {shard: 5GB}\n",
        ("recipes/bad.yaml:5:", "unknown key 'packge'", "did you mean 'package'?"),
    ),
    "an unknown key of a format": (
        BODY + "quantize:\n  bits: 4\n  grup_size: 64\n",
        ("recipes/bad.yaml:6:", "'quantize.grup_size'", "did you mean 'group_size'?"),
    ),
    "an unknown step": (
        BODY + "quantize: {bits: 4}\nsteps+:\n  - dorp: {match: x}\n",
        ("recipes/bad.yaml:6:", "unknown step 'dorp'", "did you mean 'drop'?"),
    ),
    "an unknown format": (
        BODY + "quantize: {bits: 4, format: mlxx}\n",
        ("recipes/bad.yaml:4:", "unknown format 'mlxx'", "did you mean 'mlx'?"),
    ),
    "bits that no kernel has": (
        BODY + "quantize: {bits: 7}\n",
        ("recipes/bad.yaml:4:18: quantize.bits", "got 7"),
    ),
    "a list": ("- a\n- b\n", ("recipes/bad.yaml:1:1: is not a mapping",)),
    "a word": ("hello\n", ("recipes/bad.yaml:1:1: is not a mapping",)),
    "nothing": ("", ("recipes/bad.yaml: is not a mapping",)),
    "no YAML": ("a: [1\nb: 2\n", ("recipes/bad.yaml:2:", "is not valid YAML")),
    "no UTF-8": ("a: \udcff\n", ("recipes/bad.yaml: is not UTF-8 text",)),
    "over 1 MB": ("# " + "x" * 1_000_000, ("recipes/bad.yaml: is larger than 1 MB",)),
    "an alias bomb": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)),
        ("recipes/bad.yaml:1:", "holds more than 20000 values"),
    ),
    "a key twice": (BODY + "variant: bad\n", ("recipes/bad.yaml:4:1: has the key 'variant' twic",)),
    "a drop that matches nothing": (
        BODY + "quantize: {bits: 4}\nsteps+:\n  - drop: {match: '*.mpl.*'}\n",
        ("recipes/bad.yaml:6:11: ", "*.mpl.* matches no tensor"),
    ),
    "a rename that matches nothing": (
        BODY + "quantize: {bits: 4}\nsteps+:\n  - rename: {from: '^modle', to: x}\n",
        ("recipes/bad.yaml:6:13: ", "^modle changes no name"),
    ),
    "a rule that matches nothing": (
        BODY + "quantize:\n  bits: 4\n  rules: [{match: '*.v_porj', bits: 6}]\n",
        ("recipes/bad.yaml:6:", "*.v_porj matches no module", "v_proj'?"),
    ),
    "a rule for unknown layers": (
        BODY + "quantize:\n  bits: 4\n  rules: [{match: '*.v_proj', layers: x, bits: 6}]\n",
        ("recipes/bad.yaml:6:", "there is no set of layers 'x'"),
    ),
    "a count that is not met": (
        BODY + "quantize: {bits: 4}\nsteps: [{drop: {match: '*visual*', expect: 333}}]\n",
        ("recipes/bad.yaml:5:", "*visual* matches 21 tensors; expected 333"),
    ),
    "a profile's count that is not met": (
        BODY + "quantize: {bits: 4}\nsteps: [{drop: {match: '*visual*', expect: {demo: 20}}}]\n",
        ("recipes/bad.yaml:5:", "matches 21 tensors; expected 20 for profile demo"),
    ),
    "a name twice": (
        BODY + "quantize: {bits: 4}\nsteps+:\n  - rename: {from: up_proj, to: gate_proj}\n",
        ("recipes/bad.yaml:6:13: renaming", "up_proj.weight'", "twice"),
    ),
    "a parent outside": (
        BODY.replace("[_base/carnice-text.yaml, preset:mlx-4bit]", "../../secret.yaml"),
        ("recipes/bad.yaml:1:10: extends '../../secret.yaml', which is outside",),
    ),
    "an absolute parent": (
        BODY.replace("[_base/carnice-text.yaml, preset:mlx-4bit]", "/etc/passwd"),
        ("recipes/bad.yaml:1:10: extends '/etc/passwd', which is outside",),
    ),
    "a variant outside": (
        BODY.replace("variant: bad", "variant: ../../bad"),
        ("recipes/bad.yaml:2:10: variant: '../../bad' is not a plain name",),
    ),
    "a model outside": (
        BODY + "quantize: {bits: 4}\nsources: {body: {model: ../../etc}}\n",
        ("recipes/bad.yaml:5:25: sources.body.model: '..' is not a plain name",),
    ),
}


@pytest.mark.parametrize("what", RECIPES)
def test_a_wrong_recipe_is_refused(project: Project, carnice: Carnice, what: str) -> None:
    """The line says file, line and column, what is wrong, and the nearest valid name."""
    text, parts = RECIPES[what]
    project.recipe("bad", "").write_bytes(text.encode("utf-8", "surrogateescape"))

    check_refused_at_once(carnice("build", "bad"), project, *parts)
    assert not project.cache.exists()


def test_a_wrong_override_is_refused(project: Project, carnice: Carnice) -> None:
    """The option is quoted in place of a file and line."""
    finished = carnice("build", "mlx-4bit", "--set", "quantize.bit=4")

    check_refused_at_once(
        finished, project, "carnice: --set quantize.bit=4: unknown key", "did you mean 'bits'?"
    )


def test_an_unknown_variant_is_refused(project: Project, carnice: Carnice) -> None:
    """The nearest variant is suggested, and a path is no name."""
    check_refused_at_once(
        carnice("build", "mlx-4bits"), project, "'mlx-4bits'", "did you mean 'mlx-4bit'?"
    )
    check_refused_at_once(carnice("build", "../recipes/mlx-4bit"), project, "there is no recipe")


def test_an_unknown_profile_is_refused(project: Project, carnice: Carnice) -> None:
    """The profiles that exist are listed."""
    finished = carnice("build", "mlx-4bit", "--profile", "dmeo")

    check_refused_at_once(
        finished, project, "recipes/_profiles.yaml:1:1", "'dmeo'", "did you mean 'demo'?"
    )


def test_a_profile_that_leads_outside_is_refused(project: Project, carnice: Carnice) -> None:
    """Folders of a profile are inside the project."""
    profiles = project.recipes / "_profiles.yaml"
    profiles.write_text("demo: {kai-os/Carnice-V2-27b: ../elsewhere}\n")

    check_refused_at_once(
        carnice("build", "mlx-4bit"),
        project,
        "recipes/_profiles.yaml:1:31: '../elsewhere' is outside the project",
    )


# --- checkpoints ---------------------------------------------------------------------------------


def cut(project: Project) -> None:
    path = project.checkpoint / FIRST
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)


def overlap(project: Project) -> None:
    def change(header: dict[str, Any]) -> None:
        offsets = header[NORM]["data_offsets"]
        offsets[0], offsets[1] = offsets[0] - 2, offsets[1] - 2

    reheader(shard_of(project, NORM), change)


def lengthen_header(project: Project) -> None:
    path = project.checkpoint / FIRST
    path.write_bytes((10**9).to_bytes(8, "little") + path.read_bytes()[8:])


def change_dtype(project: Project) -> None:
    reheader(shard_of(project, NORM), lambda header: header[NORM].update(dtype="BF61"))


def lose_shard(project: Project) -> None:
    (project.checkpoint / SECOND).unlink()


def repeat_tensor(project: Project) -> None:
    tensor = read_safetensors(shard_of(project, NORM))[NORM]
    for shard in (FIRST, SECOND):
        rewrite(project.checkpoint / shard, lambda tensors: tensors.update({NORM: tensor}))


def repeat_tensor_without_index(project: Project) -> None:
    repeat_tensor(project)
    (project.checkpoint / INDEX_NAME).unlink()


def point_index_outside(project: Project) -> None:
    index = read_json(project.checkpoint / INDEX_NAME)
    index["weight_map"][NORM] = "../secret.safetensors"
    write_json(project.checkpoint / INDEX_NAME, index)


def lose_tensor(project: Project) -> None:
    path = shard_of(project, NORM)
    rewrite(path, lambda tensors: tensors.pop(NORM))


def lose_tensor_everywhere(project: Project) -> None:
    lose_tensor(project)
    index = read_json(project.checkpoint / INDEX_NAME)
    del index["weight_map"][NORM]
    write_json(project.checkpoint / INDEX_NAME, index)


def pickle_weights(project: Project) -> None:
    for path in project.checkpoint.glob("model*"):
        path.unlink()
    (project.checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch x'\ntR.")


def pickle_in_disguise(project: Project) -> None:
    pickle_weights(project)
    (project.checkpoint / "pytorch_model.bin").rename(project.checkpoint / "model.safetensors")


def lose_config(project: Project) -> None:
    (project.checkpoint / "config.json").unlink()


def lose_everything(project: Project) -> None:
    for path in project.checkpoint.iterdir():
        path.unlink()
    project.checkpoint.rmdir()


def change_config(**changes: Any) -> Callable[[Project], None]:
    def change(project: Project) -> None:
        config = read_json(project.checkpoint / "config.json")
        config["text_config"] |= changes
        write_json(project.checkpoint / "config.json", config)

    return change


CHECKPOINTS = {
    "a truncated shard": (cut, (FIRST, "is truncated")),
    "overlapping offsets": (overlap, (NORM, "overlaps the one before it")),
    "a header longer than the file": (
        lengthen_header,
        (FIRST, "header has 1000000000 bytes, but the file has"),
    ),
    "an unknown dtype": (change_dtype, (NORM, "unknown dtype 'BF61'", "did you mean 'BF16'?")),
    "a shard that is missing": (lose_shard, (INDEX_NAME, SECOND, "which is missing")),
    "a tensor in two shards of an index": (repeat_tensor, (NORM, "is here, but the index says")),
    "a tensor in two shards": (repeat_tensor_without_index, (NORM, "is also in", FIRST)),
    "an index that leads outside": (
        point_index_outside,
        (INDEX_NAME, "names a shard outside the folder: '../secret.safetensors'"),
    ),
    "a tensor that only the index has": (lose_tensor, (INDEX_NAME, NORM, "does not hold it")),
    "a tensor that is missing": (
        lose_tensor_everywhere,
        ("'model.language_model.layers.2.input_layernorm.weight' is missing",),
    ),
    "pickled weights": (pickle_weights, ("pytorch_model.bin", "could run code")),
    "a pickle in disguise": (pickle_in_disguise, ("model.safetensors", "safetensors file")),
    "no config": (lose_config, ("has no config.json",)),
    "no folder": (lose_everything, ("demo/carnice-v2-27b: is not a folder",)),
    "a config of other sizes": (
        change_config(hidden_size=64),
        ("is of shape [256, 128]; expected [256, 64] by its config",),
    ),
    "a config of another number of layers": (
        change_config(num_hidden_layers=7, layer_types=None),
        ("tensor 'model.language_model.layers.7.", "is not one of qwen3_5"),
    ),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_a_damaged_checkpoint_is_refused(project: Project, carnice: Carnice, what: str) -> None:
    """The line names the file and the tensor, before anything is written."""
    damage, parts = CHECKPOINTS[what]
    damage(project)

    check_refused_at_once(carnice("build", "mlx-4bit"), project, "demo/carnice-v2-27b", *parts)
    assert not project.cache.exists()


PASSED_THROUGH = pytest.param(
    CONV,
    NAN,
    id="convolution",
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(DOWN, NAN, id="NaN"),
        pytest.param(DOWN, INFINITY, id="Inf"),
        pytest.param(NORM, NAN, id="norm"),
        PASSED_THROUGH,
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    project: Project, carnice: Carnice, name: str, value: bytes
) -> None:
    """The line names file, tensor and element, and what the recipe can do about it."""
    poison(project, name, 100, value)
    finished = carnice("build", "mlx-4bit")

    check_refused(
        finished,
        project,
        str(shard_of(project, name).relative_to(project.root)),
        f"tensor '{name}' holds NaN or infinity at element 100",
        "`nonfinite: zero` under `quantize`",
    )


@pytest.mark.parametrize("backend", ["fused", "mlx"])
def test_a_weight_whose_range_has_no_scale_is_named(
    project: Project, carnice: Carnice, backend: str
) -> None:
    """The least and the largest BF16 in one group are numbers, but not what is between them."""
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    poison(project, DOWN, 100, b"\x7f\x7f\x7f\xff")
    finished = carnice("build", "mlx-4bit", "--set", f"quantize.backend={backend}")

    shard = str(shard_of(project, DOWN).relative_to(project.root))
    words = f"tensor '{DOWN}' has a group of 64 weights whose range is beyond"
    check_refused(finished, project, shard, words)


def test_numbers_near_the_end_of_their_type_are_verified_without_warnings(
    project: Project, carnice: Carnice
) -> None:
    """A folder with infinite scales is told in sentences of ours, one with large numbers not."""
    poison(project, DOWN, 100, b"\x7f\x7f")
    built = carnice("build", "mlx-4bit")
    checked = carnice("verify", "mlx-4bit")
    folder = project.out / "mlx-4bit"
    shard = next(iter(sorted(folder.glob("*.safetensors"))))
    rewrite(shard, infinite_scales)
    failed = carnice("verify", "mlx-4bit")

    assert 0 == built.code
    assert "Warning" not in f"{checked.err}{failed.err}"
    assert "round trip" not in checked.err
    assert 1 == failed.code


def infinite_scales(tensors: dict[str, Tensor]) -> None:
    """Every scale is as large as none can be."""
    for name, old in tensors.items():
        if name.endswith(".scales"):
            tensors[name] = Tensor(old.dtype, old.shape, b"\x80\x7f" * (len(old.data) // 2))


@pytest.mark.parametrize("value", [NAN, INFINITY], ids=["NaN", "Inf"])
def test_a_recipe_can_count_values_that_are_not_finite_as_zero(
    project: Project, carnice: Carnice, value: bytes
) -> None:
    """With `nonfinite: zero` the weight is what it would be with a 0 in that place."""
    poison(project, DOWN, 100, b"\0\0")
    zeroed = carnice("build", "mlx-4bit", "--out", "zeroed", "--cache", "other")
    poison(project, DOWN, 100, value)
    allowed = carnice("build", "mlx-4bit", "--set", "quantize.nonfinite=zero")
    shards = {
        name: content
        for name, content in contents(project.root / "zeroed" / "mlx-4bit").items()
        if name.endswith(".safetensors")
    }

    assert (zeroed.code, allowed.code) == (0, 0)
    assert shards == {name: project.built("mlx-4bit")[name] for name in shards}


def test_a_group_that_does_not_divide_is_refused(
    project: Project, carnice: Carnice, tiny_checkpoint: TinyCheckpoint
) -> None:
    """The module and its number of inputs are named."""
    folder = tiny_checkpoint(intermediate=320, mtp=False)
    finished = carnice(
        *("build", "mlx-4bit", "--source", f"body={folder}", "--set", "quantize.group_size=128")
    )

    check_refused_at_once(
        finished, project, "mlp.down_proj", "group_size 128 does not divide the 320 inputs"
    )


@pytest.mark.parametrize(
    ("variant", "change", "sentence"),
    [
        ("mlx-mxfp4", "bits=5", "quantize.bits: mode mxfp4 has 4 bits, not 5"),
        ("mlx-mxfp8", "group_size=64", "quantize.group_size: mode mxfp8 has groups of 32, not 64"),
        ("mlx-nvfp4", "config_bits=3", "quantize.config_bits: mode nvfp4 has 4 bits, not 3"),
        ("mlx-4bit", "mode=nvfp4", "quantize.group_size: mode nvfp4 has groups of 16, not 64"),
        ("mlx-4bit", "group_size=16", "mode affine has groups of 32, 64 or 128, not 16"),
        ("mlx-4bit", "mode=mxfp", "did you mean 'mxfp8'?"),
        ("mlx-mxfp4", "mode=affine", "quantize.bits is missing"),
        (
            "mlx-4bit",
            "rules=[{match: lm_head, mode: mxfp8, bits: 4}]",
            "quantize.rules.0.bits: mode mxfp8 has 8 bits, not 4",
        ),
        (
            "mlx-mxfp4",
            "rules=[{match: lm_head, bits: 6}]",
            "mode mxfp4 has 4 bits, not 6; expected a `mode` in this rule",
        ),
    ],
)
def test_a_knob_that_contradicts_its_mode_is_refused(
    project: Project, carnice: Carnice, variant: str, change: str, sentence: str
) -> None:
    """Modes of floats have one group size and one width; an error is at the knob that is off."""
    finished = carnice("build", variant, "--set", f"quantize.{change}")

    check_refused_at_once(finished, project, sentence)


def test_groups_of_floats_that_do_not_divide_are_refused(
    project: Project, carnice: Carnice, tiny_checkpoint: TinyCheckpoint
) -> None:
    """As those of mode affine are, where mlx-lm leaves such modules in BF16 without a word."""
    folder = tiny_checkpoint(intermediate=328, mtp=False)
    finished = carnice("build", "mlx-mxfp8", "--source", f"body={folder}")

    check_refused_at_once(
        finished, project, "mlp.down_proj", "group_size 32 does not divide the 328 inputs"
    )


@pytest.mark.parametrize("variant", ["mlx-mxfp4", "mlx-nvfp4", "mlx-mxfp8"])
def test_no_float_of_mlx_is_made_of_nan(project: Project, carnice: Carnice, variant: str) -> None:
    """The tensor and the element are named; `nonfinite: zero` counts it as 0."""
    poison(project, DOWN, 100, NAN)
    finished = carnice("build", variant)

    check_refused(finished, project, f"tensor '{DOWN}' holds NaN or infinity at element 100")
    assert 0 == carnice("build", variant, "--set", "quantize.nonfinite=zero").code


def test_an_unknown_group_size_is_refused(project: Project, carnice: Carnice) -> None:
    """Only the kernel's group sizes are accepted, at the place where it was asked."""
    finished = carnice("build", "mlx-4bit", "--set", "quantize.group_size=48")

    check_refused_at_once(
        finished, project, "--set quantize.group_size=48: quantize.group_size: ", "48"
    )


def test_a_source_that_no_recipe_has_is_refused(project: Project, carnice: Carnice) -> None:
    """`--source` names a source of the recipe."""
    finished = carnice("build", "mlx-4bit", "--source", f"bdoy={project.base}")

    check_refused_at_once(finished, project, "--source bdoy", "did you mean 'body'?")


def test_a_size_that_is_none_is_refused(project: Project, carnice: Carnice) -> None:
    """`--memory` takes a size."""
    finished = carnice("build", "mlx-4bit", "--memory", "much")

    check_refused_at_once(finished, project, "--memory", "'much' is not a size")


# --- disk and cache ------------------------------------------------------------------------------


def test_no_space_is_found_out_before_the_start(
    project: Project, carnice: Carnice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan knows what it needs, so a disk that is too small costs no time."""
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1000)
    finished = carnice("build", "mlx-4bit")

    check_refused_at_once(finished, project, "needs 824 kB more disk, 1 kB are free")
    assert sorted((project.cache / "packs").iterdir()) == []


class SmallDisk:
    """`os.pwrite` of a disk that is full after some calls; and what got finished on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
        self.left = writes
        self.finished = 0
        self._pwrite = os.pwrite
        self._set_outputs = Records.set_outputs
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(Records, "set_outputs", self._counted())

    def pwrite(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._pwrite(descriptor, buffer, offset)

    def _counted(self) -> Callable[..., None]:
        def set_outputs(records: Records, key: str, digests: Any) -> None:
            self.finished += 1
            self._set_outputs(records, key, digests)

        return set_outputs


@pytest.mark.parametrize("writes", [2, 60, 200])
def test_a_disk_that_fills_up_is_survived(
    project: Project, carnice: Carnice, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """What was finished is kept: the next build does the rest only, and gives the same bytes."""
    carnice("build", "mlx-4bit", "--out", "clean", "--cache", "other")
    with monkeypatch.context() as patch:
        disk = SmallDisk(patch, writes)
        full = carnice("build", "mlx-4bit")
    check_refused(full, project, "cache: the disk is full", "build again", code=1)
    again = carnice("build", "mlx-4bit", "--json")
    report = json.loads(again.out)

    assert 91 - disk.finished == report["actions_run"]
    assert contents(project.root / "clean" / "mlx-4bit") == project.built("mlx-4bit")


def test_a_cache_of_an_older_version_is_refused(project: Project, carnice: Carnice) -> None:
    """The line says which version was found and what to do; the cache is left as it is."""
    project.cache.mkdir()
    (project.cache / "FORMAT").write_text("carnice-cache 0\n")
    finished = carnice("build", "mlx-4bit")

    assert contents(project.cache) == {"FORMAT": b"carnice-cache 0\n"}
    check_refused_at_once(finished, project, "cache", "'carnice-cache 0'", "remove the folder")


def test_a_cache_without_a_version_is_refused(project: Project, carnice: Carnice) -> None:
    """A cache from before there were versions is not taken for a new one."""
    (project.cache / "packs").mkdir(parents=True)
    finished = carnice("build", "mlx-4bit")

    check_refused_at_once(finished, project, "cache", "remove the folder")


def test_an_output_folder_that_holds_other_files_is_left_alone(
    project: Project, carnice: Carnice
) -> None:
    """Only what is a build is ever replaced."""
    folder = project.out / "mlx-4bit"
    folder.mkdir(parents=True)
    (folder / "diary.txt").write_text("dear diary")
    finished = carnice("build", "mlx-4bit")

    assert contents(folder) == {"diary.txt": b"dear diary"}
    assert [path.name for path in project.out.iterdir()] == ["mlx-4bit"]
    assert "carnice: build/mlx-4bit: holds files that are not a build" in finished.err
    assert finished.code != 0
