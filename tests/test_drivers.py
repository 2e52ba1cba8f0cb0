"""Any family's model run one decoder layer at a time, against the whole and against modelopt."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from driving import Checkpoint, tokens
from torch import Tensor, nn
from torch.nn import functional
from zoo import FAMILIES

from carnice_build.calibration import driver as driver_module
from carnice_build.calibration.driver import (
    Arithmetic,
    LayerDriver,
    decoder_layers,
    usual_attention,
)
from carnice_build.calibration.every_expert import EveryExpert
from carnice_build.calibration.passes import Forward, ForwardExperts
from carnice_build.calibration.text_model import ModelSource, OpenModel, State
from carnice_build.calibration.watch import NonFiniteInput, Seen, seen_by_everyone, seen_inputs
from carnice_build.checkpoint.checkpoint import open_checkpoint
from carnice_build.errors import BackendError, CheckpointError
from carnice_build.formats.autoround.tune import Advance, Tune
from carnice_build.formats.compressed_tensors.awq import Smooth
from carnice_build.graph import ProcessOp, TensorRef
from carnice_build.models import architecture_of, known_types
from carnice_build.planning.gather import gathered
from carnice_build.verification.torch_worker import StoredModel

pytest_plugins = ["driving"]

TABLED = [
    name
    for name in FAMILIES
    # transformers writes the names of Gemma 3's tower in another way than the hub has them.
    if FAMILIES[name].model_type in known_types() and name != "gemma3"
]
"""Those that a table describes."""

EAGER = ("gpt_oss",)
"""What transformers has no other attention for."""


def arithmetic(family: str, dtype: str = "bfloat16") -> Arithmetic:
    return Arithmetic(dtype, "eager" if family in EAGER else "sdpa", threads=1)


def walk(
    checkpoint: Checkpoint, how: Arithmetic, samples: Sequence[Tensor], stacked: bool = True
) -> Iterator[tuple[list[Tensor], Seen]]:
    """What each layer makes of the samples, and what its linears were given."""
    hidden = [checkpoint.embedded(sample) for sample in samples]
    beside = [checkpoint.beside(how, sample) for sample in samples]
    for index in range(checkpoint.layers):
        driver, tensors = (
            LayerDriver(checkpoint.config, index, how),
            checkpoint.layer(index, stacked),
        )
        layer = driver.layer(tensors)
        with seen_inputs(layer, driver.owners(tensors)) as seen:
            hidden = [
                driver.run(layer, driver.enter(sample), given(index))
                for sample, given in zip(hidden, beside, strict=True)
            ]
        yield hidden, seen


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("hidden_act", "nope"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "abc"}),
        ("rope_parameters", {"rope_type": "nope", "rope_theta": 1e4}),
        ("num_attention_heads", "two"),
    ],
)
def test_a_config_that_transformers_does_not_take_is_told_by_its_entry(
    entry: str, value: object
) -> None:
    """A checkpoint is to blame, no library; what transformers says is told with it."""
    config = {**FAMILIES["llama"].config, "model_type": "llama", entry: value}
    with pytest.raises(CheckpointError, match=rf"config\.json: config entry {entry} is .*"):
        LayerDriver(config, 0, arithmetic("llama"))


def test_a_config_whose_entry_is_not_known_is_told_in_transformers_words() -> None:
    """Two entries may be wrong, or none by itself."""
    wrong = {"hidden_act": "nope", "num_attention_heads": "two"}
    config = {**FAMILIES["llama"].config, "model_type": "llama", **wrong}
    with pytest.raises(
        CheckpointError, match=r"config\.json: is no config that transformers takes"
    ):
        LayerDriver(config, 0, arithmetic("llama"))


def test_a_model_that_transformers_does_not_know_is_named() -> None:
    """By its type, whichever way it is asked for."""
    with pytest.raises(BackendError, match=r"has no causal language model 'acme'"):
        LayerDriver({"model_type": "acme"}, 0, arithmetic("llama"))
    with pytest.raises(BackendError, match=r"has no causal language model 'siglip'"):
        usual_attention({"model_type": "siglip"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_make_the_bits_that_they_make_in_the_whole_model(
    zoo: Any, family: str, dtype: str
) -> None:
    """From rows of the embedding to the logits, whatever the family passes to its layers."""
    checkpoint, how = zoo(family), arithmetic(family, dtype)
    sample = tokens(75)
    whole = checkpoint.whole(how)
    states: list[Tensor] = []
    _, layers = decoder_layers(whole)
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, output: states.append(output))
    with torch.no_grad():
        expected = whole(sample[None], use_cache=False).logits

    found = [hidden for (hidden,), _ in walk(checkpoint, how, [sample])]

    assert all(map(torch.equal, states, found))
    assert len(layers) == len(found)
    # What stands behind the layers makes of the last state what the whole model makes of it.
    handle = layers[-1].register_forward_hook(lambda *_: found[-1])
    with torch.no_grad():
        assert torch.equal(expected, whole(sample[None], use_cache=False).logits)
    handle.remove()


@pytest.mark.parametrize("family", TABLED)
def test_tables_name_what_the_whole_model_is_made_of(zoo: Any, family: str) -> None:
    """From tokens to logits by a table's names and nothing else, stacks of experts among them."""
    checkpoint, how = zoo(family), arithmetic(family)
    opened = open_checkpoint(checkpoint.folder)
    architecture = architecture_of(opened.config, family)
    view = {name: TensorRef(tensor.spec, tensor) for name, tensor in opened.tensors.items()}
    tensors = {name: ref.origin for name, ref in gathered(view, architecture, family).items()}
    model = OpenModel(StoredModel(architecture, tensors).source(), how)
    sample = tokens(75)

    (state,) = model.embedded([sample])
    for index in range(architecture.num_layers):
        state = model.layer(index)(state)
    ending = model.ending()
    with torch.no_grad():
        expected = checkpoint.whole(how)(sample[None], use_cache=False).logits

    assert torch.equal(expected, ending.scores(ending.states(state.hidden)))


def test_a_sample_has_the_bits_that_it_has_alone(zoo: Any) -> None:
    """Though rotary embeddings of this type remember the longest sample that they have seen."""
    checkpoint, how = Checkpoint(zoo("llama").folder), arithmetic("llama", "float32")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = {**checkpoint.config, "rope_parameters": rope, "max_position_embeddings": 16}
    checkpoint.__dict__["config"] = config
    short, long = tokens(32), tokens(64)

    together = [hidden[1] for hidden, _ in walk(checkpoint, how, [long, short])]
    driver_module._outline.cache_clear()
    alone = [hidden for (hidden,), _ in walk(checkpoint, how, [short])]

    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("op", [Forward, ForwardExperts, EveryExpert, Smooth, Tune, Advance])
def test_whatever_transformers_may_take_for_a_layer_is_in_the_key(op: type[ProcessOp]) -> None:
    """Of the packages that it looks for when it builds the layers of any family."""
    optional = {"flash-linear-attention", "causal-conv1d", "mamba-ssm"}

    assert {"torch", "transformers", *optional} <= set(op.libraries)


def test_experts_one_by_one_are_those_of_a_stack(zoo: Any) -> None:
    """A layer is made of one tensor for each expert, too, and their linears are named alike."""
    checkpoint, how = zoo("qwen3_moe"), arithmetic("qwen3_moe")
    one_by_one, stacked = (
        list(walk(checkpoint, how, [tokens(40)], stacked)) for stacked in (False, True)
    )

    assert all(torch.equal(a, b) for ((a,), _), ((b,), _) in zip(one_by_one, stacked, strict=True))
    assert [seen.amax for _, seen in one_by_one] == [seen.amax for _, seen in stacked]
    for (_, one), (_, other) in zip(one_by_one, stacked, strict=True):
        assert one.squares.keys() == other.squares.keys()
        assert all(torch.equal(one.squares[name], other.squares[name]) for name in one.squares)
    assert {f"mlp.experts.{n}.down_proj" for n in range(4)} <= set(stacked[-1][1].amax)


def fused(stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GPT-OSS's experts as its tables name them: gate and up apart, [E, out, in]."""
    named = dict(stacks)
    for kind in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
        tensor = named.pop(f"mlp.experts.{kind}")
        part, end = kind.removesuffix("_bias"), "bias" if kind.endswith("_bias") else "weight"
        rows = tensor if end == "bias" else tensor.transpose(1, 2)
        parts = {"gate_proj": rows[:, ::2], "up_proj": rows[:, 1::2]}
        for name, rows_of in (parts if part == "gate_up_proj" else {part: rows}).items():
            named[f"mlp.experts.*.{name}.{end}"] = rows_of.contiguous()
    return named


def test_interleaved_experts_are_put_together(zoo: Any) -> None:
    """GPT-OSS's stay as they are on disk, whichever way they come, biases included."""
    checkpoint, how = zoo("gpt_oss"), arithmetic("gpt_oss")
    driver, given = LayerDriver(checkpoint.config, 1, how), checkpoint.layer(1)
    apart = driver.layer(fused(given)).state_dict()

    assert given.keys() == apart.keys()
    assert all(torch.equal(given[name], apart[name]) for name in given)


# --- modelopt ------------------------------------------------------------------------------------

SAMPLES = [tokens(length) for length in (64, 67)]


def modelopt_amax(model: Any) -> dict[str, float]:
    """`amax` of every enabled input quantizer after modelopt's calibration, by its path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        def calibrate(model: nn.Module) -> None:
            for sample in SAMPLES:
                model(sample[None], use_cache=False)

        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, calibrate)
    return {
        name: module.amax.item()
        for name, module in model.named_modules()
        if name.endswith("input_quantizer") and module.is_enabled and module.amax is not None
    }


def linears_of(quantizer: str, seen: Seen) -> list[str]:
    """The linears of a layer that share `quantizer`, as modelopt names it within the layer."""
    path, _, name = quantizer.rpartition(".")
    part = name.removesuffix("input_quantizer").removesuffix("_")
    if not part:
        return [path] if path in seen.amax else []
    parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    fit = re.compile(rf"{re.escape(path)}\.\d+\.({'|'.join(parts)})")
    return [linear for linear in seen.amax if fit.fullmatch(_respelled(linear))]


def _respelled(linear: str) -> str:
    """The name that a linear of a Mixtral has in transformers, for it is another on disk."""
    for theirs, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        linear = re.sub(rf"{theirs}$", ours, linear)
    return linear.replace("block_sparse_moe.", "mlp.")


@pytest.mark.parametrize(
    ("family", "linears"),
    [
        ("llama", 28),
        ("qwen3_moe", 55),
        ("qwen3_5_moe", 73),
        ("deepseek_v3", 68),
        ("glm4_moe", 64),
        ("nemotron_h", 20),
        ("mixtral", 64),
        ("gemma4", 48),
        ("gemma4_moe", 113),
    ],
)
def test_seen_inputs_are_those_that_modelopt_calibrates(
    zoo: Any, family: str, linears: int
) -> None:
    """Of every linear that NVFP4 enables: an expert's own tokens, and one scale for all experts."""
    checkpoint, how = zoo(family), arithmetic(family)
    theirs = modelopt_amax(checkpoint.whole(how))
    compared = 0
    for index, (_, seen) in enumerate(walk(checkpoint, how, SAMPLES)):
        prefix = f"model.layers.{index}."
        for quantizer in [name for name in theirs if name.startswith(prefix)]:
            ours = linears_of(quantizer.removeprefix(prefix), seen)
            assert theirs[quantizer] == max(seen.amax[linear] for linear in ours), quantizer
            compared += len(ours)

    assert linears == compared


def test_an_expert_without_tokens_is_told_and_changes_nothing(zoo: Any) -> None:
    """It has no figures of its own, and the scale that all experts share is that of the others."""
    checkpoint, how = zoo("qwen3_moe"), arithmetic("qwen3_moe")
    name = "mlp.gate.weight"
    tensors = checkpoint.layer(1)
    lonely = tensors[name].clone()
    lonely[:] = lonely[0]
    # Of equals, two are taken: never the one that is always the least.
    lonely[2] = -1000 * lonely[0].abs()
    driver = LayerDriver(checkpoint.config, 1, how)
    layer = driver.layer({**tensors, name: lonely})
    with seen_inputs(layer, driver.owners(tensors)) as seen:
        driver.run(layer, checkpoint.embedded(tokens(64)).abs())

    experts = {n: seen.tokens[f"mlp.experts.{n}.down_proj"] for n in range(4)}
    assert 0 == experts[2]
    assert 2 * 64 == sum(experts.values())
    assert not [linear for linear in seen.amax if ".experts.2." in linear]


def test_every_expert_is_seen_with_every_token(zoo: Any) -> None:
    """What it makes of those that go elsewhere counts for its own linears, and for nothing else.

    All have one input on their way in, which the experts that tokens were sent to were given.
    """
    checkpoint, how = zoo("qwen3_moe"), arithmetic("qwen3_moe")
    tensors, hidden = checkpoint.layer(1), checkpoint.embedded(tokens(64))
    driver = LayerDriver(checkpoint.config, 1, how)
    layer = driver.layer(tensors)
    owners = driver.owners(tensors)
    with seen_inputs(layer, owners) as sent:
        made = driver.run(layer, hidden)
    with seen_by_everyone(layer, owners) as seen:
        again = driver.run(layer, hidden)
    given: list[Tensor] = []
    experts = layer.mlp.experts
    experts.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    driver.run(layer, hidden)

    assert torch.equal(made, again)
    assert {name for name in sent.amax if ".experts." in name} == set(seen.amax)
    for number in range(4):
        gate, up = functional.linear(given[0], experts.gate_up_proj[number]).chunk(2, dim=-1)
        inner = experts.act_fn(gate) * up
        for part, wanted in (("gate", given[0]), ("up", given[0]), ("down", inner)):
            name = f"mlp.experts.{number}.{part}_proj"
            assert wanted.abs().max().item() == seen.amax[name]
            assert sent.amax[name] <= seen.amax[name]


def test_an_input_of_one_expert_is_transformed_by_itself(zoo: Any) -> None:
    """Doubling what one linear of one expert is given is doubling its weight."""
    checkpoint, how = zoo("qwen3_moe"), arithmetic("qwen3_moe", "float32")
    prefix = f"{checkpoint.prefix}layers.1."
    linear = "mlp.experts.1.down_proj"
    stack = f"{prefix}mlp.experts.*.down_proj.weight"
    plain = {f"{prefix}{name}": tensor.float() for name, tensor in checkpoint.layer(1).items()}
    doubled = {**plain, stack: plain[stack].clone()}
    doubled[stack][1] *= 2
    architecture = architecture_of(checkpoint.config, str(checkpoint.folder))
    state = State(checkpoint.embedded(tokens(32)).float(), {}, {})

    def made(named: Mapping[str, Tensor], transforms: Mapping[str, Any]) -> Tensor:
        source = ModelSource(architecture, named.__getitem__, transforms)
        return OpenModel(source, how).layer(1)(state).hidden

    transformed = made(plain, {f"{prefix}{linear}": lambda given: 2 * given})
    # Powers of two scale without rounding.
    assert torch.equal(made(doubled, {}), transformed)
    assert not torch.equal(made(plain, {}), transformed)


def test_infinity_in_an_expert_that_no_token_is_sent_to_is_told(zoo: Any) -> None:
    """A scale of its inputs would be none; the passes do not mind."""
    checkpoint, how = zoo("qwen3_moe"), arithmetic("qwen3_moe")
    tensors, hidden = checkpoint.layer(1), checkpoint.embedded(tokens(8)).abs()
    for name in ("mlp.gate.weight", "mlp.experts.*.up_proj.weight"):
        tensors[name] = tensors[name].clone()
    tensors["mlp.gate.weight"][:] = tensors["mlp.gate.weight"][0]
    tensors["mlp.gate.weight"][2] = -1000 * tensors["mlp.gate.weight"][0].abs()
    tensors["mlp.experts.*.up_proj.weight"][2] = 3e38
    driver = LayerDriver(checkpoint.config, 1, how)
    layer = driver.layer(tensors)
    owners = driver.owners(tensors)
    with seen_inputs(layer, owners):
        driver.run(layer, hidden)
    with seen_by_everyone(layer, owners), pytest.raises(NonFiniteInput) as error:
        driver.run(layer, hidden)

    assert "mlp.experts.2.down_proj" == error.value.linear


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "makes per_layer_input of layer 3 with weights of no layer"),
        ({"hidden_size_per_layer_input": 0}, r"gives layer 3 'sliding_attention' of other layers"),
    ],
)
def test_what_layers_get_from_elsewhere_must_be_given(
    zoo: Any, changes: dict[str, Any], said: str
) -> None:
    """Gemma 4's embeddings for each layer, and keys and values that its last layers share."""
    config = {**zoo("gemma4").config, **changes}
    driver = LayerDriver(config, 3, Arithmetic("bfloat16", "sdpa", threads=1))
    layer = driver._blank.to_empty(device="cpu")

    with pytest.raises(BackendError, match=rf"Gemma4ForCausalLM of transformers {said}"):
        driver.run(layer, torch.zeros(1, 8, 256, dtype=torch.bfloat16))


def test_padding_may_be_any_token(zoo: Any) -> None:
    """The rows of one sample are there, among which that of the padding need not be."""
    checkpoint, how = zoo("llama"), Arithmetic("bfloat16", "sdpa", threads=1)
    driver = LayerDriver({**checkpoint.config, "pad_token_id": 2000}, 0, how)
    rows = checkpoint.embedded(tokens(8))

    assert torch.equal(rows, driver.enter(rows))


@pytest.mark.parametrize("family", TABLED)
def test_tables_know_what_has_no_attention_but_eager(zoo: Any, family: str) -> None:
    """As transformers says of the model's class, of which a plan may not ask it."""
    architecture = architecture_of(open_checkpoint(zoo(family).folder).config, family)

    assert architecture.eager == (usual_attention(architecture.text_config) == "eager")


def test_an_attention_that_a_family_lacks_is_refused(zoo: Any) -> None:
    """GPT-OSS's sinks are in eager attention alone; with another they would be left out."""
    how = Arithmetic("bfloat16", "sdpa", threads=1)

    with pytest.raises(BackendError, match="no attention sdpa for GptOss"):
        LayerDriver(zoo("gpt_oss").config, 0, how)
