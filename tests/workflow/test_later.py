"""What the contract names and a later version brings says so, instead of doing nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import streamflow as sf


async def work() -> None: ...


@pytest.mark.parametrize(("option", "value"), [("max_parallel_steps", 3)])
def test_a_workflow_option_without_effect_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} of workflow work is not part of this version"):
        sf.Registry().workflow(**{option: value})(work)


def test_the_calls_of_later_versions_say_so() -> None:
    calls: list[Any] = [sf.promise, sf.continue_as_new]
    for call in calls:
        with pytest.raises(sf.StreamflowError, match="not part of this version"):
            call()
    with pytest.raises(sf.StreamflowError, match="not part of this version"):
        asyncio.run(sf.start(work))
