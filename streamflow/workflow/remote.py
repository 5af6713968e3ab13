"""What a call of a step on a queue says to the process that runs it.

That process has the app's code, so it finds there the function and the policies of step, workflow and app. Only what
the call itself said must travel: its name, its timeout, and the numbers of its retry policy. Classes and functions
(`on`, `unless`, `when`) cannot, so a call of a step on a queue may not give them; the step may.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from streamflow.core.events import RemoteCall
from streamflow.core.retry import Retry
from streamflow.errors import InvalidArguments

_NUMBERS: Final = ("max_attempts", "initial", "factor", "max_delay", "jitter", "max_elapsed")
_CODE: Final = {"on": Retry().on, "unless": Retry().unless, "when": None}
"""The fields that do not travel, as they are where nobody gives them."""


def remote_call(step: str, workflow: str, *, timeout: float | None, retry: Retry | None) -> RemoteCall:
    """How the step was called in that workflow; `retry` is the policy of the call or of the block around it."""
    return RemoteCall(
        step=step,
        workflow=workflow,
        timeout_ms=None if timeout is None else math.ceil(timeout * 1000),
        retry=None if retry is None else _encode_retry(retry, step),
    )


def _encode_retry(retry: Retry, step: str) -> bytes:
    given = [name for name, usual in _CODE.items() if getattr(retry, name) != usual]
    if given:
        raise InvalidArguments(
            f"step {step} runs on a queue, and the retry of its call or of the block around it has "
            f"{', '.join(given)}: code does not travel; give it in @app.step(retry=…)"
        )
    return json.dumps({name: getattr(retry, name) for name in _NUMBERS}, separators=(",", ":")).encode()


def decode_retry(numbers: bytes) -> Retry:
    """The policy of the call, or `ValueError` for what is none."""
    try:
        found: Any = json.loads(numbers)
    except RecursionError:
        found = None
    if not isinstance(found, dict) or not found.keys() <= set(_NUMBERS):
        raise ValueError(f"retry must be a JSON object with fields of {', '.join(_NUMBERS)}, found {numbers[:200]!r}")
    return Retry(**found)
