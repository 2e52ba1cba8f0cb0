"""Kernels give the same bits on every processor."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import pytest
from llvmlite import binding as llvm
from numba.core.dispatcher import Dispatcher

from carnice_build import kernels

LOOPS = [module.name for module in iter_modules(kernels.__path__) if module.name.endswith("_loops")]

SUM = """
define float @f(float %a, float %b, float %c) {
  %product = fmul float %a, %b
  %sum = fadd float %product, %c
  ret float %sum
}
"""


@pytest.mark.parametrize("name", LOOPS)
def test_no_kernel_may_be_compiled_loosely(name: str) -> None:
    """No kernel lets the compiler reorder a sum or fuse it with a product."""
    module = import_module(f"carnice_build.kernels.{name}")
    functions = {key: item for key, item in vars(module).items() if isinstance(item, Dispatcher)}

    assert functions
    assert {} == {key: item for key, item in functions.items() if "fastmath" in item.targetoptions}


@pytest.mark.parametrize(
    ("triple", "apart"),
    [
        ("arm64-apple-darwin", ["fmul", "fadd"]),
        ("aarch64-unknown-linux-gnu", ["fmul", "fadd"]),
        ("x86_64-unknown-linux-gnu", ["mulss", "addss"]),
    ],
)
def test_numba_s_compiler_rounds_twice(triple: str, apart: list[str]) -> None:
    """Unless it may be loose, a product that is added to is rounded by itself, on ARM as on x86."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(opt=3)
    code = machine.emit_assembly(llvm.parse_assembly(SUM))
    words = [line.split()[0] for line in code.splitlines() if line.startswith("\t")]

    assert apart == [word for word in words if "mul" in word or "add" in word or "fma" in word]
