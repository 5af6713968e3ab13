"""How deep JSON nests, found out without reading it: readers and writers of JSON recurse.

A limit of our own, since that of the interpreter depends on its version and on how deep the caller already is: a value
must not be taken live and refused on replay, nor be written by one worker and be unreadable for another.
"""

from __future__ import annotations

from typing import Final

NESTING_MAX: Final = 200
"""Lists and objects within each other. Far more than people write, far less than any reader of JSON survives."""

_OTHER: Final = bytes(sorted(set(range(256)) - set(b"[]{}")))
_ALIKE: Final = bytes.maketrans(b"{}", b"[]")
_OPENS: Final = ord(b"[")
_PASSES: Final = 5


def nests_too_deeply(data: bytes) -> bool:
    """Whether lists and objects lie within each other by more than `NESTING_MAX`; of what is no JSON, a guess."""
    if len(data) <= NESTING_MAX or data.count(b"[") + data.count(b"{") <= NESTING_MAX:
        return False
    outside = data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]  # of strings
    brackets = b"".join(outside).translate(_ALIKE, _OTHER)
    for _ in range(_PASSES):  # a level each: what is large is mostly wide, and little is left for the loop below
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return False
    depth = _PASSES
    for bracket in brackets:
        depth += 1 if bracket == _OPENS else -1
        if depth > NESTING_MAX:
            return True
    return False
