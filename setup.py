"""Builds the compiled modules; everything else is in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

COMPILED = {
    "tokenguard/_bucket.pyx": ["tokenguard/_table.pxi", "tokenguard/_region.h"],
    "tokenguard/_fields.pyx": [],
    "tokenguard/_heads.pyx": [],
    "tokenguard/_limit_fields.pyx": [],
    "tokenguard/_refusal.pyx": [],
    "tokenguard/upstream/_http.pyx": [],
    "tokenguard/upstream/_pool.pyx": [],
    "tokenguard/lane/_lane.pyx": [],
    "tokenguard/lane/behind.py": [],
    "tokenguard/account.py": [],
    "tokenguard/api/asgi_call.py": [],
    "tokenguard/api/call.py": [],
    "tokenguard/drift.py": [],
    "tokenguard/estimate.py": [],
    "tokenguard/exchange.py": [],
    "tokenguard/headroom.py": [],
    "tokenguard/library/call.py": [],
    "tokenguard/limiter.py": [],
    "tokenguard/metrics.py": [],
    "tokenguard/model.py": [],
    "tokenguard/plan.py": [],
    "tokenguard/refusal.py": [],
    "tokenguard/providers/_chat.pyx": ["tokenguard/providers/_scan.pxi", "tokenguard/providers/_wire.pxi"],
    "tokenguard/providers/openai.py": [],
}
"""What is compiled, and what else each is made of. A ``.pxd`` beside a ``.py`` says what is C in it."""

setup(
    options={"build_ext": {"parallel": True}},
    ext_modules=cythonize(
        [
            Extension(
                source.rpartition(".")[0].replace("/", "."),
                [source],
                depends=parts,
                extra_compile_args=["-O2", "-g0", "-ffp-contract=off"],  # floats are Python's, to the bit
            )
            for source, parts in COMPILED.items()
        ],
        language_level=3,
        compiler_directives={"annotation_typing": False},  # annotations are for people; types in C are a .pxd's
    ),
)
