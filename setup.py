"""Builds the compiled modules; everything else is in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

COMPILED = {
    "tokenguard/_bucket.pyx": ["tokenguard/_table.pxi", "tokenguard/_region.h"],
    "tokenguard/upstream/_http.pyx": [],
    "tokenguard/upstream/_pool.pyx": [],
    "tokenguard/lane/_lane.pyx": [],
    "tokenguard/providers/_chat.pyx": ["tokenguard/providers/_scan.pxi"],
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
