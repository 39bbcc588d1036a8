"""The mail server that delivers into a directory, spoken to by the client that sends notices."""

from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import default

import aiosmtplib
import pytest

from preservarium.embedded import mail
from preservarium.embedded.mail import MailDirectory


@pytest.fixture
async def server(tmp_path):
    server = MailDirectory(tmp_path / "mail")
    await server.start()
    yield server
    await server.stop()


def message(text: str) -> EmailMessage:
    made = EmailMessage()
    made["Subject"], made["From"], made["To"] = "CO2 at 1,542 ppm", "preservarium@localhost", "operators@example.org"
    made.set_content(text)
    return made


def read(server: MailDirectory) -> list[str]:
    files = sorted(server.directory.glob("*.eml"))
    return [BytesParser(policy=default).parsebytes(file.read_bytes()).get_content() for file in files]


async def test_each_mail_is_a_file(server):
    texts = ["one\n", "two\n.\n..dots\n", "ümlaut ° µ\n" * 500]
    async with aiosmtplib.SMTP(hostname="127.0.0.1", port=server.port) as client:
        for text in texts:
            _, said = await client.send_message(message(text))
            assert "kept as" in said
    assert [text.replace("\r\n", "\n") for text in read(server)] == texts
    assert server.taken == 3


async def test_only_the_newest_are_kept(server, monkeypatch):
    monkeypatch.setattr(mail, "MAILS_MAX", 2)
    for number in range(4):
        await aiosmtplib.send(message(f"{number}\n"), hostname="127.0.0.1", port=server.port)
    assert [text.strip() for text in read(server)] == ["2", "3"]


async def test_one_that_is_too_large_is_refused_and_the_next_one_taken(server, monkeypatch):
    monkeypatch.setattr(mail, "MESSAGE_BYTES_MAX", 1_000)
    async with aiosmtplib.SMTP(hostname="127.0.0.1", port=server.port) as client:
        await client.mail("a@localhost")
        await client.rcpt("b@localhost")
        with pytest.raises(aiosmtplib.SMTPDataError):
            await client.data(b"Subject: x\r\n\r\n" + b"long line\r\n" * 500)
        await client.send_message(message("short\n"))
    assert len(read(server)) == 1


async def test_what_it_does_not_know_is_said(server):
    async with aiosmtplib.SMTP(hostname="127.0.0.1", port=server.port) as client:
        assert (await client.execute_command(b"VRFY", b"somebody")).code == 502
        assert (await client.noop()).code == 250


async def test_a_stop_leaves_whoever_is_connected(server):
    client = aiosmtplib.SMTP(hostname="127.0.0.1", port=server.port)
    await client.connect()
    await server.stop()
    with pytest.raises((aiosmtplib.SMTPException, OSError)):
        await client.noop()
    client.close()
