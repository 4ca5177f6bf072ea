"""A credential that is ready to use: as JSON for WebRTC, or for people to read."""

import json
import time


def as_json(urls: list[str], username: str, password: str, expiry: int) -> str:
    """Return a credential as WebRTC's RTCIceServer has it, with its end in Unix time."""
    credential = {"urls": urls, "username": username, "credential": password, "expires": expiry}
    return json.dumps(credential)


def as_text(urls: list[str], username: str, password: str, expiry: int) -> str:
    """Return the same in lines for people."""
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(expiry))
    lines = [f"TURN URL:   {url}" for url in urls]
    lines += [
        f"username:   {username}",
        f"credential: {password}",
        f"(good until {until}; --mint makes others)",
    ]
    return "\n".join(lines)
