"""What the env's interpreter loads for `import torch` and the extension modules, found out by their files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from envbuilder.load_order import Loaded, load_order


def loaded_with_torch(
    python: Path, folders: Iterable[Path], extensions: Iterable[Path], variables: Mapping[str, str]
) -> tuple[Loaded, ...]:
    """In order: the interpreter, torch of the first of `folders` that has one, then `extensions`.

    `variables` are the process's: LD_LIBRARY_PATH and LD_PRELOAD count.
    """
    return load_order(
        (*_torch_modules(tuple(folders)), *extensions),
        interpreter=python,
        library_path=variables.get("LD_LIBRARY_PATH", ""),
        preload=variables.get("LD_PRELOAD", ""),
    )


def _torch_modules(folders: tuple[Path, ...]) -> Iterator[Path]:
    """The files that torch/__init__.py opens by their paths, in its order."""
    torch = torch_folder(folders)
    if torch is None:
        return
    yield torch / "lib" / "libtorch_global_deps.so"
    # Which it opens before others can bring another one: pytorch#138460.
    linkers = (path for folder in folders for path in folder.glob("nvidia/*/lib/libnvJitLink.so.*"))
    yield from sorted(linkers)[:1]
    yield from sorted(torch.glob("_C.*.so"))


def torch_folder(folders: Iterable[Path]) -> Path | None:
    """The package folder of the torch that is imported."""
    return next((folder / "torch" for folder in folders if (folder / "torch").is_dir()), None)


def torch_libraries(folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """The folders of the libraries that torch and the CUDA packages bring."""
    torch = torch_folder(folders)
    cuda = (library for folder in folders for library in sorted(folder.glob("nvidia/*/lib")))
    return (*([torch / "lib"] if torch else []), *cuda)
