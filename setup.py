"""Builds the extension modules; everything else about the package is in pyproject.toml.

VSPORT_DEBUG=1     no optimisation, line tracing for coverage, an annotated ``vsport/_*.html``
VSPORT_SANITIZE=1  AddressSanitizer and UndefinedBehaviorSanitizer, for ``tests/fuzz.py``
"""

from __future__ import annotations

import os
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("VSPORT_DEBUG") == "1"
SANITIZE = os.environ.get("VSPORT_SANITIZE") == "1"

FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]

PARTS = ["vsport/_ring.pxd", *sorted(glob("vsport/*.h")), *sorted(glob("vsport/ring/*.pxi"))]


def extension(name: str) -> Extension:
    return Extension(
        f"vsport.{name}",
        [f"vsport/{name}.pyx"],
        depends=PARTS,
        include_dirs=["vsport"],
        define_macros=[("CYTHON_TRACE_NOGIL", "1")] if DEBUG else [],
        extra_compile_args=FLAGS + (["-O0", "-g"] if DEBUG else ["-O2"]) + (SANITIZERS if SANITIZE else []),
        extra_link_args=SANITIZERS if SANITIZE else [],
    )


setup(
    ext_modules=cythonize(
        [extension("_ring"), extension("_poll")],
        annotate=DEBUG,
        force=DEBUG,
        compiler_directives={
            "language_level": 3,
            "auto_pickle": False,
            "autotestdict": False,
            "boundscheck": False,
            "cdivision": True,
            "initializedcheck": False,
            "wraparound": False,
            "linetrace": DEBUG,
        },
    )
)
