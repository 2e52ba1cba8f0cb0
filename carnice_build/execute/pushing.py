"""What of a cache goes to a remote, so that other machines need to compute nothing of a variant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from carnice_build.errors import StoreError
from carnice_build.execute.streaming import sample_digest
from carnice_build.graph import Action, ProcessOp
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.status import Contents
from carnice_build.remote.batches import Body, PackEntry
from carnice_build.remote.index import blob_name, pack_name
from carnice_build.remote.upload import LocalBytes
from carnice_build.store.digests import digest_bytes, digest_texts
from carnice_build.store.store import Store
from carnice_build.tensors import SourceTensor

_SMALL_BYTES = 1 << 20
"""Of a result that no pack holds and that took no process: larger ones are made again sooner."""


def holdings(
    variants: Sequence[VariantPlan], store: Store, *, partial: bool = False
) -> tuple[dict[str, Body], dict[str, LocalBytes]]:
    """A batch's body for each variant, and the files that they speak of, by their objects' names.

    Of a pack that is not finished, the tensors that are there go one by one.
    StoreError for a variant of which there is nothing; it is left out if they may be `partial`.
    """
    contents = Contents(store)
    bodies: dict[str, Body] = {}
    files: dict[str, LocalBytes] = {}
    for variant in variants:
        body = _Holding(variant, store, contents, files).body()
        if body is not None:
            bodies[variant.name] = body
        elif not partial:
            raise StoreError(
                f"nothing of {variant.name} is built",
                where=str(store.root),
                expected=f"`carnice build {variant.name}` before it is pushed",
            )
    return bodies, files


class _Holding:
    def __init__(
        self,
        variant: VariantPlan,
        store: Store,
        contents: Contents,
        files: dict[str, LocalBytes],
    ) -> None:
        self._variant = variant
        self._store = store
        self._contents = contents
        self._files = files

    def body(self) -> Body | None:
        """What is known and there; None without any of its bytes."""
        packs = dict(self._packs())
        packed = {digest for pack in packs.values() for digest in pack.digests}
        loose = dict(self._loose(packed))
        outputs = {action.identity: self._outputs(action) for action in self._actions}
        blobs = dict(self._blobs(outputs, packed))
        if not packs and not loose and not blobs:
            return None
        known = {digest for _, digests in outputs.values() for digest in digests}
        sources = list(self._sources())
        return Body(
            variants=[self._variant.name],
            actions={key: list(digests) for key, digests in outputs.values() if digests},
            figures=dict(self._figures(known)),
            packs=packs,
            blobs=loose | blobs,
            sources=dict(self._travelling(sources)),
            samples={
                sample_digest(source): digest
                for source, digest in sources
                if source.file is not None and source.file.local
            },
        )

    @property
    def _actions(self) -> Iterable[Action]:
        return self._variant.actions.values()

    def _packs(self) -> Iterator[tuple[str, PackEntry]]:
        for layout in self._variant.packs:
            pack = self._store.finished_pack(layout.identity, layout.header)
            record = self._store.pack_record(pack) if pack else None
            if pack is None or record is None:
                continue
            path = self._store.pack_path(pack)
            self._files[pack_name(pack)] = LocalBytes(path, 0, record.size)
            sizes = [slot.tensor.ref.spec.nbytes for slot in layout.slots]
            yield (
                pack,
                PackEntry(
                    size=record.size,
                    header=digest_bytes(layout.header),
                    digests=list(record.digests),
                    sizes=sizes,
                    alignment=layout.alignment,
                ),
            )

    def _loose(self, packed: set[str]) -> Iterator[tuple[str, int]]:
        """Tensors in packs that are still being written."""
        for layout in self._variant.packs:
            if self._store.finished_pack(layout.identity, layout.header):
                continue
            for slot in layout.slots:
                digest, count = self._contents.digest(slot.tensor.ref), slot.tensor.ref.spec.nbytes
                if digest is None or digest in packed or count == 0:
                    continue
                place = self._store.locate(digest, count)
                if place is not None:
                    self._files[blob_name(digest)] = LocalBytes(place.path, place.offset, count)
                    yield digest, count

    def _outputs(self, action: Action) -> tuple[str, Sequence[str]]:
        """The action's key and the digests of its outputs, "" and none when they are not known."""
        inputs = [self._contents.digest(ref) for ref in action.inputs]
        known = [digest for digest in inputs if digest is not None]
        if len(known) < len(inputs):
            return "", ()
        key = action.key(known)
        return key, self._store.records.outputs(key, len(action.outputs)) or ()

    def _figures(self, digests: Iterable[str]) -> Iterator[tuple[str, list[int | float]]]:
        if not any(action.op.figures for action in self._actions):
            return
        for digest in sorted(digests):
            values = self._store.records.figure(digest)
            if values is not None and all(map(math.isfinite, values)):
                yield digest, list(values)

    def _blobs(
        self, outputs: Mapping[str, tuple[str, Sequence[str]]], packed: set[str]
    ) -> Iterator[tuple[str, int]]:
        """Lasting results that no pack holds: what a calibration left, above all."""
        for action in self._actions:
            process = isinstance(action.op, ProcessOp)
            transient = action.op.transient if isinstance(action.op, ProcessOp) else frozenset()
            for index, digest in enumerate(outputs[action.identity][1]):
                count = action.outputs[index].nbytes
                wanted = index not in transient and digest not in packed and count > 0
                if not wanted or not (process or count <= _SMALL_BYTES):
                    continue
                path = self._store.blob(digest)
                if path is not None and path.stat().st_size == count:
                    self._files[blob_name(digest)] = LocalBytes(path, 0, count)
                    yield digest, count

    def _sources(self) -> Iterator[tuple[SourceTensor, str]]:
        for ref in self._variant.refs.values():
            digest = self._contents.digest(ref)
            if isinstance(ref.origin, SourceTensor) and digest is not None:
                yield ref.origin, digest

    def _travelling(self, sources: Iterable[tuple[SourceTensor, str]]) -> Iterator[tuple[str, str]]:
        """Digests of what has the same identity on every machine: files on the hub."""
        for source, digest in sources:
            if source.file is not None and not source.file.local:
                yield digest_texts([source.identity]), digest
