"""The models optplan knows by name, and the way from whatever a person types to a model.

"Add a row, get a model": the rows are the TOML files in `planner/data/models`.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from optplan.planner.configfile import read_config
from optplan.planner.errors import ConfigError, DataError, printable, shorten, unknown
from optplan.planner.hub import HubError, fetch_config, is_hub_id
from optplan.planner.models.reader import read_model
from optplan.planner.models.spec import ModelSpec


class ModelEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row of the catalogue.

    Attributes:
        id: Name that reports show.
        aliases: Other names it is found by.
        hub_id: Repository on the Hugging Face Hub, or an empty string.
        as_of: Date on which the row was checked, `YYYY-MM-DD`.
        source: Where the values come from.
        num_parameters: Elements of all parameters as published, tied ones counted once.
        config: The fields of the published `config.json` that bear on memory.
        nulls: Fields published as `null` where the class default is something else; TOML has no null.
    """

    id: str
    as_of: str
    source: str
    num_parameters: int
    config: dict[str, Any]
    aliases: tuple[str, ...] = ()
    hub_id: str = ""
    nulls: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """The `model_type` of the configuration."""
        return str(self.config["model_type"])

    @property
    def names(self) -> tuple[str, ...]:
        """Every name the row is found by: id, aliases, the repository with and without its owner."""
        hub = (self.hub_id, self.hub_id.rpartition("/")[2]) if self.hub_id else ()
        return (self.id, *self.aliases, *hub)


@cache
def model_entries() -> tuple[ModelEntry, ...]:
    """Every row of the catalogue, family by family."""
    folder = files("optplan.planner.data.models")
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".toml"))
    return tuple(entry for name in names for entry in _read_rows(name, (folder / name).read_text("utf-8")))


def _read_rows(name: str, text: str) -> list[ModelEntry]:
    try:
        return msgspec.convert(tomllib.loads(text)["model"], list[ModelEntry])
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, KeyError) as error:
        raise DataError(f"the catalogue file {name} is damaged: {error}") from None


def model_ids() -> tuple[str, ...]:
    """The ids of all models in the catalogue."""
    return tuple(entry.id for entry in model_entries())


def find_entry(name: str) -> ModelEntry | None:
    """The row that a name stands for, in any case, with `_`, spaces or `-` between its parts; None if there is none."""
    return _index().get(_plain(name))


@cache
def _index() -> dict[str, ModelEntry]:
    """Rows by plain name; an id or alias goes before a repository's bare name."""
    index: dict[str, ModelEntry] = {}
    for entry in model_entries():
        for name in entry.names:
            index.setdefault(_plain(name), entry)
    return index


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def entry_spec(entry: ModelEntry) -> ModelSpec:
    """The model that a row of the catalogue describes."""
    config = {**entry.config, **dict.fromkeys(entry.nulls)}
    return read_model(config, name=entry.id, source=entry.source, where=f"the catalogue entry '{entry.id}'")


def load_model(name_or_path: str) -> ModelSpec:
    """The model that a person means: a catalogue name, a `config.json` or its folder, or a repository on the Hub.

    Raises:
        ConfigError: Nothing goes by that name, or what does is no configuration of a known architecture.
    """
    entry = find_entry(name_or_path)
    if entry is not None:
        return entry_spec(entry)
    path = Path(name_or_path)
    if name_or_path.strip() and _exists(path):
        return _load_file(path)
    if is_hub_id(name_or_path):
        return _load_hub(name_or_path)
    if "/" in name_or_path or "\\" in name_or_path or name_or_path.endswith(".json"):
        raise ConfigError(f"there is no file or folder {shorten(name_or_path, limit=200)}")
    known = [name for entry in model_entries() for name in (entry.id, *entry.aliases) if "/" not in name]
    raise unknown("model", name_or_path, known, more="run `optplan models` for the list, or give a config.json")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _load_file(path: Path) -> ModelSpec:
    if path.is_dir():
        path = path / "config.json"
    where = shorten(str(path), limit=200)
    name = printable(path.parent.name if path.name == "config.json" and path.parent.name else path.stem)
    spec = read_model(read_config(path), name=name, source=printable(str(path)), where=where)
    return msgspec.structs.replace(spec, reference=str(path))


def _load_hub(repository: str) -> ModelSpec:
    try:
        path = fetch_config(repository)
    except HubError as error:
        known = [entry.hub_id for entry in model_entries() if entry.hub_id]
        raise unknown("model", repository, known, more=f"there is no such file or folder, and {error}") from None
    source = f"https://huggingface.co/{repository}/blob/main/config.json"
    return read_model(read_config(path), name=repository, source=source, where=f"the config.json of {repository}")
