"""A file of CA certificates: whether OpenSSL can use it, and if not, what it is and how to mend it.

Facts: OpenSSL reads PEM alone (RFC 7468), from lines that begin with BEGIN CERTIFICATE, and of a file with one bad
certificate it says neither which one nor where. Windows and Java export DER, PKCS #7 and PKCS #12.
"""

from __future__ import annotations

import re
import ssl
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_CERTIFICATE: Final = re.compile(rb"^-----BEGIN CERTIFICATE-----(?:[^-]*-----END CERTIFICATE-----|[^-]*)", re.MULTILINE)
_DER: Final = rb"0(?:\x80|\x81.|\x82..|\x83...)"
_OTHER: Final = {
    rb"\s*\Z": "is empty",
    rb"\xff\xfe|\xfe\xff": "is saved as UTF-16: save it as plain text (ASCII or UTF-8)",
    _DER + rb"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02": "is a PKCS #7 file (p7b) in binary form. Convert it: "
    "openssl pkcs7 -inform der -print_certs -in {0} -out ca.pem",
    rb".*-----BEGIN PKCS7-----": "is a PKCS #7 file (p7b). Convert it: openssl pkcs7 -print_certs -in {0} -out ca.pem",
    _DER + rb"\x02\x01\x03": "is a PKCS #12 file (pfx, p12). Convert it: openssl pkcs12 -nokeys -in {0} -out ca.pem",
    _DER: "is in binary (DER) form. Convert it: openssl x509 -inform der -in {0} -out ca.pem",
    rb".*-----BEGIN [A-Z ]*PRIVATE KEY-----": "holds a private key and no certificate: name the file of the CA's "
    "certificate, which begins with BEGIN CERTIFICATE",
    rb".*-----BEGIN [A-Z ]*CERTIFICATE REQUEST-----": "holds the request for a certificate, not the certificate",
    rb".*[^\n]-----BEGIN CERTIFICATE-----": "holds a certificate that does not begin at the beginning of a line: copy "
    "it again, each of its lines on a line of its own",
    rb"": "holds no certificate in PEM form (a text with BEGIN CERTIFICATE)",
}
"""What a file begins with that holds no certificate for OpenSSL, and what to tell its owner."""


def trust(context: ssl.SSLContext, path: Path) -> None:
    """Trust a bundle; raise ``OSError`` where it can't be read, ``ValueError`` (for people) where it is of no use."""
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise ValueError(_diagnosis(path, path.read_bytes())) from None


def _diagnosis(path: Path, data: bytes) -> str:
    blocks = list(_CERTIFICATE.finditer(data))
    for number, block in enumerate(blocks, start=1):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=block[0].decode("ascii"))
        except (ssl.SSLError, ValueError):
            line = data.count(b"\n", 0, block.start()) + 1
            cure = "copy it again, from BEGIN CERTIFICATE to END CERTIFICATE"
            return f"certificate {number} of {len(blocks)} in {path} (beginning at line {line}) can't be read: {cure}"
    what = next(what for start, what in _OTHER.items() if re.match(start, data, re.DOTALL))
    return f"{path} {what.format(path)}"
