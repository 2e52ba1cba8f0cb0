"""Everything that is known of the built variants, side by side; nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carnice_build.commands.findings import Findings, folder_stamp, load_findings
from carnice_build.commands.options import Options
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import CheckpointError, StoreError
from carnice_build.formats.folder import read_build, read_object
from carnice_build.models import architecture_of
from carnice_build.recipe.loader import find_recipe, list_recipes
from carnice_build.store.digests import digest_bytes
from carnice_build.store.history import BuildRecord, read_build_record, read_history
from carnice_build.verification.result import Check, Outcome
from carnice_build.version import __version__


@dataclass(frozen=True)
class ModuleError:
    """||dequantized - source|| / ||source|| of one quantized module; `layer` is None outside."""

    module: str
    kind: str
    layer: int | None
    error: float | None


@dataclass(frozen=True)
class VariantSummary:
    """One built folder; `findings` and `build` are None where nothing is known of this folder.

    `size` is that of all its files, `model` and `profile` say what it was made from.
    """

    variant: str
    description: str
    format: str
    model: str
    profile: str
    tools: Mapping[str, str]
    parameters: int
    bits_per_weight: float
    size: int
    findings: Findings | None
    errors: Sequence[ModuleError]
    build: BuildRecord | None

    @property
    def passed(self) -> bool:
        """True when checks were made and none of them failed."""
        checks = self.findings.checks if self.findings else ()
        return bool(checks) and all(item.outcome is not Outcome.FAILED for item in checks)

    def check(self, name: str) -> Check | None:
        """What the check of this name found, None when it was never made."""
        checks = self.findings.checks if self.findings else ()
        return next((check for check in checks if check.name == name), None)


@dataclass(frozen=True)
class Sharing:
    """What the variants have in common.

    `tensor_bytes[i][j]` are the bytes of variant i's tensors whose content is in variant j too.
    `outputs` is the size of all folders, one by one; `folders` and `cache` are what is on disk, a
    file with many links counted once, in the cache only when no folder links to it.
    Of the variants' `actions`, one by one, `distinct_actions` are different.
    """

    tensor_bytes: Sequence[Sequence[int]]
    outputs: int
    folders: int
    cache: int
    actions: int
    distinct_actions: int


@dataclass(frozen=True)
class Report:
    """The variants by size, smallest first, and what they share."""

    version: str
    variants: Sequence[VariantSummary]
    sharing: Sharing

    @property
    def demo(self) -> bool:
        """True when a variant was made from the demo stand-ins."""
        return any(variant.profile == "demo" for variant in self.variants)


def built_variants(options: Options) -> list[str]:
    """The recipes whose folder is in `options.out`."""
    names = [path.stem for path in list_recipes(options.recipes)]
    return [name for name in names if read_build(options.out / name)]


def unverified(names: Iterable[str], options: Options) -> list[str]:
    """Those of the built variants whose folder, as it is now, was never verified and run."""
    findings = {name: _findings(name, options) for name in names if _record(name, options)}
    return [name for name, found in findings.items() if not (found and found.ran)]


def collect_report(names: Sequence[str], options: Options) -> Report:
    """Gather what builds and verifications left about the named variants.

    Raises StoreError for a variant that is not built and when there is none at all,
    CheckpointError for a damaged folder.
    """
    if not names:
        raise StoreError("holds no build", where=str(options.out), expected="`carnice build` first")
    records = {name: _record(name, options) for name in dict.fromkeys(names)}
    variants = [_summary(name, record, options) for name, record in records.items()]
    variants.sort(key=lambda variant: (variant.size, variant.variant))
    ordered = {variant.variant: records[variant.variant] for variant in variants}
    return Report(__version__, variants, _sharing(ordered, options))


def _record(name: str, options: Options) -> dict[str, Any]:
    find_recipe(name, options.recipes)
    folder = options.out / name
    record = read_build(folder)
    if not record:
        raise StoreError("holds no build", where=str(folder), expected=f"`carnice build {name}`")
    return record


def _findings(name: str, options: Options) -> Findings | None:
    return load_findings(options.cache, name, folder_stamp(options.out / name))


def _summary(name: str, record: Mapping[str, Any], options: Options) -> VariantSummary:
    folder = options.out / name
    with _damage_named(folder):
        recipe, body = record["recipe"], next(iter(record["sources"].values()))
        findings = _findings(name, options)
        build = read_build_record(options.cache, name)
        return VariantSummary(
            variant=name,
            description=str(recipe.get("description", "")),
            format=str(recipe["quantize"]["format"]),
            model=str(body["model"]),
            profile=str(body["profile"]),
            tools=dict(record["tools"]),
            parameters=int(record["parameters"]),
            bits_per_weight=float(record["bits_per_weight"]),
            size=sum(path.stat().st_size for path in _files(folder)),
            findings=findings,
            errors=list(_errors(folder, findings)),
            build=build if build and build.key == record["key"] else None,
        )


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Turn what reading a build.json of another form raises into a CheckpointError."""
    try:
        yield
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
        what = f"build.json is damaged: {type(error).__name__} {error}"
        raise CheckpointError(what, where=str(folder)) from None


def _errors(folder: Path, findings: Findings | None) -> Iterator[ModuleError]:
    """The relative errors that check `round trip` found, with the modules' places."""
    checks = findings.checks if findings else ()
    modules = next((check.details.get("modules") for check in checks if _has_modules(check)), None)
    if not modules:
        return
    architecture = architecture_of(read_object(folder / "config.json"), str(folder))
    for module, error in modules.items():
        name = f"{module}.weight"
        if fact := architecture.tensors.get(architecture.canonical_name(name) or name):
            yield ModuleError(
                module, architecture.module_kind(fact.name), fact.layer, _number(error)
            )


def _number(error: Any) -> float | None:
    return None if error is None else float(error)


def _has_modules(check: Check) -> bool:
    return isinstance(check.details.get("modules"), dict)


def _sharing(records: Mapping[str, Mapping[str, Any]], options: Options) -> Sharing:
    contents = [_contents(options.out / name, record) for name, record in records.items()]
    digests = [set(content.values()) for content in contents]
    folders = [_files(options.out / name) for name in records]
    once = _sizes(path for files in folders for path in files)
    cached = _sizes(_files(options.cache))
    actions = [_action_digests(options.cache, name) for name in records]
    return Sharing(
        tensor_bytes=[[_bytes_in(content, other) for other in digests] for content in contents],
        outputs=sum(path.stat().st_size for files in folders for path in files),
        folders=sum(once.values()),
        cache=sum(size for inode, size in cached.items() if inode not in once),
        actions=sum(len(found) for found in actions),
        distinct_actions=len(set().union(*actions)),
    )


Content = tuple[str, int]
"""A tensor's digest and bytes."""


def _contents(folder: Path, record: Mapping[str, Any]) -> dict[str, Content]:
    with _damage_named(folder):
        return {
            name: (str(item["digest"]), TensorSpec(item["dtype"], tuple(item["shape"])).nbytes)
            for name, item in record["tensors"].items()
        }


def _bytes_in(content: Mapping[str, Content], other: set[Content]) -> int:
    return sum(tensor[1] for tensor in content.values() if tensor in other)


def _action_digests(cache: Path, name: str) -> set[str]:
    """What tells the actions of a variant's last build apart."""
    history = read_history(cache, name) or {}
    return {digest_bytes(json.dumps(facts, sort_keys=True).encode()) for facts in history.values()}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _sizes(paths: Iterable[Path]) -> dict[tuple[int, int], int]:
    """Bytes of each file by what it is on disk."""
    stats = [path.stat() for path in paths]
    return {(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}
