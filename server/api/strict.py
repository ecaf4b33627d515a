"""What every body of a request has in common: it is strict, closed, and a null is absent."""

from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class ApiModel(BaseModel):
    """Strict, closed, and blind to nulls."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """As pydantic makes it, with null allowed wherever a field may be absent."""
        schema = handler.resolve_ref_schema(handler(core))
        required = schema.get("required", ())
        for name, field in schema.get("properties", {}).items():
            if name not in required and {"type": "null"} not in field.get("anyOf", ()):
                description = {key: field.pop(key) for key in ("default", "title", "description") if key in field}
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **description}
        return schema

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value
