"""AWQ one decoder layer at a time, against llm-compressor's `oneshot` on the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from demo_model import ARCHITECTURE, CONFIG, KINDS, layer_tensors, weights, whole_model
from oneshot import Reference, run_oneshot, samples
from qwen import BODY
from torch import Tensor

from carnice_build.backends.awq import AwqSettings, apply_smoothing, smooth_layer
from carnice_build.backends.compressed import Observer, WeightScheme, quantize_module
from carnice_build.backends.compressed_layer import offset_norms
from carnice_build.backends.tensors import as_data, as_tensor
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.errors import BackendError
from carnice_build.graph import TensorData
from carnice_build.kernels.smoothing import smooth_gain
from carnice_build.models.smoothing import mappings_of_layer

LIBRARY = AwqSettings(ARCHITECTURE.smoothing)
EXACT = replace(LIBRARY, norms="exact")
FULL = KINDS.index("full")

every_observer = pytest.mark.parametrize("observer", ["mse", "memoryless_minmax"])


def driver(layer: int) -> LayerDriver:
    return LayerDriver(CONFIG, layer, Arithmetic("bfloat16", "eager", threads=1))


def smoothed_tensors(
    layer: int, scales: dict[str, Tensor], settings: AwqSettings
) -> dict[str, Tensor]:
    """The tensors of a layer with the scales that were found for it."""
    norms = [
        name.removesuffix(".weight")
        for name in layer_tensors(layer)
        if ARCHITECTURE.offset_norm(f"{BODY}layers.{layer}.{name}")
    ]
    return apply_smoothing(layer_tensors(layer), scales, settings, norms)


@dataclass
class Smoothed:
    """A layer after its search: what it read, what was found, and what the next one reads."""

    inputs: Sequence[Tensor]
    scales: dict[str, Tensor]
    outputs: list[Tensor]


def quantized(layer: int) -> list[str]:
    """The linears of a layer that the published recipe quantizes."""
    return [
        name.removesuffix(".weight")
        for name, tensor in layer_tensors(layer).items()
        if tensor.ndim == 2 and not name.startswith("linear_attn.")
    ]


def search(
    layer: int,
    inputs: Sequence[Tensor],
    settings: AwqSettings = LIBRARY,
    scratch: Path | None = None,
) -> Smoothed:
    """Smooth one layer with a model object of its own."""
    outputs: dict[int, Tensor] = {}
    scales = smooth_layer(
        driver(layer),
        layer_tensors(layer),
        quantized(layer),
        inputs,
        settings,
        outputs.__setitem__,
        scratch,
    )
    return Smoothed(inputs, scales, [outputs[index] for index in range(len(inputs))])


def embedded() -> list[Tensor]:
    """The first layer's inputs."""
    return [weights()[f"{BODY}embed_tokens.weight"][ids][None] for ids in samples()]


def walk(settings: AwqSettings, layers: int) -> Iterator[Smoothed]:
    """The first layers of the demo, each fed by the one before it."""
    inputs = embedded()
    for layer in range(layers):
        smoothed = search(layer, inputs, settings)
        inputs = smoothed.outputs
        yield smoothed


def on_disk(tensors: dict[str, Tensor], layer: int, observer: Observer) -> dict[str, Tensor]:
    """The tensors of a smoothed layer as they are written, by their whole names."""
    written = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module in quantized(layer):
            parts = quantize_module(tensor, observer, LIBRARY.scheme)
            written |= {f"{module}.{part}": value for part, value in parts.items()}
        else:
            written[name] = tensor
    return {f"{BODY}layers.{layer}.{name}": tensor for name, tensor in written.items()}


def differing(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> list[str]:
    """The names whose type, shape or bits differ; the two must have the same names."""
    assert sorted(expected) == sorted(actual)

    return [
        name
        for name, tensor in expected.items()
        if tensor.dtype != actual[name].dtype or not torch.equal(tensor, actual[name])
    ]


@pytest.fixture(scope="module")
def by_mse(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return run_oneshot("mse", tmp_path_factory.mktemp("mse"))


@pytest.fixture(scope="module")
def by_minmax(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return run_oneshot("memoryless_minmax", tmp_path_factory.mktemp("minmax"))


@pytest.fixture(scope="module")
def layers() -> list[Smoothed]:
    return list(walk(LIBRARY, len(KINDS)))


def test_smoothed_weights_and_norms_are_those_of_oneshot(
    layers: list[Smoothed], by_mse: Reference
) -> None:
    """Scales found layer by layer make every tensor of the 8 layers that oneshot holds."""
    actual = {
        f"{BODY}layers.{layer}.{name}": tensor
        for layer, smoothed in enumerate(layers)
        for name, tensor in smoothed_tensors(layer, smoothed.scales, LIBRARY).items()
    }
    expected = {name: by_mse.smoothed[name] for name in actual}

    assert [] == differing(expected, actual)


@every_observer
def test_the_folder_of_oneshot_is_made_layer_by_layer(
    layers: list[Smoothed], observer: Observer, request: pytest.FixtureRequest
) -> None:
    """All 220 tensors that oneshot writes are equal, whichever observer picks the integers."""
    fixture = {"mse": "by_mse", "memoryless_minmax": "by_minmax"}[observer]
    reference: Reference = request.getfixturevalue(fixture)
    norm = as_data(weights()[f"{BODY}norm.weight"])
    final = TensorData(norm.dtype, norm.array.copy())
    smooth_gain(norm.array, norm.dtype, None, False, final.array)
    actual = {
        name: tensor
        for name, tensor in weights().items()
        if name.startswith("mtp.") or "lm_head" in name or "embed_tokens" in name
    }
    actual[f"{BODY}norm.weight"] = as_tensor(final)
    for layer, smoothed in enumerate(layers):
        tensors = smoothed_tensors(layer, smoothed.scales, LIBRARY)
        actual |= on_disk(tensors, layer, observer)

    assert 220 == len(reference.written)
    assert [] == differing(reference.written, actual)


def test_the_search_does_not_depend_on_the_observer(
    by_mse: Reference, by_minmax: Reference
) -> None:
    """oneshot smooths alike for both observers; only scales, zero points and integers differ."""
    assert [] == differing(by_mse.smoothed, by_minmax.smoothed)

    different = differing(by_mse.written, by_minmax.written)
    assert {"weight_packed", "weight_scale", "weight_zero_point"} == {
        name.rpartition(".")[2] for name in different
    }


@pytest.mark.parametrize("kind", ["linear", "full"])
def test_mappings_are_those_of_the_library(kind: str) -> None:
    """Our table says of a layer what the library's patterns, made for the whole model, say."""
    from llmcompressor.modifiers.transform.awq.dynamic_mappings import (
        build_hybrid_attention_mappings,
    )

    model = whole_model("bfloat16", "eager")
    path = f"model.layers.{KINDS.index(kind)}."
    modules = [
        name.removeprefix(path) for name, _ in model.named_modules() if name.startswith(path)
    ]
    expected = [
        (_matched(mapping.smooth_layer, path, modules), balanced)
        for mapping in build_hybrid_attention_mappings(model)
        if (balanced := [_matched(name, path, modules) for name in mapping.balance_layers])
        and _matched(mapping.smooth_layer, path, modules)
    ]
    actual = [
        ([mapping.smooth], [[name] for name in mapping.balance])
        for mapping in mappings_of_layer(ARCHITECTURE.smoothing, modules, modules)
    ]

    assert expected == actual


def _matched(pattern: str, path: str, modules: list[str]) -> list[str]:
    from compressed_tensors.utils.match import match_name

    return [name for name in modules if match_name(path + name, pattern)]


def test_offset_norms_are_those_that_the_library_converts() -> None:
    """Our table names the norms of a layer for which the library holds 1 + w."""
    for index in range(len(KINDS)):
        layer = driver(index).layer(layer_tensors(index))
        prefix = ARCHITECTURE.layer_prefix(index)

        assert offset_norms(layer) == [
            name
            for name, module in layer.named_modules()
            if ARCHITECTURE.offset_norm(f"{prefix}{name}.weight")
        ]


def test_a_layer_can_be_resumed_from_saved_hidden_states(
    layers: list[Smoothed], tmp_path: Path
) -> None:
    """From a file of hidden states, in a new model object, the same scales and outputs come."""
    torch.save(layers[FULL].inputs, tmp_path / "inputs.pt")
    resumed = search(FULL, torch.load(tmp_path / "inputs.pt"))

    assert [] == differing(layers[FULL].scales, resumed.scales)
    assert all(map(torch.equal, layers[FULL].outputs, resumed.outputs))


def test_what_the_search_holds_may_lie_on_a_disk(layers: list[Smoothed], tmp_path: Path) -> None:
    """With a scratch folder the bits are the same, and nothing is left in it."""
    on_a_disk = search(FULL, layers[FULL].inputs, scratch=tmp_path)

    assert [] == differing(layers[FULL].scales, on_a_disk.scales)
    assert all(map(torch.equal, layers[FULL].outputs, on_a_disk.outputs))
    assert [] == list(tmp_path.iterdir())


class Recorded(Sequence[Tensor]):
    """Hidden states that say which of them was read."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        tensor = self._tensors[index]
        self.read.append(index)
        return tensor


@pytest.mark.parametrize("settings", [LIBRARY, EXACT], ids=["library", "exact"])
def test_samples_are_read_twice_in_order(layers: list[Smoothed], settings: AwqSettings) -> None:
    """Each sample is asked for once per pass, so that it may be loaded as late as that."""
    inputs = Recorded(layers[0].inputs)
    search(0, inputs, settings)

    assert [0, 1, 2, 3] * 2 == inputs.read


def test_exact_norms_change_only_what_is_smoothed() -> None:
    """Without the library's rounding, norms that nothing smooths keep their bits."""
    *_, smoothed = walk(EXACT, FULL + 1)
    result = smoothed_tensors(FULL, smoothed.scales, EXACT)
    rounded = smoothed_tensors(FULL, smoothed.scales, LIBRARY)

    untouched = {f"self_attn.{norm}_norm.weight" for norm in "qk"}
    assert untouched == {
        name
        for name, tensor in layer_tensors(FULL).items()
        if torch.equal(tensor, result[name]) and not torch.equal(tensor, rounded[name])
    }


def test_exact_norms_hand_on_what_the_layer_on_disk_computes(layers: list[Smoothed]) -> None:
    """The next layer's inputs are the outputs of the layer that is written, unquantized."""
    smoothed = search(FULL, layers[FULL].inputs, EXACT)
    model = driver(FULL)
    layer = model.layer(smoothed_tensors(FULL, smoothed.scales, EXACT))

    assert all(
        torch.equal(model.run(layer, hidden), output)
        for hidden, output in zip(smoothed.inputs, smoothed.outputs, strict=True)
    )


def test_a_search_leaves_its_tensors_alone_and_prints_nothing(
    layers: list[Smoothed], capfd: pytest.CaptureFixture[str]
) -> None:
    """The caller's weights are as before, and the library's bars and logs stay within."""
    before = {name: tensor.clone() for name, tensor in layer_tensors(FULL).items()}
    search(FULL, layers[FULL].inputs)

    assert [] == differing(before, layer_tensors(FULL))
    assert ("", "") == capfd.readouterr()


def test_a_layer_without_quantized_linears_is_passed_through(layers: list[Smoothed]) -> None:
    """Nothing to quantize, nothing to smooth: no scales, and the outputs all the same."""
    model = driver(0)
    layer = model.layer(layer_tensors(0))
    outputs: dict[int, Tensor] = {}
    inputs = layers[0].inputs
    scales = smooth_layer(model, layer_tensors(0), [], inputs, EXACT, outputs.__setitem__)

    assert {} == scales
    assert all(
        torch.equal(model.run(layer, hidden), outputs[index]) for index, hidden in enumerate(inputs)
    )


def test_hidden_states_that_are_not_finite_are_an_error(layers: list[Smoothed]) -> None:
    """Where the library would log and go on without smoothing, we say which scales are missing."""
    inputs = [hidden.clone() for hidden in layers[0].inputs]
    inputs[1][0, 0, 0] = torch.nan

    with pytest.raises(BackendError, match=r"between post_attention_layernorm and mlp\.gate_proj"):
        search(0, inputs)


def test_a_symmetric_scheme_has_no_zero_point() -> None:
    """Its integers need none, and compressed-tensors writes none."""
    weight = layer_tensors(0)["mlp.up_proj.weight"]
    parts = quantize_module(weight, "mse", WeightScheme(symmetric=True))

    assert {"weight_packed", "weight_scale", "weight_shape"} == set(parts)
