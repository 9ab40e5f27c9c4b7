"""Teachers that are not loaded here: a server that is asked over HTTP, and signals that were computed before."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from rayfuse.config.section import NewPlace, Section


def _server_address(value: str) -> str:
    """Refuse what is no plain address of a server. The value is not repeated: it may hold a key."""
    try:
        parts = urlsplit(value)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        raise ValueError("is not a URL such as https://teacher.example.com/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_valid:
        raise ValueError("is not a URL such as https://teacher.example.com/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError("has a user name or password in it; give the key by api_key_env or api_key_file")
    if "?" in value or "#" in value:
        raise ValueError("must end with its path (no ? and no #); give the key by api_key_env or api_key_file")
    if re.search(r"[\s\x00-\x1f]", value):
        raise ValueError("has white space in it")
    return value.rstrip("/")


def _variable_name(value: str) -> str:
    """Refuse what is no name of an environment variable, without repeating it: it may be the key itself."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
        raise ValueError(
            "must be the NAME of an environment variable (capital letters, digits, underscores), never the key itself"
        )
    return value


class Endpoint(Section):
    """An OpenAI-compatible completion server that returns the log-probabilities of a prompt's tokens.

    The key is read where a request is sent, from the environment or a file of that node; it stands in no configuration.
    """

    shorthand: ClassVar[str] = "url"

    url: Annotated[str, AfterValidator(_server_address)] = Field(
        description="address up to the API's version, for example https://teacher.example.com/v1"
    )
    model: str = Field("", description="the model's name on the server; default: the teacher's `model`")
    api_key_env: Annotated[str, AfterValidator(_variable_name)] | None = Field(
        None, description="name of the environment variable that holds the API key, on every node that asks the server"
    )
    api_key_file: NewPlace | None = Field(
        None, min_length=1, description="file that holds the API key (a mounted secret), read again for every request"
    )
    ca_file: NewPlace | None = Field(
        None, min_length=1, description="PEM file of the authority that signed the server's certificate, where private"
    )
    insecure: str | None = Field(
        None, description="repeat the URL's host here to allow http:// to it; never needed for this machine itself"
    )
    context: int | None = Field(
        None, ge=2, description="tokens of prompt and answer together; default: what the server says (max_model_len)"
    )
    timeout_s: float = Field(300.0, gt=0, description="seconds for one request, from sending it to its last byte")
    max_concurrency: int = Field(16, ge=1, description="requests in flight at once, per replica of the teacher")
    max_wait_s: float = Field(
        60.0, ge=0, description="longest pause before a request is sent again, whatever Retry-After says"
    )

    @model_validator(mode="after")
    def _encrypted(self) -> Endpoint:
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if self.insecure is not None and self.insecure != host:
            raise ValueError(f"insecure must repeat the host of url, {host!r}, but is {self.insecure!r}")
        if parts.scheme == "http" and not is_loopback(host) and self.insecure is None:
            raise ValueError(
                f"url is http://, which shows texts and key to everyone on the way to {host!r}: use https://, or set "
                f"insecure: {host} if this network is yours alone"
            )
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("give api_key_env or api_key_file, not both")
        return self

    @property
    def host(self) -> str:
        """Host and, where given, port: all that error messages show of the address."""
        return urlsplit(self.url).netloc


def is_loopback(host: str) -> bool:
    """Whether the name or address stands for this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Stored(Section):
    """Which signals of the store a teacher without a model stands for."""

    shorthand: ClassVar[str] = "fingerprint"

    fingerprint: str | None = Field(
        None,
        pattern="^[0-9a-f]{32}$",
        description="folder of its signals in the store; default: worked out from the model's files",
    )
    backend: Literal["transformers"] = Field(
        "transformers", description="backend that wrote them; needed where the fingerprint is worked out"
    )
