"""`App`: the steps and workflows of one application, and the two ways to run them."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from streamflow.core.retry import Retry
from streamflow.ids import check_app
from streamflow.workflow.definitions import Registry, Workflow, check_retry, defaults

if TYPE_CHECKING:
    # Upward, for its name alone: what serves an app lies above what defines one.
    from streamflow.serve import Client

MAX_PARALLEL_STEPS = 64
"""Steps that one worker runs at once, when the app does not say: they mostly wait for IO."""


class App(Registry):
    """An application: its name is the prefix of its topics, `retry` the farthest default of its steps."""

    def __init__(self, name: str, *, retry: Retry | None = None, max_parallel_steps: int = MAX_PARALLEL_STEPS) -> None:
        super().__init__()
        self.name = check_app(name)
        self.retry = Retry() if retry is None else check_retry(retry)
        self.max_parallel_steps = check_parallel(max_parallel_steps)

    def include(self, other: Registry) -> None:
        """Add the steps and workflows of a registry; a name that both have is a `ValueError`."""
        if isinstance(other, App) or not isinstance(other, Registry):
            raise ValueError(f"app {self.name} can include a streamflow.Registry, found {other!r}")
        # Copies: several apps may include one registry, and each workflow falls back on the retry of its own app.
        bound = Registry()
        bound.steps = other.steps
        bound.workflows = {name: copy.copy(workflow) for name, workflow in other.workflows.items()}
        super().include(bound)

    defaults = staticmethod(defaults)

    def serve(
        self,
        url: str | None = None,
        *,
        state_dir: str | os.PathLike[str] | None = None,
        max_parallel_steps: int | None = None,
        queues: Sequence[str] = (),
        metrics_port: int | None = None,
        create_topics: bool = True,
    ) -> AbstractAsyncContextManager[Client]:
        """A worker in this process, and a client to it. If the worker dies the block is cancelled and raises why.

        It owns partitions, and runs besides the steps of the `queues` that are named.
        """
        from streamflow.serve import serve

        return serve(
            self,
            url,
            state_dir=state_dir,
            max_parallel_steps=max_parallel_steps,
            queues=queues,
            metrics_port=metrics_port,
            create_topics=create_topics,
        )

    def connect(self, url: str | None = None) -> AbstractAsyncContextManager[Client]:
        """A client; the runs are worked on by workers elsewhere."""
        from streamflow.serve import connect

        return connect(url, app=self)

    def _add_workflow(self, workflow: Workflow[..., Any]) -> None:
        super()._add_workflow(workflow)
        workflow.app_retry = self.retry

    def __repr__(self) -> str:
        return f"<app {self.name}>"


def check_parallel(number: int) -> int:
    """Return a number of steps that may run at once, or raise `ValueError`."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"max_parallel_steps must be an int of at least 1, found {number!r}")
    return number
