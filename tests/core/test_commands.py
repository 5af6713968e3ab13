"""Commands: the closed union of requests, and how little a plain producer must know."""

from __future__ import annotations

import typing

from streamflow.core.commands import BODIES, Body, Command, IfExists, SignalWorkflow, StartWorkflow


def test_the_list_of_bodies_is_the_union():
    assert typing.get_args(Body) == BODIES
    assert all(body.__struct_config__.frozen and body.__doc__ for body in BODIES)


def test_a_producer_needs_no_more_than_a_name_and_an_id():
    command = Command(command_id="c", workflow_id="w", sent_at=0, body=StartWorkflow(workflow="work"))
    assert command.reply_to is None
    assert command.body == StartWorkflow(workflow="work", args=b"[]", if_exists="attach")
    assert SignalWorkflow(name="go").value is None


def test_a_start_of_an_id_that_exists_attaches_fails_or_restarts():
    assert typing.get_args(IfExists) == ("attach", "error", "restart")
