"""One file per state machine: its states, its table of legal transitions, and how an event changes it.

An event that its table does not hold is an `IllegalTransition`: the history, or the code that wrote it, is broken.
"""

from streamflow.core.machines.table import IllegalTransition, next_state

__all__ = ["IllegalTransition", "next_state"]
