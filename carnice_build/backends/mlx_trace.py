"""What mlx-lm does to a checkpoint, found by having it load tensors that hold nothing.

mlx-lm's own `load_model` runs on lazy arrays inside `mlx.core.export_function`, which hands over
the graph of every parameter without computing any.  To be called in a worker process: it stands
in for parts of mlx and of mlx-lm.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from carnice_build.backends.mlx_graph import build, written
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import MOST_LISTED, BackendError
from carnice_build.extras import pip_install
from carnice_build.tensors import STACK, numbered

TRACER_VERSION = 2
"""Rises whenever another answer would be given about the same checkpoint.

That of all that traces, `mlx_graph` and `mlx_vlm_trace` too; answers are remembered by it.
"""


def answer(config: Mapping[str, Any], tensors: Mapping[str, Sequence[Any]]) -> str:
    """See `trace`; each of `tensors` as its type and a list of sizes."""
    return trace(config, {name: TensorSpec(row[0], tuple(row[1])) for name, row in tensors.items()})


def trace(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> str:
    """What `mlx_lm.convert -q` makes of a checkpoint of these tensors, as JSON.

    Either `{"refusal": sentence}` with what mlx-lm says, or what `formats.mlx.trace` reads.
    """
    return traced(MlxLm(), config, tensors)


class Library:
    """A library that makes MLX folders; `utils` is its module that loads models by `mx.load`."""

    name: ClassVar[str]
    utils: Any

    def load(self, folder: Path) -> tuple[Any, Mapping[str, Any]]:
        """The model, lazily, and its config."""
        raise NotImplementedError

    def predicate(self, model: Any) -> Callable[[str, Any], Any]:
        """What says of each module whether it is quantized, and how where that is special."""
        raise NotImplementedError


class MlxLm(Library):
    """mlx-lm, which runs text models."""

    name = "mlx-lm"

    def __init__(self) -> None:
        self.utils = _mlx_lm_utils()

    def load(self, folder: Path) -> tuple[Any, Mapping[str, Any]]:
        """See `Library.load`."""
        model, config = self.utils.load_model(folder, lazy=True)
        return model, config

    def predicate(self, model: Any) -> Callable[[str, Any], Any]:
        """See `Library.predicate`."""
        return getattr(model, "quant_predicate", None) or (lambda path, module: True)


def traced(library: Library, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> str:
    """What a library's `convert` makes of a checkpoint; see `trace`."""
    mx = _mlx()
    names = list(tensors)
    arrays = [mx.zeros(spec.shape, _mlx_dtype(mx, spec.dtype)) for spec in tensors.values()]
    messages: list[Mapping[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, _stand_ins(mx):
        loaded = _Loaded(library, as_checkpoint(Path(folder), config), names)
        try:
            mx.export_function(messages.append, loaded, *arrays)
        except BackendError:
            raise
        except Exception as error:
            if loaded.refusal is None:
                raise BackendError(
                    f"mlx cannot tell what {library.name} does: {_sentence(error)}"
                ) from None
    if loaded.refusal is not None:
        return json.dumps({"refusal": _sentence(loaded.refusal)})
    dtypes = {name: spec.dtype for name, spec in tensors.items()}
    nodes = build(messages, names, dtypes, lambda dtype: _NAMES[str(dtype).rpartition(".")[2]])
    made = written(zip(loaded.parameters, nodes, strict=True))
    result = {
        **made,
        "dropped": _dropped(made["tensors"], names),
        "modules": loaded.modules,
        "quantized": loaded.quantized,
        "stated": loaded.stated,
    }
    return json.dumps(result, sort_keys=True, separators=(",", ":"))


def _dropped(rows: Sequence[Any], names: Sequence[str]) -> list[str]:
    """Those of `names` that none of the tensors of `mlx_graph.written` is made of."""
    sources = {(name, shape[0]) for row in rows for name, _, shape in row[3] if STACK in name}
    used = {name for row in rows for name, *_ in row[3]}
    used |= {member for name, count in sources for member in numbered(name, count)}
    return [name for name in names if name not in used]


def _sentence(error: Exception) -> str:
    """What was raised, in one line, as the library says it."""
    line = " ".join(str(error).split())
    names = line.split(", ")
    if len(names) > MOST_LISTED:
        # Of a name for each weight, the first ones say it.
        line = f"{', '.join(names[:MOST_LISTED])} and {len(names) - MOST_LISTED} more"
    return f"{type(error).__name__}: {line[:400]}"


def as_checkpoint(folder: Path, config: Mapping[str, Any]) -> Path:
    """`folder` with what libraries look for before they read a file by `mx.load`."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").touch()
    return folder


_PASSING = (BackendError, ImportError, MemoryError, OSError)
"""What says nothing of the model, but of this machine and of what is installed on it."""


class _Loaded:
    """Loads the model from arrays, as `convert` does before it quantizes.

    `refusal` is what the library raised of the model, which it will raise each time.
    """

    def __init__(self, library: Library, folder: Path, names: Sequence[str]) -> None:
        self._library = library
        self._folder = folder
        self._names = names
        self.refusal: Exception | None = None
        self.parameters: list[str] = []
        self.modules: dict[str, Any] = {}
        self.quantized: dict[str, Any] = {}
        self.stated: dict[str, Any] | None = None

    def __call__(self, *arrays: Any) -> list[Any]:
        """The model's parameters."""
        weights = dict(zip(self._names, arrays, strict=True))
        self._library.utils.mx.load = lambda *_, **__: dict(weights)
        try:
            return self._load()
        except _PASSING:
            raise
        except Exception as error:
            self.refusal = error
            raise

    def _load(self) -> list[Any]:
        model, config = self._library.load(self._folder)
        self.stated = config.get("quantization")
        cast_as_stated(model, config)
        predicate = self._library.predicate(model)
        flatten = module("mlx.utils").tree_flatten
        is_module = module("mlx.nn").Module.is_module
        for path, item in flatten(model.leaf_modules(), is_leaf=is_module):
            if hasattr(item, "to_quantized"):
                if verdict := predicate(path, item):
                    self.modules[path] = verdict if isinstance(verdict, dict) else {}
            elif hasattr(item, "bits"):
                # Quantized by whoever made the checkpoint.
                keys = ("group_size", "bits", "mode")
                self.quantized[path] = {key: getattr(item, key) for key in keys}
        parameters = flatten(model.parameters())
        self.parameters = [name for name, _ in parameters]
        return [array for _, array in parameters]


def cast_as_stated(model: Any, config: Mapping[str, Any]) -> None:
    """Cast parameters as `convert` of mlx-lm and of mlx-vlm does: floats alone."""
    mx, map_with_path = module("mlx.core"), module("mlx.utils").tree_map_with_path
    dtype = config.get("torch_dtype", None)
    if dtype is None and (text := config.get("text_config", None)):
        dtype = text.get("dtype", None)
    if dtype not in ("float16", "bfloat16", "float32"):
        return
    casts = getattr(model, "cast_predicate", lambda _: True)

    def to_dtype(name: str, value: Any) -> Any:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(getattr(mx, dtype)) if casts(name) and floating else value

    model.update(map_with_path(to_dtype, model.parameters()))


_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
"""Types of mlx by their names, as safetensors call them."""

_BYTES = ("F8_E4M3", "F8_E5M2", "F8_E8M0")
"""What mlx loads as bytes."""


def _mlx_dtype(mx: Any, dtype: str) -> Any:
    if dtype in _BYTES:
        return mx.uint8
    return getattr(mx, next(name for name, known in _NAMES.items() if known == dtype))


@contextmanager
def _stand_ins(mx: Any) -> Iterator[None]:
    """Stand-ins for what `export_function` cannot tell of, and for reading files.

    `contiguous` changes no number.  `from_fp8` becomes a cast of what is seen as bool, which
    nothing else makes, and which `mlx_graph` knows again.
    """
    kept = {name: getattr(mx, name) for name in ("contiguous", "from_fp8", "load")}
    mx.contiguous = lambda array, *_, **__: array
    mx.from_fp8 = lambda array, dtype=mx.bfloat16, **_: array.view(mx.bool_).astype(dtype)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(mx, name, value)


def _mlx() -> Any:
    try:
        return module("mlx.core")
    except ImportError:
        raise BackendError("mlx is not installed", expected=pip_install("mlx")) from None


def module(name: str) -> Any:
    """A module of mlx or what is built on it, of whose types nothing is known."""
    return import_module(name)


def _mlx_lm_utils() -> Any:
    """`mlx_lm.utils` without what `mlx_lm` imports first: transformers, seconds of it."""
    if "mlx_lm" not in sys.modules:
        found = find_spec("mlx_lm")
        if found is None or not found.submodule_search_locations:
            raise BackendError("mlx-lm is not installed", expected=pip_install("mlx"))
        package = ModuleType("mlx_lm")
        package.__path__ = list(found.submodule_search_locations)
        tokenizers = ModuleType("mlx_lm.tokenizer_utils")
        tokenizers.TokenizerWrapper = tokenizers.load = None  # type: ignore[attr-defined]
        sys.modules["mlx_lm"] = package
        sys.modules["mlx_lm.tokenizer_utils"] = tokenizers
    return module("mlx_lm.utils")
