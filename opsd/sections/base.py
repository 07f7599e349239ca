"""What the sections are made of: types that read YAML 1.1 as people mean it, and errors that name a field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text: a float written that way is a float all the same."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _switch(value: Any) -> Any:
    """YAML 1.1 reads on and off as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def refuse(field: str, expected: str, found: object) -> PydanticCustomError:
    """The error of a check; `opsd.config` adds file and line. `field` is the key within the section."""
    return PydanticCustomError("check", "{expected}", {"field": field, "expected": expected, "found": repr(found)})


def at_home(path: Path) -> Path:
    """`~` and `~name` resolved; a name nobody has stays as it is, and will be said not to exist."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Temperature = Annotated[Float, Field(ge=1e-6, le=1e6)]  # fp32 logits divided by less, or by more, are not numbers
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]
Local = Annotated[Path, Field(strict=False), AfterValidator(lambda path: at_home(path).absolute())]


class Section(BaseModel):
    """Unknown keys are errors, no value is coerced in silence, and a section does not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)
