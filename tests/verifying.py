"""A built variant that a test may damage, and what verify then says."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tiny import Tensor, read_json, read_safetensors, write_safetensors

from carnice_build.commands.options import Options
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.formats.folder import open_folder
from carnice_build.verification.result import Outcome


@dataclass(frozen=True)
class Copy:
    """A copy of a build of `variant`."""

    variant: str
    options: Options

    @staticmethod
    def of(variant: str, options: Options, place: Path) -> Copy:
        """Copy what was built with `options` into the folder `place`."""
        shutil.copytree(options.out / variant, place / variant)
        return Copy(variant, replace(options, out=place))

    @property
    def folder(self) -> Path:
        """The variant's folder."""
        return self.options.out / self.variant

    def rewrite(self, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
        """Change the tensors of the shard that holds `name`."""
        index = read_json(self.folder / "model.safetensors.index.json")
        path = self.folder / index["weight_map"][name]
        tensors = read_safetensors(path)
        change(tensors)
        write_safetensors(path, tensors)

    def edit(self, name: str, change: Callable[[bytearray], None]) -> None:
        """Change the bytes of tensor `name`, in a file of either kind."""
        tensor = open_folder(self.folder).tensors[name]
        assert tensor.file is not None
        data = bytearray(tensor.spec.nbytes)
        tensor.file.read_into(tensor.offset, memoryview(data))
        change(data)
        path = tensor.file.path()
        assert path is not None
        content = bytearray(path.read_bytes())
        content[tensor.offset : tensor.offset + len(data)] = data
        path.unlink()  # it may be a link to the cache's
        path.write_bytes(content)

    def flip(self, name: str, position: int, bits: int) -> None:
        """Flip bits of one byte of tensor `name`."""

        def flipped(data: bytearray) -> None:
            data[position] ^= bits

        self.edit(name, flipped)

    def problems(self) -> Mapping[str, str]:
        """The problems of each check that failed, without running the model."""
        settings = VerifySettings(run=False)
        (result,) = verify_variants([self.variant], self.options, settings).variants
        return {
            check.name: "\n".join(check.problems)
            for check in result.checks
            if check.outcome is Outcome.FAILED
        }
