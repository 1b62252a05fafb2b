"""The fields of requests: types and ranges; what is not served is refused by name, and nothing is dropped."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hf_accel.endpoint.asked import Asked
from hf_accel.endpoint.errors import Refusal
from hf_accel.endpoint.unserved import check_served

LEAST_TEMPERATURE = 1e-4  # scores divided by less leave the range of fp32
_Text = Annotated[str, Field(min_length=1)]
_Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Fields):
    """What is sent along with a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Common(_Fields):
    """The fields of both kinds of request; null counts as left out."""

    model: str
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: _Seed | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=4)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def asked(self) -> Asked:
        """Return what is asked for; of the most tokens and alternatives the kinds of request know."""
        return Asked(
            choices=self.n or 1,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            bias={int(token): value for token, value in (self.logit_bias or {}).items()},
        )


T = TypeVar("T", bound=Common)


def read_fields(kind: type[T], body: Any) -> T:
    """Return the fields of a request.

    Raises:
        Refusal: a field is missing, unknown, not served, of another type or out of its range; it is named.
    """
    if not isinstance(body, dict):
        raise Refusal("The body must be a JSON object.")
    try:
        found = kind.model_validate(check_served(body, set(kind.model_fields)))
    except ValidationError as error:
        # of what the members of a union say, the one that got furthest, and had the right type at least
        told = error.errors(include_url=False)
        first = max(told, key=lambda found: (len(found["loc"]), not found["type"].endswith("_type")))
        path = _path(first["loc"], body, is_missing=first["type"] == "missing")
        raise Refusal(f"{path}: {first['msg']}.", param=path) from error
    if found.temperature is not None and 0 < found.temperature < LEAST_TEMPERATURE:
        raise Refusal(f"temperature: 0 is greedy, and others are {LEAST_TEMPERATURE} at least.", param="temperature")
    if found.stream_options is not None and not found.stream:
        raise Refusal("stream_options belongs to stream=true.", param="stream_options")
    return found


def _path(places: tuple[int | str, ...], value: Any, *, is_missing: bool) -> str:
    """Return where in a body an error is, without the names that pydantic gives to the members of unions."""
    path = ""
    for number, place in enumerate(places):
        if isinstance(value, list) and isinstance(place, int):
            path, value = f"{path}[{place}]", value[place]
        elif isinstance(value, dict) and (place in value or (is_missing and number == len(places) - 1)):
            path, value = f"{path}.{place}", value.get(place)
    return path.removeprefix(".")
