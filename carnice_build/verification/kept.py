"""Figures that are there are not measured again.

A figure is kept in the cache under a digest of all that decides it.
There are two kinds: the checks of a folder (`Memory.checks`), and what is measured of a source for
all variants that are made from it (`Kept.measured`, `Kept.states`), in whatever process.
What is damaged is absent, and what failed is never kept.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import carnice_build.errors
from carnice_build.formats.folder import BUILD_NAME, read_build
from carnice_build.keys import canonical_json, library_version
from carnice_build.models.base import Part
from carnice_build.package.files import decides
from carnice_build.planning.planner import VariantPlan
from carnice_build.processor import gpus, vector_instructions
from carnice_build.store.digests import digest_bytes, digest_texts
from carnice_build.store.files import open_regular, write_atomically
from carnice_build.store.history import measured_path, read_measured, write_measured
from carnice_build.store.records import Records
from carnice_build.tensors import SourceTensor
from carnice_build.verification.result import Check, Outcome
from carnice_build.verification.running import AcceptanceRow, PerplexityRow, Tables

if TYPE_CHECKING:
    # It brings numpy, and a build that finds everything in the cache needs none.
    from carnice_build.formats.checks import FormatChecks

T = TypeVar("T")

_CODE = ("backends", "calibration", "chat", "checkpoint", "formats", "kernels", "models")
"""The parts of the package whose code decides figures, beside `verification` and single files."""

_DIGEST_LENGTH = 64


Key = Mapping[str, Any]
"""Facts, JSON-ready: all that can change a figure."""


@dataclass(frozen=True)
class Kept:
    """What is in the cache `root`, nowhere if it is None; what is older than `since` is not there.

    `since` is in seconds since 1970.
    """

    root: Path | None = None
    since: float = 0.0

    def measured(self, facts: Key, kind: type[T], measure: Callable[[], T]) -> tuple[T, float]:
        """What `measure` gives, a dataclass of `kind`, or gave under the same `facts`, and when."""
        found = self.found(facts, kind)
        if found is None:
            found = measure(), time.time()
            self.keep(facts, *found)
        return found

    def found(self, facts: Key, kind: type[T]) -> tuple[T, float] | None:
        """What is known under the `facts`, a dataclass of `kind`, and of when it is."""
        from pydantic import TypeAdapter, ValidationError

        value = read_measured(self.root, _key(facts)) if self.root else None
        at = value.get("at") if value else None
        if value is None or not isinstance(at, float) or not self._counts(at):
            return None
        try:
            return TypeAdapter(kind).validate_python(value.get("found")), at
        except (ValidationError, TypeError, ValueError):
            return None

    def _counts(self, at: float) -> bool:
        """Whether what is of this time is new enough; nothing is of a time to come."""
        return self.since <= at <= time.time()

    def keep(self, facts: Key, found: Any, at: float) -> None:
        """Remember what was `found`, a dataclass, under the `facts`."""
        if self.root is not None:
            # A figure is worth as much where the cache cannot be written to.
            with contextlib.suppress(OSError):
                write_measured(self.root, _key(facts), {"at": at, "found": asdict(found)})

    def states(self, facts: Key, width: int, make: Callable[[], Any]) -> Any:
        """Float32 [rows, width] of numpy that `make` gives, or gave under the same `facts`."""
        import numpy as np

        path = measured_path(self.root, _key(facts)) if self.root else None
        raw = self._bytes(path) if path else b""
        content = memoryview(raw)[_DIGEST_LENGTH:]
        whole = len(content) and len(content) % (np.float32().itemsize * width) == 0
        if whole and raw[:_DIGEST_LENGTH] == digest_bytes(content).encode():
            return np.frombuffer(bytearray(content), np.float32).reshape(-1, width)
        found = np.ascontiguousarray(make(), np.float32)
        if path is not None:
            content = memoryview(found.data).cast("B")
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, digest_bytes(content).encode() + content)
        return found

    def _bytes(self, path: Path) -> bytes:
        """What is in a file that counts, else nothing."""
        try:
            with open_regular(path) as file:
                return file.read() if self._counts(path.stat().st_mtime) else b""
        except OSError:
            return b""


def _key(facts: Key) -> str:
    return digest_texts([canonical_json(facts)])


@dataclass(frozen=True)
class KeptSource:
    """What is kept of a source for all that is made from it; nothing where that is not known.

    `facts` name its content and what computes; `model` is its name among those that are compared.
    """

    kept: Kept = Kept()
    facts: Key = field(default_factory=dict)
    model: str = ""

    def measured(self, model: str, facts: Key, kind: type[T], measure: Callable[[], T]) -> T:
        """What `measure` gives of `model`, or gave of the source under the same `facts`."""
        if model != self.model:
            return measure()
        return self.kept.measured({**self.facts, **facts}, kind, measure)[0]

    def states(self, facts: Key, width: int, make: Callable[[], Any]) -> Any:
        """As `Kept.states`, of the source."""
        return self.kept.states({**self.facts, **facts}, width, make)


NOT_KEPT = KeptSource()


@dataclass(frozen=True)
class _Record:
    """Checks that passed, and the rows of tables that go with them."""

    checks: Sequence[Check]
    perplexities: Sequence[PerplexityRow]
    acceptances: Sequence[AcceptanceRow]


@dataclass(frozen=True)
class Memory:
    """What is known of one variant's folder: `facts` are what decides all of its figures.

    `source` names the content of what it was made from, and what computes there.
    `folders` are those with its files, by what they held when that was looked at.
    """

    kept: Kept = Kept()
    facts: Key = field(default_factory=dict)
    source: Key = field(default_factory=dict)
    folders: Mapping[Path, str] = field(default_factory=dict)

    @staticmethod
    def of(
        kept: Kept, variant: VariantPlan, folder: Path, checks: FormatChecks, *, sound: bool
    ) -> Memory:
        """That of `variant` as it lies in `folder`; nothing is known of one that is not `sound`.

        Sound is a folder whose files are those that its build.json names by their digests.
        """
        # It knows of models that run, and these of what is kept.
        from carnice_build.verification.sources import source_tensors

        if kept.root is None or not sound:
            return Memory()
        tensors = source_tensors(variant)
        run = {name: tensor for name, tensor in tensors.items() if _runs(variant, name)}
        source = {
            "tensors": _contents(kept.root, run),
            "config": _plain(variant.architecture.text_config),
            "platform": [sys.platform, vector_instructions(), *gpus()],
            "code": _code(),
        }
        names = [variant.name, *(other.name for other in variant.companions)]
        folders = {folder.parent / name: _folder(folder.parent / name) for name in names}
        facts = {
            "variant": variant.name,
            "folders": list(folders.values()),
            "quantized": {name: str(scheme) for name, scheme in _quantized(variant)},
            "source": source,
            "tensors": _contents(kept.root, tensors),
            # That of another package, maybe.
            "format": digest_bytes(Path(inspect.getfile(type(checks))).read_bytes()),
        }
        return Memory(kept, facts, source, folders)

    def of_source(self, model: str, **facts: Any) -> KeptSource:
        """For a worker: what is kept of the source, which is called `model` there.

        `facts` are what else decides all of its figures, as versions of libraries.
        """
        if self.kept.root is None:
            return NOT_KEPT
        return KeptSource(self.kept, {**self.source, **facts}, model)

    def checks(
        self,
        name: str,
        facts: Key,
        tables: Tables,
        make: Callable[[], Check | list[Check]],
    ) -> list[Check]:
        """What `make` finds and adds to `tables`, or found under the same facts.

        `facts` are what decides the figures of `name` beside the folder and its source: texts,
        lengths, versions of libraries.
        Only checks that passed are kept, with the row of the source that they are compared with,
        and nothing of a folder that was built again meanwhile.
        """
        if self.kept.root is None:
            return _listed(make())
        facts = {**self.facts, "check": name, **facts}
        known = self.kept.found(facts, _Record)
        if known is not None:
            record, at = known
            for row in record.perplexities:
                if not (row.source and tables.has_source(row.library, row.source)):
                    tables.perplexities.append(row)
            tables.acceptances += record.acceptances
            on = time.strftime("%Y-%m-%d", time.localtime(at))
            return [replace(check, measured=on) for check in record.checks]
        rows, drafts = len(tables.perplexities), len(tables.acceptances)
        found = _listed(make())
        added = tables.perplexities[rows:]
        libraries = {row.library for row in added}
        sources = [row for row in tables.perplexities if row.source and row.library in libraries]
        missing = any(row.missing for row in sources)
        passed = all(check.outcome is Outcome.PASSED for check in found)
        if passed and not missing and self._holds():
            own = [row for row in added if not row.source]
            record = _Record(found, [*sources, *own], tables.acceptances[drafts:])
            self.kept.keep(facts, record, time.time())
        return found

    def _holds(self) -> bool:
        """Whether the folders hold what they held."""
        return all(_folder(path) == content for path, content in self.folders.items())


def _listed(found: Check | list[Check]) -> list[Check]:
    return [found] if isinstance(found, Check) else found


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages, for facts; nothing is imported."""
    return {package: library_version(package) for package in packages}


def _quantized(variant: VariantPlan) -> list[tuple[str, Any]]:
    both = (variant, *variant.companions)
    return [
        (f"{one.name} {module}", scheme)
        for one in both
        for module, scheme in one.conversion.quantized.items()
    ]


def _folder(folder: Path) -> str:
    """The content of a folder as its build.json names it, without what only people read."""
    record = read_build(folder)
    files = record.get("files")
    named = {name: item for name, item in files.items() if decides(name)} if files else {}
    others = [
        f"{path.relative_to(folder)} {path.stat().st_size} {digest_bytes(path.read_bytes())}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != BUILD_NAME
        and path.relative_to(folder).as_posix() not in (files or {})
        and decides(path.relative_to(folder).as_posix())
    ]
    return digest_texts([canonical_json(named), canonical_json(record.get("tensors")), *others])


def _runs(variant: VariantPlan, name: str) -> bool:
    """Whether a source's tensor is of the model that writes text, without drafts and images."""
    fact = variant.architecture.tensors.get(name)
    return fact is None or fact.part not in (Part.MTP, Part.TOWER)


def _contents(root: Path, tensors: Mapping[str, SourceTensor]) -> str:
    """What the source's tensors hold: by their digests where a build has read them."""
    known: dict[str, str] = {}
    with contextlib.suppress(carnice_build.errors.CarniceError):
        if (root / "records").is_dir():
            records = Records(root / "records")
            with contextlib.closing(records):
                for tensor in tensors.values():
                    found = records.source_digest(tensor.identity)
                    known[tensor.identity] = found or tensor.identity
    return digest_texts(
        f"{name} {tensor.spec.dtype} {list(tensor.spec.shape)} "
        f"{known.get(tensor.identity, tensor.identity)}"
        for name, tensor in sorted(tensors.items())
    )


def _plain(config: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(config, default=str))


def _code() -> str:
    """Our code that decides figures."""
    package = Path(carnice_build.errors.__file__).parent
    files = sorted(package.glob("*.py"))
    files += [
        path
        for part in (*_CODE, "verification")
        for path in sorted((package / part).rglob("*"))
        if path.suffix in (".py", ".yaml")
    ]
    return digest_texts(digest_bytes(path.read_bytes()) for path in files)
