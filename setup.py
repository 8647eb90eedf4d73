"""Builds the compiled modules; everything else is in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

COMPILED = {
    "tokenguard/_bucket.pyx": ["tokenguard/_table.pxi", "tokenguard/_region.h"],
    "tokenguard/providers/_chat.pyx": ["tokenguard/providers/_scan.pxi", "tokenguard/providers/_wire.pxi"],
}
"""What is compiled, and what else each is made of."""

setup(
    ext_modules=cythonize(
        [
            Extension(
                source.rpartition(".")[0].replace("/", "."), [source], depends=parts, extra_compile_args=["-O3"]
            )
            for source, parts in COMPILED.items()
        ],
        language_level=3,
    )
)
