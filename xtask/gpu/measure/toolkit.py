"""Finds CUDA's headers and NVRTC, in a toolkit or among Python's packages, and lays them out as flora expects them.

Kernels are compiled when they are first run: NVRTC is loaded by the name libnvrtc.so, and its headers are looked for in
`$CUDA_PATH/include`. Packages have neither that name nor that folder, and spread the headers over several, so a folder
of links is made, in which `lib64` holds NVRTC alone: a whole toolkit on the search path would give PyTorch other
libraries than the ones that it was built with.
"""

from __future__ import annotations

import os
import re
import shutil
from glob import glob
from pathlib import Path

# What generated kernels include, directly or through one another.
HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "mma.h", "crt/mma.h")
# What CUDA's own headers may include in turn, a package by itself.
CCCL = "nv/target"
# Where containers mount the driver's libraries.
DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/lib/wsl/lib")


def toolkits(environment: dict[str, str]) -> list[Path]:
    """Folders that may be a CUDA toolkit, those that somebody named first."""
    named = [environment[name] for name in ("CUDA_PATH", "CUDA_HOME") if environment.get(name)]
    nvcc = shutil.which("nvcc", path=environment.get("PATH"))
    found = [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    versions = sorted(glob("/usr/local/cuda-*"), key=lambda path: [int(part) for part in re.findall(r"\d+", path)])
    return [Path(path) for path in [*named, "/usr/local/cuda", *found, *reversed(versions), "/opt/cuda", "/usr"]]


def include_folders(root: Path) -> list[Path]:
    folders = (root / "include", *sorted(root.glob("targets/*/include")))
    return [folder for folder in folders if any((folder / header).is_file() for header in (*HEADERS, CCCL))]


def library_folders(root: Path) -> list[Path]:
    folders = (root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib")), *sorted(root.glob("lib/*-linux-gnu")))
    return [folder for folder in folders if any(folder.glob("libnvrtc.so*"))]


def package_folders(site: Path) -> tuple[list[Path], list[Path]]:
    """The folders of headers and of NVRTC among the packages in `site`: CUDA 13's layout, CUDA 12's, Triton's copy."""
    roots = [*sorted((site / "nvidia").glob("cu[0-9]*"), reverse=True)]
    roots += [site / "nvidia" / name for name in ("cuda_runtime", "cuda_nvrtc", "cuda_nvcc", "cuda_cccl", "cuda_crt")]
    roots += [site / "triton" / "backends" / "nvidia"]
    includes = [folder for root in roots for folder in include_folders(root)]
    libraries = [folder for root in roots for folder in library_folders(root)]
    return includes, libraries


def missing_headers(folders: list[Path]) -> list[str]:
    return [header for header in HEADERS if not any((folder / header).is_file() for folder in folders)]


def lay_out(scratch: Path, sites: list[Path], environment: dict[str, str]) -> dict:
    """Makes `scratch`/include and `scratch`/lib64; what was found, for the report, and the `environment` to set."""
    # The first place that has everything: headers and compiler should be of one version. Else all that there is.
    places = [(include_folders(root), library_folders(root)) for root in toolkits(environment)]
    places += [package_folders(site) for site in sites]
    chosen = [(includes, libraries) for includes, libraries in places if libraries and not missing_headers(includes)][
        :1
    ]
    chosen = chosen or places
    includes = list(dict.fromkeys(folder for folders, _ in chosen for folder in folders))
    libraries = [folder for _, folders in chosen for folder in folders]

    include, library = scratch / "include", scratch / "lib64"
    if len(includes) == 1:
        include.symlink_to(includes[0].resolve())
    else:
        include.mkdir()
        for folder in includes:
            link_all(folder.iterdir(), include)
    library.mkdir()
    plain = []
    if libraries:
        found = sorted(libraries[0].glob("libnvrtc*.so*"))
        link_all(found, library)
        plain = [path for path in found if re.fullmatch(r"libnvrtc\.so(\.\d+)*", path.name)]
        link_all(plain[:1], library, name="libnvrtc.so")

    search = [str(library), *filter(None, environment.get("LD_LIBRARY_PATH", "").split(os.pathsep))]
    search += [folder for folder in DRIVER_FOLDERS if os.path.isdir(folder) and folder not in search]
    return {
        "headers": [str(folder) for folder in includes],
        "missing_headers": missing_headers([include]),
        "nvrtc": str(libraries[0]) if libraries else None,
        "real_nvrtc": str(plain[0].resolve()) if plain else None,
        "version": version(include),
        "environment": {"CUDA_PATH": str(scratch), "LD_LIBRARY_PATH": os.pathsep.join(search)},
    }


def link_all(paths, folder: Path, name: str | None = None) -> None:
    """Links in `folder` to `paths`; where there is one of that name, the earlier stays."""
    for path in paths:
        link = folder / (name or path.name)
        if not link.is_symlink():
            link.symlink_to(path.resolve())


def version(include: Path) -> str | None:
    """CUDA's version as its headers say it."""
    try:
        found = re.search(r"#define\s+CUDA_VERSION\s+(\d+)", (include / "cuda.h").read_text(errors="replace"))
    except OSError:
        return None
    return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else None
