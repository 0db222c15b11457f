"""What calibration found: for every product with a weight, whether FP8 keeps within the error that was allowed.

A file of ``mlacompile calibrate``, read. It says what is safe, by the path of the module in the model that was
measured; what it does not name stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlacompile.errors import OptionsError

FORMAT = "mlacompile-fp8/1"
MODES = ("off", "weights", "absorb", "all")


@dataclass(frozen=True)
class Gate:
    """sites: the path of a module → the mode that is safe for its products."""

    sites: Mapping[str, str]

    @classmethod
    def read(cls, path: str | Path) -> Gate:
        """A gate from a file.

        Raises:
            OptionsError: there is no such file, or it is not one of ``mlacompile calibrate``.
        """
        try:
            found = json.loads(Path(path).read_text())
        except OSError as error:
            raise OptionsError(
                f"option fp8={str(path)!r}: {error.strerror or error}; expected a file of `mlacompile calibrate`"
            ) from error
        except ValueError as error:
            raise OptionsError(f"option fp8={str(path)!r}: the file is no JSON ({error})") from error
        sites = found.get("sites") if isinstance(found, dict) and found.get("format") == FORMAT else None
        if isinstance(sites, dict) and all(isinstance(s, dict) and s.get("mode") in MODES for s in sites.values()):
            return cls({name: site["mode"] for name, site in sites.items()})
        raise OptionsError(
            f"option fp8={str(path)!r}: expected a file of `mlacompile calibrate`: format {FORMAT!r} and sites with a "
            f"mode of {', '.join(map(repr, MODES))} each"
        )

    def mode(self, where: Sequence[str]) -> str:
        """The mode of a product found at these places. One that several sites could be, as when layers are compiled
        one by one, has the mode that all of them have."""
        path = _plain(where[-1])
        if path in self.sites:
            return self.sites[path]
        modes = {mode for name, mode in self.sites.items() if name.endswith("." + path)}
        return modes.pop() if len(modes) == 1 else "off"


def _plain(path: str) -> str:
    """``model.layers.3.mlp`` of a path that begins with what the traced function calls the model."""
    return re.sub(r"^L\['\w+'\]\.", "", path)
