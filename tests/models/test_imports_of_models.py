"""Imports without the collector of cycles: it is off for the block, and as it was afterwards."""

import gc

import pytest

from rayfuse.models.imports import collector_paused


def test_the_collector_is_off_in_the_block_and_on_after_it():
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_turns_it_on_again():
    @collector_paused()
    def fails():
        raise ImportError("no torch")

    with pytest.raises(ImportError, match="no torch"):
        fails()
    assert gc.isenabled()


def test_a_program_that_has_it_off_keeps_it_off():
    gc.disable()
    try:
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
