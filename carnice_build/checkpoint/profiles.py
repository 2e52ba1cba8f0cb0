"""Which real checkpoint each model name of a recipe means.

A profile is an entry of `_profiles.yaml` beside the recipes: a map from models to folders or
shape files, relative to the project, or the word `hub`; or the one word `hub` for all models.
Without that file there is the one profile `full`, which is the hub.
A source whose recipe names a folder is there, in every profile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from carnice_build.checkpoint.checkpoint import Checkpoint, open_checkpoint
from carnice_build.checkpoint.datasets import Dataset
from carnice_build.checkpoint.source import LocalFile, refuse_pointer
from carnice_build.errors import CheckpointError, RecipeError, nearest
from carnice_build.recipe.schema import DATASET_FILES, CalibrationSpec, FileSpec, SourceSpec
from carnice_build.tensors import ByteSource
from carnice_build.yaml_tree import Node, read_tree

PROFILES_NAME = "_profiles.yaml"
HUB = "hub"
FULL = "full"


@dataclass(frozen=True)
class Source:
    """A source of a recipe, found: what the recipe calls it and the opened checkpoint.

    `profile` is None when the command line mapped the source to a checkpoint of its own, and when
    the recipe names a folder, which `local` says;
    `revision` is the commit that a checkpoint on the hub was found at.
    """

    name: str
    spec: SourceSpec
    profile: str | None
    checkpoint: Checkpoint
    revision: str | None = None
    local: bool = False

    @property
    def origin(self) -> str:
        """Where the checkpoint is from, in words that tell nothing of this machine."""
        return self.profile or ("a local folder" if self.local else "given on the command line")


class Profiles:
    """The profiles of a folder of recipes."""

    def __init__(self, recipes: Path) -> None:
        self.root = recipes.parent
        path = recipes / PROFILES_NAME
        if recipes.is_dir() and not path.exists():
            self._tree = Node({FULL: Node(HUB, str(path))}, str(path))
        else:
            self._tree = read_tree(path)
        if not isinstance(self._tree.value, dict):
            raise RecipeError("is not a mapping of profiles", where=self._tree.where)
        self._tables = self._tree.value

    def default(self, sources: Iterable[SourceSpec]) -> str:
        """The first profile that has all of these sources and their weights, or the first one."""
        sources = list(sources)
        fitting = (name for name in self._tables if self.has(name, sources))
        return next(fitting, next(iter(self._tables), ""))

    def has(self, profile: str, sources: Iterable[SourceSpec]) -> bool:
        """True when `profile` says where all of these are, with their weights."""
        table = self.table(profile)
        return table.value == HUB or all(_lists(table, spec) for spec in sources)

    def on_hub(self, model: str) -> str:
        """The first profile by which a model is on the hub; RecipeError when there is none."""
        for name, table in self._tables.items():
            entries = table.value if isinstance(table.value, dict) else {}
            if table.value == HUB or (model in entries and entries[model].value == HUB):
                return name
        raise RecipeError(
            f"no profile takes {model} from the hub",
            where=self._tree.where,
            expected=f"`{FULL}: {HUB}` there",
        )

    def table(self, profile: str) -> Node:
        """What `profile` says; RecipeError when there is none of that name."""
        if profile not in self._tables:
            raise RecipeError(
                f"there is no profile {profile!r}",
                where=self._tree.where,
                expected=" or ".join(self._tables),
                nearest=nearest(profile, self._tables),
            )
        return self._tables[profile]


def _lists(table: Node, spec: SourceSpec) -> bool:
    if spec.folder is not None:
        return False  # what it is calibrated on is not what a profile of stand-ins has
    if not isinstance(table.value, dict) or spec.model not in table.value:
        return False
    # A shape file has no weights, so it is used only where its profile is asked for.
    return not str(table.value[spec.model].value).endswith(".json")


class SourceFinder:
    """Finds and opens sources, each checkpoint once however many recipes name it."""

    def __init__(
        self,
        profiles: Profiles,
        profile: str,
        overrides: Mapping[str, Path],
        *,
        stream: bool = False,
    ) -> None:
        """`overrides` maps source names to checkpoints, over what `profile` says.

        With `stream`, weights on the hub are read by range and never put on disk.
        """
        self._root = profiles.root
        self._profile = profile
        self._overrides = overrides
        self._table = profiles.table(profile)
        self._stream = stream
        self._opened: dict[Path, Checkpoint] = {}
        self._opened_on_hub: dict[tuple[str, str], tuple[Checkpoint, str]] = {}
        self._commits: dict[tuple[str, str], str] = {}

    def find(self, name: str, spec: SourceSpec) -> Source:
        """The source called `name`, opened; CheckpointError when nothing says where it is."""
        if name in self._overrides:
            return Source(name, spec, None, self._open(self._overrides[name]))
        if spec.folder is not None:
            return Source(name, spec, None, self._open(self._root / spec.folder), local=True)
        path = self._path_of(spec.model, f"--source {name}=FOLDER")
        if path is None:
            checkpoint, commit = self._open_on_hub(spec)
            return Source(name, spec, self._profile, checkpoint, commit)
        return Source(name, spec, self._profile, self._open(path))

    def find_dataset(self, spec: CalibrationSpec) -> Dataset:
        """The dataset of a calibration; CheckpointError when it is not there or empty."""
        if spec.dataset.endswith(DATASET_FILES):
            path: Path | None = self._root / spec.dataset
        else:
            path = self._path_of(spec.dataset, "--set calibration.dataset=FILE")
        if path is None:
            return Dataset(spec.dataset, None, self._commit(spec))
        file = LocalFile(path)
        if not path.name.endswith(DATASET_FILES):
            raise CheckpointError(
                "is no dataset", where=file.name, expected=" or ".join(DATASET_FILES)
            )
        if not file.size:
            raise CheckpointError("is empty", where=file.name, expected="rows of text")
        refuse_pointer(file)
        return Dataset(spec.dataset, file)

    def find_file(self, spec: FileSpec) -> ByteSource:
        """A file that a recipe names; CheckpointError when it is not there.

        Where a profile maps its repository to a folder, it is there.
        """
        folder: Path | None = self._root
        if spec.model is not None:
            folder = self._path_of(spec.model, "`file` alone, a file of the project")
        if folder is None:
            from carnice_build.checkpoint.hub import open_hub_file

            assert spec.model is not None
            return open_hub_file(spec.model, spec.revision, spec.file)
        file = LocalFile(folder / spec.file)
        if not file.path().is_file():
            raise CheckpointError("is no file", where=file.name)
        return file

    def _path_of(self, name: str, otherwise: str) -> Path | None:
        """Where a model or a dataset is on this machine; None when it is on the hub."""
        if self._table.value == HUB:
            return None
        if isinstance(self._table.value, dict) and name in self._table.value:
            node = self._table.value[name]
            if not isinstance(node.value, str):
                raise RecipeError(f"does not say where {name} is", where=node.where)
            if node.value == HUB:
                return None
            pure = PurePosixPath(node.value)
            if ".." in pure.parts or pure.is_absolute():
                raise RecipeError(f"{str(pure)!r} is outside the project", where=node.where)
            return self._root / pure
        raise CheckpointError(
            f"profile {self._profile!r} does not say where {name} is",
            where=self._table.where,
            expected=f"an entry there, or {otherwise}",
        )

    def _open(self, path: Path) -> Checkpoint:
        try:
            resolved = path.resolve()
        except RuntimeError:  # a loop of links; from Python 3.13 on, it resolves to itself
            raise CheckpointError("is not a folder", where=str(path)) from None
        except OSError:
            raise CheckpointError("cannot be found", where=str(path)) from None
        if resolved not in self._opened:
            self._opened[resolved] = open_checkpoint(path)
        return self._opened[resolved]

    def _commit(self, spec: CalibrationSpec) -> str:
        from carnice_build.checkpoint.hub_listing import dataset_commit

        key = (spec.dataset, spec.revision)
        if key not in self._commits:
            self._commits[key] = dataset_commit(*key)
        return self._commits[key]

    def _open_on_hub(self, spec: SourceSpec) -> tuple[Checkpoint, str]:
        # The hub's library is slow to import, and most builds never need it.
        from carnice_build.checkpoint.hub import open_hub

        key = (spec.model, spec.revision)
        if key not in self._opened_on_hub:
            self._opened_on_hub[key] = open_hub(spec.model, spec.revision, stream=self._stream)
        return self._opened_on_hub[key]
