"""TLS contexts of our clients: who is trusted, and the certificate that we show.

The default context of Python: TLS 1.2 or newer, the system's authorities or the given one, certificate and host name checked.
"""

import ssl

from preservarium.settings import PREFIX, SettingsError


def client_context(
    section: str,
    *,
    ca_file: str = "",
    cert_file: str = "",
    key_file: str = "",
    key_password: str = "",
    check_hostname: bool = True,
) -> ssl.SSLContext:
    """The context of a client.

    Args:
        section: of the settings, for the message: its fields are `ssl_ca_file`, `ssl_cert_file`, `ssl_key_file`.
        ca_file: PEM of the authorities that are trusted, instead of the system's; empty: the system's.
        cert_file: PEM of the client's certificate and its chain; empty: none is shown.
        key_file: PEM of its key; empty: it stands in `cert_file`.
        key_password: of the key; empty: the key is not encrypted.
        check_hostname: whether the server's certificate must name the host that was asked for.

    Raises:
        SettingsError: a file cannot be read or does not hold what it should. Never with the password.
    """
    variable = f"{PREFIX}{section.upper()}__SSL"
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except OSError as e:  # ssl.SSLError is one
        message = f"{variable}_CA_FILE: no certificate can be read from {ca_file!r}: {_reason(e)}"
        raise SettingsError(message) from None
    context.check_hostname = check_hostname
    if cert_file:
        try:
            # A password is always given, or OpenSSL asks for it on the terminal.
            context.load_cert_chain(cert_file, key_file or None, password=lambda: key_password)
        except (OSError, ValueError) as e:
            files = f"{cert_file!r}, {key_file!r}" if key_file else repr(cert_file)
            message = f"{variable}_CERT_FILE: no certificate with its key can be read from {files}: {_reason(e)}"
            raise SettingsError(message) from None
    return context


def _reason(e: Exception) -> str:
    """What went wrong, without a path or a line of C."""
    if isinstance(e, ssl.SSLError):
        return e.reason or "not PEM, or the key's password is wrong"
    return type(e).__name__
