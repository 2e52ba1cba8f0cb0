"""What the format `nvfp4` and its calibration take into their keys, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from calibrating import BASE, FINE_TUNE, QUICK, TOKENS
from conftest import Finished, Project
from test_bad_input import check_refused, check_refused_at_once
from tiny import Tensor, bf16, read_json, read_safetensors, write_json, write_safetensors

from carnice_build.calibration import plan
from carnice_build.calibration.passes import Embed, Forward
from carnice_build.calibration.tokens import Tokens
from carnice_build.commands.plan import plan_variants
from carnice_build.dtypes import TensorSpec
from carnice_build.formats.nvfp4.format import Nvfp4Format
from carnice_build.formats.nvfp4.fp8_ops import Fp8InputScales, MxQuantize, TensorQuantize
from carnice_build.formats.nvfp4.ops import BlockQuantize, InputScales
from carnice_build.graph import Action, ActionGraph, Op, TensorRef
from carnice_build.keys import canonical_json
from carnice_build.tensors import SourceTensor

pytest_plugins = ["calibrating"]

Carnice = Callable[..., Finished]
Change = Callable[[dict[str, Tensor]], None]

# --- keys ----------------------------------------------------------------------------------------

LAYER = "model.language_model.layers.{}.".format
TABLE, WEIGHT = TensorSpec("BF16", (64, 128)), TensorSpec("BF16", (8, 128))
HIDDEN, IDS = TensorSpec("BF16", (2, 8, 128)), TensorSpec("I32", (2, 8))
FILE, AMAX = TensorSpec("U8", (100,)), TensorSpec("F32", (3,))

TOKENS_PARAMS = {
    "samples": 2,
    "length": 8,
    "roles": {},
    "template": None,
    "special_tokens": {},
}
FORWARD_PARAMS = {
    "names": ["mlp.up_proj.weight"],
    "linears": ["mlp.up_proj"],
    "kind": "linear",
    "config": {"hidden_size": 128},
    "dtype": "bfloat16",
    "attention": "sdpa",
    "threads": 2,
    "device": "cpu",
    "processor": "x86_64 avx2",
}
HUB = {"name": "a/b", "subset": None, "split": "train", "commit": "0"}

OPS: list[tuple[Op, dict[str, Any], tuple[TensorSpec, ...]]] = [
    (Tokens(), {**TOKENS_PARAMS, "rows": "jsonl", "joined": True}, (FILE, FILE)),
    (Tokens(), {**TOKENS_PARAMS, "dataset": HUB}, (FILE,)),
    (Embed(), {"dtype": "BF16"}, (IDS, TABLE)),
    (Forward(), FORWARD_PARAMS, (IDS, HIDDEN, WEIGHT)),
    (BlockQuantize(), {}, (WEIGHT, WEIGHT)),
    (InputScales(), {"groups": [[0, 1], [2]], "shapes": [[], [4]]}, (AMAX,)),
    (Fp8InputScales(), {"groups": [[0, 1], [2]], "shapes": [[], [4]]}, (AMAX,)),
    (TensorQuantize(), {}, (WEIGHT, WEIGHT)),
    (MxQuantize(), {}, (WEIGHT,)),
]
OTHER_VALUES = {
    "samples": 3,
    "length": 9,
    "roles": {"human": "user"},
    "template": "{{ messages }}",
    "special_tokens": {"eos_token": "<|im_end|>"},
    "rows": "txt",
    "joined": False,
    "dataset": {**HUB, "commit": "1"},
    "names": ["mlp.up_proj.weight", "mlp.gate_proj.weight"],
    "linears": [],
    "kind": "full",
    "config": {"hidden_size": 128, "rms_norm_eps": 1e-5},
    "dtype": "F32",
    "attention": "eager",
    "threads": 1,
    "device": "cuda",
    "processor": "x86_64 avx512f",
    "groups": [[0], [1, 2]],
    "shapes": [[2], []],
}
IDENTIFIERS = [f"{op.name}-{index}" for index, (op, _, _) in enumerate(OPS)]


def action(op: Op, params: dict[str, Any], specs: tuple[TensorSpec, ...]) -> Action:
    refs = [
        TensorRef(spec, SourceTensor(str(index), spec, None, index))
        for index, spec in enumerate(specs)
    ]
    (made, *_) = ActionGraph().add(op, params, *refs)
    return made.origin.action  # type: ignore[union-attr]


@pytest.mark.parametrize(("op", "params", "specs"), OPS, ids=IDENTIFIERS)
def test_every_parameter_is_in_the_key(
    op: Op, params: dict[str, Any], specs: tuple[TensorSpec, ...]
) -> None:
    """Changing any parameter of any op of a calibration changes the key."""
    digests = [str(index) * 64 for index in range(len(specs))]
    key = action(op, params, specs).key(digests)
    changed = [
        action(op, {**params, name: OTHER_VALUES[name]}, specs).key(digests) for name in params
    ]

    assert len({key, *changed}) == 1 + len(params)


@pytest.mark.parametrize(("op", "params", "specs"), OPS, ids=IDENTIFIERS)
def test_every_input_and_version_is_in_the_key(
    op: Op, params: dict[str, Any], specs: tuple[TensorSpec, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bytes of any input, or another version of the op or of a library, change the key."""
    made = action(op, params, specs)
    digests = [str(index) * 64 for index in range(len(specs))]
    found = {made.key(digests)}
    for index in range(len(specs)):
        found.add(made.key([*digests[:index], "f" * 64, *digests[index + 1 :]]))
    monkeypatch.setattr("carnice_build.keys.library_version", lambda name: "another")
    found.add(made.key(digests))
    monkeypatch.setattr(type(op), "version", op.version + 1)
    found.add(made.key(digests))

    assert len(found) == 3 + len(specs)


def planned(project: Project, *overrides: str) -> list[Action]:
    options = project.options(overrides=(*QUICK, *overrides))
    return list(plan_variants([FINE_TUNE], options).graph)


def forwards(actions: list[Action]) -> list[str]:
    return [item.identity for item in actions if isinstance(item.op, Forward)]


def test_no_key_of_a_forward_pass_holds_anything_of_the_quantizer(small: Project) -> None:
    """Every knob below `quantize` leaves the forward passes the actions that they were."""
    plain = forwards(planned(small))
    keep = 'quantize.keep=["*.layers.0.mlp.*", "mtp.*"]'
    changed = [planned(small, "quantize.defaults=modelopt-0.43", "quantize.keep=mtp.*")]
    changed += [
        planned(small, keep),
        planned(small, "quantize.quant_algo=FP8", "package.serve=modelopt-vllm"),
        planned(small, "quantize.kv_cache.format=fp8"),
    ]
    spelled = [
        canonical_json(dict(item.params))
        for item in planned(small, keep)
        if isinstance(item.op, Forward)
    ]

    own = {"format", "quant_algo", "rules", "defaults", "keep", "kv_cache"}
    assert own == set(Nvfp4Format.model_fields)
    assert [plain] * 4 == [forwards(actions) for actions in changed]
    assert not any(word in text for text in spelled for word in ("nvfp4", "modelopt", "keep"))


@pytest.mark.parametrize(
    ("change", "ops"),
    [
        ("samples=3", (Tokens, Embed, Forward)),
        ("length=25", (Tokens, Embed, Forward)),
        ("roles={human: user}", (Tokens, Embed, Forward)),
        ("dtype=float32", (Embed, Forward)),
        ("attention=eager", (Forward,)),
        ("threads=3", (Forward,)),
        ("device=cuda", (Forward,)),
    ],
)
def test_a_knob_of_the_calibration_changes_what_it_is_about(
    small: Project, change: str, ops: tuple[type[Op], ...]
) -> None:
    """An entry of `calibration` reaches the ops it is about, and never the weights."""
    before = {item.identity for item in planned(small)}
    new = [
        item.op for item in planned(small, f"calibration.{change}") if item.identity not in before
    ]
    first = {type(op) for op in new}

    assert set(ops) <= first
    assert BlockQuantize not in first


@pytest.mark.parametrize(("kinds", "device"), [((), "cpu"), (("NVIDIA H100",), "cuda")])
def test_auto_is_a_gpu_where_there_is_one(
    small: Project, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...], device: str
) -> None:
    """With the keys that it has when it is named."""
    monkeypatch.setattr(plan, "gpus", lambda: kinds)

    assert forwards(planned(small, f"calibration.device={device}")) == forwards(
        planned(small, "calibration.device=auto")
    )


def test_the_kinds_of_gpus_are_in_the_keys_of_what_they_compute(
    small: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of passes on a device alone: those on the processor are the same beside any GPU."""
    found: dict[str, list[list[str]]] = {"cpu": [], "cuda": []}
    for kind in ("NVIDIA A100", "NVIDIA H100"):
        monkeypatch.setattr(plan, "gpus", lambda kind=kind: (kind,))
        for device, keys in found.items():
            keys.append(forwards(planned(small, f"calibration.device={device}")))

    assert found["cpu"][0] == found["cpu"][1]
    assert not {*found["cuda"][0]} & {*found["cuda"][1]}


# --- recipes -------------------------------------------------------------------------------------

RECIPES = {
    "no section calibration": (
        "quantize: {format: nvfp4}",
        ("recipes/bad.yaml:4:20: the format needs a section `calibration`",),
    ),
    "an unknown key of the calibration": (
        "quantize: {format: nvfp4}\ncalibration: {dataset: a/b, smaples: 2}",
        ("recipes/bad.yaml:5:", "'calibration.smaples'", "did you mean 'samples'?"),
    ),
    "an unknown key of the format": (
        "quantize: {format: nvfp4, deafults: modelopt-0.47}\ncalibration: {dataset: a/b}",
        ("recipes/bad.yaml:4:", "'quantize.deafults'", "did you mean 'defaults'?"),
    ),
    "defaults of no version": (
        "quantize: {format: nvfp4, defaults: modelopt-0.44}\ncalibration: {dataset: a/b}",
        ("recipes/bad.yaml:4:", "quantize.defaults", "got 'modelopt-0.44'"),
    ),
    "a dataset outside": (
        "quantize: {format: nvfp4}\ncalibration: {dataset: ../x.jsonl}",
        ("recipes/bad.yaml:5:", "'../x.jsonl' is outside the project"),
    ),
    "a dataset at an absolute path": (
        "quantize: {format: nvfp4}\ncalibration: {dataset: /etc/x.jsonl}",
        ("recipes/bad.yaml:5:", "'/etc/x.jsonl' is outside the project"),
    ),
    "a dataset of no known form": (
        "quantize: {format: nvfp4}\ncalibration: {dataset: data.csv}",
        ("recipes/bad.yaml:5:", "calibration.dataset"),
    ),
    "a dataset that no profile knows": (
        "quantize: {format: nvfp4}\ncalibration: {dataset: nobody/nothing}",
        ("profile 'demo' does not say where nobody/nothing is", "--set calibration.dataset=FILE"),
    ),
    "no dataset": (
        "quantize: {format: nvfp4}\ncalibration: {samples: 2}",
        ("recipes/bad.yaml:5:", "calibration.dataset is missing"),
    ),
    "no samples": (
        "quantize: {format: nvfp4}\ncalibration: {dataset: demo/calibration.jsonl, samples: 0}",
        ("recipes/bad.yaml:5:", "calibration.samples is 0; expected at least 1"),
    ),
    "no samples for a profile": (
        "quantize: {format: nvfp4}\n"
        "calibration: {dataset: demo/calibration.jsonl, samples: {demo: 0}}",
        ("recipes/bad.yaml:5:", "calibration.samples is 0; expected at least 1"),
    ),
    "no parts": (
        "quantize: {format: nvfp4}\ncalibration: {dataset: demo/calibration.jsonl, parts: 0}",
        ("recipes/bad.yaml:5:", "calibration.parts is 0; expected at least 1"),
    ),
    "a half part": (
        "quantize: {format: nvfp4}\ncalibration: {dataset: demo/calibration.jsonl, parts: 1.5}",
        ("recipes/bad.yaml:5:", "calibration.parts", "got 1.5"),
    ),
    "more parts than samples": (
        "quantize: {format: nvfp4}\n"
        "calibration: {dataset: demo/calibration.jsonl, samples: 2, parts: 3}",
        ("recipes/bad.yaml:5:", "calibration.parts is 3; expected at most 2, the number of sam"),
    ),
    "samples of one token": (
        "quantize: {format: nvfp4}\ncalibration: {dataset: demo/calibration.jsonl, length: 1}",
        ("recipes/bad.yaml:5:", "calibration.length is 1; expected at least 2"),
    ),
    "a dtype that no layer runs in": (
        "quantize: {format: nvfp4}\ncalibration: {dataset: demo/calibration.jsonl, dtype: float8}",
        ("recipes/bad.yaml:5:", "calibration.dtype", "got 'float8'"),
    ),
}


@pytest.mark.parametrize("what", RECIPES)
def test_a_wrong_recipe_is_refused(small: Project, carnice: Carnice, what: str) -> None:
    """The line says file, line and column, what is wrong, and the nearest valid name."""
    text, words = RECIPES[what]
    head = "extends: _base/carnice-text.yaml\nvariant: bad\ndescription: x\n"
    small.recipe("bad", f"{head}{text}\n")

    check_refused_at_once(carnice("build", "bad"), small, *words)
    assert not small.cache.exists()


OVERRIDES = {
    "a keep that matches nothing": (
        "quantize.keep='*.mlp.dwon_proj.weight'",
        ("*.mlp.dwon_proj.weight matches no weight", "did you mean 'mlp.down_proj.weight'?"),
    ),
    "some members of a fused module kept and others not": (
        "quantize.keep='*.layers.0.mlp.up_proj.weight'",
        ("layers.0.mlp.gate_proj", "are quantized and some are not", "layers.0.mlp.gate_up_proj"),
    ),
    "q and k kept, v not": (
        'quantize.keep=["*.q_proj.*", "*.k_proj.*"]',
        ("some of", "self_attn.v_proj", "expected all or none"),
    ),
    "0.43 with an MTP head": (
        "quantize.defaults=modelopt-0.43",
        ("module mtp.fc: no decoder layer has it, so its input is not calibrated", "among `keep`"),
    ),
    "rules that part what engines fuse": (
        "quantize.rules=[{match: '*.q_proj', quant_algo: FP8}]",
        ("quantize.rules", "q_proj", "are given FP8 and NVFP4", "one algorithm, because serving"),
    ),
    "a rule that skips a part of what engines fuse": (
        "quantize.rules=[{match: '*.layers.0.mlp.up_proj', skip: true}]",
        ("layers.0.mlp.gate_proj", "are quantized and some are not", "expected all or none"),
    ),
    "a rule that matches nothing": (
        "quantize.rules=[{match: '*.mlp.dwon_proj', quant_algo: FP8}]",
        ("quantize.rules", "*.mlp.dwon_proj matches no module"),
    ),
    "an algorithm of another name": (
        "quantize.quant_algo=NVFP4A16",
        ("quantize.quant_algo", "got 'NVFP4A16'"),
    ),
    "an algorithm in small letters": ("quantize.quant_algo=fp8", ("did you mean 'FP8'?",)),
    "a rule that skips what it changes": (
        "quantize.rules=[{match: '*.mlp.*', quant_algo: FP8, skip: true}]",
        ("quantize.rules.0", "`skip` leaves nothing for quant_algo to change"),
    ),
    "a profile of another algorithm": (
        "quantize.quant_algo=FP8",
        ("the profile 'nvfp4-vllm' is for NVFP4", "expected modelopt-vllm or vllm"),
    ),
    "a cache of another type": (
        "quantize.kv_cache=fp8",
        ("quantize.kv_cache: Input should be a mapping (got 'fp8')",),
    ),
    "samples for another profile": (
        "calibration.samples={full: 20}",
        ("calibration.samples says nothing", "expected an entry for profile demo"),
    ),
}


@pytest.mark.parametrize("what", OVERRIDES)
def test_a_wrong_knob_is_refused(small: Project, carnice: Carnice, what: str) -> None:
    """A plan stops before any work when a knob does not fit the model."""
    override, words = OVERRIDES[what]

    check_refused_at_once(carnice("build", FINE_TUNE, "--set", override), small, *words)


# --- checkpoints ---------------------------------------------------------------------------------


def poison(project: Project, name: str, value: float = np.nan) -> None:
    """Make the first element of a tensor of the base `value`."""

    def change(tensors: dict[str, Tensor]) -> None:
        old = tensors[name]
        wide = old.dtype == "F32"
        data = np.float32(value).tobytes() if wide else bf16(np.array([value], np.float32))
        tensors[name] = Tensor(old.dtype, old.shape, data + old.data[len(data) :])

    rewrite(project, change)


def rewrite(project: Project, change: Change) -> None:
    path = project.base / "model.safetensors"
    tensors = read_safetensors(path)
    change(tensors)
    write_safetensors(path, tensors)


def configure(project: Project, **entries: Any) -> None:
    path = project.base / "config.json"
    config = read_json(path)
    config["text_config"] |= entries
    write_json(path, config)


def build(carnice: Carnice, *more: str) -> Finished:
    """Build the base; its calibration is quick."""
    settings = [part for item in (*QUICK, *more) for part in ("--set", item)]
    return carnice("build", BASE, *settings)


def lose_tokenizer(project: Project) -> None:
    (project.base / "tokenizer.json").unlink()


def damage_tokenizer(project: Project) -> None:
    model = '{"type": "Unheard", "vocab": {"a": 0}}'
    (project.base / "tokenizer.json").write_text(f'{{"version": "1.0", "model": {model}}}')


def garble_tokenizer(project: Project) -> None:
    (project.base / "tokenizer.json").write_bytes(b"\xff\xfe\x00")


def shrink_vocabulary(project: Project) -> None:
    configure(project, vocab_size=100)

    def cut(tensors: dict[str, Tensor]) -> None:
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = Tensor("BF16", (100, 128), tensors[name].data[: 100 * 128 * 2])

    rewrite(project, cut)


def quantize_already(project: Project) -> None:
    path = project.base / "config.json"
    write_json(path, read_json(path) | {"quantization_config": {"quant_method": "awq"}})


def narrow(project: Project) -> None:
    configure(project, intermediate_size=200)

    def cut(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "layers." in name and ".mlp." in name:
                shape = (128, 200) if "down_proj" in name else (200, 128)
                tensors[name] = Tensor("BF16", shape, tensor.data[: 200 * 128 * 2])

    rewrite(project, cut)


def narrow_type(project: Project) -> None:
    name = LAYER(0) + "mlp.up_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        old = tensors[name]
        tensors[name] = Tensor("F8_E4M3", old.shape, old.data[::2])

    rewrite(project, change)


AT_ONCE: dict[str, tuple[Callable[[Project], None], tuple[str, ...]]] = {
    "no tokenizer.json": (
        lose_tokenizer,
        ("demo/qwen3.6-27b: has no tokenizer.json, which the calibration needs",),
    ),
    "a tokenizer that is no text": (
        garble_tokenizer,
        ("demo/qwen3.6-27b/tokenizer.json: is not a JSON object",),
    ),
    "a checkpoint that is quantized already": (
        quantize_already,
        ("demo/qwen3.6-27b: is quantized already (awq)",),
    ),
    "columns that 16 does not divide": (
        narrow,
        ("layers.0.mlp.down_proj", "blocks of 16 do not divide the 200 inputs"),
    ),
    "weights in float8": (narrow_type, ("layers.0.mlp.up_proj", "is of F8_E4M3; expected floats")),
}


@pytest.mark.parametrize("what", AT_ONCE)
def test_a_wrong_checkpoint_is_refused(small: Project, carnice: Carnice, what: str) -> None:
    """What the headers show ends the build before any work."""
    change, words = AT_ONCE[what]
    change(small)

    check_refused_at_once(build(carnice), small, *words)


WITH_WORK: dict[str, tuple[Callable[[Project], None], tuple[str, ...]]] = {
    "a tokenizer that is none": (damage_tokenizer, ("tokenizer.json: cannot be used",)),
    "a token beyond the vocabulary": (
        shrink_vocabulary,
        (
            "tokenizer.json: token ",
            "has no row in model.language_model.embed_tokens.weight; expected at most 99",
        ),
    ),
    "a norm so large that activations are not finite": (
        lambda project: poison(project, LAYER(1) + "post_attention_layernorm.weight", 3e38),
        (LAYER(1) + "mlp.gate_proj was given NaN or infinity by sample 1",),
    ),
    "a norm that is not finite": (
        lambda project: poison(project, LAYER(0) + "post_attention_layernorm.weight"),
        (LAYER(0) + "post_attention_layernorm.weight' holds NaN or infinity at element 0",),
    ),
    "an activation that transformers does not know": (
        lambda project: configure(project, hidden_act="selu2"),
        ("config.json: config entry hidden_act is 'selu2'",),
    ),
    "a config that transformers refuses": (
        lambda project: configure(project, rope_parameters={"rope_type": "nonsense"}),
        ("config.json: config entry rope_parameters is ", "nonsense"),
    ),
}


@pytest.mark.parametrize("what", WITH_WORK)
def test_a_checkpoint_that_cannot_be_calibrated_is_refused(
    small: Project, carnice: Carnice, what: str
) -> None:
    """What only the work itself shows ends it in one line that names file, layer and module."""
    change, words = WITH_WORK[what]
    change(small)

    check_refused(build(carnice), small, *words)


def test_a_device_that_is_not_there_is_refused(small: Project, carnice: Carnice) -> None:
    """torch's own complaint is the line, with the exit code of a library that failed."""
    finished = build(carnice, "calibration.device=cuda:99")

    check_refused(finished, small, "torch cannot use calibration.device cuda:99", code=1)


def test_a_device_of_no_known_kind_is_refused(small: Project, carnice: Carnice) -> None:
    """Before anything is read."""
    finished = build(carnice, "calibration.device=gpu")

    check_refused(finished, small, "'gpu' is none of auto, cpu, cuda, and cuda:N")


@pytest.mark.parametrize("algorithm", ["NVFP4", "FP8", "MXFP8", "W4A16_NVFP4"])
def test_weights_that_are_not_finite_are_named(
    small: Project, carnice: Carnice, algorithm: str
) -> None:
    """The last linear of the last layer feeds no other: the quantizer itself finds its NaN."""
    name = LAYER(1) + "mlp.down_proj.weight"
    poison(small, name)

    settings = (f"quantize.quant_algo={algorithm}", "package.serve=modelopt-vllm")
    check_refused(build(carnice, *settings), small, name)


def test_blocks_of_mxfp8_have_to_divide_a_row(small: Project, carnice: Carnice) -> None:
    """Into 32s, where those of NVFP4 are 16s; FP8 has none."""
    narrow(small)
    finished = build(carnice, "quantize.quant_algo=MXFP8")

    check_refused_at_once(finished, small, "blocks of 32 do not divide the 200 inputs")


@pytest.mark.parametrize("algorithm", ["MXFP8", "W4A16_NVFP4"])
def test_what_rounds_no_activation_under_a_scale_needs_no_calibration(
    small: Project, algorithm: str
) -> None:
    """Nor a section about one."""
    text = f"quantize: {{format: nvfp4, quant_algo: {algorithm}}}\n"
    head = "extends: _base/carnice-text.yaml\nvariant: mine\ndescription: x\n"
    small.recipe("mine", head + text)
    plan = plan_variants(["mine"], small.options())

    assert not any(isinstance(item.op, Forward) for item in plan.graph)
    assert plan.variants[0].conversion.quantized


def test_the_tokens_of_the_plan_are_those_of_the_recipe(small: Project) -> None:
    """Padding and sizes are known before a row is read."""
    (tokens,) = (item for item in planned(small) if isinstance(item.op, Tokens))

    assert (TensorSpec("I32", (2, 24)),) == tokens.outputs
    assert TOKENS == json.loads(canonical_json(dict(tokens.params)))["rows"]
