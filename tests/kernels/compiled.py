"""Compiles each kernel to machine code for an A100 and an H100, which needs no GPU. Run by `test_kernels.py`."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ddpm_dist.kernels import noise, normalisation

KINDS = (80, 90)
"""Compute capabilities: A100, H100."""


def compile_kernel(kernel: Any, types: list[str], warps: int, **constants: Any) -> None:
    names = kernel.arg_names
    given = iter(types)
    signature = {name: "constexpr" if name in constants else next(given) for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    for kind in KINDS:
        assert triton.compile(source, GPUTarget("cuda", kind, 32), {"num_warps": warps}).asm["cubin"]


def main() -> None:
    compile_kernel(noise._normals, ["*i64", "*fp32", "u64", "i64", "i32"], 4, BLOCK=noise.BLOCK)
    compile_kernel(noise._words, ["*i64", "*i64", "i64", "i32", "i32"], 4, BLOCK=noise.BLOCK)
    compile_kernel(normalisation._weights, ["*fp32", "*bf16", "*bf16", "i32", "i32"], 4, CB=64, IB=32)
    sizes = ["i32"] * 7
    # 128 channels and 384, last in memory; 128 first.
    tiles = [(4, 4, 32, 32, "bf16"), (12, 16, 8, 32, "bf16"), (4, 4, 1, 1024, "fp32")]
    for of_group, padded, groups, pixels, dtype in tiles:
        image = f"*{dtype}"
        for phase, how in ((0, 0), (1, 1), (2, 2), (0, 1), (2, 1)):
            tile = {"CG": of_group, "CG2": padded, "GB": groups, "PB": pixels, "HOW": how, "PHASE": phase, "SILU": True}
            compile_kernel(
                normalisation._forward, [image] * 5 + ["*fp32"] * 3 + ["fp32", *sizes], normalisation.WARPS, **tile
            )
            compile_kernel(normalisation._backward, [image] * 7 + ["*fp32"] * 4 + sizes, normalisation.WARPS, **tile)


if __name__ == "__main__":
    main()
