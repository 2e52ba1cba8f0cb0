"""Asking libraries what a plan wants to know, once: answers are remembered in the cache."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

from carnice_build.errors import BackendError, PlanError
from carnice_build.extras import pip_install
from carnice_build.keys import canonical_json, library_version
from carnice_build.steps.base import Question
from carnice_build.store.answers import read_answer, write_answer
from carnice_build.store.digests import digest_texts

T = TypeVar("T")


class Asking:
    """Asks in a process of its own, so that no plan imports a library; see `steps.base.Ask`."""

    def __init__(self, cache: Path) -> None:
        """Answers are remembered in the cache of this folder."""
        self._cache = cache

    def __call__(self, question: Question[T], /) -> T:
        """See `Ask`; an answer is that of the installed versions, others are asked anew."""
        key = _key(question)
        text = read_answer(self._cache, key)
        if text is not None:
            try:
                return question.parse(text)
            except ValueError:
                # Somebody else wrote it: it is asked again.
                pass
        for library in question.libraries:
            if library_version(library) == "absent":
                raise PlanError(
                    f"{library} is not installed, which a plan of this model asks",
                    expected=pip_install(question.extra),
                )
        text = _asked(question)
        try:
            answer = question.parse(text)
        except ValueError as error:
            raise BackendError(
                f"{question.function} gave an answer that is none: {error}"
            ) from None
        write_answer(self._cache, key, text)
        return answer


def _key(question: Question[Any]) -> str:
    """Names the answer: by the versions of whoever gives it, and by what is asked."""
    versions = (f"{name} {library_version(name)}" for name in question.libraries)
    arguments = (canonical_json(item) for item in question.arguments)
    return digest_texts([question.function, str(question.version), *versions, *arguments])


def _asked(question: Question[Any]) -> str:
    # Most plans ask nothing, and this brings multiprocessing.
    from carnice_build.verification.process import Worker

    with Worker() as worker:
        return worker.call(_answer, question.function, question.arguments)


def _answer(function: str, arguments: tuple[Any, ...]) -> str:
    module, _, name = function.partition(":")
    return cast(str, getattr(import_module(module), name)(*arguments))
