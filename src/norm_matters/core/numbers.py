"""Whole numbers given as text."""


def is_whole(text: str, least: int = 0) -> bool:
    """Whether a text is a whole number in decimal digits, from `least`; of 15 at most, as Python refuses thousands."""
    return text.isdecimal() and len(text) < 16 and int(text) >= least
