"""Schemes in the words of compressed-tensors: its arguments, and llm-compressor's presets by name.

The values are those of `compressed_tensors.quantization.quant_scheme` 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, PositiveInt, model_validator

from carnice_build.formats.scheme import Scheme
from carnice_build.recipe.schema import PatternList, Strict

ScaleType = Literal["torch.uint8", "torch.float8_e4m3fn"]
SCALE_TYPES = get_args(ScaleType)

LINEAR = "Linear"
"""The class of modules that a group without names is about."""


class Arguments(Strict):
    """How numbers are quantized: the library's `QuantizationArgs`, as far as recipes choose."""

    num_bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(description="Bits a number.")
    type: Literal["int", "float"] = Field("int", description="Integers, or floats.")
    symmetric: bool = Field(True, description="Whether zero is the middle of the codes.")
    group_size: Literal[16, 32, 64, 128] | None = Field(
        None, description="Numbers of a row that share a scale; for strategies of groups."
    )
    block_structure: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="Rows and columns that share a scale; for strategy `block`."
    )
    scale_dtype: ScaleType | None = Field(
        None, description="Type of scales: powers of two, or FP8; that of the weights if none."
    )

    @property
    def scheme(self) -> Scheme:
        """The terms that all formats have in common."""
        return Scheme(self.num_bits, self.group_size, self.type)

    def _zero_points(self) -> str | None:
        return None if self.symmetric else "torch.int8"

    def stated(self) -> dict[str, Any]:
        """Every entry that compressed-tensors writes."""
        return {
            **self.model_dump(mode="json"),
            "actorder": None,
            "observer_kwargs": {},
            "zp_dtype": self._zero_points(),
        }


class Weights(Arguments):
    """How the codes of a weight are chosen."""

    strategy: Literal["tensor", "channel", "group", "block", "tensor_group"] = Field(
        description="What shares a scale: all, a row, a part of a row, a block; `tensor_group` is "
        "a part of a row whose scale has a scale that all share."
    )
    dynamic: Literal[False] = Field(False, description="Scales are stored.")
    observer: Literal["memoryless_minmax", "mse"] = Field(
        "memoryless_minmax",
        description="The range of what shares a scale: from the smallest to the largest weight, or "
        "where the error is least.",
    )

    arithmetic: Literal["library", "modelopt"] = Field(
        "library",
        description="For NVFP4: whose codes and scales these are, llm-compressor's, which computes "
        "the global scale in the type of the weights, or modelopt's of the format `nvfp4`, which "
        "takes float32 for it; with these, one of both formats quantizes nothing after the other.",
    )

    def stated(self) -> dict[str, Any]:
        """See `Arguments.stated`: whose arithmetic it was is seen in nothing."""
        return {name: value for name, value in super().stated().items() if name != "arithmetic"}

    @model_validator(mode="after")
    def _fits(self) -> Weights:
        grouped = self.strategy in ("group", "tensor_group")
        if grouped != (self.group_size is not None):
            what = "needs a" if grouped else "has no"
            raise ValueError(f"strategy {self.strategy} {what} group_size")
        if self.arithmetic != "library" and self.strategy != "tensor_group":
            raise ValueError("arithmetic is for NVFP4")
        if (self.strategy == "block") != (self.block_structure is not None):
            what = "needs a" if self.strategy == "block" else "has no"
            raise ValueError(f"strategy {self.strategy} {what} block_structure")
        return self


class Activations(Arguments):
    """How engines quantize what a linear is given."""

    strategy: Literal["tensor", "token", "group", "tensor_group"] = Field(
        description="What shares a scale: all, a token, a part of a token; `tensor_group` is a "
        "part of a token whose scale has a scale that all share."
    )
    dynamic: bool | Literal["local"] = Field(
        True,
        description="Whether scales are found while the model runs, are stored, or, `local`, are "
        "found under a stored one.",
    )
    observer: Literal["static_minmax"] | None = Field(
        None, description="What finds the range of those that are stored."
    )


class ConfigGroup(Strict):
    """Modules that share a scheme."""

    targets: PatternList = Field(
        description="Paths of modules, as patterns; or `Linear` for all that no other group names."
    )
    weights: Weights = Field(description="The scheme of their weights.")
    input_activations: Activations | None = Field(
        None, description="The scheme of their inputs; none if they stay as they are."
    )


def _floats(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "strategy": strategy, **more}


def _integers(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, **more}


_MX = {"group_size": 32, "scale_dtype": "torch.uint8"}
_NV = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
_STATIC = {"dynamic": False, "observer": "static_minmax"}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "FP8_DYNAMIC": {
        "weights": _floats(8, "channel"),
        "input_activations": _floats(8, "token"),
    },
    "FP8_BLOCK": {
        "weights": _floats(8, "block", block_structure=(128, 128)),
        "input_activations": _floats(8, "group", group_size=128),
    },
    "FP8": {
        "weights": _floats(8, "tensor"),
        "input_activations": _floats(8, "tensor", **_STATIC),
    },
    "W8A8": {
        "weights": _integers(8, "channel"),
        "input_activations": _integers(8, "token"),
    },
    **{
        f"W{bits}A16": {"weights": _integers(bits, "group", group_size=128)} for bits in range(2, 9)
    },
    **{
        f"W{bits}A8": {
            "weights": _integers(bits, "group", group_size=128),
            "input_activations": _integers(8, "token"),
        }
        for bits in range(2, 8)
    },
    "W4AFP8": {
        "weights": _integers(4, "group", group_size=128),
        "input_activations": _floats(8, "token"),
    },
    "W4A16_ASYM": {"weights": _integers(4, "group", group_size=128, symmetric=False)},
    "NVFP4A16": {"weights": _floats(4, "tensor_group", **_NV)},
    "NVFP4": {
        "weights": _floats(4, "tensor_group", **_NV),
        "input_activations": _floats(
            4, "tensor_group", **_NV, dynamic="local", observer="static_minmax"
        ),
    },
    "MXFP4A16": {"weights": _floats(4, "group", **_MX)},
    "MXFP4": {
        "weights": _floats(4, "group", **_MX),
        "input_activations": _floats(4, "group", **_MX),
    },
    "MXFP8A16": {"weights": _floats(8, "group", **_MX)},
    "MXFP8": {
        "weights": _floats(8, "group", **_MX),
        "input_activations": _floats(8, "group", **_MX),
    },
}
"""What the names that llm-compressor has for schemes stand for."""

ALIASES: Mapping[str, str] = {"INT8": "W8A8"}
"""Second names that the library has."""


def preset(name: str, targets: list[str]) -> ConfigGroup:
    """The group of modules that a preset makes of `targets`; KeyError for an unknown name."""
    known = PRESETS[ALIASES.get(name, name)]
    return ConfigGroup.model_validate({"targets": targets, **known})


def preset_of(group: ConfigGroup) -> str:
    """The preset that a group is of, or the nearest one; what is in none is called `custom`.

    Engines choose by the kinds of numbers; who found the ranges does not matter to them, and
    integers may be in groups of other sizes, or in none.
    """
    inputs = group.input_activations
    weights = group.weights.model_copy(
        update={"observer": "memoryless_minmax", "arithmetic": "library"}
    )
    made = {name: preset(name, group.targets) for name in PRESETS}
    like = {name: known for name, known in made.items() if known.input_activations == inputs}
    near = [name for name, known in like.items() if known.weights == weights]
    loose = [
        name
        for name, known in like.items()
        if known.weights.type == weights.type == "int"
        and known.weights.num_bits == weights.num_bits
        and known.weights.symmetric == weights.symmetric
    ]
    return next(iter([*near, *loose]), "custom")


_SHARED = {
    "tensor": "one scale",
    "channel": "a scale for each output",
    "token": "a scale for each token",
}
_FLOATS = {8: "E4M3", 4: "E2M1"}


def in_words(arguments: Weights | Activations) -> str:
    """A scheme of numbers in the words of a model card."""
    bits = arguments.num_bits
    codes = f"INT{bits}" if arguments.type == "int" else _FLOATS[bits]
    kind = codes if arguments.symmetric else f"asymmetric {codes}"
    if arguments.block_structure is not None:
        return "{} with a scale for each block of {} x {}".format(kind, *arguments.block_structure)
    if arguments.group_size is None:
        return f"{kind} with {_SHARED[arguments.strategy]}"
    scales = {
        None: "",
        "torch.uint8": " under scales that are powers of two",
        "torch.float8_e4m3fn": " under E4M3 scales",
    }
    return f"{kind} in groups of {arguments.group_size}{scales[arguments.scale_dtype]}"


def group_in_words(group: ConfigGroup) -> str:
    """What a group does to weights and inputs, in the words of a model card."""
    inputs = group.input_activations
    if inputs is None:
        return in_words(group.weights)
    if inputs.dynamic == "local":
        how = "found under a calibrated one"
    else:
        how = "found while the model runs" if inputs.dynamic else "calibrated"
    return f"{in_words(group.weights)}; inputs in {in_words(inputs)}, {how}"
