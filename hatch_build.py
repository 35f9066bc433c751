"""The wheel contains the CPU kernels, compiled for several instruction sets.

Without a C++ compiler, or with OWL2_KERNELS=0, the wheel has no kernels and is for any platform.
They are then compiled on first use. With OWL2_KERNELS=1 a missing compiler is an error.
"""

import os
import runpy
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = "owl2/engine/backends/native"


class KernelBuildHook(BuildHookInterface):
    """Adds the libraries to a wheel; an editable installation compiles on first use."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the variants; called by hatchling."""
        requested = os.environ.get("OWL2_KERNELS", "")
        if version == "editable" or requested == "0":
            return
        build = runpy.run_path(str(Path(self.root, NATIVE, "build.py")))
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        available = build["machine_variants"]()
        if compiler is None or not available or not sysconfig.get_platform().startswith("linux"):
            if requested == "1":
                raise RuntimeError("OWL2_KERNELS=1, but there is no C++ compiler for this platform")
            self.app.display_warning("No C++ compiler: the wheel contains no CPU kernels.")
            return
        self.compiled = tempfile.mkdtemp()
        for name, (flags, _) in available.items():
            output = Path(self.compiled, f"{name}.so")
            build["compile_library"](compiler, tuple(flags.split()), output)
            build_data["force_include"][str(output)] = f"{NATIVE}/lib/{output.name}"
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"

    def finalize(self, *_: Any) -> None:
        """Remove the compiled files; called by hatchling."""
        if compiled := getattr(self, "compiled", None):
            shutil.rmtree(compiled)
