"""Configuration: a YAML file, then `section.key=value` from the command line, as one frozen `Config`.

Relative paths are relative to the folder of the file that says them; on the command line, to the working
directory. Every mistake is an `InputError` with file, line, field, what was expected and what was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from opsd.config_problems import SECTIONS, Place, Source, problems
from opsd.durable import write_text
from opsd.errors import InputError, raise_all
from opsd.sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    LogConfig,
    MediaConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PromptsConfig,
    RewardsConfig,
    RolloutConfig,
    TeacherConfig,
    TrainConfig,
    at_home,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "LogConfig",
    "MediaConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PromptsConfig",
    "RewardsConfig",
    "RolloutConfig",
    "TeacherConfig",
    "TrainConfig",
    "at_home",
    "dump_config",
    "load_config",
]

COMMAND_LINE = "command line"


def load_config(path: Path | None, overrides: Sequence[str] = (), base: dict[str, Any] | None = None) -> Config:
    """The config of a run: defaults < `base` < the file < `overrides`.

    base: {section: {key: value}} of a built-in job. Raises `InputError`, all problems in one message.
    """
    values: dict[str, Any] = {"model": {}}  # so that a missing model.path is reported as such
    sources: dict[Place, Source] = {(): Source(path or COMMAND_LINE)}
    _merge(values, sources, base or {}, Path.cwd(), {}, "built-in job")
    if path is not None:
        data, lines = read_yaml(path)
        _merge(values, sources, data, path.absolute().parent, lines, path)
    for text in overrides:
        section, key, value = _override(text)
        _merge(values, sources, {section: {key: value}}, Path.cwd(), {}, COMMAND_LINE)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise_all(problems(error, values, sources))
        raise


def dump_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back equal."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    write_text(path, text)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """The mapping in a YAML file, and the line of each key path in it. Duplicate keys are errors."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise InputError("a readable YAML file", str(found), file=path) from error
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines = dict(_key_lines(node, path))
        data = None if node is None else loader.construct_document(node)
    except InputError:
        raise
    except Exception as error:  # PyYAML lets through what its parts raise for values that are not of their tag
        mark = getattr(error, "problem_mark", None)
        found = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError("valid YAML", str(found), file=path, line=mark and mark.line + 1) from error
    if not isinstance(data, dict | None):
        raise InputError("a mapping of sections", repr(data), file=path, line=1)
    return data or {}, lines


def _key_lines(node: yaml.Node | None, path: Path, above: Place = ()) -> Iterator[tuple[Place, int]]:
    """(key path, line) of the two levels a config has."""
    if not isinstance(node, yaml.MappingNode) or len(above) > 1:
        return
    seen: dict[Place, int] = {}
    for key_node, value_node in node.value:
        if isinstance(key_node, yaml.ScalarNode) and key_node.value != "<<":
            key_node.tag = "tag:yaml.org,2002:str"  # a key is what is written: `on` is no boolean, nothing is no null
        key, line = (*above, str(key_node.value)), key_node.start_mark.line + 1
        if key in seen:
            raise InputError(
                "each key once",
                f"it again, first on line {seen[key]}",
                file=path,
                line=line,
                field=".".join(key),
            )
        seen[key] = line
        yield key, line
        yield from _key_lines(value_node, path, key)


def _override(text: str) -> tuple[str, str, Any]:
    """section, key and value of `section.key=value`. The value is YAML, or raw text where text is wanted."""
    name, equals, raw = text.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and section and key):
        raise InputError("section.key=value", repr(text), file=COMMAND_LINE)
    field = _field(section, key)
    textual = _takes(field, str) or _takes(field, Path)
    try:
        value = yaml.safe_load(raw)
    except Exception as error:
        if not textual:
            raise InputError("a YAML value", repr(raw), file=COMMAND_LINE, field=name) from error
        value = raw
    if textual and not isinstance(value, str | None):
        value = raw
    return section, key, value


def _field(section: str, key: str) -> FieldInfo | None:
    return SECTIONS[section].model_fields.get(key) if section in SECTIONS else None


def _takes(field: FieldInfo | None, kind: type) -> bool:
    """Whether a field is plain `kind` or `kind | None`."""
    if field is None:
        return False
    options = get_args(field.annotation) or (field.annotation,)
    plain = {getattr(option, "__origin__", option) for option in options}
    return plain <= {kind, type(None)} and kind in plain


def _merge(
    values: dict[str, Any],
    sources: dict[Place, Source],
    data: dict[str, Any],
    folder: Path,
    lines: dict[Place, int],
    file: str | Path,
) -> None:
    """Lay `data` over `values` key by key, note each key's source, make its paths absolute in `folder`."""
    for section, keys in data.items():
        sources[(str(section),)] = Source(file, lines.get((str(section),)))
        if not isinstance(keys, dict | None):
            values[str(section)] = keys
            continue
        into = values.setdefault(str(section), {})
        if not isinstance(into, dict):  # a list, say, in the file: the check of the whole config says so
            continue
        for key, value in (keys or {}).items():
            place = (str(section), str(key))
            sources[place] = Source(file, lines.get(place))
            into[str(key)] = _resolve(place, value, folder)


def _resolve(place: tuple[str, str], value: Any, folder: Path) -> Any:
    """A path made absolute. model.path is one if it looks like one or is a folder there, else a hub id."""
    if not isinstance(value, str) or not value:
        return value
    local = folder / at_home(Path(value))
    if place == ("model", "path"):
        return str(local) if value.startswith((".", "/", "~")) or local.is_dir() else value
    return str(local) if _takes(_field(*place), Path) else value
