"""What llama.cpp's converter writes of a checkpoint, and what we say that it does.

The converter's source is where `LLAMA_CPP` says, or in `.llama.cpp`, where `make llama-cpp` puts
it; it needs torch and transformers.  What it wrote of the demo checkpoints stands, as names and
digests, in `golden/gguf.json`, which this file writes: `python tests/gguf_converter.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from carnice_build.checkpoint.checkpoint import Checkpoint, open_checkpoint, source_view
from carnice_build.checkpoint.gguf_values import KINDS, LIST, Value
from carnice_build.checkpoint.profiles import Source
from carnice_build.checkpoint.quantized import stated_quantization
from carnice_build.dtypes import NUMPY_NAME
from carnice_build.formats.gguf.named import Named
from carnice_build.formats.gguf.naming import (
    About,
    Description,
    describe,
    describe_projector,
)
from carnice_build.graph import ActionGraph, ActionOutput, TensorData, TensorRef, View
from carnice_build.kernels.elementwise import narrow, widen
from carnice_build.models import architecture_of
from carnice_build.models.base import Architecture, Part
from carnice_build.planning.coded import coded
from carnice_build.planning.gather import gathered
from carnice_build.recipe.schema import SourceSpec
from carnice_build.steps.base import Codes, PlanContext
from carnice_build.steps.decode import Decode

REPOSITORY = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "gguf.json"
RUNNER = Path(__file__).parent / "run_llama_cpp_converter.py"

FILE_TYPES: Mapping[str, int] = {"F32": 0, "F16": 1, "BF16": 32}
"""`general.file_type` of the types that the converter writes without loss."""

NAMES = ("general.name", "general.finetune", "general.basename", "general.version")
"""What follows from the name of a folder, among others."""

_TYPES = {0: "F32", 1: "F16", 30: "BF16", 39: "MXFP4"}
_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "MXFP4": Fraction(17, 32)}


@dataclass(frozen=True)
class Written:
    """A GGUF file, but for its tokenizer: metadata, and name, type, shape and digest of tensors."""

    metadata: Mapping[str, Value]
    tensors: Sequence[tuple[str, str, tuple[int, ...], str]]

    def as_json(self) -> Any:
        """As the golden file has it."""
        metadata = {key: [value.kind, value.value] for key, value in self.metadata.items()}
        return {"metadata": metadata, "tensors": [list(item) for item in self.tensors]}


def from_json(tree: Any) -> Written:
    """What `Written.as_json` gave."""
    metadata = {key: Value(*value) for key, value in tree["metadata"].items()}
    tensors = [(name, kind, tuple(shape), digest) for name, kind, shape, digest in tree["tensors"]]
    return Written(metadata, tensors)


def source() -> Path:
    """The folder of llama.cpp's source; a skip where there is none."""
    folder = Path(os.environ.get("LLAMA_CPP") or REPOSITORY / ".llama.cpp")
    if not (folder / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama.cpp's source is not here: make llama-cpp")
    return folder


def converted(folder: Path, dtype: str, *options: str, pre: str = "qwen35") -> Written:
    """What the converter makes of the checkpoint in `folder`, in a file of `dtype`."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.gguf"
        command = [sys.executable, RUNNER, source(), pre, folder, *options]
        command += ["--outtype", dtype.lower(), "--outfile", out]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        return read(out)


def read(path: Path) -> Written:
    """A GGUF file that the converter wrote."""
    content = path.read_bytes()
    reader = _Reader(content)
    magic, _, tensors, entries = reader.take("<4sIQQ")
    assert magic == b"GGUF"
    metadata = {}
    for _ in range(entries):
        key = reader.text()
        value = reader.value(*reader.take("<I"))
        if not key.startswith("tokenizer."):
            metadata[key] = value
    infos = [reader.info() for _ in range(tensors)]
    start = -(-reader.at // 32) * 32
    found = []
    for name, shape, kind, offset in infos:
        dtype = _TYPES[kind]
        size = int(np.prod(shape) * _ELEMENT_BYTES[dtype])
        data = content[start + offset :][:size]
        found.append((name, dtype, shape, digest(data)))
    return Written(metadata, found)


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.content, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        (length,) = self.take("<Q")
        self.at += length
        return self.content[self.at - length : self.at].decode()

    def value(self, number: int) -> Value:
        if number == LIST:
            of, count = self.take("<IQ")
            items = [self.value(of) for _ in range(count)]
            return Value(f"[{_kind(of)}]", [item.value for item in items])
        kind = _kind(number)
        if kind == "str":
            return Value(kind, self.text())
        return Value(kind, self.take(_FORMS[kind])[0])

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text()
        (axes,) = self.take("<I")
        shape = self.take(f"<{axes}Q")
        kind, offset = self.take("<IQ")
        return name, shape, kind, offset


_FORMS = {
    "u8": "<B", "i8": "<b", "u16": "<H", "i16": "<h", "u32": "<I", "i32": "<i", "f32": "<f",
    "bool": "<?", "u64": "<Q", "i64": "<q", "f64": "<d",
}  # fmt: skip


def _kind(number: int) -> str:
    return next(kind for kind, known in KINDS.items() if known == number)


def digest(data: bytes) -> str:
    """The beginning of a SHA-256, which is enough to tell tensors apart."""
    return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True)
class Opened:
    """A checkpoint, its architecture, its view under repaired names, and what is quantized in it.

    Of a quantized checkpoint the view has floats.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    view: View
    codes: Mapping[str, Codes]


def model_of(folder: Path, *, mtp: bool = True) -> Opened:
    """The checkpoint in `folder`, perhaps without its MTP head."""
    checkpoint = open_checkpoint(folder)
    architecture = architecture_of(checkpoint.config, checkpoint.where)
    view = {
        architecture.canonical_name(name) or name: ref
        for name, ref in source_view(checkpoint).items()
    }
    view, codes = _decoded(view, checkpoint, architecture)
    view = gathered(view, architecture, checkpoint.where)
    facts = architecture.tensors
    if not mtp:
        view = {name: ref for name, ref in view.items() if facts[name].part is not Part.MTP}
    return Opened(checkpoint, architecture, view, codes)


def _decoded(
    view: View, checkpoint: Checkpoint, architecture: Architecture
) -> tuple[View, Mapping[str, Codes]]:
    """As `coded`, with weights in F32, as the converter decodes them."""
    method = stated_quantization(checkpoint.config)
    if not method:
        return view, {}
    body = Source("body", SourceSpec(model="local/body"), None, checkpoint)
    context = PlanContext(architecture, ActionGraph(), None, {}, {"body": body})
    codes = coded(view, context)[1] if method["quant_method"] == "mxfp4" else {}
    return Decode(dtype="float32").apply(view, context), codes


def described(
    folder: Path, dtype: str, *, mtp: bool = True, projector: bool = False
) -> Description:
    """What we say that the converter makes of the checkpoint in `folder`."""
    opened = model_of(folder, mtp=mtp)
    architecture, view = opened.architecture, opened.view
    files = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    about = About(folder.name, files, {}, FILE_TYPES[dtype], str(folder))
    if projector:
        return describe_projector(architecture, view, ActionGraph(), about)
    return describe(architecture, view, ActionGraph(), about, opened.codes)


def written(description: Description, dtype: str) -> Written:
    """The file that a description means, in `dtype` where nothing else is said."""
    metadata = {key: _rounded(value) for key, value in description.metadata.items()}
    return Written(metadata, [_made(tensor, dtype) for tensor in description.tensors])


def _rounded(value: Value) -> Value:
    """A value as a file gives it back."""
    if value.kind == "f32":
        return Value("f32", float(np.float32(value.value)))
    if value.kind == "[f32]":
        return Value("[f32]", [float(np.float32(item)) for item in value.value])
    return value


def _made(tensor: Named, dtype: str) -> tuple[str, str, tuple[int, ...], str]:
    if tensor.codes is not None:
        content = np.ascontiguousarray(computed(tensor.codes).array).tobytes()
        return tensor.name, tensor.kind, tensor.shape, digest(content)
    data = computed(tensor.ref)
    half = "F16" if dtype == "F16" else "F32"
    kept = {"F32": "F32", "F16": "F16", "half": half, "matrix": dtype}[tensor.kind]
    array = data.array if data.dtype == kept else narrow(widen(data.array, data.dtype), kept)
    return tensor.name, kept, tensor.shape, digest(np.ascontiguousarray(array).tobytes())


def computed(ref: TensorRef) -> TensorData:
    """The values of a tensor, read or computed here."""
    spec, origin = ref.spec, ref.origin
    if isinstance(origin, ActionOutput):
        inputs = [computed(item) for item in origin.action.inputs]
        outputs = [
            TensorData(item.dtype, np.empty(item.shape, NUMPY_NAME[item.dtype]))
            for item in origin.action.outputs
        ]
        origin.action.op.apply(origin.action.params, inputs, outputs)
        return TensorData(spec.dtype, outputs[origin.index].array.reshape(spec.shape))
    assert origin.file is not None
    content = bytearray(spec.nbytes)
    origin.file.read_into(origin.offset, memoryview(content))
    array = np.frombuffer(content, NUMPY_NAME[spec.dtype]).reshape(spec.shape)
    return TensorData(spec.dtype, array)


@dataclass(frozen=True)
class Case:
    """A checkpoint of the demo, and which of its files in which type."""

    checkpoint: str
    dtype: str
    mtp: bool = True
    projector: bool = False

    @property
    def name(self) -> str:
        """Its key in the golden file."""
        file = "mmproj" if self.projector else "mtp" if self.mtp else "plain"
        return f"{self.checkpoint} {self.dtype} {file}"

    @property
    def folder(self) -> Path:
        """Where the checkpoint is."""
        return REPOSITORY / "demo" / self.checkpoint

    def converted(self) -> Written:
        """By the converter."""
        options = ["--mmproj"] if self.projector else [] if self.mtp else ["--no-mtp"]
        return converted(self.folder, self.dtype, *options)

    def described(self) -> Written:
        """By us."""
        made = described(self.folder, self.dtype, mtp=self.mtp, projector=self.projector)
        return written(made, self.dtype)


def cases() -> list[Case]:
    """Those of the golden file."""
    found = [Case("carnice-v2-27b", "F16", mtp=False)]
    for dtype in FILE_TYPES:
        found.append(Case("qwen3.6-27b", dtype))
        found.append(Case("qwen3.6-27b", dtype, projector=True))
    return found


if __name__ == "__main__":
    found = {case.name: case.converted().as_json() for case in cases()}
    GOLDEN.write_text(json.dumps(found) + "\n")
