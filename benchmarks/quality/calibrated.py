"""Statistics of the experts on their train texts, for methods that take them: made once, and kept."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.zoo import Zoo
from merganser import calibrate
from merganser.method import MergeMethod
from merganser.method.description import describe


def takes_data(method: MergeMethod) -> bool:
    """Return whether a method needs statistics of data, of the models or of the base."""
    described = describe(method)
    return bool(described.from_data or described.from_data_of_base)


class Statistics:
    """Statistics of each expert, in a folder.

    Args:
        config: The settings that are measured.
        zoo: Its train texts are used.
        experts: The experts by domain.
        folder: Where the statistics are kept.
    """

    def __init__(self, config: Mapping[str, Any], zoo: Zoo, experts: Mapping[str, Path], folder: Path) -> None:
        self._config, self._zoo, self._experts, self._folder = config["calibration"], zoo, experts, folder

    def settings(self, sequences: int | None = None) -> dict[str, int]:
        """Return how many sequences of how many tokens are drawn of each text; those of config.json by default."""
        return {"sequences": sequences or self._config["sequences"], "length": self._config["length"]}

    def of(self, domain: str, method: MergeMethod, sequences: int | None = None) -> dict[str, Any]:
        """Return what a recipe says of an expert: its statistics, or the data where these are measured within the merge.

        Statistics are made if they are not there.
        """
        drawn = self.settings(sequences)
        if method.data_inputs != "own" or describe(method).from_data_of_base:
            return {"data": {"files": str(self._zoo.texts[domain]["train"]), **drawn}}
        return {"statistics": str(self._folder_of(domain, method, drawn))}

    def _folder_of(self, domain: str, method: MergeMethod, drawn: Mapping[str, int]) -> Path:
        names = sorted(describe(method).from_data)
        model = self._experts[domain]
        kind = f"{drawn['sequences']}x{drawn['length']}-{'-'.join(names)}"
        folder = self._folder / f"{model.parent.name}-{domain}-{kind}"
        made = folder / "statistics.json"
        if made.exists():
            if made.stat().st_mtime >= max(file.stat().st_mtime for file in model.iterdir()):
                return folder
            # the expert was trained again
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        calibrate(model, [self._zoo.texts[domain]["train"]], folder, statistics=names, **drawn)
        return folder
