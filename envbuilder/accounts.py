"""Names of the machine's accounts and groups."""

from __future__ import annotations

import grp
import pwd


def account_name(uid: int) -> str:
    """The name of the account, else its number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """The name of the group, else its number."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
