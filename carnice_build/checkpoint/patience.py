"""How the hub's failures are met: some are waited out, the others say what to do.

Nothing here repeats what a server said: it knows the token, and may say anything.
"""

from __future__ import annotations

import email.utils
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import httpx
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

from carnice_build.errors import CheckpointError

ATTEMPTS = 6
"""Failures in a row before we give up."""

FIRST_WAIT = 1.0
LONGEST_WAIT = 600.0
"""Seconds; the hub's rate limits last five minutes."""

BROKEN = (httpx.TransportError, httpx.StreamError)
"""What httpx raises when a connection fails."""

MALFORMED = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
"""What huggingface_hub raises when a server says what no hub would."""

OFFLINE = "offline mode (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
"""How an error calls it."""

_RETRIED = (408, 429)

T = TypeVar("T")
Refusal = Callable[[httpx.Response], CheckpointError]
"""Words an answer of 4xx that no retry will change."""


class Unreachable(CheckpointError):
    """The hub did not answer, however often it was asked."""


class Interruption(Exception):
    """Something that may go better next time, after `wait` seconds if the server said so."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class Patience:
    """Waits longer after each failure, and ends in an error."""

    def __init__(self, where: str, attempts: int = ATTEMPTS) -> None:
        self._where = where
        self._left = self._attempts = attempts

    def renew(self) -> None:
        """Forget past failures: there was progress."""
        self._left = self._attempts

    def wait(self, failure: Interruption) -> None:
        """Sleep before the next attempt; Unreachable when there were enough."""
        self._left -= 1
        wait = failure.wait
        if wait is None:
            wait = FIRST_WAIT * 2 ** (self._attempts - self._left - 1)
        if self._left <= 0 or wait > LONGEST_WAIT:
            asked = f" and asks to wait {wait:.0f} s" if wait > LONGEST_WAIT else ""
            raise Unreachable(
                f"{failure}{asked}; gave up after {self._attempts - self._left} attempts",
                where=self._where,
                expected="a connection to the hub; run the command again to go on",
            )
        time.sleep(wait)


def patiently(
    ask: Callable[[], T],
    where: str,
    refusal: Refusal,
    attempts: int = ATTEMPTS,
) -> T:
    """What `ask` returns, asked again after interruptions; `refusal` words what is final."""
    patience = Patience(where, attempts)
    while True:
        try:
            with interruptions(where, refusal):
                return ask()
        except Interruption as failure:
            patience.wait(failure)


@contextmanager
def interruptions(where: str, refusal: Refusal) -> Iterator[None]:
    """Turn the library's errors into an Interruption or a CheckpointError."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise CheckpointError(
            f"is not in the Hugging Face cache, and {OFFLINE} forbids to fetch it",
            where=where,
        ) from None
    except HfHubHTTPError as error:
        raise judge(error.response, refusal) from None
    except (httpx.LocalProtocolError, UnicodeEncodeError):
        raise CheckpointError(
            "the request cannot be sent", where=where, expected="a token of plain characters"
        ) from None
    except BROKEN as error:
        if _is_untrusted(error):
            raise CheckpointError(
                "the server's certificate is not trusted",
                where=where,
                expected="that of its authority in a file that SSL_CERT_FILE names",
            ) from None
        raise Interruption(f"lost the connection ({type(error).__name__})") from None
    except (httpx.InvalidURL, httpx.RequestError):
        raise CheckpointError("the hub's redirect cannot be followed", where=where) from None
    except MALFORMED:
        raise CheckpointError(
            "the hub's answer is malformed", where=where, expected="what a Hugging Face hub says"
        ) from None


def _is_untrusted(error: BaseException | None) -> bool:
    """True when a certificate is what is wrong, which no patience changes."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def judge(response: httpx.Response, refusal: Refusal) -> Exception:
    """The error that an answer of 4xx or 5xx is."""
    status = response.status_code
    if status in _RETRIED or status >= 500:
        return Interruption(f"the server answered {status}", _retry_after(response))
    return refusal(response)


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    with suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    limit = parse_ratelimit_headers(response.headers)
    exhausted = response.status_code == 429 and limit is not None and limit.remaining == 0
    return float(min(limit.reset_in_seconds, 10**9)) if exhausted and limit else None


def refused(
    response: httpx.Response, where: str, endpoint: str, model: str, revision: str
) -> CheckpointError:
    """What an answer of 4xx about a file or a repository means, and what to do."""
    status, code = response.status_code, response.headers.get("X-Error-Code")
    scheme, _, place = endpoint.partition("://")
    # HF_ENDPOINT may have a user and a password before the host.
    page = f"{scheme}://{place.rpartition('@')[2]}/{model}"
    if code == "GatedRepo" or (status == 403 and code is None):
        what = "the repository is gated" if code else "the hub forbids it"
        expected = f"a token (HF_TOKEN or `hf auth login`) of an account that has access at {page}"
    elif code == "RevisionNotFound":
        what, expected = f"the repository has no revision {revision!r}", f"one of those at {page}"
    elif code == "EntryNotFound":
        what, expected = (
            "the repository has no such file",
            f"one of those at {page}/tree/{revision}",
        )
    elif status in (401, 403, 404):
        what = f"the hub answered {status}: no such repository, or a private one"
        expected = "another name in the recipe, or a valid token (HF_TOKEN or `hf auth login`)"
    elif status == 416:
        what, expected = "is shorter than when it was planned", "the planned file; plan again"
    else:
        what, expected = f"the hub answered {status}", "the requested bytes"
    return CheckpointError(what, where=where, expected=expected)
