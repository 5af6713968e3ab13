"""The tree of errors: drawn as it is, with texts that name what they are about, and whole after pickling."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from streamflow import errors
from streamflow.errors import ErrorInfo

ERROR = ErrorInfo("shop.Declined", "card 7", "Traceback …")
CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, errors.StreamflowError)]
TEXTS = {
    errors.WorkflowFailed("w", ERROR): "workflow w failed: shop.Declined: card 7",
    errors.WorkflowCancelled("w"): "workflow w was cancelled",
    errors.WorkflowTerminated("w"): "workflow w was terminated",
    errors.WorkflowTerminated("w", "too slow"): "workflow w was terminated: too slow",
    errors.StepFailed("charge", 1, ERROR): "step charge failed after 1 attempt: shop.Declined: card 7",
    errors.StepFailed("charge", 3, ERROR): "step charge failed after 3 attempts: shop.Declined: card 7",
    errors.SignalError("go", "no"): "signal go was sent as an error: no",
    errors.RetryAfter(2.5): "retry after 2.5 s",
    errors.RetryAfter(2.5, "busy"): "busy",
    errors.CommandRejected("run w is closed"): "run w is closed",
}


@pytest.mark.parametrize(("error", "text"), TEXTS.items())
def test_a_text_names_the_id_and_what_happened(error, text):
    assert str(error) == text


@pytest.mark.parametrize("error", TEXTS)
def test_an_error_is_whole_after_pickling_and_copying(error):
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert (again.args, vars(again), str(again)) == (error.args, vars(error), str(error))


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = [line for line in (errors.__doc__ or "").splitlines() if line.lstrip("│├└─ ")[:1].isupper()]
    depths = {line.lstrip("│├└─ ").split()[0].strip(","): len(line) - len(line.lstrip("│├└─ ")) for line in drawn}
    for each in CLASSES:
        assert each.__name__ in (errors.__doc__ or ""), each
        parent = each.__bases__[0]
        if each.__name__ in depths and parent.__name__ in depths and each.__name__ != "NonRetryable":
            assert depths[each.__name__] == depths[parent.__name__] + 4, each


def test_every_error_is_a_streamflow_error_with_a_docstring():
    assert all(each.__doc__ for each in CLASSES)
    assert issubclass(errors.WorkflowFailed, errors.WorkflowError)
    assert issubclass(errors.WorkflowExists, errors.RequestError)


@pytest.mark.parametrize(("info", "text"), [(ERROR, "shop.Declined: card 7"), (ErrorInfo("KeyError", ""), "KeyError")])
def test_a_recorded_error_shows_its_type_and_message(info, text):
    assert str(info) == text
