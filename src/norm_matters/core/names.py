"""Names of folders and files that come from users or from files of strangers: a plain name, or refused."""

import re

PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
RULE = "at most 128 letters, digits, '.', '_' and '-', a letter or digit first, no dot last"

_NAME = re.compile(PATTERN.strip("^$"))
# What Windows takes for a device, whatever ending it has: a run's folder may be copied there.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def is_plain_name(text: str) -> bool:
    """Whether a text names an entry of a folder on any system, and cannot lead out of it; see `RULE`."""
    return bool(_NAME.fullmatch(text)) and not text.endswith(".") and not _DEVICE.fullmatch(text)
