"""AutoRound, driven one layer at a time.

The model has two layers of the demo checkpoint, one of linear and one of full attention.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round import AutoRound, SignRoundConfig
from auto_round.algorithms.composer import AlgorithmComposer
from demo_model import BASE, CONFIG, layer_tensors, weights
from qwen import BODY
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen3_5ForCausalLM, Qwen3_5TextConfig, set_seed

from carnice_build.backends.autoround import AutoRoundSettings, TunedLayer, tune_layer
from carnice_build.calibration.driver import Arithmetic, LayerDriver

# The two layers' places in the demo.
LAYERS: Mapping[str, int] = {"linear": 0, "full": 3}
NARROW = ("linear_attn.in_proj_a", "linear_attn.in_proj_b")
SAMPLES, LENGTH = 6, 64
# In a batch of all samples the library's choice of the best iteration knows the whole error.
SETTINGS = AutoRoundSettings(iters=8, lr=0.03, batch_size=SAMPLES)


def tune(
    kind: str,
    inputs: Sequence[Tensor],
    quantized_inputs: Sequence[Tensor] | None = None,
    settings: AutoRoundSettings = SETTINGS,
    threads: int = 1,
    device: str = "cpu",
) -> TunedLayer:
    """`tune_layer` of one of the two layers."""
    arithmetic = Arithmetic(settings.dtype, "sdpa", threads, device)
    runner = LayerDriver(CONFIG, LAYERS[kind], arithmetic)
    return tune_layer(runner, layer_tensors(LAYERS[kind]), inputs, quantized_inputs, settings)


def tune_both(
    embedded: Sequence[Tensor], settings: AutoRoundSettings, device: str = "cpu"
) -> list[TunedLayer]:
    """Both layers, the second on what the first makes."""
    narrow = replace(settings, layer_bits=dict.fromkeys(NARROW, 16))
    placed = [sample.to(device) for sample in embedded]
    first = tune("linear", placed, None, narrow, device=device)
    return [first, tune("full", first.outputs, first.quantized_outputs, settings, device=device)]


@pytest.fixture(scope="module")
def embedded() -> list[Tensor]:
    """The inputs of the first layer: six samples of text."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokens = tokenizer.encode(heldout()[:20_000])[: SAMPLES * LENGTH]
    rows = weights()[f"{BODY}embed_tokens.weight"][torch.tensor(tokens)]
    return list(rows.reshape(SAMPLES, LENGTH, -1).split(1))


def heldout() -> str:
    return (BASE.parent / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tuned(embedded: list[Tensor]) -> list[TunedLayer]:
    return tune_both(embedded, SETTINGS)


def contents(tuned: TunedLayer) -> dict[str, Tensor]:
    """All tensors of a result, under names."""
    named: dict[str, Tensor] = {}
    for name, linear in tuned.linears.items():
        named |= {
            f"{name}.weight": linear.weight,
            f"{name}.scale": linear.scale,
            f"{name}.zero_point": linear.zero_point,
        }
    named["outputs"] = torch.cat(tuned.outputs)
    named["quantized_outputs"] = torch.cat(tuned.quantized_outputs)
    return named


def assert_same_bits(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> None:
    assert expected.keys() == actual.keys()
    differing = [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])]
    assert [] == differing


@pytest.mark.parametrize("layer", [0, 1], ids=list(LAYERS))
def test_tuning_beats_rounding_to_nearest(tuned: list[TunedLayer], layer: int) -> None:
    """On the samples, a tuned layer's outputs are nearer to the given one's, and not by chance."""
    assert tuned[layer].loss < 0.9 * tuned[layer].nearest_loss


@pytest.mark.parametrize("layer", [0, 1], ids=list(LAYERS))
def test_weights_are_on_the_grid(tuned: list[TunedLayer], layer: int) -> None:
    """Each weight is its scale times a whole number from -8 to 7; scales have both signs."""
    for linear in tuned[layer].linears.values():
        scale = linear.scale.float().repeat_interleave(128, dim=1)
        codes = (linear.weight.float() / scale).round()

        assert (torch.bfloat16, torch.float16) == (linear.weight.dtype, linear.scale.dtype)
        assert torch.equal((scale * codes).bfloat16(), linear.weight)
        assert (-8.0, 7.0) == (codes.min().item(), codes.max().item())
        assert 0.2 < (scale < 0).float().mean().item() < 0.8
        assert torch.equal(torch.full_like(linear.zero_point, 8), linear.zero_point)


def test_linears_of_16_bits_are_left_alone(embedded: list[Tensor], tuned: list[TunedLayer]) -> None:
    """The quantized outputs are those of a layer in which only the other linears are replaced."""
    layer = layer_tensors(LAYERS["linear"])
    replaced = {f"{name}.weight": linear.weight for name, linear in tuned[0].linears.items()}
    runner = LayerDriver(CONFIG, LAYERS["linear"], Arithmetic("bfloat16", "sdpa", threads=1))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = runner.run(runner.layer(layer | replaced), torch.cat(embedded))

    matrices = {name for name, tensor in layer.items() if tensor.ndim == 2}
    assert {f"{name}.weight" for name in NARROW} == matrices - replaced.keys()
    assert torch.equal(outputs, torch.cat(tuned[0].quantized_outputs))


def test_the_same_bits_come_again(embedded: list[Tensor], tuned: list[TunedLayer]) -> None:
    """A layer comes out the same after others, from another random state, with two threads."""
    before = {name: tensor.clone() for name, tensor in layer_tensors(LAYERS["full"]).items()}
    set_seed(7)
    again = tune("full", tuned[0].outputs, tuned[0].quantized_outputs, threads=2)
    torch.set_num_threads(1)

    assert_same_bits(contents(tuned[1]), contents(again))
    assert_same_bits(before, layer_tensors(LAYERS["full"]))


def test_a_run_goes_on_from_saved_states(tuned: list[TunedLayer], tmp_path: Path) -> None:
    """Another process tunes the second layer from the two outputs of the first, bit for bit."""
    outputs, quantized = torch.cat(tuned[0].outputs), torch.cat(tuned[0].quantized_outputs)
    save_file({"outputs": outputs, "quantized": quantized}, tmp_path / "states.safetensors")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(tune_saved, tmp_path).result()

    assert_same_bits(contents(tuned[1]), load_file(tmp_path / "tuned.safetensors"))


def tune_saved(folder: Path) -> None:
    """Runs in a process of its own."""
    states = load_file(folder / "states.safetensors")
    again = tune("full", states["outputs"].split(1), states["quantized"].split(1))
    save_file(contents(again), folder / "tuned.safetensors")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_equals_the_library_on_a_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switches: None, device: str
) -> None:
    """`AutoRound(...).quantize()` makes the same weights and scales of both layers.

    Two things of it are taken away: that its random state runs on from layer to layer, and that
    the last token of a sample does not count.
    Texts from a JSON file are the calibration set with which it is right on hybrid layers.
    """
    compress = AlgorithmComposer.compress_block

    def compress_anew(self: AlgorithmComposer, *args: Any, **options: Any) -> Any:
        set_seed(42)
        return compress(self, *args, **{**options, "input_ids": None})

    monkeypatch.setattr(AlgorithmComposer, "compress_block", compress_anew)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("AR_DISABLE_DATASET_SUBPROCESS", "1")
    settings = replace(SETTINGS, batch_size=2)
    model = two_layer_model(tmp_path / "model")
    embedded: list[Tensor] = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: embedded.extend(output.clone().split(1))
    )
    library = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(BASE),
        alg_configs=SignRoundConfig(iters=settings.iters, lr=settings.lr),
        dataset=str(write_texts(tmp_path / "texts.json")),
        nsamples=SAMPLES,
        seqlen=LENGTH,
        batch_size=settings.batch_size,
        layer_config={f"model.layers.0.{name}": {"bits": 16} for name in NARROW},
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
        device_map=device,
    )
    quantized, _ = library.quantize()
    ours = tune_both(embedded, settings, device)

    assert SAMPLES == len(embedded)
    for layer, tuned in zip(quantized.model.layers, ours, strict=True):
        for name, linear in tuned.linears.items():
            theirs = layer.get_submodule(name)
            assert torch.equal(theirs.weight.cpu(), linear.weight.cpu()), name
            assert torch.equal(theirs.scale.cpu(), linear.scale.cpu()), name


def two_layer_model(folder: Path) -> Any:
    """The two layers as transformers loads them, from a folder that is text only."""
    tensors = {
        name.replace(BODY, "model."): tensor
        for name, tensor in weights().items()
        if name.startswith((BODY, "lm_head")) and ".layers." not in name
    }
    for position, place in enumerate(LAYERS.values()):
        for name, tensor in layer_tensors(place).items():
            tensors[f"model.layers.{position}.{name}"] = tensor
    kinds = ["linear_attention", "full_attention"]
    config = Qwen3_5TextConfig(**{**CONFIG, "num_hidden_layers": 2, "layer_types": kinds})
    model = Qwen3_5ForCausalLM(config).bfloat16()
    model.load_state_dict(tensors)
    model.save_pretrained(folder)
    return Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def write_texts(path: Path) -> Path:
    texts = [{"text": heldout()[start : start + 2000]} for start in range(0, 20_000, 2000)]
    path.write_text(json.dumps(texts), encoding="utf-8")
    return path


@pytest.fixture
def switches() -> Iterator[None]:
    """Sets back what the library's constructor switches on."""
    yield
    torch.use_deterministic_algorithms(False)


def test_no_iterations_round_to_nearest(embedded: list[Tensor], tuned: list[TunedLayer]) -> None:
    """The weight of largest magnitude in a group becomes -8 scales, each other the nearest.

    Nothing that was to be left alone is quantized, and the error is the one that tuning begins at.
    """
    settings = AutoRoundSettings(iters=0, batch_size=SAMPLES, layer_bits=dict.fromkeys(NARROW, 16))
    nearest = tune("linear", embedded, None, settings)
    layer = layer_tensors(LAYERS["linear"])

    assert tuned[0].linears.keys() == nearest.linears.keys()
    assert tuned[0].nearest_loss == nearest.nearest_loss == nearest.loss
    for name, linear in nearest.linears.items():
        groups = layer[f"{name}.weight"].float().unflatten(1, (-1, 128))
        low, high = groups.aminmax(dim=2, keepdim=True)
        scale = (torch.where(high >= -low, high, low) / -8).half().float()
        codes = (groups / scale).round().clamp(-8, 7)

        assert torch.equal(scale.squeeze(2), linear.scale.float()), name
        assert torch.equal((scale * codes).flatten(1).bfloat16(), linear.weight), name


def test_bits_and_zero_points_of_single_linears(embedded: list[Tensor]) -> None:
    """Without symmetry zero points vary and scales are positive; a linear can have 8 bits."""
    settings = AutoRoundSettings(
        iters=2, sym=False, batch_size=SAMPLES, layer_bits={"mlp.up_proj": 8}
    )
    for name, linear in tune("full", embedded, None, settings).linears.items():
        scale, zero = (
            part.float().repeat_interleave(128, dim=1) for part in (linear.scale, linear.zero_point)
        )
        codes = (linear.weight.float() / scale + zero).round()
        most = 255 if name == "mlp.up_proj" else 15

        assert linear.scale.min() > 0
        assert len(linear.zero_point.unique()) > 1
        assert 0.0 == codes.min().item()
        assert 0.9 * most < codes.max().item() <= most


def test_samples_of_several_lengths_are_tuned_one_by_one(embedded: list[Tensor]) -> None:
    """With batches of one, accumulated or not, each sample keeps its length."""
    lengths = [17, 64, 40]
    samples = [sample[:, :length] for sample, length in zip(embedded, lengths, strict=False)]
    settings = replace(SETTINGS, batch_size=1, gradient_accumulate_steps=3)
    tuned = tune("full", samples, None, settings)

    assert lengths == [output.shape[1] for output in tuned.quantized_outputs]
    assert tuned.loss < tuned.nearest_loss


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "there is no sample to tune on"),
        ([64, 63], {}, "samples of 63 to 64 tokens cannot share a batch"),
        (
            [64],
            {"layer_bits": {"mlp.up": 16}},
            "layer_bits names mlp.up, no linear of the layer",
        ),
    ],
    ids=["no sample", "lengths", "name"],
)
def test_what_cannot_be_tuned_is_refused(
    embedded: list[Tensor], lengths: list[int], options: dict[str, Any], message: str
) -> None:
    """No samples, samples that cannot share a batch and unknown linears are named."""
    samples = [sample[:, :length] for sample, length in zip(embedded, lengths, strict=False)]
    with pytest.raises(ValueError, match=message):
        tune("full", samples, None, AutoRoundSettings(**options))


def test_linears_that_the_library_skips_are_refused(embedded: list[Tensor]) -> None:
    """What is quantized is what the settings say: a linear of 4 outputs must be excepted."""
    with pytest.raises(ValueError, match="in_proj_a alone for sizes that 32 does not divide"):
        tune("linear", embedded)


def test_what_is_not_finite_is_refused(embedded: list[Tensor]) -> None:
    """The library would stay silent and round to nearest."""
    bad = embedded[0].clone()
    bad[0, 3] = torch.nan
    with pytest.raises(ValueError, match="outputs of the layer are NaN or infinite"):
        tune("full", [bad])


def test_nothing_is_printed_or_left_behind(
    embedded: list[Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The library says nothing, and neither files nor torch's switches are left changed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tune("full", embedded, None, replace(SETTINGS, iters=1))

    assert ("", "") == capfd.readouterr()
    assert [] == list(tmp_path.iterdir())
    assert not torch.are_deterministic_algorithms_enabled()
