"""Every setting of the server, once: a field here is a `PRECIS_*` environment variable and a flag of `precis serve`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from quantizers.errors import InvalidInput
from quantizers.recipe import parse_recipe
from server.engine.interface import KvDtype

MIB = 1 << 20


def _default_data_dir() -> Path:
    return Path.home() / ".local" / "share" / "precis"


class Settings(BaseSettings):
    """Validated where it is made; a wrong value is a ValidationError that names the field."""

    model_config = SettingsConfigDict(env_prefix="PRECIS_", frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    data_dir: Path = Field(default_factory=_default_data_dir, description="where checkpoints, variants, uploads and jobs are kept")
    device: Literal["auto", "cpu", "cuda:0"] = Field("auto", description="where weights are resident; auto takes a GPU if there is one")
    default_precision: str = Field("bf16", description="recipe that a bare model name stands for")
    recipes: list[str] = Field([], description="recipes to make and load at start, for every model named on the command line")
    on_load: bool = Field(True, description="quantize when a request names a recipe that has no artifact yet")
    memory_budget_bytes: int | None = Field(None, gt=0, description="ceiling of what residents may hold; default 80 % of what is free")
    max_waiting: int = Field(64, ge=1, description="requests that may wait in the engine before new ones get 503")
    speculation: Literal["off", "lookup"] = Field(
        "lookup", description="guess tokens from the text so far and verify them, where that pays"
    )
    twin_precision: str | None = Field(
        None, description="recipe whose variant of a checkpoint drafts tokens for its others; none: no twins"
    )
    kv_dtype: KvDtype = Field(
        "auto", description="of cached keys and values: auto is the model's own, int8 takes about half of bf16's memory"
    )
    allowed_roots: list[Path] = Field([], description="folders under which POST /v1/checkpoints may import a path")
    allow_hub: bool = Field(False, description="POST /v1/checkpoints may import from the Hugging Face hub")
    max_upload_bytes: int = Field(64 << 30, gt=0, description="largest upload")
    max_body_bytes: int = Field(10 * MIB, gt=0, description="largest JSON body")
    load_timeout_seconds: float = Field(300.0, gt=0, description="how long a request waits for its variant to be made and loaded")
    grace_seconds: float = Field(30.0, ge=0, description="how long running requests may finish after SIGTERM")
    api_key: str | None = Field(None, min_length=8, description="bearer token that /v1 asks for; none: open")
    api_keys: list[Annotated[str, Field(min_length=8)]] = Field([], description="further bearer tokens; no two keys share cached prefixes")

    @property
    def keys(self) -> tuple[str, ...]:
        """Every bearer token that /v1 takes; none: it is open."""
        return (*(() if self.api_key is None else (self.api_key,)), *self.api_keys)

    @field_validator("default_precision", "recipes", "twin_precision")
    @classmethod
    def _are_recipes(cls, value: str | list[str] | None) -> str | list[str] | None:
        for slug in [value] if isinstance(value, str) else value or []:
            try:
                parse_recipe(slug)
            except InvalidInput as error:
                raise ValueError(error.message) from error
        return value
