"""Serving: when the teachers work, what happens when one is missing, and whether people may ask them too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rayfuse.config.section import NewPlace, Section


class Http(Section):
    """The teachers over HTTP, for people and programs; off unless this section is there."""

    host: str = Field("127.0.0.1", description="address to listen on; the default is reached from this machine only")
    port: int = Field(8000, ge=0, le=65535, description="port; 0: any that is free")
    token_env: str = Field("RAYFUSE_HTTP_TOKEN", description="environment variable with the token clients must send")
    token_file: NewPlace | None = Field(None, description="file with the token, in place of the variable")
    certificate: NewPlace | None = Field(None, description="file with the server's TLS certificate chain (PEM)")
    certificate_key: NewPlace | None = Field(None, description="file with its private key (PEM)")
    in_flight: int = Field(
        1, ge=1, description="requests that may be inside a teacher at a time, beside the run's units"
    )
    queue: int = Field(16, ge=0, description="requests that may wait for a teacher; more are told to come back (429)")
    max_body_bytes: int = Field(1 << 20, ge=1024, description="largest request")
    max_samples: int = Field(8, ge=1, description="most samples, or prompts, of one request")
    max_new_tokens: int = Field(1024, ge=1, description="longest answer that may be asked for")
    timeout_s: float = Field(120.0, gt=0, description="seconds to wait for a teacher that does not answer")

    @model_validator(mode="after")
    def _certificate_has_a_key(self) -> Http:
        if (self.certificate is None) != (self.certificate_key is None):
            raise ValueError("certificate and certificate_key belong together; give both or none")
        return self


def _switch(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class Serving(Section):
    """How the teachers serve the run."""

    mode: Literal["online", "first"] = Field(
        "online",
        description="online: teachers answer while the student trains; first: they fill the signal store, give their "
        "memory back, and then the student trains (for a single node)",
    )
    on_missing: Literal["wait", "fail", "drop"] = Field(
        "fail",
        description="a teacher gone for longer than its patience_s: wait for it, end the run, or go on with the others",
    )
    max_dropped: float = Field(
        0.01, ge=0, le=1, description="share of a stage's (sample, teacher) pairs that may be dropped before it fails"
    )
    http: Annotated[Http | None, BeforeValidator(_switch)] = Field(
        None, description="true, or a section: let people ask the teachers over HTTP while the run uses them"
    )

    @model_validator(mode="after")
    def _teachers_are_there_to_be_asked(self) -> Serving:
        if self.mode == "first" and self.http is not None:
            raise ValueError(
                "mode: first takes the teachers away before the student trains; with http use mode: online"
            )
        return self
