"""The nouns that stages hand to one another, and the form in which they are kept on disk.

Everything here is frozen. What is written to disk is a pydantic model, so a damaged or foreign file is
refused with the field's name when it is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from envbuilder.errors import IntegrityError
from envbuilder.lock import SourceLock

ENV_RECEIPT = "envbuilder.json"
"""Name of an env's receipt (`EnvReceipt`), in the env's folder."""
Isolation = Literal["sealed", "network-namespace", "none"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


AnyRecord = TypeVar("AnyRecord", bound=_Record)


def read_record(path: Path, kind: type[AnyRecord], *, remedy: str) -> AnyRecord:
    """The record kept in the JSON file `path`; IntegrityError (with `remedy`) if it is missing or damaged."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged: {error}"
        raise IntegrityError(f"{path} {reason}.", remedy=remedy, context={"file": path}) from error


class BundleRecord(_Record):
    """`bundle.json`: what `fetch` writes last, so a bundle without it is incomplete."""

    schema_version: Literal[2] = 2
    recipe: str
    python: str
    """Minor version that the files were chosen for, e.g. "3.12"."""
    lock_sha256: str
    recipe_sha256: str
    """Of recipe.toml."""
    start_sha256: str
    """Of start.py."""
    tool_version: str
    tool_wheel: str
    """envbuilder's own wheel: file name in the bundle's `tool/` folder."""
    tool_sha256: str
    tool_files: tuple[str, ...]
    """What envbuilder needs: file names in the bundle's `files/` folder (the lock's `tool` group)."""
    trainer_wheel: str | None
    """File name in the bundle's `tool/` folder."""
    trainer_sha256: str | None
    provided_models: dict[str, str] = Field(default_factory=dict)
    """Models that are not in the bundle, for the machine has them: name → folder."""


class Bundle(BaseModel):
    """A complete bundle on disk; `envbuilder.bundle.open_bundle` makes one."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    path: Path
    record: BundleRecord
    lock: SourceLock


class Extension(_Record):
    """One compiled extension module."""

    module: str
    """Import name, e.g. "causal_conv1d_cuda"."""
    file: str
    """Path inside the wheel, so relative to site-packages too."""
    sha256: str
    architectures: tuple[str, ...]
    """GPU code found in the file: "sm_90" for machine code, "compute_90" for PTX; sorted."""


class UnitTiming(_Record):
    """What compiling one translation unit took, or one shard of it."""

    source: str
    """Path in the source tree."""
    shard: str = ""
    """The instantiations in this shard of the unit; empty where it was compiled whole."""
    compiler: str = ""
    """E.g. "nvcc 13.0.88"."""
    began: float = 0.0
    """Seconds after the work on all packages began."""
    seconds: float
    """Wall time."""
    cpu_seconds: float
    peak_rss_bytes: int
    threads: int = 1
    """CPUs that it had."""
    cached: bool = False
    """Taken from the object cache."""
    architectures_kept: tuple[str, ...]
    architectures_dropped: tuple[str, ...]
    command: tuple[str, ...] = ()
    """As it was run, with the build's folder as /build."""


class LoadedModule(_Record):
    """An environment module (`module load`) that a build had, and what it put into the shell."""

    name: str
    """As resolved, e.g. "gcc/12.2.0"."""
    folders: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Variable → folders that it put there, in their order, e.g. of LD_LIBRARY_PATH."""
    variables: dict[str, str] = Field(default_factory=dict)
    """Others that it set, e.g. CC; those of compilers and networks alone."""


class BuildReceipt(_Record):
    """`receipt.json` beside a built wheel: what it was made of, and how."""

    schema_version: Literal[1] = 1
    package: str
    version: str
    sdist: str
    sdist_sha256: str
    patches: dict[str, str] = Field(default_factory=dict)
    """Path below the recipe's folder → sha256 of each patch, in the order in which they were applied."""
    key: str
    """The ABI key: the wheel's folder in the wheelhouse."""
    wheel: str
    """File name."""
    wheel_sha256: str
    python: str
    """Full version of the interpreter that built it."""
    torch: str | None
    """Version of the torch that it is linked against, local version included."""
    torch_cuda: str | None
    cxx11_abi: bool | None
    nvcc: str | None
    """nvcc's release, e.g. "13.0.88"."""
    host_compiler: str
    compute_capabilities: tuple[str, ...]
    """Those asked for."""
    architectures_kept: tuple[str, ...]
    architectures_dropped: tuple[str, ...]
    extensions: tuple[Extension, ...]
    isolation: Isolation
    """How the build was cut off (`sandbox.py` has the tiers)."""
    node: str = ""
    """Name of the machine that built it."""
    differs: tuple[str, ...] = ()
    """What may make another build of the same inputs differ in its bytes; empty where nothing is known."""
    compiled_whole: dict[str, str] = Field(default_factory=dict)
    """Source → why it was not compiled in shards, of units with several explicit instantiations."""
    environment: dict[str, str]
    """Variables that the recipe and the tool set for the build."""
    modules: tuple[LoadedModule, ...] = ()
    """Those that were loaded where it was built, in their order."""
    units: tuple[UnitTiming, ...]
    seconds: float
    built_at: str
    """ISO 8601, UTC."""


class BuiltWheel(_Record):
    """A wheel in the wheelhouse with its receipt."""

    path: Path
    receipt: BuildReceipt


class InstalledPackage(_Record):
    """One distribution that `install` put into an env."""

    name: str
    version: str
    wheel: str
    """File name."""
    sha256: str
    origin: Literal["bundle", "wheelhouse", "tool"]
    """`tool` is the trainer's own wheel."""


class ProvidedPackages(_Record):
    """What an env takes from the machine."""

    python: str
    """The provider's interpreter, absolute."""
    site_packages: tuple[str, ...]
    """The provider's purelib and platlib, written into the env's .pth file."""
    versions: dict[str, str]
    """Normalised name → version found."""


class EnvReceipt(_Record):
    """`envbuilder.json` in an env: what it was made of. The last file that `install` writes."""

    schema_version: Literal[1] = 1
    recipe: str
    lock_sha256: str
    python: str
    """Full version of the env's interpreter."""
    compute_capabilities: tuple[str, ...]
    packages: tuple[InstalledPackage, ...]
    extensions: tuple[Extension, ...]
    provided: ProvidedPackages | None
    modules: tuple[LoadedModule, ...] = ()
    """Those that its packages were built with: what they had added is there again for the env's processes."""
    created_at: str
    """ISO 8601, UTC."""

    def made_of_the_same(self, other: EnvReceipt) -> bool:
        """Whether this env and that of `other` are the same but for when they were made."""
        return self.model_copy(update={"created_at": other.created_at}) == other


class ImageReceipt(_Record):
    """`ROOT/images/NAME.json`: the image that an env is kept as. Written after the image."""

    schema_version: Literal[1] = 1
    file: str
    """Name of the image beside this receipt."""
    sha256: str
    """Of the image: the env's digest."""
    size: int
    """Bytes of the image."""
    plain_files: int
    plain_bytes: int
    """Files (folders among them) and bytes of the same env unpacked."""
    mksquashfs: str
    """Version of the program that wrote it: another one may write other bytes."""
    tool_version: str
    """Of envbuilder: another one may put other files into it."""
    interpreter: str
    """Path that the env's own interpreter leads to: it is the machine's, and each node must have it."""
    env: EnvReceipt
    created_at: str
    """ISO 8601, UTC."""


class PublishedFile(_Record):
    """One file of a publication."""

    path: str
    """Relative to the publication's folder."""
    size: int
    """Bytes."""
    sha256: str


class Publication(_Record):
    """`manifest.json` in a published version: what is in it, and who put it there. Written last."""

    schema_version: Literal[1] = 1
    name: str
    """What it is published as."""
    recipe: str
    python: str
    """Full version of the interpreter of the env that was published, e.g. "3.11.7"."""
    lock_sha256: str
    compute_capabilities: tuple[str, ...]
    """Those that its packages were compiled for."""
    architectures: tuple[str, ...]
    """GPU code in the extension modules that were compiled, e.g. "sm_90"; sorted."""
    publisher: str
    """Account name."""
    published_at: str
    """ISO 8601, UTC."""
    files: tuple[PublishedFile, ...]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.size for file in self.files)


class CurrentVersion(_Record):
    """`current.json` beside the published versions of one name: which of them counts."""

    schema_version: Literal[1] = 1
    manifest_sha256: str


class Finding(_Record):
    """The outcome of one of doctor's checks."""

    check: str
    """The check's id, e.g. "env.records"."""
    verdict: Literal["ok", "warning", "failed", "skipped"]
    summary: str
    """One sentence: what was found, or why it was skipped."""
    evidence: tuple[str, ...] = ()
    remedy: str | None = None
    """The command that mends it; always there when failed."""
