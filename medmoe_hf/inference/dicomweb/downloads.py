"""Studies of DICOMweb servers as files: in a private temporary folder, which is deleted afterwards."""

import logging
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medmoe_hf.common.console import progress as progress_bar
from medmoe_hf.errors import ArgumentError, DicomWebError
from medmoe_hf.inference.dicomweb.addresses import TOKEN, is_address, parse_address, token
from medmoe_hf.inference.dicomweb.service import Budget, DownloadLimits, Service, UnusableError
from medmoe_hf.inference.studies.predictions import SkippedFile, StudyPredictions
from medmoe_hf.model.study_files_medmoe import Skipped

_LOST = 3  # files in a row without an answer, after which a server counts as gone
_REASONS = 3  # that are logged

logger = logging.getLogger(__name__)


class Downloads:
    """The paths of a prediction, with folders of what was downloaded in the place of addresses.

    The folders live until `close`, or until nothing refers to this object any more.

    Args:
        paths: Files, folders and addresses.
        limits: What may be downloaded.
        progress: Whether to show a progress bar.

    Attributes:
        paths: The files and folders to read.

    Raises:
        ArgumentError: For an address that cannot be read, or credentials that cannot be used.
        DicomWebError: If a server cannot be read, or a limit is exceeded.
        MissingPackageError: Without the package dicomweb-client.
    """

    def __init__(self, paths: Sequence[str | Path], limits: DownloadLimits, progress: bool) -> None:
        self.paths = list(paths)
        self._names: dict[str, str] = {}  # of downloaded files: their addresses
        self._missed: list[tuple[str, SkippedFile]] = []  # what was not downloaded, with its StudyInstanceUID
        self._delete: Callable[[], Any] = lambda: None
        addresses = {str(path): parse_address(str(path)) for path in paths if is_address(path)}
        if not addresses:
            return
        if token() and len({address.host for address in addresses.values()}) > 1:
            raise ArgumentError(
                f"The token of {TOKEN} would be sent to several servers: predict the studies of each server by a call "
                "of their own, or use ~/.netrc."
            )
        budget = Budget(limits)
        services = {text: Service(address, budget) for text, address in addresses.items()}
        folder = Path(tempfile.mkdtemp(prefix="medmoe-dicomweb-"))  # which only this user can read
        self._delete = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        try:
            for number, (text, service) in enumerate(services.items(), start=1):
                target = folder / str(number)
                target.mkdir()
                self._download(service, target, progress)
                self.paths = [target if path == text else path for path in self.paths]
        except BaseException:
            self._delete()
            raise

    def close(self) -> None:
        """Deletes what was downloaded: pictures and heat-maps cannot be drawn any more."""
        self._delete()

    def keep(self, skipped: Skipped) -> None:
        """Does nothing. A series that holds this method as its `on_skip` may read its files: they live as long."""

    def named(self, found: StudyPredictions) -> StudyPredictions:
        """Names files by their addresses, adds those that were not downloaded, and lets `found` delete all of them."""
        for study in found:
            for series in study.series:
                for index, source in series.sources.items():
                    if source["file"] in self._names:
                        series.paths[index], source["file"] = source["file"], self._names[source["file"]]
            study.skipped = self._renamed(study.skipped) + [one for uid, one in self._missed if uid == study.uid]
        known = {study.uid for study in found}
        found.skipped = self._renamed(found.skipped) + [one for uid, one in self._missed if uid not in known]
        found.on_close = self.close
        return found

    def _renamed(self, skipped: list[SkippedFile]) -> list[SkippedFile]:
        return [SkippedFile(self._names.get(one.path, one.path), one.reason) for one in skipped]

    def _download(self, service: Service, folder: Path, progress: bool) -> None:
        address, lost, size, count = service.address, 0, 0, 0
        instances = service.instances()
        reasons = ["it is listed without a valid UID"] * service.unnamed
        for series, uid in progress_bar(instances, "downloading", unit="file", disable=not progress):
            name = f"{address.base}/studies/{address.study}/series/{series}/instances/{uid}"
            try:
                content = service.retrieve(series, uid)
            except UnusableError as error:
                lost = lost + 1 if error.lost else 0
                if lost == _LOST:
                    told = f"{error}, for {lost} files in a row; {count} of {len(instances)} were downloaded before"
                    raise DicomWebError(f"{address.host}: {told}. Try again later.") from None
                reasons.append(str(error))
                self._missed.append((address.study, SkippedFile(name, f"it was not downloaded: {error}")))
                continue
            path = folder / f"{count:06}.dcm"
            path.write_bytes(content)
            self._names[str(path)] = name
            lost, size, count = 0, size + len(content), count + 1
        told = "; ".join(f"{number} x {reason}" for reason, number in Counter(reasons).most_common(_REASONS))
        if not count:
            raise DicomWebError(f"{address.host}: no file of the study could be downloaded: {told}.")
        logger.info("Downloaded %s files (%.1f MB) from %s.", count, size / 1e6, address.host)
        if reasons:
            logger.warning("Not downloaded from %s: %s.", address.host, told)
