"""Generates the stubs from the contract's proto files whenever the package is built."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
PROTOS = ("dataqueue/v1/data_queue.proto", "dataqueue/v1/queue_admin.proto")
CONFIG = "service_config.json"


def origin(name: str) -> Path:
    """A source archive carries its own copies; in the repository they are shared by all clients."""
    places = (HERE / "contract" / name, HERE.parent / name, HERE.parent.parent / name)
    for place in places:
        if place.exists():
            return place
    raise SystemExit(f"{name} is missing: build in the repository or from a source archive")


def generate(target: Path) -> None:
    from importlib import resources

    from grpc_tools import protoc

    include = resources.files("grpc_tools") / "_proto"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{origin('proto')}", f"-I{include}", *outputs, *PROTOS]) != 0:
        raise SystemExit("the stubs could not be generated; protoc says why above")
    shutil.copyfile(origin(CONFIG), target / "dataqueue" / CONFIG)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        generate(HERE / "src" if self.editable_mode else Path(self.build_lib).resolve())


class Sdist(sdist):
    def make_release_tree(self, base_dir: str, files: list) -> None:
        super().make_release_tree(base_dir, files)
        contract = Path(base_dir) / "contract"
        for proto in PROTOS:
            (contract / "proto" / proto).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin("proto") / proto, contract / "proto" / proto)
        shutil.copyfile(origin(CONFIG), contract / CONFIG)


# The folder that setuptools builds in is named `build` unless told otherwise, as is the script beside this file.
setup(cmdclass={"build_py": BuildPy, "sdist": Sdist}, options={"build": {"build_base": "dist/build"}})
