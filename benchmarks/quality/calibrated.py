"""Statistics of the experts, and of the base, on the experts' train texts, for methods that take them: made once, and kept."""

import shutil
from collections.abc import Mapping, Sequence
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
    """Statistics of each expert, and of the base on its text, in a folder.

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

        Statistics of the expert, and of the base on its text, are made if they are not there.
        """
        drawn = self.settings(sequences)
        if method.reads_alike:
            files = [str(self._zoo.texts[name]["train"]) for name in self._experts]
            return {"data": {"files": files, **drawn, "sequences": drawn["sequences"] * len(files)}}
        if method.data_inputs != "own":
            return {"data": {"files": str(self._zoo.texts[domain]["train"]), **drawn}}
        described, expert = describe(method), self._experts[domain]
        wanted = {
            "statistics": (expert, f"{expert.parent.name}-{domain}", described.from_data),
            "base_statistics": (self._zoo.base, f"base-on-{domain}", described.from_data_of_base),
        }
        return {
            key: str(self._made(model, name, domain, sorted(names), drawn))
            for key, (model, name, names) in wanted.items()
            if names
        }

    def _made(self, model: Path, name: str, domain: str, names: Sequence[str], drawn: Mapping[str, int]) -> Path:
        """Return the folder with statistics of a model on the train text of a domain."""
        folder = self._folder / f"{name}-{drawn['sequences']}x{drawn['length']}-{'-'.join(names)}"
        made = folder / "statistics.json"
        if made.exists():
            if made.stat().st_mtime >= max(file.stat().st_mtime for file in model.iterdir()):
                return folder
            # the model was trained again
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        calibrate(model, [self._zoo.texts[domain]["train"]], folder, statistics=list(names), **drawn)
        return folder
