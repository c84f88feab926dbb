"""What a user can put right is an InputError, and still the built-in error that Python's protocols and a caller expect."""

from __future__ import annotations

from typing import Any

import pytest

import circuitvision as cv
from circuitvision.data import Side
from circuitvision.errors import CircuitVisionError, HookError, InputError, UnknownSiteError, UnsupportedModelError
from tests.zoo import case, shared_model


def mistakes() -> dict[str, tuple[Any, type[Exception]]]:
    module = shared_model("vit")
    model, inputs = cv.HookedModel(module), case("vit").inputs(module, batch=2)
    view: Any = cv.interop.transformer_lens(model, "vision")
    side: Any = Side(texts=["a", "b"])
    return {
        "site": (lambda: model.run_with_cache(inputs, names_filter="vision.blocks.0.hook_nothing"), KeyError),
        "tower of a cache": (lambda: model.run_with_cache(inputs)[1]["nothing.hook_embed"], KeyError),
        "attribute of a model": (lambda: model.langauge, AttributeError),
        "attribute of a tower": (lambda: model.vision.nothing, AttributeError),
        "attribute of a view": (lambda: view.nothing, AttributeError),
        "name in the package": (lambda: cv.nothing, AttributeError),
        "example": (lambda: side[2], IndexError),
        "hook": (lambda: model.run_with_hooks(inputs, [("vision.hook_embed", lambda value, hook: "x")]), HookError),
        "value": (lambda: cv.edits.scale("vision.hook_embed", 2.0, positions="nowhere"), ValueError),
    }


def test_mistakes_are_input_errors_and_what_python_expects() -> None:
    for name, (call, kind) in mistakes().items():
        with pytest.raises(InputError) as caught:
            call()
        assert isinstance(caught.value, kind), name
        assert str(caught.value) == caught.value.args[0], name


def test_protocols_of_python_still_work() -> None:
    model = cv.HookedModel(shared_model("vit"))
    assert not hasattr(model, "langauge")
    assert getattr(model.vision, "nothing", 3) == 3
    side: Any = Side(texts=["a", "b"])
    assert [one.examples[0].text for one in side] == ["a", "b"]


def test_every_class_of_error_says_what_it_is() -> None:
    assert str(UnknownSiteError("as it is")) == "as it is"
    for kind in CircuitVisionError.__subclasses__():
        assert kind in (InputError, UnsupportedModelError)
