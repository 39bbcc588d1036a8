"""Secrets of devices (keys of meters and of advertisements): sealed in the registry, opened where a device's parser is compiled.

What PostgreSQL, Kafka, the workers' tables, exports and pages have is `sealed:1:…`: AES-SIV (RFC 5297) under a key that is made of the setting
`normalize.secrets_key`, with the device's address and the secret's name as associated data. It is deterministic, so that applying a
registry file twice changes nothing, and a sealed secret of one device cannot be given to another.
"""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any, Final

from preservarium.domain.readings.address import canonical_address
from preservarium.errors import ReasonCode, Reject

PREFIX: Final = "sealed:1:"
#: Characters of a secret: a key has 32 to 64.
SECRET_CHARS_MAX: Final = 512
#: Secrets of one device.
SECRETS_MAX: Final = 20
#: Bytes of the synthetic IV, which is the proof as well.
_IV_BYTES: Final = 16


class Keyring:
    """Seals and opens.

    Args:
        secret: the setting; empty: nothing can be opened.
    """

    def __init__(self, secret: str = "") -> None:
        self._key = hashlib.sha512(b"preservarium.secrets\0" + secret.encode()).digest() if secret else None

    @property
    def usable(self) -> bool:
        """Whether there is a key."""
        return self._key is not None

    def seal(self, device_id: str, name: str, plain: str) -> str:
        """A secret as the registry keeps it; one that is sealed already stays as it is.

        Raises:
            ValueError: there is no key; or what is sealed already cannot be opened with it.
        """
        if plain.startswith(PREFIX):
            self._open(device_id, name, plain)
            return plain
        text, proof = self._cipher(device_id, name).encrypt_and_digest(plain.encode())
        return PREFIX + base64.urlsafe_b64encode(proof + text).decode()

    def opened(self, device_id: str, sealed: Mapping[str, Any]) -> dict[str, str]:
        """The secrets of a device.

        Raises:
            Reject: NO_PARSER, one cannot be opened; the message does not repeat it.
        """
        try:
            return {name: self._open(device_id, name, str(text)) for name, text in sealed.items()}
        except ValueError as e:
            message = f"device {device_id}: its secrets cannot be opened: {e}"
            raise Reject(ReasonCode.NO_PARSER, message) from None

    def _open(self, device_id: str, name: str, sealed: str) -> str:
        if not sealed.startswith(PREFIX):
            message = f"secret {name} is not sealed"
            raise ValueError(message)
        try:
            data = base64.urlsafe_b64decode(sealed.removeprefix(PREFIX).encode())
            return self._cipher(device_id, name).decrypt_and_verify(data[_IV_BYTES:], data[:_IV_BYTES]).decode()  # type: ignore[no-any-return]
        except (binascii.Error, UnicodeError):
            message = f"secret {name} is torn"
            raise ValueError(message) from None
        except ValueError as e:
            if self._key is None:
                raise
            message = f"secret {name} was sealed with another key, or for another device"
            raise ValueError(message) from e

    def _cipher(self, device_id: str, name: str) -> Any:
        if self._key is None:
            message = "PRESERVARIUM_NORMALIZE__SECRETS_KEY is not set"
            raise ValueError(message)
        from Crypto.Cipher import AES

        cipher = AES.new(self._key, AES.MODE_SIV)
        cipher.update(canonical_address(device_id).encode())
        cipher.update(name.encode())
        return cipher


#: Where secrets are of no use, or there are none.
NO_KEYS: Final = Keyring()
