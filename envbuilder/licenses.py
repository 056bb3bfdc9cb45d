"""The licence of a package, as its own metadata names it: SPDX where it can be, else its author's words.

Pure. What is stated is passed on, never judged: a lock is no legal opinion.
"""

from __future__ import annotations

from collections.abc import Sequence

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.metadata import RawMetadata, parse_email

_SHORT = 100
"""Characters of a License field that is a name; longer ones are whole licence texts."""
_CLASSIFIED = {
    "Apache Software License": "Apache-2.0",
    "Boost Software License 1.0 (BSL-1.0)": "BSL-1.0",
    "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication": "CC0-1.0",
    "Eclipse Public License 2.0 (EPL-2.0)": "EPL-2.0",
    "European Union Public Licence 1.2 (EUPL 1.2)": "EUPL-1.2",
    "GNU Affero General Public License v3": "AGPL-3.0-only",
    "GNU Affero General Public License v3 or later (AGPLv3+)": "AGPL-3.0-or-later",
    "GNU General Public License v2 (GPLv2)": "GPL-2.0-only",
    "GNU General Public License v2 or later (GPLv2+)": "GPL-2.0-or-later",
    "GNU General Public License v3 (GPLv3)": "GPL-3.0-only",
    "GNU General Public License v3 or later (GPLv3+)": "GPL-3.0-or-later",
    "GNU Lesser General Public License v2 or later (LGPLv2+)": "LGPL-2.0-or-later",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only",
    "GNU Lesser General Public License v3 or later (LGPLv3+)": "LGPL-3.0-or-later",
    "Historical Permission Notice and Disclaimer (HPND)": "HPND",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "Mozilla Public License 1.1 (MPL 1.1)": "MPL-1.1",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "Universal Permissive License (UPL)": "UPL-1.0",
    "zlib/libpng License": "Zlib",
}
"""Classifiers that stand for one SPDX identifier; others, as "BSD License", leave open which."""


def stated_license(metadata: bytes) -> str | None:
    """The licence that a METADATA or PKG-INFO file states."""
    return license_in(parse_email(metadata)[0])


def license_in(metadata: RawMetadata) -> str | None:
    """The licence that core metadata names."""
    return license_name(
        metadata.get("license_expression"), metadata.get("license"), metadata.get("classifiers", [])
    )


def license_name(expression: str | None, text: str | None, classifiers: Sequence[str]) -> str | None:
    """The licence that these fields state: the License-Expression (PEP 639), else the License field if it is
    a name and no whole text, else the classifiers."""
    if expression and (name := " ".join(expression.split())):
        return _spdx(name)
    name = (text or "").strip()
    if name.upper() not in ("", "UNKNOWN") and "\n" not in name and len(name) <= _SHORT:
        return _spdx(name)
    return _classified(classifiers)


def _spdx(name: str) -> str:
    try:
        return canonicalize_license_expression(name)
    except InvalidLicenseExpression:
        return name


def _classified(classifiers: Sequence[str]) -> str | None:
    parts = [classifier.split(" :: ") for classifier in classifiers]
    # "License :: OSI Approved" alone names none.
    names = [part[-1] for part in parts if part[0] == "License" and part[-1] != "OSI Approved"]
    return ", ".join(dict.fromkeys(_CLASSIFIED.get(name, name) for name in names)) or None
