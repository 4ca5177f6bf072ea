"""The user that the relay runs as. See credentials(7), setresuid(2) and user_namespaces(7)."""

import errno
import os
import pwd
from dataclasses import dataclass
from typing import Final

DEFAULT_USER: Final = "nobody"  # whom root becomes
_OVERFLOW_ID: Final = 65534  # what nobody is where no name is known: /proc/sys/kernel/overflowuid
ROOT: Final = 0


@dataclass(frozen=True, slots=True)
class Identity:
    """A user, and its group."""

    name: str
    uid: int
    gid: int


def identity_of(user: str | None) -> Identity:
    """Return the user of that name or number, or whom root becomes if there is none.

    A number that has no name is its own group, too. Raises ValueError.
    """
    try:
        if user is not None and user.isascii() and user.isdigit():
            try:
                entry = pwd.getpwuid(int(user))
            except KeyError:
                return Identity(user, int(user), int(user))
        else:
            entry = pwd.getpwnam(DEFAULT_USER if user is None else user)
    except (KeyError, OverflowError):
        if user is None:
            return Identity(DEFAULT_USER, _OVERFLOW_ID, _OVERFLOW_ID)
        raise ValueError(f"user {user!r}: there is no such user") from None
    return Identity(entry.pw_name, entry.pw_uid, entry.pw_gid)


def require_possible(user: str | None) -> None:
    """Raise ValueError if this process cannot become that user, as it is not root's."""
    uid = os.geteuid()
    if user is not None and uid not in {ROOT, identity_of(user).uid}:
        raise ValueError(
            f"user {user!r}: only root can become another user, and this process is of uid {uid}"
        )


def become(identity: Identity) -> None:
    """Be that user and no other from here on, in all of the process. Raises OSError.

    No supplementary group stays.
    """
    # What the resolver imports when the first name is asked for: the new user may not be able to
    # read Python's library, which can be in root's home.
    "localhost".encode("idna")
    os.setgroups([])
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)


def reason(error: OSError, identity: Identity) -> str:
    """Say why a process of root could not become another user."""
    match error.errno:
        case errno.EINVAL:
            return f"this user namespace has no uid {identity.uid} or no gid {identity.gid}"
        case errno.EPERM:
            return "CAP_SETUID and CAP_SETGID are missing, or this user namespace forbids it"
        case _:
            return str(error.strerror)
