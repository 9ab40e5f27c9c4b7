"""The tokens of several models as bytes, and which token of the student stands for a teacher's token.

Two tokens are the same where they write the same bytes; the models' end-of-turn tokens are the same by their meaning.
Every table is made when it is first asked for, and once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rayfuse.alignment.token_bytes import bytes_to_ids, token_bytes
from rayfuse.config import Model
from rayfuse.data.render import Renderer
from rayfuse.prepare.byte_prefix import PrefixMap
from rayfuse.prepare.min_edit import NearestTokens


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """One model's tokens.

    Attributes:
        pieces: [V] the bytes of each id, b"" for special ids and gaps (see alignment.token_bytes).
        ids: the id that writes given bytes (see alignment.bytes_to_ids).
        end_of_turn: the id with which the model ends its turn.
    """

    pieces: Sequence[bytes]
    ids: Mapping[bytes, int]
    end_of_turn: int

    @staticmethod
    def of(renderer: Renderer) -> Vocabulary:
        """The tokens of a renderer's tokenizer that its model has rows for."""
        rows = renderer.vocabulary
        pieces = token_bytes(renderer.tokenizer)[:rows]
        return Vocabulary(pieces, bytes_to_ids(renderer.tokenizer, rows), renderer.end_of_turn)


def counterparts(teacher: Vocabulary, student: Vocabulary) -> np.ndarray:
    """The student's id for each of the teacher's ids: int64 [V_teacher], -1 where it has no such token.

    Of several teacher ids that write the same bytes, one has a counterpart: no two map to the same id.
    """
    table = np.full(max(len(teacher.pieces), teacher.end_of_turn + 1), -1, dtype=np.int64)
    for piece, index in teacher.ids.items():
        table[index] = student.ids.get(piece, -1)
    table[teacher.end_of_turn] = student.end_of_turn
    return table


class Vocabularies:
    """The tokens of the student and of each teacher, and what one is to the other.

    Args:
        student: the student's renderer.
        teachers: the teachers' models; their tokenizers are loaded when they are first needed.
    """

    def __init__(self, student: Renderer, teachers: Sequence[Model]) -> None:
        self._renderer = student
        self._models = teachers

    @cached_property
    def student(self) -> Vocabulary:
        """The student's tokens."""
        return Vocabulary.of(self._renderer)

    @cached_property
    def teachers(self) -> list[Vocabulary]:
        """Each teacher's tokens."""
        return [Vocabulary.of(renderer) for renderer in self._teacher_renderers]

    @cached_property
    def teacher_tokenizers(self) -> list[Any]:
        """Each teacher's tokenizer."""
        return [renderer.tokenizer for renderer in self._teacher_renderers]

    @cached_property
    def _teacher_renderers(self) -> list[Renderer]:
        return [Renderer.of(model) for model in self._models]

    @cached_property
    def prefixes(self) -> PrefixMap:
        """The longest token of the student that is a prefix of given bytes."""
        return PrefixMap(self.student.ids)

    @cached_property
    def counterparts(self) -> list[np.ndarray]:
        """Per teacher, the student's id for each of its ids; see `counterparts`."""
        return [counterparts(teacher, self.student) for teacher in self.teachers]

    @cached_property
    def nearest(self) -> NearestTokens:
        """The student's token nearest to given bytes."""
        return NearestTokens(self.student.ids)

    @cached_property
    def _nearest_tables(self) -> list[np.ndarray]:
        return [table.copy() for table in self.counterparts]

    def nearest_ids(self, s: int, ids: np.ndarray) -> np.ndarray:
        """For ids of teacher s, the student's nearest tokens, -1 for special ids; int64 in the shape of `ids`."""
        table, pieces = self._nearest_tables[s], self.teachers[s].pieces
        for index in np.unique(ids[table[ids] < 0]).tolist():
            if pieces[index]:
                table[index] = self.nearest(pieces[index])
        return table[ids]
