"""Addresses of people and machines -> addresses that nobody has.

The replacement is chosen by a hash of what it replaces, from ranges reserved for examples, so it is
the same in every document and in any order. Neither holds whitespace, so no cut can lie inside.
"""

import hashlib
import ipaddress
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.strict import Strict, UserError

# A letter or digit on both ends of the local part; labels of a domain; letters at the end.
_EMAIL = re.compile(
    r"(?<![\w.+-])[\w](?:[\w.+%'-]{0,62}[\w])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}"
)
_IP = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_RESERVED = re.compile(r"@(?:[\w-]+\.)*example\.(?:com|org|net)$|\.(?:example|invalid|test)$", re.I)


class PiiConfig(Strict):
    """Replace e-mail addresses and public IP addresses."""

    kind: Literal["pii"]
    emails: bool = True
    ip_addresses: bool = True

    def build(self) -> Callable[[SourceDocument], SourceDocument | Drop]:
        def stage(document: SourceDocument) -> SourceDocument | Drop:
            text = anonymous(document.text, self.emails, self.ip_addresses)
            if text == document.text:
                return document
            if document.cuts or document.thoughts or document.target_spans:
                raise UserError(
                    "[stages] pii: changes the text of documents whose cuts the source supplies; "
                    "clean the source first"
                )
            return replace(document, text=text)

        return stage


def anonymous(text: str, emails: bool = True, ip_addresses: bool = True) -> str:
    """The text with addresses replaced; applied again it changes nothing."""
    if emails and "@" in text:
        text = _EMAIL.sub(lambda match: _email(match[0]), text)
    return _IP.sub(lambda match: _ip(match[0]), text) if ip_addresses else text


def _email(found: str) -> str:
    if _RESERVED.search(found):
        return found
    return f"user{_number(found.lower()) % 10**6:06d}@example.com"


def _ip(found: str) -> str:
    try:
        public = ipaddress.IPv4Address(found).is_global
    except ValueError:  # a version number, or a leading zero
        return found
    return f"192.0.2.{1 + _number(found) % 254}" if public else found


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
