"""Who says so: Ed25519 signatures, private keys in files of their owner, public keys as text."""

from __future__ import annotations

import base64
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from carnice_build.errors import StoreError
from carnice_build.extras import pip_install
from carnice_build.store.files import open_regular

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PUBLIC_KEY = re.compile(r"ed25519:[A-Za-z0-9+/]{43}=")
"""How a public key is written: the base64 of its 32 bytes."""

_MOST = 10_000
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Signer:
    """A private key; it is never shown."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @property
    def public(self) -> str:
        """The public key."""
        return f"ed25519:{base64.b64encode(self._key.public_key().public_bytes_raw()).decode()}"

    def sign(self, content: bytes) -> str:
        """The base64 of the signature of `content`."""
        return base64.b64encode(self._key.sign(content)).decode()


def is_signed(content: bytes, public: str, signature: str) -> bool:
    """Whether `signature` is that of `content` by the owner of `public`."""
    _require_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        raw = base64.b64decode(public.removeprefix("ed25519:"), validate=True)
        key = Ed25519PublicKey.from_public_bytes(raw)
        key.verify(base64.b64decode(signature, validate=True), content)
    except (InvalidSignature, ValueError):
        return False
    return True


def new_key(path: Path) -> Signer:
    """Make a private key and write it to `path`, which must not exist."""
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            file.write(text)
    except FileExistsError:
        raise StoreError(
            "there is something already", where=str(path), expected="another place for the key"
        ) from None
    except OSError as error:
        raise StoreError(f"cannot write the key: {error.strerror}", where=str(path)) from None
    return Signer(key)


def read_key(path: Path) -> Signer | None:
    """The private key in a file, None when there is no such file; StoreError for anything else."""
    try:
        with open_regular(path) as file:
            mode, text = os.fstat(file.fileno()).st_mode, file.read(_MOST)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(
            f"cannot read the key: {error.strerror or 'no file'}", where=str(path)
        ) from None
    if mode & _OTHERS:
        raise StoreError(
            "others can read or write this key", where=str(path), expected=f"chmod 600 {path}"
        )
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_pem_private_key(text, password=None)
    except Exception:  # of many kinds, and what they say may be what they read
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise StoreError(
            "is no private key of Ed25519",
            where=str(path),
            expected="what `carnice cache keys new` writes",
        )
    return Signer(key)


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise StoreError("signatures need cryptography", expected=pip_install("remote")) from None
