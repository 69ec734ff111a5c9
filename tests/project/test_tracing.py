"""The tracer, on functions whose order is known."""

from __future__ import annotations

import sys
import threading

from moefoundry.config.overrides import split_arguments
from moefoundry.config.urls import is_url, resolved
from tests.project.tracing import trace


def test_functions_are_named_by_first_entry() -> None:
    with trace() as calls:
        is_url("a/b")
        resolved("a/b")
        is_url("s3://a")
    assert calls[0] == "moefoundry.config.urls:is_url"
    assert calls.index("moefoundry.config.urls:resolved") > 0
    assert len(set(calls)) == len(calls)
    assert calls.modules == ["moefoundry.config.urls"]
    assert calls.has_in_order("moefoundry.config.urls:is_url", "moefoundry.config.urls:resolved")
    assert not calls.has_in_order("moefoundry.config.urls:resolved", "moefoundry.config.urls:is_url")


def test_threads_that_start_inside_are_traced_and_nothing_afterwards() -> None:
    before = sys.getprofile()
    with trace() as calls:
        thread = threading.Thread(target=split_arguments, args=(["a=1"],))
        thread.start()
        thread.join()
    assert "moefoundry.config.overrides:split_arguments" in calls
    assert sys.getprofile() is before
    count = len(calls)
    is_url("a")
    assert len(calls) == count
