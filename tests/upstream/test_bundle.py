from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest
import trustme

from metquay_proxy.upstream.bundle import trust

if TYPE_CHECKING:
    from pathlib import Path

CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
PEM = trustme.CA().cert_pem.bytes()
LINES = PEM.splitlines()
PKCS7 = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02\xa0"


@pytest.mark.parametrize("damaged", [0, 1, 2])
@pytest.mark.parametrize(
    "bad",
    [[*LINES[:2], b"!" + LINES[2][1:], *LINES[3:]], [*LINES[:5], LINES[-1]], LINES[:5]],
    ids=["changed", "cut short", "copied by halves"],
)
def test_one_bad_certificate_among_good_ones(tmp_path: Path, damaged: int, bad: list[bytes]) -> None:
    """It is said which one, and where it begins, since the others are in order."""
    certificates = [LINES] * 3
    certificates[damaged] = bad
    path = tmp_path / "bundle.pem"
    path.write_bytes(b"".join(line + b"\n" for certificate in certificates for line in certificate))
    where = f"certificate {damaged + 1} of 3 in {path} (beginning at line {damaged * len(LINES) + 1})"
    with pytest.raises(ValueError, match="can't be read: copy it again") as caught:
        trust(CONTEXT, path)
    assert str(caught.value).startswith(where)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (PEM.decode().encode("utf-16"), "is saved as UTF-16"),
        (b"-----BEGIN PKCS7-----\nMIIB\n-----END PKCS7-----\n", "(p7b). Convert it: openssl pkcs7 -print_certs -in"),
        (b"\x30\x82\x01\x00" + PKCS7, "openssl pkcs7 -inform der"),
        (b"\x30\x80" + PKCS7, "openssl pkcs7 -inform der"),
        (b"\x30\x82\x0a\x0a\x02\x01\x03\x30", "openssl pkcs12 -nokeys -in"),
        (ssl.PEM_cert_to_DER_cert(PEM.decode()), "is in binary (DER) form. Convert it: openssl x509 -inform der -in"),
        (b"-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\n", "holds a private key and no certificate"),
        (b"-----BEGIN EC PRIVATE KEY-----\nMIIB\n", "holds a private key and no certificate"),
        (b"-----BEGIN NEW CERTIFICATE REQUEST-----\nMIIB\n", "holds the request for a certificate"),
        (b"\n  ".join([b"ca: |", *LINES]), "does not begin at the beginning of a line"),
        (b" ".join(LINES), "certificate 1 of 1"),
        (b"0815", "holds no certificate in PEM form (a text with BEGIN CERTIFICATE)"),
        (b"<html>", "holds no certificate in PEM form (a text with BEGIN CERTIFICATE)"),
    ],
)
def test_a_file_without_certificates(tmp_path: Path, content: bytes, complaint: str) -> None:
    """It is said what it looks like, and how to convert it."""
    path = tmp_path / "bundle"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bundle") as caught:
        trust(CONTEXT, path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"\r\n".join(LINES), b"# M\xfcller\n" + PEM * 2, b"\xef\xbb\xbf" + PEM],
    ids=["Windows lines", "comments", "byte order mark"],
)
def test_what_openssl_reads(tmp_path: Path, content: bytes) -> None:
    """Line ends, comments and a mark do no harm."""
    (tmp_path / "bundle").write_bytes(content)
    trust(CONTEXT, tmp_path / "bundle")
    with pytest.raises(FileNotFoundError):
        trust(CONTEXT, tmp_path / "none")
