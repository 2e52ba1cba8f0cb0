"""Which modules stay unquantized: what a config is to list, and what is wrong with what one lists.

An engine builds the modules of the model that config.json describes, and quantizes each that it
does not find listed: a head that is tied to the embedding and a vision tower without tensors too.
So what is listed follows from the config's architecture, and not from the tensors of the folder.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator

from carnice_build.dtypes import WIDE_FLOATS
from carnice_build.formats.folder import ModelFolder
from carnice_build.models.base import Architecture, Role, TensorFact
from carnice_build.recipe.patterns import compile_pattern
from carnice_build.tensors import numbered

_PATTERN = "re:"


def unquantized_modules(
    architecture: Architecture, quantized: Container[str], roles: Collection[Role]
) -> list[str]:
    """Paths of the modules of `roles` that stay plain, and of those that an engine fuses from them.

    An engine that runs several linears as one looks up the fused name alone: without it an MTP
    head in BF16 is taken for a quantized one, and drafts nothing.
    """
    plain = plain_modules(architecture, quantized, roles)
    fused = [
        fusion.module
        for fusion in architecture.fusions
        if all(part in plain for part in fusion.parts)
    ]
    return sorted([*plain, *fused])


def plain_modules(
    architecture: Architecture, quantized: Container[str], roles: Collection[Role]
) -> dict[str, None]:
    """Paths of the modules of `roles` that stay plain, in the order of the model."""
    return {
        module: None
        for fact in architecture.built.values()
        if fact.role in roles and fact.module not in quantized
        for module in modules_of(fact)
        if module not in quantized
    }


def engine_names(architecture: Architecture, entries: Iterable[str]) -> list[str]:
    """`entries` of a list of modules as engines spell them; patterns are as they are."""
    return [name for entry in entries for name in architecture.engine_names(entry)]


def modules_of(fact: TensorFact) -> list[str]:
    """The module of a fact; of a stack, that of each expert."""
    return numbered(fact.module, fact.shape[0]) if fact.stacked else [fact.module]


def ignore_problems(
    folder: ModelFolder,
    architecture: Architecture,
    listed: Collection[str],
    roles: Collection[Role],
    *,
    fused: bool = True,
    respelled: bool = True,
) -> Iterator[str]:
    """Modules of `roles` that are plain and not listed, and entries for modules that are not.

    A module is quantized when the folder holds it as something else than a float; one without
    tensors, such as a tied head, is built plain.
    Where engines look a `fused` module up under its own name alone, it must be listed exactly when
    its parts are plain.
    An entry is a name, or `re:` and a pattern for the beginning of names.
    Names are those of engines where they are `respelled`, else those of the checkpoint.
    """
    owners = {name.rpartition(".")[0] for name in folder.tensors}
    modules = [
        module
        for fact in architecture.built.values()
        if fact.role in roles
        for module in modules_of(fact)
    ]
    floats = {module for module in modules if _is_plain(folder, f"{module}.weight")}
    quantized = {module for module in modules if module in owners} - floats
    expected = unquantized_modules if fused else plain_modules
    plain = set(expected(architecture, quantized, roles))
    if respelled:
        plain = set(engine_names(architecture, plain))
    for fusion in architecture.fusions:
        if quantized.issuperset(fusion.parts):
            quantized.add(fusion.module)
        elif not quantized.isdisjoint(fusion.parts):
            yield f"only some of {', '.join(fusion.parts)} are quantized, which engines fuse"
    if respelled:
        quantized = set(engine_names(architecture, quantized))
    covered: set[str] = set()
    for entry in sorted(set(listed)):
        found = _matching(entry, plain | quantized)
        covered |= found
        for module in sorted(found & quantized):
            by = "" if entry == module else f" by {entry}"
            yield f"config.json lists {module}{by}, which is quantized"
        if not found:
            yield f"config.json lists {entry}, which is no module of the model"
    for module in sorted(plain - covered):
        yield f"config.json does not list {module}, which is not quantized"


def _matching(entry: str, modules: Collection[str]) -> set[str]:
    if not entry.startswith(_PATTERN):
        return {entry}.intersection(modules)
    try:
        pattern = compile_pattern(entry)
    except ValueError:
        return set()
    return {module for module in modules if pattern.match(module)}


def _is_plain(folder: ModelFolder, name: str) -> bool:
    return name in folder.tensors and folder.tensors[name].spec.dtype in WIDE_FLOATS
