"""What is seen of the inputs of linears, however a layer multiplies by their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from samples import OPS
from test_every_op import files
from torch import Tensor, nn
from torch.nn import functional

from carnice_build.calibration import watch
from carnice_build.calibration.watch import Seen, seen_inputs, sum_of_squares
from carnice_build.errors import BackendError
from carnice_build.graph import ProcessOp

Product = Callable[[Tensor, Tensor], Tensor]

VECTORS = 10
"""Tokens of the samples of a pass, without padding."""

GIVEN = torch.tensor([[1.0, -5.0, 2.0], [0.5, 3.0, -4.0]])

WATCHED: dict[str, Product] = {
    "linear": lambda x, w: functional.linear(x, w),
    "linear by name": lambda x, w: functional.linear(weight=w, input=x),
    "linear by half": lambda x, w: functional.linear(x, weight=w),
    "matmul": lambda x, w: torch.matmul(x, w.T),
    "matmul by name": lambda x, w: torch.matmul(other=w.T, input=x),
    "mm by name": lambda x, w: torch.mm(x, mat2=w.T),
    "addmm by name": lambda x, w: torch.addmm(torch.zeros(2, 4), mat1=x, mat2=w.T),
    "a method by name": lambda x, w: x.matmul(other=w.T),
    "an operator": lambda x, w: x @ w.T,
}

UNWATCHED: dict[str, Product] = {
    "bmm": lambda x, w: torch.bmm(x[None], w.T[None])[0],
    "einsum": lambda x, w: torch.einsum("ni,oi->no", x, w),
    "a sum": lambda x, w: (x[:, None] * w).sum(2),
}


class Multiplying(nn.Module):
    """A linear of 3 inputs and 4 outputs."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).view(4, 3), requires_grad=False)
        self._product = product

    def forward(self, given: Tensor) -> Tensor:
        """Their product."""
        return self._product(given, self.weight)


def seen_by(product: Product) -> tuple[Seen, Tensor]:
    """What is seen of a linear `up`, and what it gives out meanwhile."""
    layer = Multiplying(product)
    with seen_inputs(layer, {"weight": (("up",),)}) as seen:
        made = layer(GIVEN)
    return seen, made


@pytest.mark.parametrize("way", WATCHED)
def test_products_are_seen_however_they_are_called(way: str) -> None:
    """By the places of operands or by their names; what comes out is the same."""
    seen, made = seen_by(WATCHED[way])

    assert torch.equal(GIVEN @ torch.arange(12.0).view(4, 3).T, made)
    assert [5.0] == seen.largest([["up"]])
    assert {"up": 2} == dict(seen.tokens)


@pytest.mark.parametrize("way", UNWATCHED)
def test_a_linear_that_is_not_watched_is_refused(way: str) -> None:
    """It is never taken for one that was given zeros."""
    seen, _ = seen_by(UNWATCHED[way])

    with pytest.raises(BackendError, match="gave up no input that is watched"):
        seen.largest([["up"]])


def test_an_expert_without_tokens_has_zero_if_another_has_some() -> None:
    """Each token is sent to some expert, so that of a stack something is seen."""
    seen = Seen({"experts.1.up": 3.0})

    assert [0.0, 3.0] == seen.largest([["experts.0.up", "experts.1.up"]])
    with pytest.raises(BackendError, match=r"gave experts\.0\.down no input"):
        seen.largest([["experts.0.down", "experts.1.down"]])


@pytest.mark.parametrize("op", ["forward", "forward_experts", "every_expert", "beside"])
def test_a_pass_stops_where_a_linear_was_not_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    """Its scale would be that of zeros; so it is of linears in layers and before them."""
    monkeypatch.setattr(watch, "_PRODUCTS", {})
    sample = next(item for item in OPS if item.op.name == f"calibration.{op}")
    assert isinstance(sample.op, ProcessOp)
    given = [item.array.tobytes() for item in sample.inputs()]
    made = sample.op.infer(sample.params, sample.specs)
    inputs = files(tmp_path, "input", sample.specs, given)
    outputs = files(tmp_path, "output", made, [bytes(spec.nbytes) for spec in made])

    with pytest.raises(BackendError, match=r"gave .*_proj\w* no input that is watched"):
        sample.op.run(sample.params, inputs, outputs, lambda: None)


def test_squares_are_summed_by_column() -> None:
    """Over all vectors, however many axes count them, and however many calls there are."""
    layer = Multiplying(functional.linear)
    random = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=random) for shape in ((5, 3), (2, 7, 3), (0, 3))]
    with seen_inputs(layer, {"weight": (("up", "gate"),)}) as seen:
        for tensor in given:
            layer(tensor)
    wanted = torch.cat([tensor.reshape(-1, 3) for tensor in given]).double().square().sum(0)

    assert {"up", "gate"} == seen.squares.keys()
    for squares in seen.squares.values():
        torch.testing.assert_close(wanted, squares, rtol=1e-6, atol=0)
    assert {"up": 19, "gate": 19} == seen.tokens


@pytest.mark.parametrize("rows", [1, 2, 3, 1000])
def test_sums_of_squares_do_not_depend_on_how_rows_are_dealt_out(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Blocks are of whole rows, at least one; BF16 is squared in float32."""
    monkeypatch.setattr(watch, "_BLOCK", 4 * rows)
    given = torch.randn(1001, 4, generator=torch.Generator().manual_seed(1)).bfloat16()

    wanted = given.double().square().sum(0)
    torch.testing.assert_close(wanted, sum_of_squares(given), rtol=1e-5, atol=0)


@pytest.mark.parametrize("op", ["forward", "forward_experts"])
def test_a_pass_gives_what_each_linear_was_given(tmp_path: Path, op: str) -> None:
    """Sums and counts of each linear; each token is sent to as many experts as the config says."""
    sample = next(item for item in OPS if item.op.name == f"calibration.{op}")
    assert isinstance(sample.op, ProcessOp)
    given = [item.array.tobytes() for item in sample.inputs()]
    made = sample.op.infer(sample.params, sample.specs)
    inputs = files(tmp_path, "input", sample.specs, given)
    outputs = files(tmp_path, "output", made, [bytes(spec.nbytes) for spec in made])
    sample.op.run(sample.params, inputs, outputs, lambda: None)
    linears = sample.params["linears"]
    first = len(made) - 2 * len(linears)
    found = {
        name: (outputs[first + 2 * index].read(), outputs[first + 2 * index + 1].read())
        for index, name in enumerate(linears)
    }
    amax = iter(outputs[1].read().tolist())

    for name, (sums, counts) in found.items():
        experts = "*" in name
        assert (3 if experts else 1,) == counts.shape
        assert (2 if experts else 1) * VECTORS == counts.sum()
        for row, count in zip(sums.reshape(len(counts), -1), counts, strict=True):
            largest = next(amax)
            assert largest**2 * (1 - 1e-6) <= row.max() <= largest**2 * max(count, 1)
    for names in (("q", "k", "v"), ("gate", "up")):
        same = [
            found[name][0].tobytes()
            for name in found
            if name.endswith(tuple(f".{n}_proj" for n in names))
        ]
        assert 1 == len(set(same))
