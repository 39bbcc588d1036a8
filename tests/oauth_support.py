"""Signed tokens for tests, made by openssl: an issuer with its key set, as a broker reads it."""

import base64
import json
import subprocess
import time
from pathlib import Path


def _part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


class Issuer:
    """Issues tokens that a broker can verify by the key set in a file."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.key = directory / "issuer.key"
        self.key_set = directory / "jwks.json"
        subprocess.run(["openssl", "genrsa", "-out", self.key, "2048"], check=True, capture_output=True, timeout=60)
        said = subprocess.run(
            ["openssl", "rsa", "-in", self.key, "-noout", "-modulus"],
            check=True,
            capture_output=True,
            text=True,
            timeout=20,
        )
        modulus = bytes.fromhex(said.stdout.strip().removeprefix("Modulus="))
        key = {"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "1", "n": _part(modulus), "e": "AQAB"}
        self.key_set.write_text(json.dumps({"keys": [key]}))

    def token(self, *, audience: str = "kafka", life_s: float = 3_600) -> str:
        """A token for `worker`; of a negative life where it has ended."""
        now = int(time.time())
        claims = {
            "iss": "tests",
            "sub": "worker",
            "aud": audience,
            "iat": min(now, now + int(life_s)) - 1,
            "exp": now + int(life_s),
        }
        signed = f"{_part(json.dumps({'alg': 'RS256', 'kid': '1', 'typ': 'JWT'}).encode())}.{_part(json.dumps(claims).encode())}"
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", self.key],
            input=signed.encode(),
            check=True,
            capture_output=True,
            timeout=20,
        )
        return f"{signed}.{_part(signature.stdout)}"
