"""Who is right: how a run finds out before it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayfuse.config.judges import UnitTests
from rayfuse.config.section import NewPlace, Section
from rayfuse.config.teachers import Replicas


class Consensus(Section):
    """Teachers and pivot answer the data's prompts; the stages then learn what is probably right.

    A label, a teacher's answer and the pivot's count by how reliable their sources turn out to be in each field and at
    each certainty, without supervision; rows with `trusted: true` are known to be right. Rows may lack a response.
    """

    equivalence: Literal["auto", "exact", "final", "tests", "none"] = Field(
        "auto",
        description="when two answers say the same: exact text, same final answer (boxed or number), passing the row's "
        "tests, or none (free text: every model scores every answer); auto chooses among the others by the data, "
        "and leaves the labels as they are where none fits",
    )
    keep: float = Field(0.5, ge=0, lt=1, description="least probability of being right of an answer to learn from")
    clusters: int = Field(12, ge=1, description="fields to find at most, where the rows name no `skill`")
    pivot: bool = Field(True, description="whether the pivot answers too")
    max_new_tokens: int = Field(1024, ge=1, description="longest answer, in the model's own tokens")
    tests: UnitTests = Field(UnitTests(), description="the sandbox of the rows' tests")
    replicas: Replicas = Field(Replicas(), description="copies of the pivot, while it answers")
    in_flight: int = Field(4, ge=1, description="units of prompts that are answered at a time")
    store: NewPlace | None = Field(None, description="folder or fsspec URL that keeps answers; default: OUTPUT/answers")
