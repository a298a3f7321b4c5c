"""Web archives made by hand, for the tests of their readers."""

import base64
import gzip
import hashlib


def digest(data: bytes) -> str:
    return "sha1:" + base64.b32encode(hashlib.sha1(data).digest()).decode()


def http(body: bytes, *headers: str, status: str = "200 OK", kind: str = "text/html") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def record(url: str, block: bytes, kind: str = "response", **headers: str) -> bytes:
    """A WARC record; a keyword such as Content_Length replaces the header of that name."""
    head = {
        "WARC-Type": kind,
        "WARC-Record-ID": f"<urn:test:{url}>",
        "WARC-Target-URI": url,
        "WARC-Block-Digest": digest(block),
        "Content-Length": str(len(block)),
    }
    head |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"WARC/1.0\r\n{lines}\r\n".encode() + block + b"\r\n\r\n"


def page(number: int, size: int = 400) -> bytes:
    """A record with an HTML page; equal numbers are equal bytes, and gzip cannot shrink it much."""
    noise = b"".join(hashlib.sha256(f"{number}/{n}".encode()).digest() for n in range(size // 32))
    body = f"<html><body><p>Page {number}. {noise.hex()}</p></body></html>".encode()
    return record(f"https://a.org/{number}", http(body))


def member(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)
