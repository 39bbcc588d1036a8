"""Certificates for tests, made by openssl: an authority, a server's and a client's certificate."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

DAYS = "2"  #: longer than any test, short enough that none is ever trusted by mistake


def _openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=20)


@dataclass(frozen=True)
class Identity:
    """A certificate and its key, PEM."""

    cert: Path
    key: Path

    @property
    def both(self) -> Path:
        """Key and certificate in one file, as Kafka's PEM stores have them."""
        path = self.cert.with_suffix(".both.pem")
        path.write_text(self.key.read_text() + self.cert.read_text())
        path.chmod(0o600)
        return path


class Authority:
    """An authority of its own, in a directory of its own."""

    def __init__(self, directory: Path, name: str = "test authority") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.cert = directory / "ca.pem"
        _openssl(
            directory, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", DAYS,
            "-subj", f"/CN={name}", "-keyout", "ca.key", "-out", "ca.pem",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip

    def sign(self, name: str, *, hosts: str = "", password: str = "", days: str = DAYS) -> Identity:
        """A certificate for `name`; `hosts` as openssl's subjectAltName, e.g. `DNS:localhost`; -1 `days`: it has expired."""
        _openssl(
            self.directory, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr",
        )  # fmt: skip
        extensions = self.directory / f"{name}.ext"
        extensions.write_text(
            "basicConstraints=CA:FALSE\nkeyUsage=digitalSignature\nauthorityKeyIdentifier=keyid\n"
            + (f"subjectAltName={hosts}\n" if hosts else "")
        )
        _openssl(
            self.directory, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", days, "-extfile", extensions.name, "-out", f"{name}.pem",
        )  # fmt: skip
        if password:
            key = f"{name}.key"
            _openssl(
                self.directory, "pkcs8", "-topk8", "-v2", "aes-256-cbc", "-in", key, "-out", f"{key}.enc",
                "-passout", f"pass:{password}",
            )  # fmt: skip
            (self.directory / f"{key}.enc").rename(self.directory / key)
        # PostgreSQL takes no key that others may read.
        (self.directory / f"{name}.key").chmod(0o600)
        return Identity(self.directory / f"{name}.pem", self.directory / f"{name}.key")
