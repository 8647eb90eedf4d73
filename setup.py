"""Builds the compiled core, ``tokenguard._bucket``; everything else is in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    ext_modules=cythonize(
        [
            Extension(
                "tokenguard._bucket",
                ["tokenguard/_bucket.pyx"],
                depends=["tokenguard/_table.pxi", "tokenguard/_region.h"],
                extra_compile_args=["-O3"],
            )
        ],
        language_level=3,
    )
)
