"""Checkpoints of other families that contradict their configs, and tables that lie, end in one
error with exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, Project
from test_bad_input import check_refused, check_refused_at_once, rewrite
from tiny import Tensor, read_all_tensors, read_json, write_json
from zoo import Layout, write_zoo

from carnice_build.dtypes import TensorSpec

pytest.importorskip("transformers")

Carnice = Callable[..., Finished]
Zoo = Callable[[str, Layout], Path]

QUANTS = {
    "mlx": "{format: mlx, bits: 4}",
    "fp8": "{format: compressed-tensors, scheme: FP8_DYNAMIC}",
    "int4": "{format: autoround, method: nearest}",
    "nvfp4": "{format: nvfp4}",
    "tuned": "{format: autoround, method: tune}",
}
DECODE = "[decode: {}]"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """`zoo(family, layout)`: its tiny checkpoint, made once; not to be changed."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, layout: Layout) -> Path:
        key = family, layout
        if key not in made:
            made[key] = write_zoo(tmp_path_factory.mktemp("zoo") / family, *key)
        return made[key]

    return make


class Bad:
    """A copy of a checkpoint to be damaged, and a recipe of it."""

    def __init__(self, project: Project, source: Path, quant: str = "fp8", steps: str = "[]"):
        self.folder = Path(shutil.copytree(source, project.root / "model"))
        (project.recipes / "_profiles.yaml").write_text("demo: {local/model: model}\n")
        project.recipe(
            "bad",
            "variant: bad\ndescription: A\nsources: {body: {model: local/model}}\n"
            f"steps: {steps}\nquantize: {QUANTS[quant]}\n",
        )

    def config(self, **entries: Any) -> None:
        """Change entries of config.json."""
        path = self.folder / "config.json"
        write_json(path, {**read_json(path), **entries})

    def tensors(self, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Change the tensors."""
        rewrite(self.folder / "model.safetensors", lambda tensors: (change(tensors), None)[1])


EXPERT = "model.layers.2.mlp.experts.2"


def cut(name: str) -> Callable[[dict[str, Tensor]], object]:
    """The last row of a tensor left out."""

    def change(tensors: dict[str, Tensor]) -> None:
        old = tensors[name]
        rows = old.shape[0]
        shape = (rows - 1, *old.shape[1:])
        tensors[name] = Tensor(old.dtype, shape, old.data[: len(old.data) // rows * (rows - 1)])

    return change


def put(name: str, data: bytes) -> Callable[[dict[str, Tensor]], object]:
    """A tensor that begins with `data`."""

    def change(tensors: dict[str, Tensor]) -> None:
        old = tensors[name]
        tensors[name] = Tensor(old.dtype, old.shape, data + old.data[len(data) :])

    return change


def put_at(name: str, element: int, data: bytes) -> Callable[[dict[str, Tensor]], object]:
    """A tensor of 16-bit numbers with `data` at an element."""

    def change(tensors: dict[str, Tensor]) -> None:
        old, start = tensors[name], 2 * element
        held = old.data[:start] + data + old.data[start + len(data) :]
        tensors[name] = Tensor(old.dtype, old.shape, held)

    return change


# --- configs that contradict their tensors --------------------------------------------------------

CONTRADICTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "other experts": (
        {"moe_intermediate_size": 256},
        ("36 tensors are of other shapes", "experts.0.down_proj.weight' is of shape [256, 384]"),
    ),
    "more experts": (
        {"num_local_experts": 5},
        ("mlp.gate.weight' is of shape [4, 256]; expected [5, 256] by its config",),
    ),
    "fewer experts": (
        {"num_local_experts": 3},
        ("experts.3.down_proj.weight' is not one of qwen3_moe; expected experts 0 to 2",),
    ),
    "more layers": ({"num_hidden_layers": 6}, ("are missing", "'model.layers.4.input_layernorm")),
    "fewer layers": ({"num_hidden_layers": 3}, ("are not of qwen3_moe", "'model.layers.3.")),
    "dense layers": ({"mlp_only_layers": [0, 1]}, ("are not of qwen3_moe", "layers.1.mlp.experts")),
    "no number of experts": (
        {"num_local_experts": "4"},
        ("config entry num_local_experts is '4'",),
    ),
    "no experts": ({"num_local_experts": 0}, ("config entry num_local_experts is 0",)),
    "a vast number of them": (
        {"num_local_experts": 10**9},
        ("has 1000000000 experts in a layer by num_experts; expected at most 10000",),
    ),
    "sizes that are too large": ({"hidden_size": 2**40}, ("config entry hidden_size is",)),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_config_that_contradicts_its_tensors_is_refused(
    project: Project, zoo: Zoo, carnice: Carnice, what: str
) -> None:
    """By the tensor, its shape and the one that the config calls for, or by the config's entry."""
    entries, words = CONTRADICTIONS[what]
    bad = Bad(project, zoo("qwen3_moe", "transformers"))
    bad.config(**entries)

    check_refused_at_once(carnice("build", "bad"), project, "model: ", *words)


HOLES: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "an expert in the middle": (
        "qwen3_moe",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if f"{EXPERT}." in name],
        f"tensor '{EXPERT}.down_proj.weight' is missing",
    ),
    "a projection of the last one": (
        "qwen3_moe",
        lambda tensors: tensors.pop("model.layers.3.mlp.experts.3.up_proj.weight"),
        "tensor 'model.layers.3.mlp.experts.3.up_proj.weight' is missing",
    ),
    "all of a layer": (
        "qwen3_moe",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "2.mlp.experts" in name],
        "tensor 'model.layers.2.mlp.experts.*.down_proj.weight' is missing",
    ),
    "a row of an expert": (
        "qwen3_moe",
        cut(f"{EXPERT}.up_proj.weight"),
        f"tensor '{EXPERT}.up_proj.weight' is of shape [383, 256]; expected [384, 256]",
    ),
    "an expert of another type": (
        "qwen3_moe",
        lambda tensors: tensors.update(
            {
                f"{EXPERT}.up_proj.weight": Tensor(
                    "F16", (384, 256), tensors[f"{EXPERT}.up_proj.weight"].data
                )
            }
        ),
        f"tensor '{EXPERT}.up_proj.weight' is F16 [384, 256]; expected BF16 [384, 256]",
    ),
    "an expert of fused ones": (
        "gpt_oss",
        cut("model.layers.1.mlp.experts.gate_up_proj"),
        "gate_up_proj' is of shape [3, 256, 768]; expected [4, 256, 768]",
    ),
}


@pytest.mark.parametrize("what", HOLES)
def test_experts_that_lack_something_are_named(
    project: Project, zoo: Zoo, carnice: Carnice, what: str
) -> None:
    """By the tensor of the checkpoint, not the stack that it would be part of."""
    family, change, words = HOLES[what]
    bad = Bad(project, zoo(family, "transformers"))
    bad.tensors(change)

    check_refused_at_once(carnice("build", "bad"), project, "model", words)


# --- tables that lie ------------------------------------------------------------------------------

OWN = """\
extends: qwen3
values:
  queries: {queries}
model:
  - {{name: model.embed_tokens.weight, part: embed, role: embedding, shape: [vocab_size, {size}]}}
  - {{repeat: num_hidden_layers, prefix: 'model.layers.{{}}.', rows: layer, part: layers}}
  - {{name: {name}, part: body, role: norm, shape: [hidden_size]}}
  - {{name: lm_head.weight, part: head, role: linear, shape: [vocab_size, hidden_size]}}
"""
RIGHT = {
    "queries": "num_attention_heads * head_dim",
    "size": "hidden_size",
    "name": "model.norm.weight",
}
LIES: dict[str, tuple[dict[str, str], int, str]] = {
    "a formula without a value": ({"queries": "num_attention_heads // 0"}, 3, "divides by zero"),
    "a formula of a name that is none": ({"size": "hiden_size"}, 0, "config entry hiden_size is"),
    "a formula that is code": ({"queries": "open('x')"}, 3, "may call min, max, len, int"),
    "a size that is none": ({"size": "hidden_size - 256"}, 5, "gives 0"),
    "a tensor twice": (
        {"name": "lm_head.weight"},
        8,
        "names the tensor 'lm_head.weight' once more",
    ),
    "a row that fits another": (
        {"name": "model.layers.1.input_layernorm.weight"},
        7,
        "names the tensor 'model.layers.1.input_layernorm.weight' once more",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_table_that_lies_is_refused(
    project: Project, zoo: Zoo, carnice: Carnice, lie: str
) -> None:
    """By its file and line, or by the entry that the config lacks."""
    changes, line, words = LIES[lie]
    Bad(project, zoo("qwen3", "transformers"))
    table = project.recipes / "_families" / "qwen3.yaml"
    table.parent.mkdir(exist_ok=True)
    table.write_text(OWN.format(**{**RIGHT, **changes}), encoding="utf-8")
    finished = carnice("build", "bad")

    check_refused_at_once(finished, project, words)
    assert not line or f"qwen3.yaml:{line}:" in finished.err, finished.err


def test_the_table_of_these_tests_does_not_lie(
    project: Project, zoo: Zoo, carnice: Carnice
) -> None:
    """With nothing changed it plans, and is the one that is used."""
    Bad(project, zoo("qwen3", "transformers"))
    table = project.recipes / "_families" / "qwen3.yaml"
    table.parent.mkdir(exist_ok=True)
    table.write_text(OWN.format(**RIGHT), encoding="utf-8")

    assert 0 == carnice("plan", "bad").code
    table.write_text(OWN.format(**{**RIGHT, "name": "model.norm.wheight"}), encoding="utf-8")
    check_refused_at_once(carnice("plan", "bad"), project, "did you mean", "model.norm.wheight")


# --- tensors that are no floats -------------------------------------------------------------------

INTEGERS = {
    "model.norm.weight": "I16",
    "model.embed_tokens.weight": "U16",
    "model.layers.1.mlp.gate.weight": "I8",
    "model.layers.0.self_attn.q_norm.weight": "BOOL",
    "model.layers.0.self_attn.q_proj.weight": "F8_E4M3",
    f"{EXPERT}.up_proj.weight": "I32",
    "lm_head.weight": "F64",
}


@pytest.mark.parametrize("quant", ["mlx", "fp8", "int4", "nvfp4"])
@pytest.mark.parametrize("name", INTEGERS)
def test_a_tensor_that_is_no_floats_is_refused(
    project: Project, zoo: Zoo, carnice: Carnice, name: str, quant: str
) -> None:
    """By the plan of any format, whether the format quantizes it or would publish it as it is."""
    dtype = INTEGERS[name]
    bad = Bad(project, zoo("qwen3_moe", "transformers"), quant)

    def change(tensors: dict[str, Tensor]) -> None:
        shape = tensors[name].shape
        tensors[name] = Tensor(dtype, shape, bytes(TensorSpec(dtype, shape).nbytes))

    bad.tensors(change)
    words = f"tensor {name!r} is of {dtype}; expected floats: F32, F16, BF16"
    check_refused_at_once(carnice("build", "bad"), project, "model: ", words)


# --- quantized sources ----------------------------------------------------------------------------

NAN = b"\x00\x00\xc0\x7f"
SCALES = f"{EXPERT}.up_proj.weight_scale_inv"
MXFP4 = "model.layers.1.mlp.experts.gate_up_proj"
DAMAGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "scales of an expert": (
        "deepseek_v3",
        lambda tensors: tensors.pop(SCALES),
        f"tensor '{EXPERT}.up_proj.weight' is of a quantized weight that lacks '{SCALES}'",
    ),
    "its codes": (
        "deepseek_v3",
        lambda tensors: tensors.pop(f"{EXPERT}.up_proj.weight"),
        f"tensor '{SCALES}'",
    ),
    "scales of another shape": (
        "deepseek_v3",
        lambda tensors: tensors.update({SCALES: Tensor("F32", (1, 3), bytes(12))}),
        f"tensor '{SCALES}' is F32 [1, 3]; expected [1, 2], a scale for each 128 x 128 weights",
    ),
    "scales of another type": (
        "deepseek_v3",
        lambda tensors: tensors.update({SCALES: Tensor("I32", (1, 2), bytes(8))}),
        f"tensor '{SCALES}' is I32 [1, 2]; expected F32 or BF16 or F16",
    ),
    "NaN among scales": (
        "deepseek_v3",
        put(SCALES, NAN),
        f"tensor '{SCALES}' holds nan at element 0; expected finite scales",
    ),
    "a negative scale": (
        "deepseek_v3",
        put(SCALES, b"\x00\x00\x80\xbf"),
        f"tensor '{SCALES}' holds -1 at element 0; expected finite scales, none of them negative",
    ),
    "a code of NaN": (
        "deepseek_v3",
        put(f"{EXPERT}.up_proj.weight", b"\x00\x7f"),
        f"tensor '{EXPERT}.up_proj.weight' holds NaN or infinity at element 1",
    ),
    "no scales of MXFP4": (
        "gpt_oss",
        lambda tensors: tensors.pop(f"{MXFP4}_scales"),
        f"tensor '{MXFP4}_blocks' is of a quantized weight that lacks '{MXFP4}_scales'",
    ),
    "scales of fewer experts": (
        "gpt_oss",
        cut(f"{MXFP4}_scales"),
        f"tensor '{MXFP4}_scales' is U8 [3, 768, 8]; expected U8 [4, 768, 8]",
    ),
    "an expert less": (
        "gpt_oss",
        lambda tensors: (cut(f"{MXFP4}_scales")(tensors), cut(f"{MXFP4}_blocks")(tensors)),
        f"tensor '{MXFP4}.weight' is of shape [3, 768, 256]; expected [4, 768, 256]",
    ),
    "E8M0 of NaN": (
        "gpt_oss",
        put(f"{MXFP4}_scales", b"\x7f\xff"),
        f"tensor '{MXFP4}_scales' holds NaN at element 1; expected finite scales",
    ),
}
READ = ("NaN among scales", "a negative scale", "a code of NaN", "E8M0 of NaN")
"""What headers do not tell."""


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_scales_of_experts_are_named(
    project: Project, zoo: Zoo, carnice: Carnice, what: str
) -> None:
    """The tensor as the checkpoint has it, however many experts are one stack, and its file."""
    family, change, words = DAMAGES[what]
    bad = Bad(project, zoo(family, "hub"), steps=DECODE)
    bad.tensors(change)
    finished = carnice("build", "bad")

    check = check_refused if what in READ else check_refused_at_once
    check(finished, project, "model", words)


@pytest.mark.parametrize("quant", ["mlx", "fp8"])
@pytest.mark.parametrize("layout", ["hub", "transformers"])
def test_an_expert_that_holds_nan_is_named(
    project: Project, zoo: Zoo, carnice: Carnice, layout: Layout, quant: str
) -> None:
    """Whether its weight is a tensor of its own, or a part of one that holds all of them."""
    experts = "model.language_model.layers.1.mlp.experts"
    bad = Bad(project, zoo("qwen3_5_moe", layout), quant)
    name = f"{experts}.down_proj" if layout == "hub" else f"{experts}.2.down_proj.weight"
    (size,) = {item.shape for key, item in read_all_tensors(bad.folder).items() if key == name}
    before = 2 * size[-1] * size[-2] if layout == "hub" else 0
    bad.tensors(put_at(name, before + 7, b"\xc0\x7f"))
    expert = f", which is of '{experts}.2.down_proj.weight'" if layout == "hub" else ""

    words = f"tensor '{name}' holds NaN or infinity at element {before + 7}{expert};"
    check_refused(carnice("build", "bad"), project, "model", words)


@pytest.mark.parametrize("steps", ["[]", DECODE], ids=["kept", "decoded"])
@pytest.mark.parametrize("element", [1, 11], ids=["of a gate", "of an up"])
def test_scales_of_nan_are_refused_in_codes_that_are_kept(
    project: Project, zoo: Zoo, carnice: Carnice, steps: str, element: int
) -> None:
    """MLX publishes experts in MXFP4 as they are, and refuses what decoding them refuses."""
    pytest.importorskip("mlx_lm")
    bad = Bad(project, zoo("gpt_oss", "hub"), "mlx", steps)
    bad.tensors(put(f"{MXFP4}_scales", b"\x7f" * element + b"\xff"))

    words = f"tensor '{MXFP4}_scales' holds NaN at element {element}; expected finite scales"
    check_refused(carnice("build", "bad"), project, "model", words)


@pytest.mark.parametrize(
    ("family", "quant"),
    [("deepseek_v3", "mlx"), ("deepseek_v3", "int4"), ("minimax_m2", "fp8"), ("gpt_oss", "int4")],
)
def test_a_quantized_source_without_the_step_is_refused(
    project: Project, zoo: Zoo, carnice: Carnice, family: str, quant: str
) -> None:
    """It says what to write."""
    Bad(project, zoo(family, "hub"), quant)

    check_refused_at_once(
        carnice("build", "bad"),
        project,
        "model: is quantized already",
        "expected a step `- decode: {}`",
    )


# --- code from elsewhere --------------------------------------------------------------------------


def remote(bad: Bad) -> None:
    """A family that nobody knows, whose classes are files of the checkpoint."""
    bad.config(
        model_type="elsewhere",
        architectures=["ElsewhereForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_elsewhere.ElsewhereConfig",
            "AutoModelForCausalLM": "modeling_elsewhere.ElsewhereForCausalLM",
        },
    )
    for name in ("configuration_elsewhere.py", "modeling_elsewhere.py"):
        (bad.folder / name).write_text("raise SystemExit('this code was run')\n")


@pytest.mark.parametrize("quant", ["fp8", "int4"])
def test_data_free_formats_build_a_model_of_remote_code(
    project: Project, zoo: Zoo, carnice: Carnice, quant: str
) -> None:
    """No line of it is run, and the plan says what is not checked."""
    remote(Bad(project, zoo("qwen3_moe", "transformers"), quant))
    finished = carnice("build", "bad")
    plan = json.loads(carnice("plan", "bad", "--json").out)

    assert 0 == finished.code, finished.err
    assert "elsewhere has no table here" in plan["variants"][0]["notices"][0]


@pytest.mark.parametrize("quant", ["mlx", "nvfp4", "tuned"])
def test_others_say_why_they_do_not(
    project: Project, zoo: Zoo, carnice: Carnice, quant: str
) -> None:
    """The family is unknown, its code is the checkpoint's own, and what can be done."""
    remote(Bad(project, zoo("qwen3_moe", "transformers"), quant))

    check_refused_at_once(
        carnice("build", "bad"),
        project,
        "model: ",
        "'elsewhere'",
        "whose code is not transformers' own",
        "carnice family",
    )
