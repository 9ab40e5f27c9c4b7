"""The runtime environment of a teacher: other packages than the student's, in another interpreter."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from rayfuse.config.section import LocalPath, Section

_SECRET_NAME = re.compile(r"(^|_)(api_?key|key|token|secret|pass(word|wd|phrase)?|credentials?)(_|$)|password", re.I)
_URL_WITH_USER = re.compile(r"://[^/\s]*@")


class RuntimeEnv(Section):
    """Where a teacher's replicas run, when its engine's packages do not fit the student's.

    Every environment needs the same minor version of Python and the same version of Ray as the run, and what rayfuse
    imports; rayfuse's own code is sent there.
    """

    py_executable: Annotated[str, LocalPath(resolve=False)] | None = Field(
        None, min_length=1, description="interpreter of another virtual environment, there on every node that serves it"
    )
    pip: tuple[str, ...] = Field((), description="packages that Ray installs with pip beside those of the run")
    uv: tuple[str, ...] = Field((), description="the same, installed with uv")
    conda: str | None = Field(None, min_length=1, description="name of a conda environment on every node")
    env_vars: dict[str, str] = Field({}, description="environment variables; secrets belong into the node's own")

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @field_validator("env_vars", mode="before")
    @classmethod
    def _numbers_are_texts(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            str(name): str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item
            for name, item in value.items()
        }

    @model_validator(mode="after")
    def _one_environment(self) -> RuntimeEnv:
        given = [key for key in ("py_executable", "pip", "uv", "conda") if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} cannot be given together: each is an environment of its own")
        return self

    @model_validator(mode="after")
    def _without_secrets(self) -> RuntimeEnv:
        """Refuse what looks like a secret: the configuration is written into the run folder and the card."""
        for name in self.env_vars:
            if _SECRET_NAME.search(name):
                raise ValueError(
                    f"env_vars.{name} looks like a secret, and the configuration is written into the run folder; "
                    "set it in the environment in which the node's Ray is started"
                )
        for text in [*self.pip, *self.uv, *self.env_vars.values()]:
            if _URL_WITH_USER.search(text):
                raise ValueError(
                    "a URL in it has a user name or password, and the configuration is written into the run folder; "
                    "give credentials by the node's own configuration (pip.conf, netrc) instead"
                )
        return self

    def as_ray(self) -> dict[str, Any]:
        """The same as Ray's own runtime_env, without what is not given."""
        return {key: value for key, value in self.model_dump(mode="json").items() if value}
