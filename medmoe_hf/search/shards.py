"""The shards of a folder of embeddings: writing, listing, checking and reading them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from medmoe_hf.common.console import progress
from medmoe_hf.common.files import atomic_write
from medmoe_hf.errors import EncodeError

MANIFEST = "encoding.json"
FORMAT = 2
"""Version of the folder's format; 1, which search still reads, lacks the sources' content and the list of shards."""
_STATE = b"medmoe"
# A run may be resumed with another value of these: nothing that is written depends on them.


class ShardWriter:
    """The shards of one process, and their list."""

    def __init__(self, out: Path, rank: int, world_size: int) -> None:
        self.out, self.prefix = out, f"embeds-{rank:05d}-of-{world_size:05d}"
        self.list_path = out / f"shards-{rank:05d}-of-{world_size:05d}.json"
        self.listed: dict[str, list[Any]] = {}

    def path(self, number: int) -> Path:
        return self.out / f"{self.prefix}-{number:06d}.parquet"

    def shards(self, listed: bool = True) -> list[Path]:
        """Finds the shards that were written and compares their sizes with the list.

        Args:
            listed: Whether there is a list, as in every folder of this `FORMAT`.

        Returns:
            Paths of the shards, in order.

        Raises:
            EncodeError: If a shard or the list is missing, or a size differs.
        """
        found = sorted(self.out.glob(f"{self.prefix}-*.parquet"))
        for number, path in enumerate(found):
            if path != self.path(number):
                raise EncodeError(
                    f"{self.path(number)} is missing, but {path.name} exists. Restore it, or remove "
                    f"{path.name} and those after it and run `medmoe encode` again."
                )
        if not listed:
            return found
        self.listed = self._read_list() if found or self.list_path.exists() else {}
        for path in found:
            if path.name not in self.listed:
                raise EncodeError(
                    f"{path} is not listed in {self.list_path.name}: it does not belong to this folder. "
                    f"Remove it, and the later shards of its process, to encode them again."
                )
            size, written = path.stat().st_size, self.listed[path.name][0]
            if size != written:
                raise damaged_shard(path, f"it has {size} bytes instead of {written}")
        return found

    def check(self, path: Path) -> None:
        """Compares the checksum of a shard with the list; call `shards` first.

        Raises:
            EncodeError: If they differ.
        """
        if path.name in self.listed and _checksum(path) != self.listed[path.name][1]:
            raise damaged_shard(path, "its checksum differs from the one in the list")

    def resume(self) -> dict[str, Any] | None:
        """Checks the existing shards, after which the next one is written.

        Returns:
            State of the newest shard; None if there are none.

        Raises:
            EncodeError: If a shard is missing or damaged.
        """
        for left in (*self.out.glob(f".{self.prefix}-*"), *self.out.glob(f".{self.list_path.name}*")):
            left.unlink()
        found = self.shards()
        for path in progress(found, "checking shards", "shard"):
            self.check(path)
        # A run that was interrupted between the list and the rename has listed one shard that does not exist.
        self.listed = {path.name: self.listed[path.name] for path in found}
        return shard_state(found[-1]) if found else None

    def write(self, table: pyarrow.Table, state: dict[str, Any]) -> None:
        table = table.replace_schema_metadata({_STATE: json.dumps(state).encode()})
        path = self.path(len(self.listed))
        with atomic_write(path) as partial:
            # Numbers like these do not compress.
            pyarrow.parquet.write_table(
                table,
                partial,
                compression="none",
                use_dictionary=["source", "shard", "modality"],
                write_page_checksum=True,
            )
            self.listed[path.name] = [partial.stat().st_size, _checksum(partial)]
            with atomic_write(self.list_path) as partial_list:
                partial_list.write_text(json.dumps(self.listed, indent=1) + "\n", encoding="utf-8")

    def _read_list(self) -> dict[str, list[Any]]:
        try:
            listed: dict[str, list[Any]] = json.loads(self.list_path.read_text(encoding="utf-8"))
            return listed
        except FileNotFoundError:
            raise EncodeError(
                f"{self.list_path} is missing: without it the shards cannot be checked. "
                "Restore it, or encode into another folder."
            ) from None
        except ValueError as error:
            raise EncodeError(
                f"{self.list_path} is damaged: {error}. Restore it, or encode into another folder."
            ) from error


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def damaged_shard(path: Path, why: object) -> EncodeError:
    return EncodeError(
        f"{path} is damaged: {why}. Restore it from a copy; or remove it and the later shards of its process, and "
        "run `medmoe encode` again."
    )


def read_manifest(out: Path) -> dict[str, Any]:
    """Reads the manifest of a folder of embeddings.

    Args:
        out: The folder.

    Returns:
        Model, sources and settings that the embeddings were computed with.

    Raises:
        EncodeError: If it is not a folder of embeddings.
    """
    try:
        manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return manifest
    except OSError as error:
        raise EncodeError(
            f"{out} contains no embeddings (no {MANIFEST}); create them with `medmoe encode SOURCES.yaml {out}`."
        ) from error
    except ValueError as error:
        raise EncodeError(f"{out / MANIFEST} is damaged: {error}. Encode again into another folder.") from error


def shard_state(path: Path) -> dict[str, Any]:
    """Reads the state in the metadata of a shard.

    Args:
        path: The shard.

    Returns:
        `stream`, the state of its process's stream after it, and `complete`, whether it is the last one.

    Raises:
        EncodeError: If it cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads(pyarrow.parquet.read_schema(path).metadata[_STATE])
        return state
    except (OSError, pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise damaged_shard(path, error) from error


def read_shard(path: Path, columns: Sequence[str]) -> pyarrow.Table:
    """Reads columns of a shard.

    Args:
        path: The shard.
        columns: Names of the columns.

    Returns:
        A table with one row per pair.

    Raises:
        EncodeError: If it cannot be read, or the checksum of a page differs.
    """
    try:
        return pyarrow.parquet.read_table(path, columns=list(columns), page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise damaged_shard(path, error) from error


@dataclass(frozen=True)
class FinishedShard:
    """A shard of a finished folder.

    Attributes:
        path: Path of the file.
        rows: Number of pairs.
        checksum: Checksum in the list; None in a folder of format 1.
        writer: Writer of its process.
    """

    path: Path
    rows: int
    checksum: str | None
    writer: ShardWriter

    def check(self) -> None:
        """Compares its checksum with the list.

        Raises:
            EncodeError: If they differ.
        """
        self.writer.check(self.path)


def finished_shards(out: Path) -> tuple[dict[str, Any], list[FinishedShard]]:
    """Reads the manifest of a finished folder and finds its shards.

    Args:
        out: The folder.

    Returns:
        The manifest, and the shards in order.

    Raises:
        EncodeError: If it is not a folder of embeddings, not finished, or a shard is damaged.
    """
    manifest = read_manifest(out)
    processes = manifest["processes"]
    listed = manifest.get("format", 1) > 1
    shards, missing = [], 0
    for rank in range(processes):
        writer = ShardWriter(out, rank, processes)
        found = writer.shards(listed)
        missing += not found or not shard_state(found[-1])["complete"]
        for path in found:
            try:
                rows = pyarrow.parquet.read_metadata(path).num_rows
            except (OSError, pyarrow.ArrowException) as error:
                raise damaged_shard(path, error) from error
            shards.append(FinishedShard(path, rows, writer.listed.get(path.name, [None, None])[1], writer))
    if missing:
        raise EncodeError(
            f"{out} is not finished: {missing} of {processes} processes were interrupted. Run the same "
            "`medmoe encode` again to resume."
        )
    return manifest, shards
