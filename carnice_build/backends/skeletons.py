"""transformers' models of one type without weights, built of configs that differ.

What a table says of a family follows from them: names and shapes as they are saved, and the modules
that own the tensors.
Needs the `torch` extra.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from carnice_build.backends.config_entries import (
    GENERIC,
    Path,
    defaults_of,
    entries_of,
    other_values,
    small_sizes,
    values_of,
)
from carnice_build.errors import BackendError, CheckpointError, RecipeError, nearest
from carnice_build.models.base import Part, Role
from carnice_build.models.derive import SEVERAL, Owner, Sample, rows_of

_ROUTED = re.compile(r"(^|\.)router\.\w+\.weight$")
_ADDS_ONE = re.compile(r"\b1(\.0)?\s*\+\s*self\.weight")


class Skeletons:
    """Models of one type."""

    def __init__(self, model_type: str, entries: Mapping[str, Any], where: str) -> None:
        """`entries` are those of the config.json `where`, none for what the class has by default.

        RecipeError when transformers has no such model, CheckpointError when it does not take the
        entries, BackendError when it cannot build the model.
        """
        if model_type not in CONFIG_MAPPING:
            raise RecipeError(
                f"transformers {transformers.__version__} has no {model_type!r}",
                expected="a model type of transformers, or a config.json",
                nearest=nearest(model_type, sorted(CONFIG_MAPPING)),
            )
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.config_class: Any = CONFIG_MAPPING[model_type]
        self.sections: Mapping[str, Any] = self.config_class.sub_configs
        self.model_class = _model_class(model_type, entries, bool(self.sections))
        self.defaults = defaults_of(self.config_class, self.sections)
        self._base = self._sizes(entries, where)
        self._accept_base()
        self.text = next((name for name in self.sections if name == "text_config"), None)
        self.version = transformers.__version__

    @property
    def aliases(self) -> Mapping[str, str]:
        """What entries of the text model are called when a config is saved."""
        config = self.config_class()
        found: Mapping[str, str] = (
            getattr(config, self.text) if self.text else config
        ).attribute_map
        return found

    @property
    def text_type(self) -> str | None:
        """The model type of the text section."""
        return getattr(self.config_class(), self.text).model_type if self.text else None

    @property
    def tied(self) -> bool:
        """Whether a config ties embeddings that does not say."""
        return bool(self.config_class().tie_word_embeddings)

    def _sizes(self, entries: Mapping[str, Any], where: str) -> dict[Path, Any]:
        """Small sizes of what the config.json has; nothing else of it is ever given to a model."""
        stated = {key: value for key, value in entries.items() if key not in GENERIC}
        try:
            config = self.config_class(**json.loads(json.dumps(stated)))
            return dict(small_sizes(config, self.sections))
        except Exception as error:  # whatever a class thinks of its entries
            why = " ".join(str(error).split())
            raise CheckpointError(
                f"has entries that {self.config_class.__name__} of transformers does not take: "
                f"{type(error).__name__}: {why}",
                where=where,
            ) from None

    def _accept_base(self) -> None:
        """Give up small sizes that the model cannot be built of."""
        while self._made(self._base) is None:
            worst = next((path for path in reversed(list(self._base))), None)
            if worst is None:
                raise BackendError(f"{self.model_class.__name__} of transformers cannot be built")
            del self._base[worst]

    def name(self, path: Path) -> str:
        """What tables call an entry: with its section, but for that of the text model."""
        section, name = path[:-1], path[-1]
        if not section:
            return f"root.{name}" if self.text else name
        return name if section == (self.text,) else f"{section[0]}.{name}"

    def samples(self) -> Iterator[Sample]:
        """The model as it is small, and with one entry changed, and with several.

        The same again where one entry gives it tensors that it has not otherwise.
        """
        base = yield from self._series("", self._base)
        rows = {place for sample in base for place in rows_of(sample.shapes)}
        known = set(rows_of(base[0].shapes))
        for path, values in list(self._other_values(self._configured(self._base))):
            name = self.name(path)
            own = next((sample for sample in base if sample.changed == name), None)
            if own is not None and set(rows_of(own.shapes)) - known:
                known |= set(rows_of(own.shapes))
                changed = next(v for v in values if self._made({**self._base, path: v}))
                yield from self._series(name, {**self._base, path: changed})
        assert known <= rows

    def _series(self, name: str, base: Mapping[Path, Any]) -> Generator[Sample, None, list[Sample]]:
        made = self._made(base)
        assert made is not None
        found = [self._sample(made, None, name)]
        yield found[0]
        fits: dict[Path, Any] = {}
        for path, values in self._other_values(made[0]):
            for value in values:
                if other := self._made({**base, path: value}):
                    found.append(self._sample(other, self.name(path), name))
                    yield found[-1]
                    if type(value) is int:
                        fits[path] = value
                    break
        # What one entry is multiplied with shows when both change.
        for stride in (2, 3):
            for start in range(stride):
                several = dict(list(fits.items())[start::stride])
                if other := self._made({**base, **several}):
                    yield self._sample(other, SEVERAL, name)
        return found

    def _other_values(self, config: Any) -> Iterator[tuple[Path, list[Any]]]:
        return other_values(config, self.sections, self.defaults)

    def _configured(self, changes: Mapping[Path, Any]) -> Any:
        nested: dict[str, Any] = {name: {} for name in self.sections}
        for (*section, name), value in changes.items():
            (nested[section[0]] if section else nested)[name] = value
        try:
            return self.config_class(**nested)
        except Exception:  # whatever a class thinks of its entries
            return None

    def _made(self, changes: Mapping[Path, Any]) -> tuple[Any, Any] | None:
        """The config with these entries and its model; None when transformers refuses."""
        if (config := self._configured(changes)) is None:
            return None
        try:
            with torch.device("meta"):
                return config, self.model_class(config)
        except Exception:  # as above
            return None

    def _sample(self, made: tuple[Any, Any], changed: str | None, series: str) -> Sample:
        config, model = made
        state = _state(model)
        saved = revert_weight_conversion(model, state)
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        entries = {self.name(p): v for p, v in values_of(config, self.sections).items()}
        return Sample(changed, entries, shapes, series)

    def config(self) -> dict[str, Any]:
        """The config.json of the first sample."""
        config = self._configured(self._base)
        found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        return found

    def owners(self) -> Mapping[str, Owner]:
        """Of the small model: what owns its tensors, by the names that they are saved under."""
        made = self._made(self._base)
        assert made is not None
        model = made[1]
        modules = dict(model.named_modules())
        decoder = {id(module) for module in model.get_decoder().modules()}
        strict = set(model._keep_in_fp32_modules_strict or ())
        found: dict[str, Owner] = {}
        for name, tensor in _state(model).items():
            module = modules[name.rpartition(".")[0]]
            part = Part.LAYERS if id(module) in decoder else Part.TOWER
            if module is model.get_output_embeddings():
                part = Part.HEAD
            for saved in _alone(model, name, tensor):
                found[saved] = Owner(
                    type(module).__name__,
                    part,
                    _role(saved, module, tensor, part),
                    offset=isinstance(name, str) and _adds_one(module),
                    wide=any(word in saved.split(".") for word in strict),
                    transposed=bool(getattr(module, "is_transposed", False)),
                )
        return found

    def silent(self) -> Mapping[str, list[Sample]]:
        """By entry that the class works out when a config does not state it: such configs."""
        unset = {
            path
            for path, value, _ in entries_of(self.config_class(), self.sections)
            if type(value) is int and self._raw(path) is None
        }
        return {self.name(path): list(self._silent(path)) for path in unset}

    def _raw(self, path: Path) -> Any:
        """What stands in the class itself."""
        *section, name = path
        config = self.config_class()
        owner = getattr(config, section[0]) if section else config
        return next(field.default for field in dataclasses.fields(owner) if field.name == name)

    def _silent(self, path: Path) -> Iterator[Sample]:
        base = {other: value for other, value in self._base.items() if other != path}
        for changed in (None, *(other for other, value in base.items() if type(value) is int)):
            changes = base if changed is None else {**base, changed: 2 * base[changed]}
            if config := self._configured(changes):
                entries = {self.name(p): v for p, v in values_of(config, self.sections).items()}
                yield Sample(self.name(changed) if changed else None, entries, {})

    def ties(self) -> Mapping[str, str]:
        """What is another tensor when the config ties embeddings."""
        tied = self.model_class._tied_weights_keys
        made = self._made(self._base)
        assert made is not None
        pairs = tied.items() if isinstance(tied, dict) else ()
        state = dict(made[1].state_dict())
        return {
            new: other
            for name, source in pairs
            if name in state and source in state
            for new in _alone(made[1], name, state[name])
            for other in _alone(made[1], source, state[source])
        }

    def modules(self) -> Mapping[str, str]:
        """Beginnings of modules' paths as they are saved, and what they are here instead.

        Longest first, for the first that fits counts.
        """
        made = self._made(self._base)
        assert made is not None
        found: dict[str, str] = {}
        for name, tensor in made[1].state_dict().items():
            for saved in _alone(made[1], name, tensor):
                if pair := _beginnings(saved.rpartition(".")[0], name.rpartition(".")[0]):
                    found.setdefault(*pair)
        pairs = [pair for pair in found.items() if f"{pair[0]}." not in found]
        return dict(sorted(pairs, key=lambda pair: -len(pair[0])))

    def unloaded(self) -> Iterable[str]:
        """Patterns of what checkpoints hold and transformers leaves out, as MTP heads."""
        return sorted(self.model_class._keys_to_ignore_on_load_unexpected or ())


def _model_class(model_type: str, entries: Mapping[str, Any], nested: bool) -> Any:
    stated = entries.get("architectures")
    names = [stated[0]] if isinstance(stated, list) and stated else []
    tables = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    for table in reversed(tables) if nested else tables:
        names.append(table.get(model_type))
    for name in names:
        if isinstance(name, str) and _is_model(found := getattr(transformers, name, None)):
            return found
    raise RecipeError(f"transformers has no language model of {model_type!r}")


def _is_model(found: Any) -> bool:
    """Whether it is a class of models: a config.json may name whatever transformers has."""
    return isinstance(found, type) and issubclass(found, PreTrainedModel)


def _state(model: Any) -> dict[str, torch.Tensor]:
    tied = set(model.all_tied_weights_keys)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _alone(model: Any, name: str, tensor: torch.Tensor) -> list[str]:
    """What one tensor is saved as."""
    try:
        return list(revert_weight_conversion(model, {name: tensor}))
    except Exception:  # one that is saved together with others
        return [name]


def _beginnings(saved: str, here: str) -> tuple[str, str] | None:
    """How two paths of a module begin that end alike; None where only more would tell them apart.

    A path that is only shorter than the other keeps one name, to be told from others by.
    """
    old, new = saved.split("."), here.split(".")
    if old == new or old[-1] != new[-1]:
        return None
    ends = zip(reversed(old), reversed(new), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    if shared == min(len(old), len(new)):
        shared -= 1
    old, new = old[: len(old) - shared], new[: len(new) - shared]
    if any(name.isdigit() for name in (*old, *new)):
        return None
    dot = "." if shared else ""
    return ".".join(old) + dot, ".".join(new) + dot


def _adds_one(module: nn.Module) -> bool:
    code = "".join(inspect.getsource(function) for function in _own_functions(module))
    return "Norm" in type(module).__name__ and bool(_ADDS_ONE.search(code))


def _own_functions(module: nn.Module) -> Iterator[Any]:
    for value in vars(type(module)).values():
        if inspect.isfunction(value):
            yield value


def _role(name: str, module: nn.Module, tensor: torch.Tensor, part: Part) -> Role:
    """By the class of the module, and by what kinds of names such modules have."""
    kind, matrix = type(module).__name__, name.endswith(".weight")
    if isinstance(module, nn.Linear) and matrix:
        routes = len(tensor) == 1 or _ROUTED.search(name)
        return Role.ROUTER if routes else Role.LINEAR
    if part is Part.TOWER:
        return Role.VISION
    if name.endswith("bias") and not name.endswith("correction_bias"):
        return Role.STATE if name.endswith("dt_bias") else Role.BIAS
    if isinstance(module, nn.Embedding):
        return Role.EMBEDDING
    if "Norm" in kind:
        return Role.NORM
    if "Conv" in kind:
        return Role.CONV
    if kind.endswith("Router") and tensor.ndim == 2:
        return Role.ROUTER
    if tensor.ndim == 3 and kind.endswith("Experts"):
        # What lies as columns is a part of a stack, which only a person can say.
        return Role.STATE if getattr(module, "is_transposed", False) else Role.LINEAR
    return Role.STATE
